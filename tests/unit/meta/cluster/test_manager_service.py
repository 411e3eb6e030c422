"""Managers and nodes on a simulated network, in one trio run under virtual time: registration, death, recovery, restart, fencing."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from kvfs.common.boundary.random import SeededRandom, SystemRandom
from kvfs.common.errors import (
    AlreadyExists,
    InvalidArgument,
    LeaseExpired,
    NotEnoughTargets,
    NotPrimary,
    NotRegistered,
    StaleIncarnation,
    WrongCluster,
    WrongDataDirectory,
)
from kvfs.common.membership import ManagerLink
from kvfs.common.primary import hinted_address
from kvfs.common.sim.clock import SimClock
from kvfs.common.sim.disk import SimDisk
from kvfs.common.sim.net import SimFabric
from kvfs.common.wire import base_pb2 as base
from kvfs.common.wire import cluster_pb2 as pb
from kvfs.common.wire.channel import ChannelPool
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.service import method
from kvfs.meta.cluster.config import ManagerConfig
from kvfs.meta.cluster.registry import chain_from_wire
from kvfs.meta.cluster.server import World as ServerWorld
from kvfs.meta.cluster.server import serve
from kvfs.meta.cluster.states import problems
from kvfs.meta.kv import Engine, open_engine

CREATE = method("Manager", "CreateTargets")
STATUS = method("Manager", "Status")
HEARTBEAT = method("Manager", "Heartbeat")
LIST_CLIENTS = method("Manager", "ListClients")
SET_CONFIG = method("Manager", "SetConfig")
GET_CONFIG = method("Manager", "GetConfig")

LEASE_S = 2.0
CLUSTER = "c1"


class World:
    """A network of simulated machines under virtual time. Each manager is a machine with a disk of its own; `fabric.partition` cuts machines off."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.fabric = SimFabric(SeededRandom(3), latency_s=(0.0001, 0.002))
        self.disks: dict[str, SimDisk] = {}
        self.engine: Engine = open_engine("memory")
        """Survives the managers, as a store on disk or on other machines does."""
        self.clocks: dict[str, SimClock] = {}
        self.addresses: list[str] = []

    async def manager(self, host: str = "m1", *, listen: str = "", **fields: Any) -> RunningManager:
        fields = {"lease_ms": int(LEASE_S * 1000), "client_lease_ms": 3000, "primary_lease_ms": 6000, "cluster_id": CLUSTER, **fields}
        config = ManagerConfig(data=host, listen=(listen or "tcp://127.0.0.1:0",), **fields)
        self.disks[host] = self.disks[host].reopen() if host in self.disks else SimDisk()
        clock = self.clocks.setdefault(host, SimClock(start_s=1000.0 * len(self.clocks)))
        random = SeededRandom(list(self.disks).index(host))
        world = ServerWorld(clock=clock, random=random, net=self.fabric.host(host), disk=self.disks[host], engine=self.engine)
        started = await start_manager(self.nursery, config, world)
        if started.address not in self.addresses:
            self.addresses.append(started.address)
        return started

    @asynccontextmanager
    async def link(
        self, host: str = "client", *, role: str = "client", cluster_id: str = CLUSTER, follow: bool = True, **options: Any
    ) -> AsyncIterator[ManagerLink]:
        """`follow`: with its task running."""
        identity = Identity(cluster_id=cluster_id, client_id=SystemRandom().bytes(16), role=role)
        clock = SimClock()
        async with ChannelPool(self.fabric.host(host), clock, identity) as pool, trio.open_nursery() as nursery:
            link = ManagerLink(pool, clock, SeededRandom(1), self.addresses, identity, **options)
            if follow:
                nursery.start_soon(link.run)
            yield link
            nursery.cancel_scope.cancel()

    async def node(self, uuid: str, **options: Any) -> Node:
        node = Node(self, uuid, **options)
        await self.nursery.start(node.run)
        return node

    async def nodes(self, count: int) -> list[Node]:
        return [await self.node(f"uuid-{index}") for index in range(count)]


