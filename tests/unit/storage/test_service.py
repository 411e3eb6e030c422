"""The storage service over real sockets: writes, reads, removal, replicas."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import trio
from mini_cluster import READ, MiniCluster, mini_cluster

from kvfs.common.checksum import checksums, verify
from kvfs.common.errors import ChainVersionMismatch, DeadlineExceeded, InvalidArgument, NotPermitted, TargetNotServing
from kvfs.common.ids import SPACE_BIT, block_id, chunk_id
from kvfs.common.wire import base_pb2 as base
from kvfs.common.wire import storage_pb2 as pb
from kvfs.common.wire.channel import ChannelPool
from kvfs.common.wire.service import Method, method
from kvfs.storage.forwards import Forwarder


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_write_and_read(tmp_path: Path, replicas: int, shared: bool) -> None:
    async def main() -> None:
        async with mini_cluster(tmp_path, shared=shared) as world:
            chain = await world.one_chain(replicas)
            data = bytes(range(256)) * 4096
            result = await world.write(chain, chunk_id(5, 0), data)
            assert (result.version, result.chunk_length) == (1, len(data))
            result = await world.write(chain, chunk_id(5, 0), b"hello", offset=100_000)
            assert result.version == 2
            expected = data[:100_000] + b"hello" + data[100_005:]
            for target in world.routing.serving(chain):
                assert await world.read(chain, chunk_id(5, 0), 0, len(data), target=target) == expected
                assert await world.read(chain, chunk_id(5, 0), 99_990, 30, target=target) == expected[99_990:100_020]
                assert await world.read(chain, chunk_id(5, 1), 0, 10, target=target) == b""
            assert await world.assert_identical(chain) == 1
            await world.write(chain, chunk_id(5, 0), b"", kind=pb.REMOVE)
            assert await world.read(chain, chunk_id(5, 0), 0, 10) == b""

    trio.run(main)


def test_requests_that_make_no_sense_are_refused_one_by_one(tmp_path: Path) -> None:
    async def main() -> None:
        async with mini_cluster(tmp_path) as world:
            chain = await world.one_chain(2)
            head = world.routing.head(chain)
            where = world.routing.addresses_of_target(head)
            reads = [pb.ReadIO(chain_id=chain, target_id=head, chunk_id=wrong, length=4) for wrong in (b"", b"short", bytes(99))]
            reply = await world.pool.call(where, READ, pb.ReadRequest(reads=reads), timeout_s=5, receive=[bytearray(4)] * 3)
            assert [result.status for result in reply.results] == [InvalidArgument.code] * 3
            results = await world.write_once(chain, [pb.WriteIO(chunk_id=chunk_id(5, 0), kind=99, chunk_size=10), pb.WriteIO(chunk_id=b"")], [])  # type: ignore[arg-type]
            assert [result.status for result in results] == [InvalidArgument.code] * 2
            # What LastChunk could not tell: a chunk far behind any file's end, and the blocks of a space, whose ids are digests.
            far = pb.WriteIO(chunk_id=chunk_id(5, 1 << 64), length=1, chunk_size=10, checksums=checksums(b"x", 0))
            (result,) = await world.write_once(chain, [far], [b"x"])
            assert result.status == InvalidArgument.code
            # Found by a million mutated frames (seed 2026): one that said to come from a replica was taken, and LastChunk failed ever after.
            far.chain_id, far.target_id = chain, world.routing.tail(chain)
            forged = pb.WriteRequest(writes=[far], from_target=head)
            reply = await world.pool.call(
                world.routing.addresses_of_target(far.target_id), method("Storage", "Write"), forged, timeout_s=5, send=[b"x"]
            )
            assert [result.status for result in reply.results] == [InvalidArgument.code]
            block = pb.WriteIO(chunk_id=block_id(SPACE_BIT | 5, b"d" * 16), kind=pb.CREATE, length=1, chunk_size=10, checksums=checksums(b"x", 0))
            block.slab_bytes = 4096
            (result,) = await world.write_once(chain, [block], [b"x"])
            assert result.status == 0
            with pytest.raises(InvalidArgument):
                ask = pb.LastChunkRequest(chain_id=chain, target_id=head, inode=SPACE_BIT | 5)
                await world.pool.call(where, method("Storage", "LastChunk"), ask, timeout_s=5)

    trio.run(main)


def test_a_sync_done_of_who_is_not_the_predecessor_leaves_no_tags(tmp_path: Path) -> None:
    """Its tags were stored before the core was asked: a forged or late message made a later update of that channel count as done."""

    async def main() -> None:
        async with mini_cluster(tmp_path) as world:
            chain = await world.one_chain(2)
            head, tail = world.routing.serving(chain)
            client_id, channel = world.pool.identity.client_id, 77
            tag = base.Tag(client_id=client_id, channel=channel, sequence=1)
            version = world.routing.chain(chain).version
            for target, before, known in ((tail, head, version - 1), (tail, tail, version), (head, tail, version)):
                done = pb.SyncDoneRequest(chain_id=chain, chain_version=known, target_id=target, from_target=before)
                done.tags.add(tag=tag, result=(9).to_bytes(8, "little"))
                with pytest.raises((ChainVersionMismatch, TargetNotServing)):
                    await world.pool.call(world.routing.addresses_of_target(target), method("Storage", "SyncDone"), done, timeout_s=5)
            io = pb.WriteIO(chunk_id=chunk_id(5, 0), length=5, chunk_size=1 << 20, checksums=checksums(b"hello", 0), tag=tag)
            (result,) = await world.write_once(chain, [io], [b"hello"])
            assert (result.status, result.version) == (0, 1)
            assert await world.read(chain, chunk_id(5, 0), 0, 5) == b"hello"

    trio.run(main)


async def read_place(world: MiniCluster, chain: int, target: int, offset: int, length: int) -> tuple[int, bytes]:
    """(version, bytes) as a reader of the data files finds them; version 0: the place went stale meanwhile."""
    io = pb.ReadIO(chain_id=chain, target_id=target, chunk_id=chunk_id(5, 0), offset=offset, length=length)
    addresses = world.routing.addresses_of_target(target)
    reply = await world.pool.call(addresses, READ, pb.ReadRequest(reads=[io], places=True), timeout_s=5)
    (result,) = reply.results
    assert result.status == 0
    files = await world.pool.borrowed(addresses, timeout_s=5)
    assert files is not None
    file = files.get(result.file)
    assert file is not None
    start = offset - offset % 32768
    end = min(-(-(offset + length) // 32768) * 32768, result.chunk_length)
    units = memoryview(bytearray(end - start))
    assert file.read_into([units[: result.stored]], result.file_offset) == result.stored
    if not verify(units, start, result.checksums):
        return 0, b""
    return result.version, bytes(units[offset - start : offset - start + result.length])


def test_places_are_told_of_what_the_chain_has_committed(tmp_path: Path) -> None:
    """Asked of every replica while the chunk is written: never an older version than one that was acknowledged before the question."""

    async def main() -> None:
        async with mini_cluster(tmp_path) as world:
            chain = await world.one_chain(3)
            acknowledged, writing = 0, True
            size = 200_000

            async def write() -> None:
                nonlocal acknowledged, writing
                for version in range(1, 40):
                    result = await world.write(chain, chunk_id(5, 0), bytes([version]) * size)
                    assert result.version == version
                    acknowledged = version
                writing = False

            right = 0

            async def read(target: int) -> None:
                nonlocal right
                while writing:
                    before = acknowledged
                    version, data = await read_place(world, chain, target, 70_000, 100_000)
                    if version:
                        assert version >= before and data == bytes([version]) * 100_000
                        right += 1

            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                while not acknowledged:
                    await trio.sleep(0.001)
                for target in world.routing.serving(chain):
                    nursery.start_soon(read, target)
            assert right > 30

    trio.run(main)


def test_places_of_a_question_do_not_wait_for_an_update_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tail is silent, and the chain does not know it yet: one chunk has an update under way, the other has not."""

    async def silent(*arguments: object) -> NoReturn:
        await trio.sleep(3)
        raise DeadlineExceeded("silence")

    async def main() -> None:
        async with mini_cluster(tmp_path) as world:
            chain = await world.one_chain(2)
            for index in (0, 1):
                await world.write(chain, chunk_id(5, index), b"x" * 1000)
            head = world.routing.head(chain)
            monkeypatch.setattr(Forwarder, "send", silent)
            monkeypatch.setattr(ChannelPool, "call", silent_versions(ChannelPool.call, silent))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(world.write, chain, chunk_id(5, 0), b"y" * 1000)
                await trio.sleep(0.2)
                request = pb.ReadRequest(places=True)
                for index in (0, 1):
                    request.reads.add(chain_id=chain, target_id=head, chunk_id=chunk_id(5, index), offset=0, length=1000)
                began_s = trio.current_time()
                reply = await world.pool.call(world.routing.addresses_of_target(head), READ, request, timeout_s=5)
                assert trio.current_time() - began_s < 1.5
                assert [bool(result.status) for result in reply.results] == [True, False]
                nursery.cancel_scope.cancel()

    trio.run(main)


