"""The manager link against scripted managers on the simulated network: whom it asks, what it believes, when it stops."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from kvfs.common.boundary.random import SeededRandom
from kvfs.common.errors import (
    BadRequest,
    ConfigError,
    ConnectionLost,
    DeadlineExceeded,
    KvfsError,
    LeaseExpired,
    NotPrimary,
    NotRegistered,
    Overloaded,
    ServiceStopping,
    StaleIncarnation,
    TxnConflict,
    Unreachable,
)
from kvfs.common.membership import ManagerLink
from kvfs.common.primary import hinted_address, not_primary
from kvfs.common.routing import Routing
from kvfs.common.sim.clock import SimClock
from kvfs.common.sim.net import SimFabric
from kvfs.common.wire import base_pb2 as base
from kvfs.common.wire import cluster_pb2 as pb
from kvfs.common.wire.channel import ChannelPool
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.server import Call, RpcServer
from kvfs.common.wire.service import method

STATUS = method("Manager", "Status")
LEASE_MS = 2000


class ScriptedManager:
    """Answers what the test set; `error` goes before everything, `delay_s` before every answer."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.host = f"host-{name}"
        self.address = ""
        self.version = 1
        self.error: KvfsError | None = None
        self.heartbeat_error: KvfsError | None = None
        self.delay_s = 0.0
        self.calls: list[str] = []
        self.heartbeats: list[pb.HeartbeatRequest] = []
        self.registrations: list[pb.RegisterRequest] = []
        self.under_way = 0
        self.most_under_way = 0
        self.leaving = 0

    async def _begin(self, name: str) -> None:
        self.calls.append(name)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await trio.sleep(self.delay_s)
        finally:
            self.under_way -= 1
        if self.error is not None:
            raise self.error

    def info(self) -> pb.RoutingInfo:
        return pb.RoutingInfo(version=self.version, targets=[pb.Target(target_id=70, node_id=7), pb.Target(target_id=80, node_id=8)])

    async def status(self, request: base.Empty, call: Call) -> pb.ManagerStatusReply:
        await self._begin("status")
        return pb.ManagerStatusReply(primary=True)

    async def get_routing(self, request: pb.GetRoutingRequest, call: Call) -> pb.GetRoutingReply:
        await self._begin("get_routing")
        until = trio.current_time() + min(request.wait_ms / 1000, call.remaining_s() - 0.1)
        while self.version <= request.known_version and trio.current_time() < until:
            await trio.sleep(0.05)
        if self.version > request.known_version:
            return pb.GetRoutingReply(changed=True, routing=self.info())
        return pb.GetRoutingReply()

    async def register(self, request: pb.RegisterRequest, call: Call) -> pb.RegisterReply:
        await self._begin("register")
        self.registrations.append(request)
        return pb.RegisterReply(node_id=7, incarnation=len(self.registrations), lease_ms=LEASE_MS, routing=self.info())

    async def heartbeat(self, request: pb.HeartbeatRequest, call: Call) -> pb.HeartbeatReply:
        await self._begin("heartbeat")
        self.heartbeats.append(request)
        if self.heartbeat_error is not None:
            raise self.heartbeat_error
        return pb.HeartbeatReply(lease_ms=LEASE_MS)

    async def client_heartbeat(self, request: pb.ClientHeartbeatRequest, call: Call) -> pb.ClientHeartbeatReply:
        await self._begin("client_heartbeat")
        self.leaving += request.leaving
        return pb.ClientHeartbeatReply(lease_ms=8000, routing_version=self.version)


