"""The slabs of KV-cache blocks: packed densely whatever comes and goes, apart from chunks of files, and the disk's again when they are empty."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_world import IDENTITY, SMALL, LogDisk, ManualClock, cid, content_of, noise, open_engine, remove, write

from kvfs.common.boundary.clock import SystemClock
from kvfs.common.boundary.real_disk import RealDisk, RealFile
from kvfs.common.errors import NoSpace
from kvfs.storage.engine.classes import Block, Stretch
from kvfs.storage.engine.config import EngineConfig
from kvfs.storage.engine.engine import ChunkEngine
from kvfs.storage.engine.slabs import SlabClass

KIB = 1 << 10
CONFIG = EngineConfig(background=False, reserve_bytes=1)


@contextmanager
def real_engine(path: Path, config: EngineConfig = CONFIG) -> Iterator[ChunkEngine]:
    engine = ChunkEngine(RealDisk(path), SystemClock(), IDENTITY, config)
    try:
        yield engine
    finally:
        engine.close()


def put(engine: ChunkEngine, index: int, slab: int) -> None:
    engine.apply(write(cid(index), 0, noise(index, 500), slab_bytes=slab), 1)


def packing(engine: ChunkEngine, slab: int) -> float:
    taken, held = engine.slab_space(slab)
    return held * slab / taken


def on_disk(path: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in (path / "data").iterdir())


@pytest.mark.parametrize(("slab", "count"), [(64 * KIB, 50), (64 * KIB, 800), (4_497_408, 50), (4_497_408, 130)])
def test_a_full_space_is_packed_before_and_after_churn(tmp_path: Path, slab: int, count: int) -> None:
    dice = random.Random(count)
    with real_engine(tmp_path) as engine:
        for index in range(count):
            put(engine, index, slab)
        assert packing(engine, slab) >= 0.98
        there = list(range(count))
        for step in range(2 * count):
            put(engine, count + step, slab)
            gone = there.pop(dice.randrange(count // 2))
            there.append(count + step)
            engine.apply(remove(cid(gone)), 1)
            if step % 20 == 0:
                engine._ledger.tidy()
        for _ in range(2):  # two quiet seconds
            engine._ledger.tidy()
        assert engine.slab_space(slab)[1] == count
        assert packing(engine, slab) >= 0.98
        assert on_disk(tmp_path) <= 1.01 * engine.slab_space(slab)[0] + 64 * KIB, "the files take what is said of them"
        assert not engine.check(read_data=True).problems
        kept = engine.slab_space(slab)
    with real_engine(tmp_path) as engine:
        assert engine.slab_space(slab)[1] == kept[1] and packing(engine, slab) == 1
        engine.remove([cid(index) for index in there])
        engine._ledger.tidy()
        engine._ledger.tidy()
        assert engine.slab_space(slab) == (0, 0)
        assert on_disk(tmp_path) < 256 * KIB


def test_a_dropped_space_serves_other_sizes_again() -> None:
    slab = 20 * KIB
    engine = open_engine(LogDisk(), replace(SMALL, capacity_bytes=100 * slab))
    for index in range(100):
        put(engine, index, slab)
    with pytest.raises(NoSpace):
        put(engine, 100, slab)
    with pytest.raises(NoSpace):
        engine.apply(write(cid(0, 6), 0, noise(1, 250_000)), 1)
    engine.remove([cid(index) for index in range(100)])
    for index in range(100 * slab // (64 * KIB)):
        put(engine, index, 64 * KIB)
    assert engine.slab_space(slab) == (0, 0)
    engine.remove([cid(index) for index in range(100)])
    for index in range(100 * slab // (256 * KIB)):
        engine.apply(write(cid(index, 6), 0, noise(index, 250_000)), 1)
    assert engine.slab_space(64 * KIB) == (0, 0)
    assert not engine.check(read_data=True).problems


def test_blocks_and_chunks_of_files_share_no_data_file() -> None:
    disk = LogDisk()
    engine = open_engine(disk)
    for index in range(12):
        put(engine, index, 64 * KIB)
        engine.apply(write(cid(index, 6), 0, noise(index, 60_000)), 1)
    assert engine.slab_space(64 * KIB) == (12 * 64 * KIB, 12), "what files take is none of it"
    blocks, chunks = ([engine.get(cid(index, inode)) for index in range(12)] for inode in (5, 6))
    assert all(meta is not None and meta.block is not None and meta.block.slab for meta in blocks)
    assert all(meta is not None and meta.block is not None and not meta.block.slab for meta in chunks)
    assert "data/65536.32768" in disk.files


@pytest.mark.parametrize(("slab", "count"), [(64 * KIB, 40), (5 << 20, 3)])
def test_what_is_left_goes_back_to_the_disk_by_itself(tmp_path: Path, slab: int, count: int) -> None:
    """Also where a single block is so much that its removal is not let wait."""
    with real_engine(tmp_path, replace(CONFIG, background=True, rest_s=3600)) as engine:
        for index in range(count):
            put(engine, index, slab)
        engine.remove([cid(index) for index in range(count - 1)])
        end = time.monotonic() + 20
        while engine.slab_space(slab) != (slab, 1) and time.monotonic() < end:
            time.sleep(0.05)
        assert engine.slab_space(slab) == (slab, 1)
        assert not engine.check(read_data=True).problems


def test_a_size_of_which_nothing_is_left_has_no_files(tmp_path: Path) -> None:
    """Open or on the disk: spaces of many sizes come and go in the life of a service."""
    with real_engine(tmp_path) as engine:
        for slab in range(4 * KIB, 44 * KIB, 4 * KIB):
            for index in range(40):
                put(engine, index, slab)
            place = engine.place(cid(0), 0, 500)
            assert place.file is not None
            engine.remove([cid(index) for index in range(40)])
            for _ in range(3):
                engine._ledger.tidy()
            engine.sync()
            assert not list((tmp_path / "data").iterdir()) and not open_in(tmp_path / "data") - {place.file}
            buffer = bytearray(500)
            assert place.file.read_into([memoryview(buffer)], place.file_offset) == 500, "who still looks at it is not led to another file"
            assert not any(buffer)
        put(engine, 1, 8 * KIB)
        assert [path.name for path in (tmp_path / "data").iterdir()] == ["8192.32768"]
        assert not engine.check(read_data=True).problems
    (tmp_path / "data" / "12288.32768").write_bytes(bytes(24 * KIB))  # the removal of its file did not survive a power loss
    with real_engine(tmp_path) as engine:
        assert [path.name for path in (tmp_path / "data").iterdir()] == ["8192.32768"]
        assert not engine.check(read_data=True).problems


def open_in(folder: Path) -> set[Any]:
    return {entry for entry in gc.get_objects() if isinstance(entry, RealFile) and entry._path.startswith(str(folder)) and entry._fd >= 0}


def test_what_writes_still_need_is_kept() -> None:
    """Churn finds its own places again: they are given back only when a while passed in which nobody took them."""
    engine = open_engine(LogDisk())
    for index in range(200):
        put(engine, index, 4 * KIB)
    for round_ in range(5):
        engine.remove([cid(index) for index in range(50)])
        engine._ledger.tidy()
        taken, _ = engine.slab_space(4 * KIB)
        assert taken >= 200 * 4 * KIB, round_
        for index in range(50):
            put(engine, index, 4 * KIB)
    engine.remove([cid(index) for index in range(50)])
    engine._ledger.tidy()
    engine._ledger.tidy()
    assert engine.slab_space(4 * KIB)[0] <= 152 * 4 * KIB


def test_a_place_being_read_is_not_given_back() -> None:
    engine = open_engine(LogDisk())
    put(engine, 0, 4 * KIB)
    meta = engine.get(cid(0))
    assert meta is not None and meta.block is not None
    allocator = engine._ledger.allocator
    allocator.pin(meta.block)
    engine.apply(remove(cid(0)), 1)
    engine._ledger.tidy()
    engine._ledger.tidy()
    assert engine.slab_space(4 * KIB) == (4 * KIB, 0)
    allocator.unpin(meta.block)
    engine._ledger.tidy()
    engine._ledger.tidy()
    assert engine.slab_space(4 * KIB) == (0, 0)


def test_directories_of_before_still_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks once lay in groups like those of files, in files with low numbers."""
    disk = LogDisk()
    engine = open_engine(disk)
    allocate = engine._ledger.allocator.allocate
    monkeypatch.setattr(engine._ledger.allocator, "allocate", lambda size, **_: allocate(size))
    for index in range(30):
        put(engine, index, 20 * KIB)
    engine.close()
    assert "data/20480.0" in disk.files
    engine = open_engine(disk)
    assert all(content_of(engine, cid(index)) == noise(index, 500) for index in range(30))
    for index in range(15):
        engine.apply(remove(cid(index)), 1)
        put(engine, 30 + index, 20 * KIB)
    meta = engine.get(cid(30))
    assert meta is not None and meta.block is not None and meta.block.slab
    assert not engine.check(read_data=True).problems
    engine.close()
    engine = open_engine(disk)
    assert all(content_of(engine, cid(index)) == noise(index, 500) for index in range(15, 45))
    assert not engine.check(read_data=True).problems


