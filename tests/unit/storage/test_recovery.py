"""Storage services die and come back while clients write: nothing acknowledged is lost, replicas end byte-identical."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest
import trio
from mini_cluster import CHUNK_SIZE, WRITE, MiniCluster, mini_cluster

from kvfs.common.checksum import checksums
from kvfs.common.errors import KvfsError, StaleUpdate
from kvfs.common.ids import chunk_id
from kvfs.common.sim.disk import SimDisk
from kvfs.common.sim.medium import Medium
from kvfs.common.wire import storage_pb2 as pb
from kvfs.common.wire.service import method
from kvfs.storage import server
from kvfs.storage.engine.engine import ChunkEngine

SIZE = 200_000


class Writers:
    """Clients that write, cut and remove, one chunk each at a time, and remember what was acknowledged."""

    def __init__(self, world: MiniCluster, chain: int, chunks: int, seed: int) -> None:
        self.world = world
        self.chain = chain
        self.chunks = chunks
        self.random = random.Random(seed)
        self.expected: dict[int, bytes] = {}
        self.busy: set[int] = set()
        self.done = 0
        self.stopping = False

    async def run(self) -> None:
        while not self.stopping:
            index = self.random.randrange(self.chunks)
            if index in self.busy:
                await trio.sleep(0.001)
                continue
            self.busy.add(index)
            await self.step(index)
            self.busy.discard(index)
            self.done += 1

    async def step(self, index: int) -> None:
        chunk = chunk_id(7, index)
        before = self.expected.get(index, b"")
        what = self.random.random()
        if what < 0.75:
            data = self.random.randbytes(self.random.choice((10, 4096, 40_000, SIZE)))
            offset = self.random.choice((0, 0, min(len(before), SIZE), self.random.randrange(SIZE)))
            await self.world.write(self.chain, chunk, data, offset=offset)
            self.expected[index] = before[:offset].ljust(offset, b"\0") + data + before[offset + len(data) :]
        elif what < 0.9:
            length = self.random.randrange(1, SIZE)
            await self.world.write(self.chain, chunk, b"", kind=pb.TRUNCATE, length=length)
            self.expected[index] = before[:length].ljust(length, b"\0")
        else:
            await self.world.write(self.chain, chunk, b"", kind=pb.REMOVE)
            self.expected.pop(index, None)

    async def check(self) -> None:
        for target in self.world.routing.serving(self.chain):
            for index in range(self.chunks):
                data = await self.world.read(self.chain, chunk_id(7, index), 0, 1 << 20, target=target)
                assert data == self.expected.get(index, b""), (target, index)


class Readers:
    """A chunk that only grows, read at every replica: no read may see less than an acknowledged write or a read that ended before it began."""

    def __init__(self, world: MiniCluster, chain: int, index: int, seed: int) -> None:
        self.world = world
        self.chain = chain
        self.chunk = chunk_id(8, index)
        self.random = random.Random(seed)
        self.seen = 0
        self.reads = 0
        self.stopping = False

    async def write(self) -> None:
        length = 0
        while not self.stopping:
            piece = self.random.randbytes(self.random.choice((1, 100, 3000)))
            if length + len(piece) > 1 << 20:
                return
            result = await self.world.write(self.chain, self.chunk, piece, offset=length)
            length += len(piece)
            assert result.chunk_length in (length, 0), "0: a duplicate whose chunk has moved on"
            self.seen = max(self.seen, length)

    async def read(self) -> None:
        while not self.stopping:
            serving = self.world.routing.serving(self.chain)
            floor = self.seen
            try:
                with trio.move_on_after(3):
                    target = self.random.choice(serving)
                    data = await self.world.read(self.chain, self.chunk, 0, 1 << 20, target=target)
                    assert len(data) >= floor, f"target {target} answered {len(data)} bytes, {floor} were seen before"
                    self.seen = max(self.seen, len(data))
                    self.reads += 1
            except (KvfsError, IndexError):
                await trio.sleep(0.01)

    def start(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self.write)
        for _ in range(2):
            nursery.start_soon(self.read)


async def wait_serving(world: MiniCluster, chain: int, count: int) -> None:
    with trio.fail_after(20):
        while len(world.routing.serving(chain)) != count:
            await trio.sleep(0.02)


def test_kill_one_and_bring_it_back_under_load(tmp_path: Path) -> None:
    async def main() -> None:
        async with mini_cluster(tmp_path) as world:
            chain = await world.one_chain(3)
            writers = Writers(world, chain, 40, seed=1)
            readers = Readers(world, chain, 0, seed=1)
            async with trio.open_nursery() as nursery:
                readers.start(nursery)
                for _ in range(4):
                    nursery.start_soon(writers.run)
                for number in (2, 1, 3):
                    await trio.sleep(0.5)
                    world.stop(number)
                    await wait_serving(world, chain, 2)
                    before = writers.done
                    await trio.sleep(0.5)
                    assert writers.done > before, "two replicas go on"
                    await world.start(number)
                    await wait_serving(world, chain, 3)
                writers.stopping = readers.stopping = True
            await writers.check()
            assert await world.assert_identical(chain) == len(writers.expected) + 1
            assert readers.reads > 100
            assert not any(world.ended.values())

    trio.run(main)


def test_all_stop_and_start_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with mini_cluster(tmp_path) as world:
            for number in (1, 2, 3):
                await world.start(number)
            await world.create(3, 3, targets_per_disk=2)
            chains = [chain.chain_id for chain in world.routing.chains]
            for place, chain in enumerate(chains):
                await world.write(chain, chunk_id(9, place), b"x" * 5000)
            for number in (1, 2, 3):
                world.stop(number)
            await trio.sleep(1.0)
            for number in (3, 1, 2):
                await world.start(number)
            with trio.fail_after(20):
                await world.settled(3)
            for place, chain in enumerate(chains):
                assert await world.read(chain, chunk_id(9, place), 0, 6000) == b"x" * 5000
                await world.assert_identical(chain)

    trio.run(main)


def test_a_lone_replica_comes_back_with_its_data(tmp_path: Path) -> None:
    async def main() -> None:
        async with mini_cluster(tmp_path) as world:
            chain = await world.one_chain(1)
            await world.write(chain, chunk_id(9, 0), b"abc")
            world.stop(1)
            await trio.sleep(0.1)
            await world.start(1)
            await world.settled(1)
            assert await world.read(chain, chunk_id(9, 0), 0, 10) == b"abc"
            assert (await world.write(chain, chunk_id(9, 0), b"d", offset=3)).version == 2

    trio.run(main)


def test_what_comes_late_of_a_truncation_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another metadata service carried it out, and the file was written anew: what the first one lists and removes from then on is void."""

    async def main() -> None:
        async with mini_cluster(tmp_path) as world:
            chain = await world.one_chain(2)
            head = world.routing.head(chain)
            where = world.routing.addresses_of_target(head)

            async def remove(turn: int) -> int:
                request = pb.RemoveRangeRequest(chain_id=chain, chain_version=world.routing.chain(chain).version, target_id=head, inode=9, turn=turn)
                try:
                    reply = await world.pool.call(where, method("Storage", "RemoveRange"), request, timeout_s=5)
                except KvfsError as error:
                    return -error.code
                return int(reply.removed)

            async def late() -> None:
                assert await remove(4) == -StaleUpdate.code

            listing, go_on, list_chunks = threading.Event(), threading.Event(), ChunkEngine.list

            def slow_list(engine: ChunkEngine, **asked: Any) -> Any:
                monkeypatch.setattr(ChunkEngine, "list", list_chunks)
                listing.set()
                go_on.wait()
                return list_chunks(engine, **asked)

            await world.write(chain, chunk_id(9, 0), b"old")
            monkeypatch.setattr(ChunkEngine, "list", slow_list)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(late)
                await trio.to_thread.run_sync(listing.wait)
                assert await remove(5) == 1
                await world.write(chain, chunk_id(9, 0), b"new")
                go_on.set()
            await late()
            assert await world.read(chain, chunk_id(9, 0), 0, 10) == b"new"
            cut = pb.WriteIO(chunk_id=chunk_id(9, 0), kind=pb.TRUNCATE, length=1, chunk_size=CHUNK_SIZE, turn=4)
            (result,) = await world.write_once(chain, [cut], [])
            assert result.status == StaleUpdate.code
            assert await remove(0) == 1

    trio.run(main)


