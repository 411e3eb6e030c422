"""Blocks: when they may be used again, who takes freed space, and what a full target does."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from engine_world import IDENTITY, SMALL, LogDisk, cid, content_of, noise, open_engine, remove, write

from kvfs.common.boundary.clock import SystemClock
from kvfs.common.boundary.real_disk import RealDisk
from kvfs.common.checksum import checksums
from kvfs.common.errors import InvalidArgument, NoSpace
from kvfs.common.sim.disk import SimDisk
from kvfs.storage.engine.classes import block_bytes_for, data_file_name, parse_data_file_name
from kvfs.storage.engine.config import EngineConfig
from kvfs.storage.engine.engine import ChunkEngine
from kvfs.storage.engine.requests import Tag, Update, UpdateKind

A, B, C = cid(0), cid(1), cid(2)
KIB = 1 << 10


def test_classes() -> None:
    assert [block_bytes_for(length) // KIB for length in (1, 65536, 65537, 1 << 20, (1 << 20) + 1, 64 << 20)] == [64, 64, 128, 1024, 2048, 65536]
    for bad in (0, -1, (64 << 20) + 1):
        with pytest.raises(ValueError):
            block_bytes_for(bad)
    assert parse_data_file_name(data_file_name(65536, 3).removeprefix("data/")) == (65536, 3)
    assert [parse_data_file_name(name) for name in ("x", "12", "5.1", "4096.x", "lost+found", "0.0")] == [None] * 6


def test_a_freed_block_waits_for_a_sync() -> None:
    engine = open_engine(LogDisk())
    first = engine.apply(write(A, 0, b"1" * 1000), 1).block
    engine.apply(write(A, 0, b"2" * 1000), 1)
    assert engine.apply(write(B, 0, b"3" * 1000), 1).block != first, "after a power loss the index may still point there"
    engine.sync()
    later = {engine.apply(write(cid(index), 0, b"x"), 1).block for index in range(3, 8)}
    assert first in later


def test_a_sync_releases_only_what_was_freed_before_it_began() -> None:
    engine = open_engine(LogDisk())
    block = engine.apply(write(A, 0, b"x"), 1).block
    allocator = engine._ledger.allocator
    allocator.quarantine(block, 50)
    allocator.release(50)
    assert block in allocator.waiting()
    allocator.release(51)
    assert block not in allocator.waiting()


def test_blocks_of_removed_chunks_come_back_when_the_journal_is_synced() -> None:
    """Without a sync of the data: what took no one's place needs none. An overwritten block goes on waiting."""
    disk = LogDisk()
    engine = open_engine(disk, replace(SMALL, removed_bytes=100 << 10))
    overwritten = engine.apply(write(A, 0, b"1" * 1000), 1).block
    engine.apply(write(A, 0, b"2" * 1000), 1)
    removed = {engine.apply(write(chunk, 0, noise(1, 60_000)), 1).block for chunk in (B, C)}
    disk.start_log()
    engine.remove([B, C])
    synced = [name.partition("/")[0] for what, name, _, _ in disk.log if what == "sync"]
    assert synced == ["journal"]
    later = {engine.apply(write(cid(index), 0, b"x"), 1).block for index in range(3, 9)}
    assert removed <= later and overwritten not in later


def test_a_target_keeps_some_empty_space_for_its_next_writes_and_gives_the_rest_back() -> None:
    disk = LogDisk()
    engine = open_engine(disk, replace(SMALL, keep_empty_bytes=512 << 10))
    for index in range(32):
        engine.apply(write(cid(index), 0, noise(index, 60_000)), 1)
    engine.remove([cid(index) for index in range(32)])
    engine.sync()
    assert engine._ledger.allocator.group_bytes_total == 512 << 10
    assert engine.space().used_bytes == 0


