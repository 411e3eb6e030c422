"""Managers and nodes on a simulated network, in one trio run under virtual time: the world of the manager's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio
from trio.testing import MockClock

from kvfs.common.boundary.random import SeededRandom, SystemRandom
from kvfs.common.membership import ManagerLink
from kvfs.common.sim.clock import SimClock
from kvfs.common.sim.disk import SimDisk
from kvfs.common.sim.net import SimFabric
from kvfs.common.wire import cluster_pb2 as pb
from kvfs.common.wire.channel import ChannelPool
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.service import method
from kvfs.meta.cluster.config import ManagerConfig
from kvfs.meta.cluster.server import World as ServerWorld
from kvfs.meta.cluster.server import serve
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
        self, host: str = "client", *, role: str = "client", cluster_id: str = CLUSTER, follow: bool = True, boot: str = "", **options: Any
    ) -> AsyncIterator[ManagerLink]:
        """`follow`: with its task running. `boot`: of the machine."""
        identity = Identity(cluster_id=cluster_id, client_id=SystemRandom().bytes(16), role=role, host_id=f"{host} {boot}")
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

    def __init__(self, world: World, uuid: str, *, own: set[int] | None = None, node_id: int = 0, complete: bool = True, boot: str = "") -> None:
        self.world = world
        self.host = f"host-{uuid}"
        self.uuid = uuid
        self.boot = boot
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
            async with self.world.link(self.host, role="storage", follow=False, boot=self.boot) as self.link, trio.open_nursery() as nursery:
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


def all_born(link: ManagerLink) -> bool:
    """All are known here, and there."""
    return bool(link.routing.chains) and all(target.born for target in link.routing.targets)


def all_serve(link: ManagerLink) -> bool:
    return bool(link.routing.message.chains) and all(member.state == pb.SERVING for chain in link.routing.chains for member in chain.targets)


async def create(link: ManagerLink, **fields: Any) -> pb.CreateTargetsReply:
    reply: pb.CreateTargetsReply = await link.call(CREATE, pb.CreateTargetsRequest(**{"table_id": 1, "replicas": 3, **fields}), timeout_s=5.0)
    return reply