def test_sync_remove_range_last_chunk(tmp_path: Path) -> None:
    async def main() -> None:
        async with mini_cluster(tmp_path) as world:
            chain = await world.one_chain(2)
            from kvfs.common.wire.service import method

            head = world.routing.head(chain)
            where = world.routing.addresses_of_target(head)
            for index in range(10):
                await world.write(chain, chunk_id(9, index), b"x" * (100 + index))
            await world.write(chain, chunk_id(10, 0), b"other")
            last = await world.pool.call(
                where, method("Storage", "LastChunk"), pb.LastChunkRequest(chain_id=chain, target_id=head, inode=9), timeout_s=5
            )
            assert (last.found, last.index, last.length, last.chunks) == (True, 9, 109, 10)
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(lambda: world.pool.call(where, method("Storage", "Sync"), pb.SyncRequest(target_ids=[head]), timeout_s=5))
            request = pb.RemoveRangeRequest(
                chain_id=chain, chain_version=world.routing.chain(chain).version, target_id=head, inode=9, first_index=3, end_index=9, limit=4
            )
            reply = await world.pool.call(where, method("Storage", "RemoveRange"), request, timeout_s=5)
            assert (reply.removed, reply.more) == (4, True)
            reply = await world.pool.call(where, method("Storage", "RemoveRange"), request, timeout_s=5)
            assert (reply.removed, reply.more) == (2, False)
            request.end_index = 0
            reply = await world.pool.call(where, method("Storage", "RemoveRange"), request, timeout_s=5)
            assert (reply.removed, reply.more) == (1, False)
            for target in world.routing.serving(chain):
                assert [c.chunk_id for c in await world.listing(target)] == [chunk_id(9, 0), chunk_id(9, 1), chunk_id(9, 2), chunk_id(10, 0)]
            stale = pb.RemoveRangeRequest(chain_id=chain, chain_version=99, target_id=head, inode=77)
            try:
                await world.pool.call(where, method("Storage", "RemoveRange"), stale, timeout_s=5)
                raise AssertionError("another chain version was taken")
            except KvfsError as error:
                assert error.code == 401

    trio.run(main)