def test_a_target_at_rest_keeps_nothing_that_it_does_not_need(tmp_path: Path) -> None:
    """On a real disk, by its own thread: what was removed goes back, what is stored stays."""
    engine = ChunkEngine(RealDisk(tmp_path), SystemClock(), IDENTITY, EngineConfig(rest_s=0.1, index_bytes=64 << 20))
    for index in range(40):
        engine.apply(write(cid(index), 0, noise(index, 1_000_000)), 1)
    full = blocks_on_disk(tmp_path)
    engine.remove([cid(index) for index in range(1, 40)])
    give_up = time.monotonic() + 20
    while blocks_on_disk(tmp_path) > full / 2:
        assert time.monotonic() < give_up, (blocks_on_disk(tmp_path), full)
        time.sleep(0.05)
    assert engine.space().chunks == 1 and not engine.check(read_data=True).problems
    engine.apply(write(cid(50), 0, noise(50, 1_000_000)), 1)
    engine.close()


def blocks_on_disk(path: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in (path / "data").iterdir())


def test_a_block_is_not_used_again_while_a_reader_is_inside() -> None:
    engine = open_engine(LogDisk())
    block = engine.apply(write(A, 0, b"1" * 1000), 1).block
    allocator = engine._ledger.allocator
    allocator.pin(block)
    engine.apply(remove(A), 1)
    engine.sync()
    assert block in allocator.waiting()
    assert block not in {engine.apply(write(cid(index), 0, b"x"), 1).block for index in range(3, 12)}
    allocator.unpin(block)
    assert block not in allocator.waiting() and not allocator.in_use(block)


def test_a_slow_reader_sees_the_version_it_began_with() -> None:
    """The data read stands still in the middle while the chunk is overwritten, synced, and its old block wanted by others."""
    disk = LogDisk()
    engine = open_engine(disk)
    old = noise(1, 100_000)
    engine.apply(write(A, 0, old), 1)
    inside, go_on = threading.Event(), threading.Event()
    real_get = engine._ledger.files.get

    def slow_get(block_bytes: int, number: int) -> object:
        if threading.current_thread() is reader:
            inside.set()
            assert go_on.wait(10)
        return real_get(block_bytes, number)

    view = memoryview(bytearray(100_000))
    found: list[object] = []
    reader = threading.Thread(target=lambda: found.append(engine.read(A, 0, 100_000, view)))
    engine._ledger.files.get = slow_get  # type: ignore[method-assign, assignment]
    reader.start()
    assert inside.wait(10)
    for step in range(4):
        engine.apply(write(A, 0, noise(9, 100_000)), 1)
        engine.apply(write(cid(5 + step), 0, noise(10, 100_000)), 1)
        engine.sync()
    go_on.set()
    reader.join()
    assert found and bytes(view) == old


def test_freed_space_goes_to_other_classes() -> None:
    """A target of four groups, filled with small blocks, emptied, filled with large ones."""
    disk = LogDisk()
    engine = open_engine(disk, replace(SMALL, capacity_bytes=1 << 20))
    for index in range(16):
        engine.apply(write(cid(index), 0, noise(index, 60_000)), 1)
    with pytest.raises(NoSpace):
        engine.apply(write(cid(16), 0, b"x"), 1)
    assert engine.space().free_bytes == 0
    engine.remove(map(cid, range(16)))
    for index in range(4):
        engine.apply(write(cid(index), 0, noise(index, 250_000)), 1)
    with pytest.raises(NoSpace):
        engine.apply(write(cid(4), 0, noise(1, 250_000)), 1)
    assert not engine.check(read_data=True).problems
    assert engine.space() == open_engine(disk, replace(SMALL, capacity_bytes=1 << 20)).space()


def test_a_full_target_refuses_before_a_byte_is_written_and_can_still_remove() -> None:
    disk = LogDisk()
    engine = open_engine(disk)
    kept = noise(1, 200_000)
    engine.apply(write(A, 0, kept), 1)
    disk.full = True
    with pytest.raises(NoSpace):
        engine.prepare(write(B, 0, noise(2, 100_000)))
    assert engine.get(B) is None
    assert content_of(engine, A) == kept
    engine.apply(remove(A), 1)
    engine.apply(write(C, 0, noise(3, 200_000)), 1)
    assert content_of(engine, C) == noise(3, 200_000), "removed space is usable at once"
    assert not engine.check(read_data=True).problems


