"""A reign on its own: the fence, commits of unknown outcome, what the store holds after."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from kvfs.common.boundary.random import SeededRandom
from kvfs.common.errors import BadRequest, FormatTooNew, LeaseExpired, NotPrimary, TxnThrottled, WrongDataDirectory
from kvfs.common.sim.clock import SimClock
from kvfs.common.wire import cluster_pb2 as pb
from kvfs.meta.cluster import registry
from kvfs.meta.cluster.manager import Manager, Self
from kvfs.meta.cluster.primary import Primary
from kvfs.meta.cluster.states import Public
from kvfs.meta.kv import Engine, Transaction, open_engine


def run(test: Callable[[trio.Nursery], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(300.0):
            async with trio.open_nursery() as nursery:
                await test(nursery)
                nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def start(nursery: trio.Nursery, engine: Engine, uuid: str, **times: int) -> Manager:
    me = Self(uuid, "c")
    manager = Manager(engine, SimClock(), SeededRandom(1), me, **{"lease_ms": 2000, "client_lease_ms": 5000, "primary_lease_ms": 6000, **times})
    manager.addresses = (f"tcp://{uuid}:1",)
    await nursery.start(manager.run)
    return manager


def registration(uuid: str) -> pb.RegisterRequest:
    return pb.RegisterRequest(node_uuid=uuid, role=pb.ROLE_STORAGE, addresses=["tcp://x:1"], disks=[pb.DiskInfo(disk=0)])


async def stored(engine: Engine) -> registry.Records:
    return await engine.transact(lambda txn: registry.load(txn, "c"))


async def usurp(engine: Engine) -> None:
    """Another manager takes the lease, while the first believes in it."""

    def body(txn: Transaction) -> None:
        lease = registry.read_lease(txn)
        assert lease is not None
        registry.write_lease(txn, registry.Lease("other", "tcp://other:1", lease.epoch + 1, 1, 6000))

    await engine.transact(body)


def test_what_is_shown_is_what_is_stored() -> None:
    async def body(nursery: trio.Nursery) -> None:
        engine = open_engine("memory")
        reign = (await start(nursery, engine, "m")).primary()
        for index in range(3):
            await reign.register(registration(f"u{index}"))
        await reign.create_targets(pb.CreateTargetsRequest(table_id=1, replicas=3), 0.0)
        await reign.client_heartbeat(pb.ClientHeartbeatRequest(client=pb.ClientInfo(client_id=b"x" * 16, role="mount")))
        await reign.set_config(pb.ConfigBlob(name="storage", toml="a = 1"))
        await trio.sleep(5.0)
        assert await stored(engine) == reign.records
        assert not any(node.alive for node in reign.records.nodes.values() if node.role == pb.ROLE_STORAGE)

    run(body)


def test_a_superseded_primary_can_change_nothing() -> None:
    async def body(nursery: trio.Nursery) -> None:
        engine = open_engine("memory")
        manager = await start(nursery, engine, "m")
        reign = manager.primary()
        before = await stored(engine)
        await usurp(engine)
        attempts: list[Callable[[], Awaitable[Any]]] = [
            lambda: reign.register(registration("u")),
            lambda: reign.set_config(pb.ConfigBlob(name="x")),
            reign.renew,
        ]
        with pytest.raises(NotPrimary, match="the primary is tcp://other:1"):
            await attempts[0]()
        assert reign.ended
        for attempt in attempts[1:]:
            with pytest.raises(NotPrimary):
                await attempt()
        with pytest.raises(NotPrimary):
            manager.primary()
        assert await stored(engine) == before
        # It stands by, and names the one that is, once it has looked.
        await trio.sleep(1.0)
        with pytest.raises(NotPrimary, match="the primary is tcp://other:1"):
            manager.primary()
        # And takes over when that one falls silent.
        await trio.sleep(7.0)
        assert manager.primary().holding.lease.epoch == 3

    run(body)


def test_waiting_pollers_are_told_when_the_reign_ends() -> None:
    async def body(nursery: trio.Nursery) -> None:
        engine = open_engine("memory")
        reign = (await start(nursery, engine, "m")).primary()
        told = 0

        async def poll() -> None:
            nonlocal told
            with pytest.raises(NotPrimary):
                await reign.routing_above(reign.records.version, 100.0)
            told += 1

        async with trio.open_nursery() as pollers:
            pollers.start_soon(poll)
            pollers.start_soon(poll)
            await trio.sleep(0.1)
            await usurp(engine)
        assert told == 2

    run(body)


def test_a_commit_of_unknown_outcome_ends_the_reign_and_the_next_loads_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(nursery: trio.Nursery) -> None:
        engine = open_engine("memory")
        manager = await start(nursery, engine, "m")
        reign = manager.primary()
        real = engine.transact
        failing = True

        async def transact(*args: Any, **options: Any) -> Any:
            result = await real(*args, **options)
            if failing:
                raise TxnThrottled("it was committed, but nobody says so")
            return result

        monkeypatch.setattr(engine, "transact", transact)
        with pytest.raises(TxnThrottled):
            await reign.register(registration("u"))
        failing = False
        assert reign.ended and reign.records.node_of_uuid("u") is None
        await trio.sleep(2.0)
        again = manager.primary()
        assert again is not reign and again.records.node_of_uuid("u") is not None
        assert again.records == await stored(engine)

    run(body)


def test_a_node_condemned_by_a_scan_under_way_gets_no_more_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(nursery: trio.Nursery) -> None:
        engine = open_engine("memory")
        reign: Primary = (await start(nursery, engine, "m", primary_lease_ms=60_000)).primary()
        node = await reign.register(registration("u"))
        beat = pb.HeartbeatRequest(node_id=node.node_id, incarnation=node.incarnation, sequence=1)
        real = engine.transact

        async def slow(*args: Any, **options: Any) -> Any:
            await trio.sleep(1.0)
            return await real(*args, **options)

        await trio.sleep(1.9)
        monkeypatch.setattr(engine, "transact", slow)
        await trio.sleep(0.4)
        assert reign.records.nodes[node.node_id].alive, "the commit is under way"
        with pytest.raises(LeaseExpired):
            reign.heartbeat(beat)
        await trio.sleep(2.0)
        assert not reign.records.nodes[node.node_id].alive

    run(body)


def test_an_old_primary_stops_believing_when_its_store_stalls(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(nursery: trio.Nursery) -> None:
        engine = open_engine("memory")
        manager = await start(nursery, engine, "m")
        real = engine.transact

        async def stalled(*args: Any, **options: Any) -> Any:
            await trio.sleep(60.0)
            return await real(*args, **options)

        monkeypatch.setattr(engine, "transact", stalled)
        await trio.sleep(3.9)
        assert manager.is_primary()
        await trio.sleep(1.2)
        assert not manager.is_primary()

    run(body)


def test_stores_of_others_are_refused() -> None:
    async def body(nursery: trio.Nursery) -> None:
        engine = open_engine("memory")
        await start(nursery, engine, "m")
        other = Manager(engine, SimClock(), SeededRandom(1), Self("m2", "other"), lease_ms=2000, client_lease_ms=5000, primary_lease_ms=6000)
        with pytest.raises(WrongDataDirectory, match="belong to cluster 'c', the configuration says 'other'"):
            await other.run()
        await engine.transact(lambda txn: txn.set(registry.FORMAT, (99).to_bytes(4, "big") + b"c"))
        newer = Manager(engine, SimClock(), SeededRandom(1), Self("m3", "c"), lease_ms=2000, client_lease_ms=5000, primary_lease_ms=6000)
        with pytest.raises(FormatTooNew, match="nothing was touched"):
            await newer.run()

    run(body)


def test_bad_requests() -> None:
    async def body(nursery: trio.Nursery) -> None:
        reign = (await start(nursery, open_engine("memory"), "m")).primary()
        version = reign.records.version
        with pytest.raises(BadRequest):
            await reign.client_heartbeat(pb.ClientHeartbeatRequest(client=pb.ClientInfo(client_id=b"short")))
        with pytest.raises(BadRequest):
            await reign.set_config(pb.ConfigBlob(name=""))
        # Found by a million mutated frames (seed 2026): a record larger than the store takes ended the reign.
        for field in ("hostname", "software", "host_id"):
            large = registration("large")
            setattr(large, field, "x" * 140_000)
            with pytest.raises(BadRequest, match="would be too large"):
                await reign.register(large)
        with pytest.raises(BadRequest, match="would be too large"):
            await reign.set_config(pb.ConfigBlob(name="c", toml="x" * 140_000))
        assert not reign.ended and reign.records.version == version
        # Reports of targets that are not the node's, or that say nothing, are passed over.
        node = await reign.register(registration("u"))
        reports = [pb.TargetReport(target_id=5, local_state=pb.UPTODATE), pb.TargetReport(target_id=6)]
        reign.heartbeat(pb.HeartbeatRequest(node_id=node.node_id, incarnation=1, sequence=1, targets=reports))
        await reign.scan()
        assert reign.records.version == version + 1

    run(body)


def test_unknown_clients_do_not_add_up() -> None:
    async def body(nursery: trio.Nursery) -> None:
        engine = open_engine("memory")
        reign = (await start(nursery, engine, "m")).primary()
        leaving = pb.ClientHeartbeatRequest(client=pb.ClientInfo(client_id=bytes(16)), leaving=True)
        await reign.client_heartbeat(leaving)
        assert not reign.records.clients
        for index in range(20):
            await reign.client_heartbeat(pb.ClientHeartbeatRequest(client=pb.ClientInfo(client_id=index.to_bytes(16, "big"))))
        assert len(reign.list_clients().clients) == 20
        await trio.sleep(8.0)
        assert len(reign.list_clients().clients) == 0 == len((await stored(engine)).clients)

    run(body)


def test_what_an_earlier_run_said_counts_for_nothing() -> None:
    async def body(nursery: trio.Nursery) -> None:
        reign = (await start(nursery, open_engine("memory"), "m")).primary()
        first = await reign.register(registration("u"))
        await reign.create_targets(pb.CreateTargetsRequest(table_id=1, replicas=1), 0.0)
        up = [pb.TargetReport(target_id=target_id, local_state=pb.UPTODATE) for target_id in reign.records.targets]
        reign.heartbeat(pb.HeartbeatRequest(node_id=first.node_id, incarnation=1, sequence=1, targets=up))
        await trio.sleep(0.5)
        disk = pb.DiskInfo(disk=0, targets=list(reign.records.targets))
        await reign.register(pb.RegisterRequest(node_uuid="u", role=pb.ROLE_STORAGE, addresses=["tcp://x:1"], disks=[disk]))
        for _ in range(3):
            await trio.sleep(0.5)
            states = {member.state for chain in reign.records.chains.values() for member in chain.members}
            assert states == {Public.LASTSRV}, "until the new run has spoken for itself"
        reign.heartbeat(pb.HeartbeatRequest(node_id=first.node_id, incarnation=2, sequence=1, targets=up))
        await trio.sleep(0.5)
        assert {member.state for chain in reign.records.chains.values() for member in chain.members} == {Public.SERVING}

    run(body)


def test_a_caller_that_goes_away_does_not_part_memory_from_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(nursery: trio.Nursery) -> None:
        engine = open_engine("memory")
        reign = (await start(nursery, engine, "m", primary_lease_ms=60_000)).primary()
        real = engine.transact

        async def slow(*args: Any, **options: Any) -> Any:
            result = await real(*args, **options)
            await trio.sleep(1.0)
            return result

        monkeypatch.setattr(engine, "transact", slow)
        with trio.move_on_after(0.5):
            await reign.register(registration("u"))
        monkeypatch.setattr(engine, "transact", real)
        assert not reign.ended and reign.records.node_of_uuid("u") is not None
        assert await stored(engine) == reign.records

    run(body)