class RunningManager:
    def __init__(self, scope: trio.CancelScope, done: trio.Event, info: dict[str, Any]) -> None:
        self._scope = scope
        self._done = done
        self.address: str = info["addresses"][0]
        self.cluster_id: str = info["cluster_id"]

    async def stop(self) -> None:
        self._scope.cancel()
        await self._done.wait()


async def start_manager(nursery: trio.Nursery, config: ManagerConfig, world: ServerWorld) -> RunningManager:
    scope, done = trio.CancelScope(), trio.Event()

    async def body(*, task_status: trio.TaskStatus[dict[str, Any]]) -> None:
        try:
            with scope:
                await serve(config, world=world, task_status=task_status)
        finally:
            done.set()

    return RunningManager(scope, done, await nursery.start(body))


def run(test: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(300.0):
            async with trio.open_nursery() as nursery:
                await test(World(nursery))
                nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


class Node:
    """A storage service without storage. It reports what a real one would; `complete` says when its syncing targets are up to date."""

    def __init__(self, world: World, uuid: str, *, own: set[int] | None = None, node_id: int = 0, complete: bool = True) -> None:
        self.world = world
        self.host = f"host-{uuid}"
        self.uuid = uuid
        self.own = own if own is not None else set()
        self.wished_id = node_id
        self.complete = complete
        self.mute = False
        """Says nothing of its targets."""
        self.leaving = False
        self.chain_versions_behind = 0
        self.link: ManagerLink
        self.error: Exception | None = None
        self._scope = trio.CancelScope()

    def reports(self) -> list[pb.TargetReport]:
        found = []
        for target in () if self.mute else self.link.targets:
            self.own.add(target.target_id)
            chain = self.link.routing.chain(target.chain_id)
            public = next(member.state for member in chain.targets if member.target_id == target.target_id)
            up = public == pb.SERVING or (public == pb.SYNCING and self.complete)
            found.append(
                pb.TargetReport(
                    target_id=target.target_id,
                    local_state=pb.LOCAL_OFFLINE if self.leaving else pb.UPTODATE if up else pb.ONLINE,
                    chain_version=chain.version - self.chain_versions_behind,
                    capacity_bytes=100,
                    free_bytes=60,
                    used_bytes=40,
                )
            )
        return found

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        with self._scope:
            async with self.world.link(self.host, role="storage", follow=False) as self.link, trio.open_nursery() as nursery:
                nursery.start_soon(self._link)
                disks = [pb.DiskInfo(disk=0, capacity_bytes=100, free_bytes=60, targets=sorted(self.own), path="/x")]
                self.registered = await self.link.register(
                    role=pb.ROLE_STORAGE, node_uuid=self.uuid, addresses=["tcp://127.0.0.1:1"], disks=disks, node_id=self.wished_id
                )
                self.link.on_routing(lambda _: self.link.report_now())
                self.link.start_heartbeats(self.reports)
                task_status.started()
                await trio.sleep_forever()

    async def _link(self) -> None:
        try:
            await self.link.run()
        except Exception as error:
            self.error = error
            self._scope.cancel()

    def leave(self) -> None:
        self.leaving = True
        self.link.report_now()

    def kill(self) -> None:
        self._scope.cancel()


async def until(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    with trio.fail_after(within_s):
        while not condition():
            await trio.sleep(0.01)


def states(link: ManagerLink, chain_id: int) -> list[tuple[int, int]]:
    """(node, public state) of a chain's targets."""
    routing = link.routing
    return [(routing.target(member.target_id).node_id, member.state) for member in routing.chain(chain_id).targets]


def all_serve(link: ManagerLink) -> bool:
    return bool(link.routing.message.chains) and all(member.state == pb.SERVING for chain in link.routing.chains for member in chain.targets)


async def create(link: ManagerLink, **fields: Any) -> pb.CreateTargetsReply:
    reply: pb.CreateTargetsReply = await link.call(CREATE, pb.CreateTargetsRequest(**{"table_id": 1, "replicas": 3, **fields}), timeout_s=5.0)
    return reply


def test_a_node_dies_and_comes_back() -> None:
    async def body(world: World) -> None:
        await world.manager()
        nodes = await world.nodes(3)
        async with world.link() as link:
            table = (await create(link, expected_nodes=3)).table
            await link.refresh()
            assert len(table.chain_ids) == 4 and all_serve(link)
            chain_id = table.chain_ids[0]
            await trio.sleep(LEASE_S * 1.5)
            assert all_serve(link), "living nodes stay"

            victim = nodes[1]
            nodes[1].kill()
            died = trio.current_time()
            await until(lambda: states(link, chain_id)[-1] == (victim.link.node_id, pb.PUBLIC_OFFLINE), within_s=2 * LEASE_S)
            assert trio.current_time() - died > LEASE_S / 2, "not before its lease could have run out"
            assert not link.routing.node(victim.link.node_id).alive
            assert [state for _, state in states(link, chain_id)] == [pb.SERVING, pb.SERVING, pb.PUBLIC_OFFLINE]

            seen: list[int] = []
            versions: list[int] = []

            def watch(_: object) -> None:
                seen.append(states(link, chain_id)[-1][1])
                versions.append(link.routing.chain(chain_id).version)

            link.on_routing(watch)
            back = await world.node("uuid-1", own=victim.own)
            back.complete = False
            assert back.link.node_id == victim.link.node_id
            assert back.registered.incarnation == victim.registered.incarnation + 1
            assert {target.target_id for target in back.registered.targets} == victim.own
            await until(lambda: states(link, chain_id)[-1] == (back.link.node_id, pb.SYNCING))
            await trio.sleep(LEASE_S)
            assert states(link, chain_id)[-1][1] == pb.SYNCING, "not serving before it says that it is up to date"
            back.complete = True
            back.link.report_now()
            await until(lambda: all_serve(link))
            steps = [state for index, state in enumerate(seen) if index == 0 or seen[index - 1] != state]
            # A follower may miss the short wait between two versions, nothing else.
            assert [state for state in steps if state != pb.WAITING] == [pb.PUBLIC_OFFLINE, pb.SYNCING, pb.SERVING]
            assert versions == sorted(versions)

    run(body)


def test_the_manager_restarts_on_its_store() -> None:
    async def body(world: World) -> None:
        manager = await world.manager()
        nodes = await world.nodes(3)
        async with world.link() as link:
            made = await create(link, expected_nodes=3)
            before = (await link.refresh()).message
            link.start_client_heartbeats(description="/mnt/x")
            await trio.sleep(LEASE_S / 2)
            await manager.stop()
            await trio.sleep(LEASE_S)  # longer than half a lease: the nodes stop serving
            assert not nodes[0].link.lease_valid()
            with pytest.raises(LeaseExpired):
                nodes[0].link.check_lease()
            again = await world.manager(listen=manager.address)
            assert again.address == manager.address
            await until(lambda: all(node.link.lease_valid() for node in nodes))
            await trio.sleep(LEASE_S * 1.5)
            after = (await link.refresh()).message
            assert after.version > before.version
            assert list(after.chains) == list(before.chains) and list(after.tables) == list(before.tables)
            assert [(n.node_id, n.incarnation, n.alive) for n in after.nodes if n.role == pb.ROLE_STORAGE] == [
                (n.node_id, n.incarnation, n.alive) for n in before.nodes if n.role == pb.ROLE_STORAGE
            ]
            assert all(node.error is None for node in nodes)
            assert (await create(link, expected_nodes=3)) == made
            clients = await link.call(LIST_CLIENTS, base.Empty(), timeout_s=1.0)
            assert [client.description for client in clients.clients] == ["/mnt/x"]
            # And one that does not find the restarted manager is dead after its lease of grace.
            nodes[2].kill()
            await until(lambda: not link.routing.node(nodes[2].link.node_id).alive, within_s=2 * LEASE_S)

    run(body)


def test_a_node_that_misses_the_restart_is_declared_dead_after_a_lease_of_grace() -> None:
    async def body(world: World) -> None:
        manager = await world.manager()
        nodes = await world.nodes(3)
        async with world.link() as link:
            await create(link, expected_nodes=3)
            await manager.stop()
            nodes[0].kill()
            await world.manager(listen=manager.address)
            await link.refresh()
            assert link.routing.node(nodes[0].link.node_id).alive, "grace first"
            await until(lambda: not link.routing.node(nodes[0].link.node_id).alive, within_s=2 * LEASE_S)
            assert all(node.error is None for node in nodes)

    run(body)


def test_a_stale_incarnation_is_refused_and_ends_its_process() -> None:
    async def body(world: World) -> None:
        await world.manager()
        old = await world.node("same")
        new = await world.node("same")
        await until(lambda: old.error is not None)
        assert isinstance(old.error, StaleIncarnation) and "must exit" in old.error.message
        await trio.sleep(LEASE_S)
        assert new.error is None and new.link.lease_valid()
        async with world.link() as link:
            for node_id, incarnation in ((99, 1), (new.link.node_id, new.link.incarnation + 1)):
                with pytest.raises(NotRegistered):
                    await link.call(HEARTBEAT, pb.HeartbeatRequest(node_id=node_id, incarnation=incarnation, sequence=1), timeout_s=1.0)

    run(body)


def test_a_node_declared_dead_must_register_again() -> None:
    async def body(world: World) -> None:
        await world.manager()
        async with world.link(role="storage", follow=False) as cut_off, world.link(role="meta", rejoin=True) as meta:
            await cut_off.register(role=pb.ROLE_STORAGE, node_uuid="u", addresses=["tcp://h:1"])
            await meta.register(role=pb.ROLE_META, node_uuid="m", addresses=["tcp://h:2"])
            await trio.sleep(LEASE_S * 1.6)
            assert not cut_off.lease_valid()
            meta.start_heartbeats()
            cut_off.start_heartbeats()
            with pytest.raises(LeaseExpired, match="must register again"):
                await cut_off.run()
            await until(meta.lease_valid)
            assert meta.incarnation == 2
            assert (await meta.refresh()).node(meta.node_id).alive

    run(body)


def test_registration_at_once_takes_the_earlier_run_out_of_service() -> None:
    async def body(world: World) -> None:
        await world.manager()
        nodes = await world.nodes(2)
        async with world.link() as link:
            await create(link, replicas=2, expected_nodes=2)
            nodes[0].kill()
            back = await world.node("uuid-0", own=nodes[0].own)
            routing = back.registered.routing
            mine = {target.target_id for target in back.registered.targets}
            public = [member.state for chain in routing.chains for member in chain.targets if member.target_id in mine]
            assert public and set(public) == {pb.PUBLIC_OFFLINE}
            await link.refresh()
            await until(lambda: all_serve(link))

    run(body)


def test_a_node_with_an_empty_disk_gets_its_targets_back_but_never_revives_a_chain() -> None:
    async def body(world: World) -> None:
        await world.manager()
        nodes = await world.nodes(2)
        async with world.link() as link:
            await create(link, replicas=2, expected_nodes=2)
            await until(lambda: len(nodes[0].own) == 4 and all(t.born for t in link.routing.targets))
            # One dies, then the other: that one was the last to serve. It comes back with an empty disk.
            nodes[0].kill()
            await until(lambda: not link.routing.node(nodes[0].link.node_id).alive)
            nodes[1].kill()
            await until(lambda: not link.routing.node(nodes[1].link.node_id).alive)
            blank = await world.node("new-uuid", node_id=nodes[1].link.node_id)
            assert blank.link.node_id == nodes[1].link.node_id
            assert {target.target_id for target in blank.registered.targets} == nodes[1].own
            await trio.sleep(LEASE_S)
            assert {state for chain in link.routing.chains for state in (m.state for m in chain.targets)} == {pb.LASTSRV, pb.PUBLIC_OFFLINE}
            assert all(target.blank for target in link.routing.targets_of_node(blank.link.node_id))
            # The one with data cannot revive it either: it missed writes.
            await world.node("uuid-0", own=nodes[0].own)
            await trio.sleep(LEASE_S)
            assert not any(link.routing.serving(chain.chain_id) for chain in link.routing.chains)

    run(body)


def test_a_blank_target_is_filled_by_its_predecessor() -> None:
    async def body(world: World) -> None:
        await world.manager()
        nodes = await world.nodes(2)
        async with world.link() as link:
            await create(link, replicas=2, expected_nodes=2)
            await until(lambda: len(nodes[1].own) == 4 and all(t.born for t in link.routing.targets))
            nodes[1].kill()
            back = await world.node("uuid-1")
            assert all(target.blank for target in back.registered.targets)
            await until(lambda: all_serve(link))
            assert not any(target.blank for target in link.routing.targets)

    run(body)


def test_create_targets() -> None:
    async def body(world: World) -> None:
        await world.manager()
        async with world.link() as link:
            with pytest.raises(NotEnoughTargets, match="0 storage nodes are alive, 2 were expected"):
                await link.call(CREATE, pb.CreateTargetsRequest(table_id=1, replicas=2, expected_nodes=2), timeout_s=0.4)
            answers: list[pb.CreateTargetsReply] = []

            async def early() -> None:
                answers.append(await create(link, replicas=2, expected_nodes=3))

            async with trio.open_nursery() as waiting:
                waiting.start_soon(early)
                waiting.start_soon(early)
                await trio.sleep(0.05)
                await world.nodes(3)
            assert answers[0] == answers[1]
            assert answers[0].table.replicas == 2 and len(answers[0].table.chain_ids) == 6
            assert (answers[0].best_pair_chains, answers[0].worst_pair_chains) == (2, 2)
            with trio.fail_after(5.0):
                while not all(target.born for target in (await link.refresh()).targets):
                    await trio.sleep(0.05)
            version = (await link.refresh()).version
            assert await create(link, replicas=2) == answers[0]
            assert (await link.refresh()).version == version
            with pytest.raises(AlreadyExists, match="exists with 2 replicas"):
                await create(link, replicas=3)
            second = await create(link, table_id=2, replicas=1, targets_per_disk=2)
            assert len(second.table.chain_ids) == 6 and not set(second.table.chain_ids) & set(answers[0].table.chain_ids)
            routing = await link.refresh()
            assert len({target.target_id for target in routing.targets}) == 12 + 6
            with pytest.raises(NotEnoughTargets, match="4 replicas need storage on 4 different nodes, and there are 3"):
                await create(link, table_id=3, replicas=4)
            with pytest.raises(InvalidArgument):
                await create(link, table_id=0, replicas=1)

    run(body)


def test_two_managers_one_primary_failover_and_fence() -> None:
    async def body(world: World) -> None:
        first = await world.manager("m1")
        second = await world.manager("m2")
        nodes = await world.nodes(3)
        async with world.link() as link:
            made = await create(link, expected_nodes=3)
            async with ChannelPool(world.fabric.host("client"), SimClock(), Identity(cluster_id=CLUSTER)) as pool:
                status = await pool.call([second.address], STATUS, base.Empty(), timeout_s=1.0)
                assert not status.primary and status.primary_address == first.address
                with pytest.raises(NotPrimary) as refused:
                    await pool.call([second.address], CREATE, pb.CreateTargetsRequest(table_id=9), timeout_s=1.0)
                assert hinted_address(refused.value) == first.address
                assert (await pool.call([first.address], STATUS, base.Empty(), timeout_s=1.0)).primary
                version = link.routing.version
                await first.stop()
                with trio.fail_after(8.0):
                    while not (status := await pool.call([second.address], STATUS, base.Empty(), timeout_s=1.0)).primary:
                        await trio.sleep(0.05)
            await until(lambda: all(node.link.lease_valid() for node in nodes))
            await trio.sleep(LEASE_S * 1.5)
            assert all(node.error is None for node in nodes) and all_serve(link)
            assert link.routing.version > version
            assert await create(link) == made

    run(body)


def test_clients_come_and_go() -> None:
    async def body(world: World) -> None:
        await world.manager()

        async def listed(link: ManagerLink) -> list[str]:
            reply = await link.call(LIST_CLIENTS, base.Empty(), timeout_s=1.0)
            assert all(client.since_ns and client.seen_ns >= client.since_ns and client.pid for client in reply.clients)
            return sorted(client.description for client in reply.clients)

        async with world.link() as admin, world.link(follow=False) as polite, world.link(follow=False) as rude:
            for link, name in ((polite, "polite"), (rude, "rude")):
                link.start_client_heartbeats(description=name)
                await link.client_heartbeat()
            assert await listed(admin) == ["polite", "rude"]
            with trio.CancelScope() as scope:
                world.nursery.start_soon(polite.run)
                await trio.sleep(4.0)
                scope.cancel()
            assert await listed(admin) == ["polite"], "the silent one is dropped after its lease"
            await polite.leave()
            assert await listed(admin) == []

    run(body)


def test_configuration_blobs() -> None:
    async def body(world: World) -> None:
        await world.manager()
        async with world.link() as link:

            async def put(**fields: Any) -> Any:
                return await link.call(SET_CONFIG, pb.ConfigBlob(name="storage", **fields), timeout_s=0.3)

            assert (await put(toml="a = 1")).version == 1
            assert (await put(toml="a = 2", version=1)).version == 2
            with pytest.raises(Exception, match="at version 2, not 1"):
                await put(toml="a = 3", version=1)
            found = await link.call(GET_CONFIG, pb.GetConfigRequest(name="storage"), timeout_s=1.0)
            assert (found.version, found.toml) == (2, "a = 2")
            assert (await link.call(GET_CONFIG, pb.GetConfigRequest(name="none"), timeout_s=1.0)).version == 0

    run(body)


def test_other_clusters_are_kept_out() -> None:
    async def body(world: World) -> None:
        manager = await world.manager()
        async with world.link(cluster_id="other") as link:
            with pytest.raises(WrongCluster):
                await link.refresh()
        await manager.stop()
        with pytest.raises(WrongDataDirectory):
            await world.manager(cluster_id="other")
        # Nothing was touched: it starts as itself, also without being told which cluster it is.
        again = await world.manager(cluster_id="")
        assert again.cluster_id == CLUSTER

    run(body)


def test_a_node_cut_off_is_silent_before_it_is_declared_dead_and_must_register_again() -> None:
    async def body(world: World) -> None:
        await world.manager()
        nodes = await world.nodes(3)
        async with world.link() as link:
            await create(link, expected_nodes=3)
            await trio.sleep(LEASE_S)
            world.fabric.partition({nodes[1].host}, {"m1"})
            cut = trio.current_time()
            await until(lambda: not nodes[1].link.lease_valid())
            silent = trio.current_time()
            await until(lambda: not link.routing.node(nodes[1].link.node_id).alive)
            dead = trio.current_time()
            assert silent - cut <= LEASE_S / 2
            assert silent < dead - LEASE_S / 4, "it stopped serving well before others took its place"
            assert dead - cut <= LEASE_S * 1.2
            world.fabric.heal()
            await until(lambda: nodes[1].error is not None)
            assert isinstance(nodes[1].error, LeaseExpired)
            assert nodes[0].error is nodes[2].error is None

    run(body)


def test_a_short_cut_off_does_no_harm() -> None:
    async def body(world: World) -> None:
        await world.manager()
        nodes = await world.nodes(3)
        async with world.link() as link:
            await create(link, expected_nodes=3)
            await trio.sleep(LEASE_S)
            version = link.routing.version
            for _ in range(5):
                world.fabric.partition({nodes[1].host}, {"m1"})
                await trio.sleep(LEASE_S * 0.7)
                assert not nodes[1].link.lease_valid()
                world.fabric.heal()
                await until(nodes[1].link.lease_valid, within_s=LEASE_S / 2)
            assert all(node.error is None for node in nodes) and link.routing.version == version

    run(body)


def test_steps_of_the_wall_clock_change_nothing() -> None:
    async def body(world: World) -> None:
        await world.manager()
        nodes = await world.nodes(2)
        async with world.link() as link:
            await create(link, replicas=2, expected_nodes=2)
            await trio.sleep(1.0)
            version = link.routing.version
            for step_s in (-86_400, 172_800, -1):
                world.clocks["m1"].wall_offset_ns += step_s * 1_000_000_000
                await trio.sleep(LEASE_S * 3)
            assert link.routing.version == version and all(node.link.lease_valid() for node in nodes)
            assert (await link.call(STATUS, base.Empty(), timeout_s=1.0)).primary
            # A restart after a step back is not without a primary either (3FS issue 135).
            world.clocks["m1"].wall_offset_ns -= 10**18
            await world.manager("m2")
            assert (await link.call(STATUS, base.Empty(), timeout_s=1.0)).primary

    run(body)


def heads(link: ManagerLink) -> dict[int, int]:
    """How many chains each node is the head of."""
    return Counter(states(link, chain.chain_id)[0][0] for chain in link.routing.chains)


async def restart_everyone(world: World, manager: RunningManager, nodes: list[Node], missing: int = 0) -> list[Node]:
    for node in nodes:
        node.kill()
    await manager.stop()
    await world.manager(listen=manager.address)
    again = [Node(world, node.uuid, own=node.own) for node in nodes[missing:]]
    async with trio.open_nursery() as starting:
        for place, node in enumerate(again):
            await trio.sleep(0.1 * bool(place))  # no two processes start equally fast
            starting.start_soon(world.nursery.start, node.run)
    return again


def test_everyone_restarts_and_all_serve_again_with_the_heads_spread() -> None:
    async def body(world: World) -> None:
        manager = await world.manager()
        nodes = await world.nodes(3)
        async with world.link() as link:
            await create(link, expected_nodes=3, targets_per_disk=6)
            await until(lambda: all(len(node.own) == 6 for node in nodes) and all(target.born for target in link.routing.targets))
            assert sorted(heads(link).values()) == [2, 2, 2]
        await restart_everyone(world, manager, nodes)
        async with world.link() as link:
            await until(lambda: all_serve(link))
            assert not any(target.blank for target in link.routing.targets)
            assert sorted(heads(link).values()) == [2, 2, 2]

    run(body)


def test_nodes_that_leave_together_leave_the_heads_spread() -> None:
    async def body(world: World) -> None:
        await world.manager()
        nodes = await world.nodes(3)
        async with world.link() as link:
            await create(link, expected_nodes=3, targets_per_disk=6)
            await until(lambda: all_serve(link) and all(target.born for target in link.routing.targets))
            for node in nodes:
                node.leave()
                await trio.sleep(0.02)
            await until(lambda: not any(link.routing.serving(chain.chain_id) for chain in link.routing.chains))
            assert sorted(heads(link).values()) == [2, 2, 2]
            for node in nodes:
                node.leaving = False
                node.link.report_now()
            await until(lambda: all_serve(link))
            nodes[0].leave()  # and one that goes alone is not waited with for long
            left_s = trio.current_time()
            await until(lambda: not all_serve(link))
            assert trio.current_time() - left_s < 0.2

    run(body)


def test_nodes_that_restart_do_not_wait_for_one_that_stays_away() -> None:
    async def body(world: World) -> None:
        manager = await world.manager()
        nodes = await world.nodes(3)
        async with world.link() as link:
            await create(link, expected_nodes=3)
            await until(lambda: all(len(node.own) == 4 for node in nodes) and all(target.born for target in link.routing.targets))
        before_s = trio.current_time()
        again = await restart_everyone(world, manager, nodes, missing=1)
        assert trio.current_time() - before_s < LEASE_S
        await trio.sleep(2 * LEASE_S)
        assert all(node.error is None and node.link.lease_valid() for node in again)
        await world.node(nodes[0].uuid, own=nodes[0].own)
        async with world.link() as link:
            await until(lambda: all_serve(link))

    run(body)


def test_a_node_that_never_makes_its_targets_is_taken_out() -> None:
    async def body(world: World) -> None:
        await world.manager()
        nodes = await world.nodes(2)
        nodes[1].mute = True
        async with world.link() as link:
            chain_id = (await create(link, replicas=2, expected_nodes=2)).table.chain_ids[0]
            await trio.sleep(5.0)
            assert all_serve(link)
            await until(
                lambda: states(link, chain_id) == [(nodes[0].link.node_id, pb.SERVING), (nodes[1].link.node_id, pb.PUBLIC_OFFLINE)], within_s=15.0
            )
            nodes[1].mute = False
            await until(lambda: all_serve(link))

    run(body)


def test_an_uptodate_report_from_an_earlier_shape_of_the_chain_does_not_count() -> None:
    async def body(world: World) -> None:
        await world.manager()
        nodes = await world.nodes(2)
        async with world.link() as link:
            chain_id = (await create(link, replicas=2, expected_nodes=2)).table.chain_ids[0]
            await until(lambda: all(len(node.own) == 4 for node in nodes) and all(target.born for target in link.routing.targets))
            nodes[1].kill()
            back = await world.node("uuid-1", own=nodes[1].own, complete=False)
            await until(lambda: states(link, chain_id)[-1][1] == pb.SYNCING)
            back.complete, back.chain_versions_behind = True, 1
            await trio.sleep(LEASE_S * 2)
            assert states(link, chain_id)[-1][1] == pb.SYNCING
            back.chain_versions_behind = 0
            await until(lambda: all_serve(link))

    run(body)


@pytest.mark.parametrize("seed", range(3))
def test_random_faults_end_with_everyone_serving(seed: int) -> None:
    """Nodes die, come back, are cut off; the manager restarts: chains stay sound all the time, and all serve when it is over."""

    async def body(world: World) -> None:
        random = SeededRandom(seed)
        manager = await world.manager()
        nodes = await world.nodes(4)
        alive = {node.uuid: node for node in nodes}
        async with world.link() as link:
            await create(link, expected_nodes=4)
            await until(lambda: len(nodes[3].own) > 0 and all(target.born for target in link.routing.targets))
            unsound: list[str] = []
            link.on_routing(lambda routing: unsound.extend(p for c in routing.chains for p in problems(chain_from_wire(c))))
            own = {node.uuid: node.own for node in nodes}
            for _ in range(60):
                uuid = random.choice(sorted(own))
                match random.randrange(4):
                    case 0:
                        alive.pop(uuid).kill() if uuid in alive else None
                    case 1:
                        world.fabric.partition({f"host-{uuid}"}, {"m1"})
                    case 2:
                        world.fabric.heal()
                    case 3:
                        await manager.stop()
                        manager = await world.manager(listen=manager.address)
                await trio.sleep(random.uniform(0.0, 2.5))
                for uuid in [uuid for uuid, node in alive.items() if node.error is not None]:
                    del alive[uuid]
                for uuid in sorted(set(own) - set(alive)):
                    if random.randrange(2) and not world.fabric.parted(f"host-{uuid}", "m1"):
                        alive[uuid] = await world.node(uuid, own=own[uuid])
            world.fabric.heal()
            await trio.sleep(LEASE_S)
            for uuid in sorted(own):
                if uuid not in alive or alive[uuid].error is not None:
                    await world.node(uuid, own=own[uuid])
            await until(lambda: all_serve(link), within_s=20.0)
            assert unsound == []

    run(body)


def test_a_node_whose_disk_was_replaced_waits_for_its_own_death_and_is_filled() -> None:
    async def body(world: World) -> None:
        await world.manager()
        nodes = await world.nodes(2)
        async with world.link() as link:
            await create(link, replicas=2, expected_nodes=2)
            await until(lambda: all(len(node.own) == 4 for node in nodes) and all(target.born for target in link.routing.targets))
            nodes[1].kill()
            began = trio.current_time()
            new = await world.node("another-uuid", node_id=nodes[1].link.node_id)
            assert LEASE_S / 2 < trio.current_time() - began < LEASE_S * 1.5
            assert {target.target_id for target in new.registered.targets} == nodes[1].own
            await until(lambda: all_serve(link))
            assert len(list(link.routing.nodes)) == 3

    run(body)