def test_an_index_without_room_refuses_writes_but_not_removals() -> None:
    disk = LogDisk()
    engine = open_engine(disk)
    for index in range(6):
        engine.apply(write(cid(index), 0, noise(index, 1000)), 1)
    disk.full = True
    with pytest.raises(NoSpace, match="index"):
        for step in range(1000):
            engine.apply(write(cid(step % 6), 0, noise(step, 1000)), 1)
    engine.apply(remove(cid(5)), 1)
    assert engine.failed is None
    kept = {index: content_of(engine, cid(index)) for index in range(6)}
    assert kept == {index: content_of(open_engine(disk.copy()), cid(index)) for index in range(6)}, "a kill now loses nothing"
    disk.full = False
    for index in range(40):
        engine.apply(remove(cid(100 + index)), 1)
        engine.commit([], 1, [Tag(b"c" * 16, index, 1)])
    engine.apply(write(cid(0), 0, b"again"), 1)
    engine.close()
    assert not open_engine(disk).check(read_data=True).problems


def test_overwriting_does_not_eat_the_disk() -> None:
    """Quarantine ends by itself: a file overwritten again and again without a sync needs a bounded number of blocks."""
    disk = LogDisk()
    engine = open_engine(disk, replace(SMALL, capacity_bytes=2 << 20))
    for step in range(50):
        engine.apply(write(A, 0, noise(step, 250_000)), 1)
    assert content_of(engine, A) == noise(49, 250_000)
    engine = open_engine(disk, replace(SMALL, quarantine_bytes=1 << 20))
    for step in range(30):
        engine.apply(write(A, 0, noise(step, 250_000)), 1)
    assert engine.space().used_bytes == 256 << 10
    assert engine._ledger.allocator.group_bytes_total <= 3 << 20


def test_a_target_that_is_mostly_quarantine_syncs_by_itself() -> None:
    engine = open_engine(LogDisk())
    data = noise(1, 1 << 20)
    engine.apply(write(cid(1), 0, data), 1)
    for _ in range(100):
        engine.apply(write(A, 0, data), 1)
    assert engine._ledger.allocator.quarantined_bytes <= 65 << 20
    assert engine._ledger.allocator.group_bytes_total <= 70 << 20


def test_the_reserve_is_kept() -> None:
    disk = LogDisk()
    disk.capacity_bytes = 2 << 20
    engine = open_engine(disk, replace(SMALL, reserve_bytes=1 << 20))
    with pytest.raises(NoSpace, match="reserve"):
        for index in range(100):
            engine.apply(write(cid(index), 0, noise(index, 60_000)), 1)
    assert disk.space()[1] >= 1 << 20
    space = engine.space()
    assert space.capacity_bytes == space.used_bytes + space.free_bytes <= 1 << 20


def test_opening_gives_back_what_no_chunk_holds() -> None:
    disk = LogDisk()
    engine = open_engine(disk)
    for index in range(12):
        engine.apply(write(cid(index), 0, noise(index, 60_000)), 1)
    for index in range(12):
        engine.prepare(write(cid(index), 0, noise(index, 50_000)))
    engine.remove(map(cid, range(4, 12)))
    engine.drop_pending([cid(0), cid(1), cid(2), cid(3)])
    reopened = open_engine(disk)
    assert reopened.space().used_bytes == 4 * 64 * KIB
    assert not reopened.check(read_data=True).problems


