"""Flipped bits in stored chunks and in a target's own files: found by a scrub, mended from the chain; what no replica has is told, never read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from damage import begin, damages, data_file, find, flip, folder, number_of, scrub, status
from mini_cluster import CHUNK_SIZE, MiniCluster, mini_cluster

from kvfs.common.checksum import CHECKSUM_UNIT_BYTES, checksums
from kvfs.common.errors import ChecksumMismatch
from kvfs.common.ids import SPACE_BIT, block_id, chunk_id
from kvfs.common.wire import storage_pb2 as pb
from kvfs.storage.retention import records


async def pair(world: MiniCluster) -> tuple[int, list[int]]:
    chain = await world.one_chain(2)
    return chain, world.routing.serving(chain)


def test_a_flipped_bit_is_mended_from_the_replica(tmp_path: Path) -> None:
    """Anywhere in a chunk, first and last byte too, at head and tail; two replicas damaged in different units mend each other."""

    async def main() -> None:
        async with mini_cluster(tmp_path, lease_ms=5000) as world:
            chain, targets = await pair(world)
            length = 5 * CHECKSUM_UNIT_BYTES + 1234
            chunks = {chunk_id(9, index): os.urandom(length) for index in range(4)}
            for chunk, data in chunks.items():
                await world.write(chain, chunk, data)
            before = {target: await world.listing(target) for target in targets}
            places = [0, length - 1, 2 * CHECKSUM_UNIT_BYTES + 7, CHECKSUM_UNIT_BYTES]
            for place, data in zip(places, chunks.values(), strict=True):
                for target in targets:
                    path, at = data_file(world, target, data[:64])
                    flip(path, at + (place if target == targets[0] else (place + 2 * CHECKSUM_UNIT_BYTES) % length))
            with pytest.raises((ChecksumMismatch, AssertionError)):
                await world.read(chain, next(iter(chunks)), 0, length, target=targets[0])
            for target in targets:
                found = await scrub(world, target)
                assert (found.found, found.repaired, found.damaged) == (4, 4, 0)
                assert found.checked_chunks == 4 and found.checked_bytes == 4 * length
            for chunk, data in chunks.items():
                for target in targets:
                    assert await world.read(chain, chunk, 0, length, target=target) == data
            assert {target: await world.listing(target) for target in targets} == before, "no version, length or checksum has changed"
            assert await world.assert_identical(chain) == 4
            assert (await scrub(world, targets[0])).found == 0

    trio.run(main)


def test_what_no_replica_has_is_told_and_never_read(tmp_path: Path) -> None:
    async def main() -> None:
        async with mini_cluster(tmp_path, lease_ms=5000) as world:
            chain, targets = await pair(world)
            lost, written_anew = chunk_id(9, 0), chunk_id(9, 1)
            data = os.urandom(100_000)
            for chunk in (lost, written_anew):
                await world.write(chain, chunk, data)
            for target in targets:
                for at in (70_000, 300):
                    path, start = data_file(world, target, data[-10_000:])
                    flip(path, start - 90_000 + at)  # first the one found first
                other = folder(world, target) / "data"
                assert other.is_dir()
            found = await scrub(world, targets[0])
            assert (found.found, found.repaired, found.damaged) == (1, 0, 1)
            (damage,) = await damages(world, targets[0])
            assert damage.chunk_id in (lost, written_anew)
            for target in targets:
                with pytest.raises((ChecksumMismatch, AssertionError)):
                    await world.read(chain, damage.chunk_id, 0, 100_000, target=target)
                with pytest.raises(ChecksumMismatch):
                    await world.read(chain, damage.chunk_id, 10, 100, target=target)
            # Written anew as a whole it is damaged no more.
            await world.write(chain, damage.chunk_id, data)
            assert await damages(world, targets[0]) == []
            assert (await scrub(world, targets[0])).damaged == 0

    trio.run(main)


def test_a_damaged_block_of_a_space_is_mended(tmp_path: Path) -> None:
    """It lies in a slab, and is written whole."""

    async def main() -> None:
        async with mini_cluster(tmp_path, lease_ms=5000) as world:
            chain, targets = await pair(world)
            block = block_id(SPACE_BIT | 77, b"d" * 16)
            data = os.urandom(70_000)
            io = pb.WriteIO(chunk_id=block, kind=pb.CREATE, length=len(data), chunk_size=CHUNK_SIZE, checksums=checksums(data, 0), slab_bytes=73_728)
            (result,) = await world.write_once(chain, [io], [data])
            assert result.status == 0
            path, at = data_file(world, targets[1], data[:100])
            assert path.name.startswith("73728.")
            flip(path, at + 69_999)
            found = await scrub(world, targets[1])
            assert (found.found, found.repaired) == (1, 1)
            assert await world.read(chain, block, 0, len(data), target=targets[1]) == data

    trio.run(main)


def test_a_chunk_that_is_written_while_it_is_mended(tmp_path: Path) -> None:
    """Writes go on, some of them into the damaged chunks: what is read afterwards is what was written last, on both replicas."""

    async def main() -> None:
        async with mini_cluster(tmp_path, lease_ms=5000) as world:
            chain, targets = await pair(world)
            chunks = [chunk_id(9, index) for index in range(8)]
            model = {chunk: bytearray(os.urandom(200_000)) for chunk in chunks}
            for chunk, data in model.items():
                await world.write(chain, chunk, bytes(data))
            for chunk in chunks:
                path, at = data_file(world, targets[1], bytes(model[chunk][:64]))
                flip(path, at + 150_000)
            async with trio.open_nursery() as nursery:

                async def write(chunk: bytes) -> None:
                    for turn in range(10):
                        part = os.urandom(1000)
                        where = len(model[chunk]) if turn % 2 else turn * 1000
                        await world.write(chain, chunk, part, where)
                        model[chunk][where : where + 1000] = part

                for chunk in chunks:
                    nursery.start_soon(write, chunk)
                found = await scrub(world, targets[1])
            assert found.damaged == 0
            await scrub(world, targets[1])
            for chunk, data in model.items():
                for target in targets:
                    assert await world.read(chain, chunk, 0, len(data), target=target) == data
            assert await world.assert_identical(chain) == len(chunks)

    trio.run(main)


def test_own_files_are_written_anew(tmp_path: Path) -> None:
    """Superblock, journal and node.json: each is known to the process, and a restart finds them whole."""

    async def main() -> None:
        async with mini_cluster(tmp_path, lease_ms=5000) as world:
            chain, targets = await pair(world)
            data = os.urandom(5000)
            await world.write(chain, chunk_id(9, 0), data)
            target = targets[0]
            home = folder(world, target)
            node_file = home.parents[1] / "node.json"
            originals = {path: path.read_bytes() for path in (home / "superblock", node_file)}
            flip(home / "superblock", 24)
            flip(node_file, node_file.read_bytes().find(b"node_uuid") + 15, mask=3)
            (segment,) = (home / "journal").iterdir()
            flip(segment, find(segment, chunk_id(9, 0)))
            assert (await scrub(world, target)).found == 3
            assert {path: path.read_bytes() for path in originals} == originals
            assert (await scrub(world, target)).found == 0
            number = number_of(world, target)
            world.stop(number)
            await world.start(number)
            await world.settled(2)
            for each in targets:
                assert await world.read(chain, chunk_id(9, 0), 0, 5000, target=each) == data

    trio.run(main)


@pytest.mark.parametrize("at", [5, -3], ids=["header", "touch"])
def test_a_damaged_retention_log_is_written_anew(tmp_path: Path, at: int) -> None:
    """By the next touch that is written down; the order of blocks is known to the process."""

    async def main() -> None:
        async with mini_cluster(tmp_path, lease_ms=5000) as world:
            chain, targets = await pair(world)

            def is_whole(data: bytes) -> bool:
                found = records.replay(data)
                return found.problem is None and found.end == len(data)

            async def put(number: int) -> None:
                block, data = block_id(SPACE_BIT | 77, bytes([number]) * 16), os.urandom(5000)
                io = pb.WriteIO(chunk_id=block, kind=pb.CREATE, length=5000, chunk_size=CHUNK_SIZE, checksums=checksums(data, 0), slab_bytes=8192)
                (result,) = await world.write_once(chain, [io], [data])
                assert result.status == 0

            await put(1)
            log = folder(world, targets[0]) / "retention.log"
            with trio.fail_after(10):
                while not log.exists():
                    await trio.sleep(0.05)
            flip(log, at % log.stat().st_size)
            assert not is_whole(log.read_bytes())
            assert (await scrub(world, targets[0])).found == 1
            await put(2)
            with trio.fail_after(10):
                while not is_whole(log.read_bytes()):
                    await trio.sleep(0.05)
            assert (await scrub(world, targets[0])).found == 0
            told = records.replay(log.read_bytes())
            assert {digest for space in told.spaces.values() for digest in space.touched} == {b"\1" * 16, b"\2" * 16}

    trio.run(main)


def test_a_pass_in_the_background_keeps_to_its_rate_and_goes_on_after_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        async with mini_cluster(tmp_path, lease_ms=5000) as world:
            world.settings = {"scrub_interval_s": 3600.0, "scrub_bytes_per_s": 16 << 20}
            chain, targets = await pair(world)
            for index in range(16):
                await world.write(chain, chunk_id(9, index), os.urandom(CHUNK_SIZE))
            target = targets[0]
            await begin(world, target, at_once=False)
            began_s = trio.current_time()
            with trio.fail_after(10):
                while (await status(world, target)).checked_bytes < 8 << 20:
                    await trio.sleep(0.02)
            took_s = trio.current_time() - began_s
            assert 0.2 < took_s < 5, "the second piece of 4 MiB comes a quarter of a second after the first"
            number = number_of(world, target)
            world.stop(number)
            await world.start(number)
            await world.settled(2)
            with trio.fail_after(10):
                while not (found := await status(world, target)).passes:
                    assert found.running and found.checked_bytes >= 8 << 20, "it goes on where it was"
                    await trio.sleep(0.02)
            assert (found.checked_chunks, found.checked_bytes) == (16, 16 << 20)

    trio.run(main)