def test_one_block_of_two_chunks_is_never_given_out_again() -> None:
    disk = LogDisk()
    engine = open_engine(disk)
    put(engine, 0, 4 * KIB)
    put(engine, 1, 4 * KIB)
    one, two = engine.get(cid(0)), engine.get(cid(1))
    assert one is not None and two is not None
    from kvfs.storage.engine.ledger import Change

    with engine._ledger.lock:
        engine._ledger.record([Change(two, replace(two, content=one.content))])
    engine.close()
    engine = open_engine(disk)
    assert one.block in engine._ledger.allocator.disputed
    engine.apply(remove(cid(0)), 1)
    for _ in range(2):
        engine._ledger.tidy()
    for index in range(2, 10):
        put(engine, index, 4 * KIB)
    assert content_of(engine, cid(1)) == noise(0, 500)


class Space:
    """What the disk was asked for, checked against what the class says."""

    def __init__(self) -> None:
        self.behind: set[Block] = set()
        self.full = False

    def take(self, places: Stretch) -> None:
        if self.full:
            raise NoSpace("full")
        fresh = set(places.places())
        assert not fresh & self.behind, "taken twice"
        self.behind |= fresh


@pytest.mark.parametrize("seed", range(20))
def test_slabs_against_a_model(seed: int) -> None:
    dice = random.Random(seed)
    slabs, space = SlabClass(4096, 3), Space()
    held: set[Block] = set()
    leaving: list[Stretch] = []
    for _ in range(1500):
        step = dice.choice(("put", "put", "put", "drop", "drop", "burst", "trim", "forget", "full"))
        if step == "full":
            space.full = dice.random() < 0.3
        elif step == "put":
            for _ in range(dice.randrange(40)):
                try:
                    block = slabs.allocate(space.take)
                except NoSpace:
                    assert not slabs.free
                    break
                assert block not in held and block in space.behind
                held.add(block)
        elif step in ("drop", "burst"):
            for block in dice.sample(sorted(held), min(len(held), dice.randrange(300 if step == "burst" else 30))):
                assert slabs.in_use(block) and slabs.give(block) and not slabs.in_use(block) and not slabs.give(block)
                held.discard(block)
        elif step == "trim":
            for places in slabs.trim(all_of_them=dice.random() < 0.1):
                gone = set(places.places())
                assert gone <= space.behind - held
                space.behind -= gone
                leaving.append(places)
        else:
            for places in leaving:
                slabs.forget(places)
            leaving = []
        still_punched: set[Block] = {block for places in leaving for block in places.places()}
        assert not still_punched & space.behind, "on its way out and taken again"
        assert {block for part in slabs.parts() for block in part.used()} == held
        assert (slabs.places, slabs.free) == (len(space.behind), len(space.behind) - len(held))
    again = SlabClass(4096, 3)
    counted = Space()
    order: list[Any] = sorted(held)
    dice.shuffle(order)
    assert all(again.load_used(block, counted.take) for block in order) and not any(again.load_used(block, counted.take) for block in order[:3])
    sizes = {block.file: 4096 * (1 + max(each.number for each in space.behind if each.file == block.file)) for block in space.behind}
    unused, short = again.load_files(sizes)
    assert not short and counted.behind == held
    assert {block for places in unused for block in places.places()} >= space.behind - held
    if held:
        last = max(held)
        _, short = again.load_files({**sizes, last.file: last.start + 100})
        assert last in {block for places in short for block in places.places()}


def test_the_lowest_place_is_given_out_first() -> None:
    slabs, space = SlabClass(4096, 1), Space()
    blocks = [slabs.allocate(space.take) for _ in range(600)]
    for block in dict.fromkeys((blocks[500], blocks[3], blocks[77])):
        slabs.give(block)
    free = sorted(block.number for block in space.behind - set(blocks) | {blocks[500], blocks[3], blocks[77]})
    assert [slabs.allocate(space.take).number for _ in range(3)] == free[:3]


def test_a_clock_is_not_needed() -> None:
    """The simulation has no thread: limits alone keep what waits bounded."""
    engine = open_engine(LogDisk(), replace(SMALL, removed_bytes=16 << 20), ManualClock())
    for index in range(300):
        put(engine, index, 64 * KIB)
        if index:
            engine.apply(remove(cid(index - 1)), 1)
    assert engine._ledger.allocator.removed_slab_bytes <= (2 << 20) + 64 * KIB
    assert engine.slab_space(64 * KIB)[0] <= 3 << 20