class World:
    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.fabric = SimFabric(SeededRandom(1))
        self.link: ManagerLink

    async def manager(self, name: str = "a") -> ScriptedManager:
        manager = ScriptedManager(self, name)
        server = RpcServer(self.fabric.host(manager.host), SimClock(), Identity(cluster_id="c", client_id=bytes(16), role="manager"))
        server.add("Manager", manager)
        (manager.address,) = await self.nursery.start(server.serve, ["tcp://127.0.0.1:0"])
        return manager

    @asynccontextmanager
    async def linked(self, *managers: str, follow: bool = False, **options: Any) -> AsyncIterator[ManagerLink]:
        identity = Identity(cluster_id="c", client_id=bytes(16))
        async with ChannelPool(self.fabric.host("me"), SimClock(), identity) as pool, trio.open_nursery() as nursery:
            link = ManagerLink(pool, SimClock(start_s=50.0), SeededRandom(2), managers, identity, **options)
            if follow:
                await nursery.start(link.run)
            yield link
            nursery.cancel_scope.cancel()

    async def registered(self, link: ManagerLink) -> None:
        await link.register(role=pb.ROLE_STORAGE, node_uuid="u", addresses=["tcp://me:1"])


def run(test: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(300.0):
            async with trio.open_nursery() as nursery:
                await test(World(nursery))
                nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


# --- finding the primary


def test_the_hint_travels_in_the_message() -> None:
    assert hinted_address(not_primary("tcp://10.0.0.1:7001")) == "tcp://10.0.0.1:7001"
    assert hinted_address(not_primary("")) == "" == hinted_address(NotPrimary("no idea"))


def test_a_standby_names_the_primary_which_is_then_asked_first() -> None:
    async def body(world: World) -> None:
        standby, primary = await world.manager("a"), await world.manager("b")
        standby.error = not_primary(primary.address)
        async with world.linked(standby.address) as link:
            began = trio.current_time()
            for _ in range(3):
                assert (await link.call(STATUS, base.Empty(), timeout_s=1.0)).primary
            assert trio.current_time() - began < 0.02, "a hint is followed at once"
            assert len(standby.calls) == 1 and len(primary.calls) == 3

    run(body)


@pytest.mark.parametrize("error", [Overloaded("x"), ServiceStopping("x"), NotPrimary("x"), TxnConflict("x"), ConnectionLost("x"), Unreachable("x")])
def test_others_are_asked_when_one_cannot_answer(error: KvfsError) -> None:
    async def body(world: World) -> None:
        sick, well = await world.manager("a"), await world.manager("b")
        sick.error = error
        async with world.linked("tcp://127.0.0.1:9", sick.address, well.address) as link:
            assert (await link.call(STATUS, base.Empty(), timeout_s=5.0)).primary
            assert well.calls == ["status"]

    run(body)


def test_a_silent_manager_is_given_up_for_another() -> None:
    async def body(world: World) -> None:
        silent, well = await world.manager("a"), await world.manager("b")
        world.fabric.partition({"me"}, {silent.host})
        async with world.linked(silent.address, well.address) as link:
            began = trio.current_time()
            assert (await link.call(STATUS, base.Empty(), timeout_s=10.0, try_s=0.5)).primary
            assert trio.current_time() - began < 1.0

    run(body)


def test_an_answer_that_no_other_manager_would_give_differently_is_raised_at_once() -> None:
    async def body(world: World) -> None:
        one, other = await world.manager("a"), await world.manager("b")
        one.error = BadRequest("no")
        async with world.linked(one.address, other.address) as link:
            with pytest.raises(BadRequest):
                await link.call(STATUS, base.Empty(), timeout_s=10.0)
            assert other.calls == []

    run(body)


def test_nobody_there_is_said_within_the_time_and_hints_in_circles_end() -> None:
    async def body(world: World) -> None:
        one, other = await world.manager("a"), await world.manager("b")
        one.error, other.error = not_primary(other.address), not_primary(one.address)
        for managers, expected in (([one.address], NotPrimary), (["tcp://127.0.0.1:9"], Unreachable)):
            async with world.linked(*managers) as link:
                began = trio.current_time()
                with pytest.raises(expected):
                    await link.call(STATUS, base.Empty(), timeout_s=3.0)
                assert 2.0 < trio.current_time() - began <= 3.01
        assert len(one.calls) + len(other.calls) < 60, "it backs off"

    run(body)


# --- routing


def test_routing_is_followed_and_never_goes_back() -> None:
    async def body(world: World) -> None:
        manager = await world.manager()
        async with world.linked(manager.address, follow=True) as link:
            assert link.routing.version == 0 or link.routing.version == 1
            assert (await link.wait_routing(0, timeout_s=1.0)).version == 1
            seen: list[int] = []
            stop = link.on_routing(lambda routing: seen.append(routing.version))
            for version in (2, 5, 3, 4, 6):
                manager.version = version
                await trio.sleep(6.0)
            assert seen == [2, 5, 6] and link.routing.version == 6
            stop()
            stop()
            manager.version = 7
            assert (await link.wait_routing(6)).version == 7 and seen == [2, 5, 6]
            with pytest.raises(DeadlineExceeded, match="still version 7"):
                await link.wait_routing(7, timeout_s=0.5)

    run(body)


def test_routing_comes_back_after_the_manager_was_away() -> None:
    async def body(world: World) -> None:
        manager = await world.manager()
        async with world.linked(manager.address, follow=True) as link:
            await link.wait_routing(0)
            world.fabric.partition({"me"}, {manager.host})
            manager.version = 2
            await trio.sleep(60.0)
            assert link.routing.version == 1
            world.fabric.heal()
            healed = trio.current_time()
            await link.wait_routing(1)
            assert trio.current_time() - healed < 1.0

    run(body)


def test_a_failing_callback_harms_nobody() -> None:
    async def body(world: World) -> None:
        manager = await world.manager()
        async with world.linked(manager.address) as link:
            seen: list[int] = []

            def fail(_: Routing) -> None:
                raise RuntimeError("a fault of the callback's owner")

            link.on_routing(fail)
            link.on_routing(lambda routing: seen.append(routing.version))
            assert (await link.refresh()).version == 1
            assert seen == [1]

    run(body)


def test_refreshes_share_one_request_and_a_cancelled_one_does_not_stop_the_others() -> None:
    async def body(world: World) -> None:
        manager = await world.manager()
        manager.delay_s = 0.5
        async with world.linked(manager.address) as link:
            results: list[int] = []

            async def one() -> None:
                results.append((await link.refresh()).version)

            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(one)
            assert results == [1] * 20 and manager.calls == ["get_routing"]

            # The one that asks gives up; another asks in its place.
            manager.version = 2
            async with trio.open_nursery() as nursery:
                with trio.move_on_after(0.2):
                    nursery.start_soon(one)
                    await link.refresh()
                assert link.routing.version == 1
            assert results[-1] == 2 and manager.most_under_way <= 2

    run(body)


def test_refresh_ends_with_its_time() -> None:
    async def body(world: World) -> None:
        manager = await world.manager()
        manager.delay_s = 100.0
        async with world.linked(manager.address) as link:
            began = trio.current_time()

            async def one() -> None:
                with pytest.raises(DeadlineExceeded):
                    await link.refresh(timeout_s=1.0)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(one)
                nursery.start_soon(one)
            assert trio.current_time() - began < 2.1

    run(body)


# --- heartbeats and the lease


def test_registration_tells_who_this_process_is_and_which_targets_it_has() -> None:
    async def body(world: World) -> None:
        manager = await world.manager()
        async with world.linked(manager.address) as link:
            with pytest.raises(NotRegistered):
                link.start_heartbeats()
            assert not link.lease_valid()
            await world.registered(link)
            sent = manager.registrations[0]
            assert sent.node_uuid == "u" and sent.pid and sent.hostname and sent.host_id and sent.software
            assert (link.node_id, link.incarnation, link.routing.version) == (7, 1, 1)
            assert [target.target_id for target in link.targets] == [70]
            assert link.lease_valid()

    run(body)


def test_heartbeats_come_four_times_a_lease_one_at_a_time_and_numbered() -> None:
    async def body(world: World) -> None:
        manager = await world.manager()
        async with world.linked(manager.address, follow=True) as link:
            await world.registered(link)
            reports = [pb.TargetReport(target_id=70, local_state=pb.ONLINE)]
            link.start_heartbeats(lambda: reports)
            await trio.sleep(4.1)
            assert 8 <= len(manager.heartbeats) <= 10
            assert [beat.sequence for beat in manager.heartbeats] == list(range(1, len(manager.heartbeats) + 1))
            assert manager.heartbeats[-1].targets[0].target_id == 70 and manager.heartbeats[-1].node_id == 7
            count = len(manager.heartbeats)
            reports[0].local_state = pb.UPTODATE
            link.report_now()
            await trio.sleep(0.01)
            assert len(manager.heartbeats) == count + 1
            assert manager.heartbeats[-1].targets[0].local_state == pb.UPTODATE
            for _ in range(5):  # what comes while one is under way is not lost
                link.report_now()
            await trio.sleep(0.01)
            assert len(manager.heartbeats) <= count + 3

    run(body)


def test_the_lease_is_half_and_counts_from_the_sending() -> None:
    async def body(world: World) -> None:
        manager = await world.manager()
        async with world.linked(manager.address, follow=True) as link:
            await world.registered(link)
            link.start_heartbeats()
            await trio.sleep(3.0)
            manager.delay_s = 0.3
            await trio.sleep(3.0)
            assert link.lease_valid()
            assert link.lease_left_s() <= 0.7 + 1e-6, "the 0.3 s that the answer took are not given twice"
            world.fabric.partition({"me"}, {manager.host})
            cut = trio.current_time()
            while link.lease_valid():
                await trio.sleep(0.01)
            assert trio.current_time() - cut <= 1.01
            with pytest.raises(LeaseExpired, match="does not serve until it does"):
                link.check_lease()
            world.fabric.heal()
            await trio.sleep(1.0)
            link.check_lease()

    run(body)


@pytest.mark.parametrize("error", [StaleIncarnation("newer"), LeaseExpired("declared dead"), NotRegistered("who?")])
def test_the_managers_verdict_ends_the_node(error: KvfsError) -> None:
    async def body(world: World) -> None:
        manager = await world.manager()
        async with world.linked(manager.address) as link:
            await world.registered(link)
            link.start_heartbeats()
            manager.heartbeat_error = error
            with pytest.raises(type(error), match=error.message):
                await link.run()
            assert not link.lease_valid()

    run(body)


def test_a_node_that_may_rejoins_registers_again() -> None:
    async def body(world: World) -> None:
        manager = await world.manager()
        async with world.linked(manager.address, follow=True, rejoin=True) as link:
            await world.registered(link)
            link.start_heartbeats()
            await trio.sleep(1.0)
            manager.heartbeat_error = LeaseExpired("declared dead")
            await trio.sleep(0.6)
            manager.heartbeat_error = None
            await trio.sleep(1.0)
            assert len(manager.registrations) >= 2 and manager.registrations[-1].node_id == 7
            assert link.incarnation == len(manager.registrations) and manager.heartbeats[-1].incarnation == link.incarnation
            assert link.lease_valid()

    run(body)


def test_exit_when_lost_ends_the_node_after_half_a_lease() -> None:
    async def body(world: World) -> None:
        manager = await world.manager()
        async with world.linked(manager.address, exit_when_lost=True) as link:
            await world.registered(link)
            link.start_heartbeats()
            world.fabric.partition({"me"}, {manager.host})
            began = trio.current_time()
            with pytest.raises(LeaseExpired):
                await link.run()
            assert trio.current_time() - began < 2.1

    run(body)


# --- clients


def test_a_client_stays_on_the_list_and_leaves() -> None:
    async def body(world: World) -> None:
        manager = await world.manager()
        async with world.linked(manager.address, follow=True) as link:
            await link.leave()
            link.start_client_heartbeats(description="/mnt")
            await trio.sleep(8.1)
            assert manager.calls.count("client_heartbeat") in (4, 5)
            await link.leave()
            assert manager.leaving == 1
            world.fabric.partition({"me"}, {manager.host})
            began = trio.current_time()
            await link.leave(timeout_s=0.5)
            assert trio.current_time() - began < 1.0

    run(body)


def test_no_manager_address_is_a_fault_of_the_configuration() -> None:
    async def body(world: World) -> None:
        with pytest.raises(ExceptionGroup) as refused:
            async with world.linked():
                pass
        assert refused.group_contains(ConfigError, match="at least one")

    run(body)