def test_threads_on_their_own_chunks(tmp_path: Path) -> None:
    """Real disk, background upkeep, four threads with a chunk each and readers of all: no torn read, fsck clean, all there after a kill."""
    from kvfs.common.boundary.clock import SystemClock
    from kvfs.common.boundary.real_disk import RealDisk
    from kvfs.storage.engine.engine import ChunkEngine

    config = replace(SMALL, background=True, group_bytes=1 << 20)
    from engine_world import IDENTITY

    engine = ChunkEngine(RealDisk(tmp_path), SystemClock(), IDENTITY, config)
    errors: list[BaseException] = []
    finals: dict[int, bytes] = {}

    def work(number: int) -> None:
        try:
            data = b""
            for step in range(60):
                if step % 7 == 6:
                    data = noise(number * 1000 + step, 90_000)
                    engine.apply(write(cid(number), 0, data), 1)
                    engine.apply(write(cid(number), 0, data), 1)
                    from engine_world import truncate

                    engine.apply(truncate(cid(number), len(data)), 1)
                else:
                    part = noise(number * 1000 + step, 9000)
                    engine.prepare(write(cid(number), len(data), part))
                    engine.commit([cid(number)], 1)
                    data += part
                if step % 10 == 0:
                    engine.sync()
                for other in range(4):
                    content_of(engine, cid(other))
            finals[number] = data
        except BaseException as error:
            errors.append(error)

    def look() -> None:
        """fsck beside the work must not take what changes for a fault."""
        try:
            while len(finals) + len(errors) < 4:
                problems = engine.check(read_data=True).problems
                assert not problems, problems
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)] + [threading.Thread(target=look)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert not engine.check(read_data=True).problems
    engine._upkeep.stop()
    engine._disk.close()  # killed: no checkpoint
    engine._ledger.index.close()
    again = ChunkEngine(RealDisk(tmp_path), SystemClock(), IDENTITY, config)
    assert {number: content_of(again, cid(number))[: len(data)] for number, data in finals.items()} == finals
    assert not again.check(read_data=True).problems
    again.close()


def test_blocks_of_a_space_lie_densely_in_a_class_of_their_own() -> None:
    """A class of any size takes one group at a time, so that nearly all it took from the disk are blocks; and others get the space when they go."""
    slab = 20 * KIB
    disk = LogDisk()
    config = replace(SMALL, files_per_class=4, capacity_bytes=41 * 240 * KIB)
    engine = open_engine(disk, config)
    count = 12 * 40  # 12 blocks a group of 240 KiB
    for index in range(count):
        meta = engine.apply(write(cid(index), 0, noise(index, 9000 + index), slab_bytes=slab), 1)
        assert meta is not None and meta.block is not None and meta.block.block_bytes == slab
    taken, used = engine.slab_space(slab)
    assert used == count and count * slab >= 0.97 * taken
    # Shorter ones keep the class, and so does what replaces them; a restart knows them again.
    engine.close()
    engine = open_engine(disk, config)
    assert engine.slab_space(slab) == (taken, used)
    data = noise(1, 50)
    engine.replace(
        Update(cid(3), UpdateKind.REPLACE, 0, 50, memoryview(data), checksums(data, 0), update_version=7, chain_version=1, slab_bytes=slab)
    )
    meta = engine.get(cid(3))
    assert meta is not None and meta.block is not None and meta.block.block_bytes == slab
    engine.remove([cid(index) for index in range(count)])
    for index in range(36):
        engine.apply(write(cid(index), 0, noise(index, 250 * KIB)), 1)
    assert engine.slab_space(slab)[1] == 0
    assert not engine.check(read_data=True).problems


@pytest.mark.parametrize("slab", [5000, 4096, (64 << 20) + 4096])
def test_a_class_that_does_not_fit_is_refused(slab: int) -> None:
    engine = open_engine(LogDisk())
    with pytest.raises(InvalidArgument):
        engine.apply(write(A, 0, b"x" * 4097, slab_bytes=slab), 1)
    assert engine.get(A) is None


def test_an_index_that_found_no_room_is_asked_again() -> None:
    """Seed 40031 of the simulation: the disk had been full for a while, and writes were refused until something was removed."""
    full = False

    def hook(operation: str, name: str) -> None:
        if full and operation == "map_commit":
            raise NoSpace("planted")

    engine = open_engine(SimDisk(hook=hook))
    full = True
    with pytest.raises(NoSpace, match="index has no room"):
        for index in range(500):
            engine.apply(write(cid(index), 0, noise(index, 100)), 1)
    full = False
    engine.apply(write(cid(999), 0, noise(9, 100)), 1)
    assert not engine.check(read_data=True).problems