def test_a_pending_version_is_carried_on_through_a_middle(tmp_path: Path) -> None:
    """Seed 30155 of the simulation: a replica with a successor refused to prepare the whole chunk that a recovery sends, and that chunk was stuck
    until the chain changed."""

    async def main() -> None:
        async with mini_cluster(tmp_path) as world:
            chain = await world.one_chain(3)
            chunk = chunk_id(5, 0)
            await world.write(chain, chunk, b"before")
            head, middle, tail = world.routing.serving(chain)
            data = b"the head's pending version"
            io = pb.WriteIO(
                chain_id=chain,
                chain_version=world.routing.chain(chain).version,
                chunk_id=chunk,
                kind=pb.REPLACE,
                length=len(data),
                chunk_size=CHUNK_SIZE,
                checksums=checksums(data, 0),
                target_id=middle,
                update_version=2,
                from_target=head,
                sequence=1000,
            )
            addresses = world.routing.addresses_of_target(middle)
            reply = await world.pool.call(addresses, WRITE, pb.WriteRequest(writes=[io], from_target=head), timeout_s=5, send=[data])
            assert (reply.results[0].status, reply.results[0].version) == (0, 2), reply.results[0].message
            assert await world.read(chain, chunk, 0, 100, target=tail) == data

    trio.run(main)


def test_what_was_synced_survives_the_power_loss_of_a_target_that_was_brought_up_to_date_since(tmp_path: Path) -> None:
    """It had got the chunks and not synced them, and as the last one serving it was what the others were then brought up to."""

    async def main() -> None:
        async with mini_cluster(tmp_path) as world:
            media: dict[str, Medium] = {}

            def open_disk(path: str) -> SimDisk:
                top, _, inside = path.partition("/disk-0")
                return SimDisk(medium=media.setdefault(top, Medium(1 << 40)), inside=inside.strip("/"))

            world.services = server.World(open_disk=open_disk)
            chain = await world.one_chain(2)
            chunk, data = chunk_id(5, 0), b"synced"
            world.stop(2)
            await world.write(chain, chunk, data)
            (alone,) = world.routing.serving(chain)
            where, version = world.routing.addresses_of_target(alone), world.routing.chain(chain).version
            try:  # who knows an older version of the chain may not know all who have the bytes
                await world.pool.call(where, method("Storage", "Sync"), pb.SyncRequest(target_ids=[alone], chain_versions=[version - 1]), timeout_s=5)
                raise AssertionError("another chain version was taken")
            except KvfsError as error:
                assert error.code == 401
            await world.pool.call(where, method("Storage", "Sync"), pb.SyncRequest(target_ids=[alone], chain_versions=[version]), timeout_s=5)
            await world.start(2)
            await world.settled(2)
            world.stop(1)
            with trio.fail_after(20):
                while len(world.routing.serving(chain)) > 1:
                    await world.link.wait_routing(world.routing.version)
            (medium,) = [medium for top, medium in media.items() if "storage-2" in top]
            SimDisk(medium=medium).crash()
            world.stop(2)
            await world.start(2)
            await world.start(1)
            await world.settled(2)
            assert await world.read(chain, chunk, 0, 100) == data

    trio.run(main)
