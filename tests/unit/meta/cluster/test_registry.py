"""The manager's records as bytes: docs/format.md is true, and what is written is read back."""

from __future__ import annotations

import trio
from tests.unit.document import FORMAT

from kvfs.common.wire import cluster_pb2 as pb
from kvfs.meta.cluster import registry
from kvfs.meta.cluster.lease import Lease
from kvfs.meta.cluster.registry import Change, Records
from kvfs.meta.cluster.states import Chain, Member, Public
from kvfs.meta.kv import Transaction, open_engine

LEASE = Lease("m", "tcp://h:1", 2, 7, 10_000)


def test_the_example_in_the_document() -> None:
    lines = FORMAT.read_text().split("<!-- cluster example -->")[1].split("```")[1].strip().splitlines()
    rows = [tuple(bytes.fromhex(word) for word in line.partition("#")[0].split()) for line in lines]
    chain = Chain(100_001, 3, (Member(1_000_001, Public.SERVING), Member(2_000_001, Public.OFFLINE)))

    async def written() -> list[tuple[bytes, ...]]:
        engine = open_engine("memory")
        await engine.transact(lambda txn: registry.open_store(txn, "c1", "unused"))
        await engine.transact(lambda txn: registry.write_lease(txn, LEASE))
        await engine.transact(registry.writer(LEASE, Records("c1", version=8), Change(chains={100_001: chain})))

        def read(txn: Transaction) -> list[tuple[bytes, ...]]:
            assert registry.read_lease(txn) == LEASE
            assert registry.load(txn, "c1").chains == {100_001: chain}
            return [(key, value) for key, value in txn.get_range(b"C", b"D")[0]]

        return await engine.transact(read)

    assert trio.run(written) == sorted(rows)


def test_records_of_many_pages_are_all_loaded() -> None:
    async def body() -> None:
        engine = open_engine("memory")
        await engine.transact(lambda txn: registry.write_lease(txn, LEASE))
        records = Records("c")
        for first in range(1, 40_000, 2000):
            change = Change(targets={number: pb.Target(target_id=number, node_id=1) for number in range(first, first + 2000)})
            await engine.transact(registry.writer(LEASE, records, change))
            records.take(change)
        assert await engine.transact(lambda txn: registry.load(txn, "c")) == records

    trio.run(body)


def test_clients_come_and_go_in_the_store() -> None:
    async def body() -> None:
        engine = open_engine("memory")
        await engine.transact(lambda txn: registry.write_lease(txn, LEASE))
        records = Records("c")
        infos = {bytes([number]) * 16: pb.ClientInfo(client_id=bytes([number]) * 16) for number in (1, 2, 255)}
        for change in (Change(clients=dict(infos)), Change(clients={bytes([2]) * 16: None})):
            assert change and not change.routes
            await engine.transact(registry.writer(LEASE, records, change))
            records.take(change)
        assert sorted(records.clients) == [bytes([1]) * 16, bytes([255]) * 16] and records.version == 0
        assert await engine.transact(lambda txn: registry.load(txn, "c")) == records

    trio.run(body)
