"""KV-cache blocks on real storage services: made once, read whole or not at all, in a slab class of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from block_world import BLOCK_BYTES, INODE, SLAB_BYTES, Blocks, block_world, client_of, content, digest

from kvfs.client.storage_blocks import Probe
from kvfs.client.storage_reads import ChunkRead
from kvfs.client.storage_writes import ChunkWrite, WriteDone
from kvfs.common.errors import AlreadyExists, InvalidArgument, KvfsError, UnknownChain
from kvfs.common.ids import block_id, chunk_id
from kvfs.common.wire import storage_pb2 as pb


@pytest.mark.parametrize("replicas", [1, 3])
def test_put_probe_get(tmp_path: Path, replicas: int) -> None:
    async def main() -> None:
        async with block_world(tmp_path, replicas=replicas) as blocks:
            assert await blocks.present(range(9)) == [False] * 9
            done = await blocks.put([0, 1, 8], [content(0), content(1, 5000), content(8)])
            assert all(isinstance(one, WriteDone) for one in done)
            assert await blocks.present(range(9)) == [True, True, False, False, False, False, False, False, True]
            assert await blocks.get([0, 1, 2, 8]) == [content(0), content(1, 5000), None, content(8)]
            # Made once: the second is told so, and the first one's bytes stay.
            [again, new] = await blocks.put([0, 2], [b"x" * 100, content(2)])
            assert isinstance(again, AlreadyExists) and isinstance(new, WriteDone)
            assert await blocks.get([0]) == [content(0)]
            assert await blocks.world.assert_identical(blocks.chain) == 4
            stats = await blocks.stats()
            assert len(stats) == replicas
            for one in stats.values():
                assert (one.blocks, one.bytes, one.block_space) == (4, 3 * BLOCK_BYTES + 5000, 4 * SLAB_BYTES)
                assert one.allocated_bytes % SLAB_BYTES == 0 and one.allocated_bytes >= one.block_space
            assert sum(one.stored for one in stats.values()) == 4 and sum(one.present for one in stats.values()) == 1
            assert [one.head for one in stats.values()].count(True) == 1

    trio.run(main)


def test_two_writers_of_one_block_never_mix(tmp_path: Path) -> None:
    async def main() -> None:
        async with block_world(tmp_path, replicas=2) as blocks, trio.open_nursery() as nursery:
            other = Blocks(blocks.world, client_of(blocks.world, nursery))
            keys = range(40)
            mine, yours = [b"m" * 9000] * 40, [b"y" * 8000] * 40
            outcomes: list[list[WriteDone | KvfsError]] = [[], []]

            async def put(place: int, who: Blocks, contents: list[bytes]) -> None:
                for key in keys:
                    outcomes[place] += await who.put([key], [contents[key]])

            async with trio.open_nursery() as both:
                both.start_soon(put, 0, blocks, mine)
                both.start_soon(put, 1, other, yours)
            found = await blocks.get(keys)
            for key in keys:
                first, second = outcomes[0][key], outcomes[1][key]
                assert isinstance(first, WriteDone) != isinstance(second, WriteDone), "exactly one of them made it"
                assert found[key] == (mine if isinstance(first, WriteDone) else yours)[key]
            assert await blocks.world.assert_identical(blocks.chain) == 40
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_block_is_never_changed_and_what_is_wrong_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with block_world(tmp_path) as blocks:
            await blocks.put([1])
            name = block_id(INODE, digest(1))
            refused = await blocks.client.write_each(
                [
                    ChunkWrite(blocks.chain, name, 0, 5, BLOCK_BYTES, b"hello"),
                    ChunkWrite(blocks.chain, name, 0, 5, BLOCK_BYTES, None, pb.TRUNCATE),
                    ChunkWrite(blocks.chain, chunk_id(5, 0), 0, 5, BLOCK_BYTES, b"hello", pb.CREATE, SLAB_BYTES),
                    ChunkWrite(blocks.chain, block_id(INODE, digest(2)), 1, 5, BLOCK_BYTES, b"hello", pb.CREATE, SLAB_BYTES),
                    ChunkWrite(blocks.chain, block_id(INODE, digest(3)), 0, 5000, BLOCK_BYTES, b"h" * 5000, pb.CREATE, 4096),
                    ChunkWrite(blocks.chain, block_id(INODE, digest(4)), 0, 5, BLOCK_BYTES, b"hello", pb.CREATE, 5000),
                    ChunkWrite(blocks.chain, block_id(INODE, digest(5)), 0, 5, 4, b"hello", pb.CREATE, SLAB_BYTES),
                    ChunkWrite(blocks.chain, block_id(INODE, digest(6)), 0, 5, BLOCK_BYTES, b"hello", pb.CREATE, 0),
                ]
            )
            assert [type(error) for error in refused] == [InvalidArgument] * 8
            assert await blocks.get([1, 2, 3, 4, 5]) == [content(1), None, None, None, None]
            await blocks.client.write([ChunkWrite(blocks.chain, name, 0, 0, 1, None, pb.REMOVE)])
            assert await blocks.get([1]) == [None]
            [stats] = (await blocks.stats()).values()
            assert (stats.blocks, stats.removed, stats.hits, stats.misses) == (0, 1, 1, 5)

    trio.run(main)


def test_trouble_of_one_is_an_outcome_and_not_an_exception(tmp_path: Path) -> None:
    async def main() -> None:
        async with block_world(tmp_path) as blocks:
            await blocks.put([1])
            found, unknown, crooked, none = await blocks.client.probe(
                [
                    Probe(blocks.chain, INODE, digest(1)),
                    Probe(99, INODE, digest(1)),
                    Probe(blocks.chain, INODE, b"short"),
                    Probe(blocks.chain, INODE, b""),
                ],
                deadline_s=0.3,
            )
            assert (found, none) == (b"\x01", b"")
            assert isinstance(unknown, KvfsError) and isinstance(crooked, InvalidArgument)
            assert isinstance((await blocks.client.probe([Probe(blocks.chain, 5, digest(1))]))[0], InvalidArgument), "a file is no space"
            buffer = memoryview(bytearray(BLOCK_BYTES))
            name = block_id(INODE, digest(1))
            right, wrong = await blocks.client.read_each(
                [ChunkRead(blocks.chain, name, 0, BLOCK_BYTES, buffer), ChunkRead(99, name, 0, 10, memoryview(bytearray(10)))], deadline_s=0.3
            )
            assert not isinstance(right, KvfsError) and bytes(right.view) == content(1)
            assert isinstance(wrong, KvfsError) and isinstance(wrong.__cause__ or wrong, UnknownChain)

    trio.run(main)


def test_many_digests_in_one_probe(tmp_path: Path) -> None:
    async def main() -> None:
        async with block_world(tmp_path) as blocks:
            await blocks.put(range(0, 64, 3))
            keys = [key % 64 for key in range(20_011)]
            assert await blocks.present(keys, touch=True) == [key % 3 == 0 for key in keys]

    trio.run(main)


def test_a_dropped_space_goes_in_batches_and_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with block_world(tmp_path, replicas=2) as blocks:
            await blocks.put(range(250))
            other = ChunkWrite(blocks.chain, block_id(INODE + 1, digest(1)), 0, 5, BLOCK_BYTES, b"other", pb.CREATE, SLAB_BYTES)
            await blocks.client.write([other, ChunkWrite(blocks.chain, chunk_id(5, 0), 0, 4, 100, b"file")])
            assert await blocks.client.remove_range(blocks.chain, INODE, 0) == (250, 0)
            assert not any(await blocks.present(range(250)))
            assert [one.blocks for one in (await blocks.stats()).values()] == [0, 0]
            assert await blocks.world.assert_identical(blocks.chain) == 2

    trio.run(main)


def test_blocks_are_found_again_after_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        async with block_world(tmp_path, replicas=2) as blocks:
            await blocks.put(range(20))
            for number in (1, 2):
                blocks.world.stop(number)
            for number in (1, 2):
                await blocks.world.start(number)
            await blocks.world.settled(2)
            assert await blocks.present(range(21)) == [True] * 20 + [False]
            assert await blocks.get(range(20)) == [content(key) for key in range(20)]
            for stats in (await blocks.stats()).values():
                assert (stats.blocks, stats.block_space) == (20, 20 * SLAB_BYTES)

    trio.run(main)


def test_a_returning_replica_gets_blocks_in_their_class(tmp_path: Path) -> None:
    async def main() -> None:
        async with block_world(tmp_path, replicas=2) as blocks:
            await blocks.put([1, 2])
            blocks.world.stop(2)
            with trio.fail_after(20):
                while len(blocks.world.routing.serving(blocks.chain)) != 1:
                    await trio.sleep(0.02)
            await blocks.put([3, 4])
            await blocks.client.write([ChunkWrite(blocks.chain, block_id(INODE, digest(1)), 0, 0, 1, None, pb.REMOVE)])
            await blocks.world.start(2)
            await blocks.world.settled(2)
            assert await blocks.world.assert_identical(blocks.chain) == 3
            listed = [await blocks.world.listing(target) for target in blocks.world.routing.serving(blocks.chain)]
            assert [[info.allocated for info in one] for one in listed] == [[SLAB_BYTES] * 3] * 2
            for stats in (await blocks.stats()).values():
                assert (stats.blocks, stats.block_space) == (3, 3 * SLAB_BYTES)

    trio.run(main)