def silent_versions(call: Callable[..., Awaitable[Any]], silent: Callable[[], Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Every call but that for committed versions, which ends when its time is up."""

    async def some(pool: ChannelPool, addresses: object, what: Method, *arguments: Any, timeout_s: float, **more: Any) -> Any:
        if what.full_name.endswith("Version"):
            with trio.move_on_after(timeout_s):
                await silent()
            raise DeadlineExceeded("silence")
        return await call(pool, addresses, what, *arguments, timeout_s=timeout_s, **more)

    return some


@pytest.mark.parametrize("shared", [False, True])
def test_places_are_told_to_nobody_who_may_not_read_the_files(tmp_path: Path, shared: bool) -> None:
    async def main() -> None:
        async with mini_cluster(tmp_path, shared=shared) as world:
            world.settings["direct_reads"] = not shared
            chain = await world.one_chain(1)
            await world.write(chain, chunk_id(5, 0), b"secret")
            target = world.routing.tail(chain)
            io = pb.ReadIO(chain_id=chain, target_id=target, chunk_id=chunk_id(5, 0), offset=0, length=6)
            with pytest.raises(NotPermitted, match="ask for the bytes"):
                await world.pool.call(world.routing.addresses_of_target(target), READ, pb.ReadRequest(reads=[io], places=True), timeout_s=5)
            assert await world.read(chain, chunk_id(5, 0), 0, 6) == b"secret"

    trio.run(main)
