"""What the meta service asks of real storage services: cuts, removals, lengths. One cluster in one trio run."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import ClassVar

import trio
from tests.unit.client.whole import AsyncClient, whole

from kvfs.common.boundary.clock import SystemClock
from kvfs.common.boundary.random import SeededRandom
from kvfs.common.ids import chunk_index, chunk_inode
from kvfs.common.routing import Routing
from kvfs.common.wire import cluster_pb2 as pb
from kvfs.common.wire.storage_pb2 import SyncRequest
from kvfs.meta.gc.chunks import StorageChunks

SIZE = 1 << 20


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        with trio.fail_after(60):
            await test()

    trio.run(limited)


async def chunks(client: AsyncClient, inode: int) -> dict[int, set[int]]:
    """Index -> lengths, over all replicas that serve; each chunk must be on every target of its chain."""
    found: dict[int, list[int]] = {}
    routing = client.routing
    for chain in routing.chains:
        for target_id in routing.serving(chain.chain_id):
            reply = await client.storage.list_chunks(target_id, inode=inode, limit=1000)
            for chunk in reply.chunks:
                if chunk_inode(chunk.chunk_id) == inode and chunk.version:
                    found.setdefault(chunk_index(chunk.chunk_id), []).append(chunk.length)
    return {index: set(lengths) for index, lengths in found.items()}


async def write(client: AsyncClient, path: str, length: int) -> tuple[int, bytes]:
    data = random.Random(length).randbytes(length)
    await client.write_bytes(path, data)
    return (await client.stat(path)).inode, data


def test_truncate_and_remove_free_chunks_on_every_replica() -> None:
    async def test() -> None:
        async with whole() as cluster, cluster.client() as client:
            number, data = await write(client, "/f", 6 * SIZE + 100)
            assert sorted(await chunks(client, number)) == list(range(7))
            await client.truncate("/f", 2 * SIZE + 77)
            assert await chunks(client, number) == {0: {SIZE}, 1: {SIZE}, 2: {77}}
            await client.truncate("/f", 5 * SIZE)
            assert await client.read_bytes("/f") == data[: 2 * SIZE + 77] + bytes(3 * SIZE - 77)
            await client.unlink("/f")
            status = await client.meta.collect_garbage()
            assert status.gc_pending == 0
            assert await chunks(client, number) == {}
            assert (await client.meta.get_attr([number]))[0].type == 0

    run(test)


def test_garbage_waits_for_a_storage_service_that_is_away() -> None:
    async def test() -> None:
        async with whole(storage=3, replicas=1) as cluster, cluster.client() as client:
            number, _ = await write(client, "/f", 12 * SIZE)
            await client.unlink("/f")
            cluster.stop_storage(1)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.meta.collect_garbage)
                await trio.sleep(2.0)
                await cluster.start_storage(1)
            while (await client.meta.collect_garbage()).gc_pending:
                await trio.sleep(0.1)
            assert await chunks(client, number) == {}

    run(test)


def test_the_chains_tell_the_length_of_what_was_not_reported() -> None:
    async def test() -> None:
        async with whole() as cluster, cluster.client() as client:
            number, _ = await write(client, "/f", 3 * SIZE + 5)
            session = client.new_session()
            inode = await client.meta.open(number, session=session, write=True)
            await client.meta.set_attr(number, length=0)
            file = client.open_file(inode, session=session, write=True)
            await file.pwrite(2 * SIZE, [b"x" * 10])
            await file.flush()
            closed = await client.meta.close(number, session, wrote=True, length=2 * SIZE + 10, truncate_version=inode.truncate_version)
            assert closed.length == 2 * SIZE + 10  # measured: the report is older than the truncate

    run(test)


def test_a_recursive_removal_leaves_no_chunk() -> None:
    async def test() -> None:
        async with whole() as cluster, cluster.client() as client:
            await client.makedirs("/t/a/b")
            numbers = [(await write(client, f"/t/{path}", length))[0] for path, length in (("1", 10), ("a/2", SIZE + 1), ("a/b/3", 3 * SIZE))]
            await client.rmtree("/t")
            await client.meta.collect_garbage()
            for number in numbers:
                assert await chunks(client, number) == {}
            reply = await client.meta.fsck()
            assert not reply.problems
            assert [inode.inode for inode in reply.inodes] == [1]

    run(test)


def test_a_file_grown_through_an_open_handle_and_never_written_leaves_no_chunk() -> None:
    """Growing it makes its boundary chunk: the removal must know that there can be one."""

    async def test() -> None:
        async with whole() as cluster, cluster.client() as client:
            file = await client.open("/grown", "wb")
            await file.truncate(SIZE + SIZE // 2)
            await file.aclose()
            number = (await client.stat("/grown")).inode
            assert (await client.stat("/grown")).length == SIZE + SIZE // 2
            assert await client.read_bytes("/grown") == bytes(SIZE + SIZE // 2)
            await client.unlink("/grown")
            assert (await client.meta.collect_garbage()).gc_pending == 0
            assert await chunks(client, number) == {}

    run(test)


def test_a_change_is_made_again_when_its_chain_changes_before_it_is_synced() -> None:
    """The replicas may have lost power with it, and serve again: to sync what they have now would say nothing."""

    async def test() -> None:
        def at_version(version: int) -> Routing:
            chain = pb.Chain(chain_id=1, version=version, targets=[pb.ChainTarget(target_id=4, state=pb.SERVING)])
            target = pb.Target(target_id=4, chain_id=1, node_id=2)
            return Routing(pb.RoutingInfo(version=version, chains=[chain], targets=[target], nodes=[pb.Node(node_id=2, addresses=["tcp://s:1"])]))

        class Link:
            routing = at_version(7)

            async def refresh(self, *, timeout_s: float) -> None:
                pass

        class Pool:
            asked: ClassVar[list[tuple[int, bool]]] = []

            async def call(self, addresses: object, what: object, request: SyncRequest, *, timeout_s: float) -> None:
                self.asked.append((request.chain_versions[0], request.removals))

        made = 0

        async def change() -> None:
            nonlocal made
            made += 1
            Link.routing = at_version(8)

        chunks = StorageChunks(Link(), Pool(), SystemClock(), SeededRandom(1), b"m" * 16)  # type: ignore[arg-type]
        await chunks.durably([1], change, removals=True)
        assert made == 2
        assert Pool.asked == [(8, True)]

    run(test)
