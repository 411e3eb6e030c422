"""Where bytes go and what their checksums are: append in place, copy-on-write, growth, gaps, cuts; and damage that must be seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_world import LogDisk, cid, content_of, noise, open_engine, truncate, write

from kvfs.common.boundary.clock import SystemClock
from kvfs.common.boundary.real_disk import RealDisk
from kvfs.common.checksum import checksums
from kvfs.common.errors import ChecksumMismatch, InputOutput
from kvfs.storage.engine.config import EngineConfig
from kvfs.storage.engine.content import LARGE_BYTES, PIECE_BYTES
from kvfs.storage.engine.engine import ChunkEngine
from kvfs.storage.engine.requests import Update, UpdateKind
from kvfs.storage.engine.superblock import Superblock

A = cid(0)
UNIT = 32768


def data_writes(disk: LogDisk, before: int) -> list[tuple[int, int]]:
    return [(offset, len(data)) for what, name, offset, data in disk.log[before:] if what == "write" and name.startswith("data/")]


def test_an_append_goes_in_place_and_readers_of_the_old_version_do_not_notice() -> None:
    disk = LogDisk()
    engine = open_engine(disk)
    first = noise(1, 40_000)
    block = engine.apply(write(A, 0, first), 1).block
    before = len(disk.log)
    meta = engine.prepare(write(A, len(first), noise(2, 10_000)))
    assert meta.pending.content.block == block
    assert data_writes(disk, before) == [(block.start + 40_000, 10_000)]
    assert meta.pending.checksums[:8] == meta.checksums[:8] and meta.pending.checksums[8:] != meta.checksums[8:]
    assert content_of(engine, A) == first
    engine.commit([A], 1)
    assert content_of(engine, A) == first + noise(2, 10_000)


def test_an_append_that_outgrows_its_block_moves_to_the_next_class() -> None:
    engine = open_engine(LogDisk())
    data = b""
    sizes = set()
    for step in range(30):
        part = noise(step, 33_000)
        meta = engine.apply(write(A, len(data), part), 1)
        data += part
        sizes.add(meta.block.block_bytes)
    assert content_of(engine, A) == data
    assert sizes == {64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20}
    engine.sync()
    assert engine.space().used_bytes == 1 << 20


def test_an_overwrite_goes_to_a_new_block_and_copies_the_rest() -> None:
    engine = open_engine(LogDisk())
    old = noise(1, 200_000)
    first = engine.apply(write(A, 0, old), 1)
    meta = engine.apply(write(A, 70_000, noise(2, 50_000)), 1)
    assert meta.block != first.block
    assert content_of(engine, A) == old[:70_000] + noise(2, 50_000) + old[120_000:]
    untouched = [0, 1, 4, 5, 6]
    assert all(meta.checksums[8 * unit : 8 * unit + 8] == first.checksums[8 * unit : 8 * unit + 8] for unit in untouched)


def test_whole_units_keep_the_checksums_that_came_with_them() -> None:
    """End to end: what the client said is what is stored, for every whole unit."""
    engine = open_engine(LogDisk())
    data = noise(1, 5 * UNIT)
    engine.apply(write(A, 0, b"o" * 6 * UNIT), 1)
    meta = engine.apply(write(A, 100, data), 1)
    came = checksums(data, 100)
    assert meta.checksums[8:40] == came[8:40]
    assert meta.checksums == checksums(b"o" * 100 + data + b"o" * (UNIT - 100), 0)


@pytest.mark.parametrize("offset", [1, 100, UNIT - 1, UNIT, UNIT + 1, 3 * UNIT, 3 * UNIT + 5, 900_000])
@pytest.mark.parametrize("length", [0, 1, 100, UNIT - 1, UNIT, UNIT + 1])
@pytest.mark.parametrize("count", [1, UNIT - 1, UNIT, 2 * UNIT + 7])
def test_a_write_past_the_end_leaves_zeros(offset: int, length: int, count: int) -> None:
    engine = open_engine(LogDisk())
    old = noise(1, length)
    if length:
        engine.apply(write(A, 0, old), 1)
    engine.apply(write(A, offset, noise(2, count)), 1)
    expected = bytearray(max(length, offset + count))
    expected[:length] = old
    expected[offset : offset + count] = noise(2, count)
    assert content_of(engine, A) == bytes(expected)
    assert engine.get(A).checksums == checksums(bytes(expected), 0)


@pytest.mark.parametrize("length", [0, 1, UNIT - 1, UNIT, UNIT + 1, 100_000, 131_072, 131_073, 200_000, 1 << 20])
def test_truncate_cuts_and_extends_without_writing(length: int) -> None:
    disk = LogDisk()
    engine = open_engine(disk)
    old = noise(1, 131_072)
    engine.apply(write(A, 0, old), 1)
    before = len(disk.log)
    meta = engine.apply(truncate(A, length), 1)
    expected = old[:length].ljust(length, b"\0")
    assert data_writes(disk, before) == []
    assert meta.checksums == checksums(expected, 0)
    assert content_of(engine, A) == expected
    engine.apply(write(A, length // 2, b"mark"), 1)
    expected = expected[: length // 2] + b"mark" + expected[length // 2 + 4 :]
    assert content_of(engine, A) == expected


def test_cut_then_append_does_not_touch_bytes_that_an_older_version_still_needs() -> None:
    engine = open_engine(LogDisk())
    old = noise(1, 60_000)
    block = engine.apply(write(A, 0, old), 1).block
    assert engine.apply(truncate(A, 10_000), 1).block == block
    assert engine.apply(write(A, 10_000, b"new"), 1).block != block
    assert content_of(engine, A) == old[:10_000] + b"new"


def test_extended_zeros_take_no_block() -> None:
    engine = open_engine(LogDisk())
    meta = engine.apply(truncate(A, 1 << 20), 1)
    assert meta.block is None and engine.space().used_bytes == 0
    assert content_of(engine, A) == bytes(1 << 20)
    assert not engine.check(read_data=True).problems


@pytest.mark.parametrize("offset", [0, 5, UNIT, UNIT + 9, 99_999, 100_000, 150_000])
@pytest.mark.parametrize("length", [0, 1, 4096, UNIT, 2 * UNIT, 100_000])
def test_reading_any_range(offset: int, length: int) -> None:
    engine = open_engine(LogDisk())
    data = noise(1, 100_000) + bytes(30_000)
    engine.apply(write(A, 0, data[:100_000]), 1)
    engine.apply(truncate(A, 130_000), 1)
    view = memoryview(bytearray(b"\xff" * (length + 10)))
    found = engine.read(A, offset, length, view)
    expected = data[offset : offset + length]
    assert (found.length, found.chunk_length, bytes(view[: found.length])) == (len(expected), 130_000, expected)
    assert found.checksums == checksums(expected, offset)
    assert bytes(view[length:]) == b"\xff" * 10, "nothing is written behind what was asked"


def test_nowait_says_when_it_would_block() -> None:
    disk = LogDisk()
    engine = open_engine(disk)
    engine.apply(write(A, 0, b"x" * 50_000), 1)
    disk.cold = True
    assert engine.read(A, 0, 4096, memoryview(bytearray(4096)), nowait=True) is None
    assert engine.read(A, 0, 4096, memoryview(bytearray(4096))).length == 4096
    disk.cold = False
    assert engine.read(A, 0, 4096, memoryview(bytearray(4096)), nowait=True).length == 4096


def flip(disk: LogDisk, place: int) -> None:
    (name,) = [name for name in disk.files if name.startswith("data/")]
    disk.files[name].data[place] ^= 0x10


def test_a_flipped_bit_is_seen_by_partial_reads_and_passed_to_whole_ones() -> None:
    disk = LogDisk()
    engine = open_engine(disk)
    engine.apply(write(A, 0, noise(1, 100_000)), 1)
    flip(disk, 70_000)
    view = memoryview(bytearray(100_000))
    with pytest.raises(ChecksumMismatch):
        engine.read(A, 66_000, 100, view)
    assert engine.read(A, 0, 60_000, view).length == 60_000
    found = engine.read(A, 0, 100_000, view)
    assert checksums(view, 0) != found.checksums, "the far end must be able to see it"
    report = engine.check(read_data=True)
    assert len(report.problems) == 1 and "unit 2" in report.problems[0]


def test_damage_is_never_given_a_fresh_checksum() -> None:
    disk = LogDisk()
    engine = open_engine(disk)
    engine.apply(write(A, 0, noise(1, 100_000)), 1)
    flip(disk, 40_000)
    for update in (write(A, 60_000, b"in the damaged unit"), truncate(A, 41_000), write(A, 32_768, b"x")):
        with pytest.raises(ChecksumMismatch):
            engine.apply(update, 1)
    engine.apply(write(A, 0, b"another unit"), 1)
    assert any("unit 1" in problem for problem in engine.check(read_data=True).problems), "a copied unit keeps its checksum"
    engine.apply(write(A, UNIT, noise(3, UNIT)), 1)
    assert not engine.check(read_data=True).problems, "a unit that is overwritten as a whole is good again"


@pytest.fixture(params=["simulated", "real"])
def large(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ChunkEngine]:
    """An engine whose chunks of 3 MiB are written in pieces, on a real disk by several threads."""
    disk = LogDisk() if request.param == "simulated" else RealDisk(tmp_path)
    engine = ChunkEngine(disk, SystemClock(), Superblock("c", 1, bytes(16)), EngineConfig(background=False, reserve_bytes=1, files_per_class=1))
    yield engine
    engine.close()


def large_write(chunk: bytes, data: bytes, sums: bytes | None = None, kind: UpdateKind = UpdateKind.WRITE, waited_for: bool = False) -> Update:
    whole = checksums(data, 0) if sums is None else sums
    version = {"update_version": 5, "chain_version": 1} if kind is UpdateKind.REPLACE else {}
    return Update(chunk, kind, 0, len(data), memoryview(data), whole, chunk_size=4 << 20, waited_for=waited_for, **version)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [UpdateKind.WRITE, UpdateKind.REPLACE])
@pytest.mark.parametrize("length", [LARGE_BYTES, LARGE_BYTES + 1, 3 * LARGE_BYTES - 12_345])
@pytest.mark.parametrize("waited_for", [False, True])
def test_a_large_chunk_is_verified_as_it_is_written(large: ChunkEngine, length: int, kind: UpdateKind, waited_for: bool) -> None:
    data = noise(1, length)
    update = large_write(A, data, kind=kind, waited_for=waited_for)
    made = large.replace(update) if kind is UpdateKind.REPLACE else large.apply(update, 1)
    assert made.checksums == checksums(data, 0)
    view = memoryview(bytearray(length))
    found = large.read(A, 0, length, view)
    assert found is not None and found.length == length and bytes(view) == data and not large.check(read_data=True).problems


@pytest.mark.parametrize("waited_for", [False, True])
def test_a_large_chunk_that_came_damaged_leaves_nothing_behind(large: ChunkEngine, waited_for: bool) -> None:
    good = noise(1, 3 * LARGE_BYTES)
    large.apply(large_write(A, good), 1)
    used = large.space().used_bytes
    damaged = bytearray(noise(2, 3 * LARGE_BYTES))
    sums = checksums(damaged, 0)
    for place in (0, 5 * PIECE_BYTES // 2, len(damaged) - 1):
        damaged[place] ^= 1
        for chunk in (A, cid(1)):
            with pytest.raises(ChecksumMismatch):
                large.apply(large_write(chunk, bytes(damaged), sums, waited_for=waited_for), 1)
        damaged[place] ^= 1
    for wrong in (b"", sums[:-8], sums + sums[:8]):
        with pytest.raises(ChecksumMismatch):
            large.prepare(large_write(A, bytes(damaged), wrong, waited_for=waited_for))
    assert large.space().used_bytes == used and large.get(cid(1)) is None
    view = memoryview(bytearray(len(good)))
    large.read(A, 0, len(good), view)
    assert bytes(view) == good
    # In the middle of a chunk nothing is written before all of it was verified.
    with pytest.raises(ChecksumMismatch):
        large.apply(Update(A, UpdateKind.WRITE, UNIT, 2 * LARGE_BYTES, memoryview(damaged)[: 2 * LARGE_BYTES], sums[8:], chunk_size=4 << 20), 1)


@pytest.mark.parametrize("waited_for", [False, True])
def test_an_error_of_the_disk_is_the_error_of_the_write(large: ChunkEngine, monkeypatch: pytest.MonkeyPatch, waited_for: bool) -> None:
    large.apply(large_write(A, noise(1, LARGE_BYTES)), 1)
    block = large.get(A).block
    assert block is not None
    file = large._ledger.files.get(block.block_bytes, block.file)
    real = type(file).write

    def write(self: Any, buffers: Any, offset: int) -> None:
        if len(buffers[0]) >= LARGE_BYTES:
            raise InputOutput("the disk is gone")
        real(self, buffers, offset)

    monkeypatch.setattr(type(file), "write", write)
    with pytest.raises(InputOutput, match="is gone"):
        large.apply(large_write(cid(1), noise(2, 3 * LARGE_BYTES), waited_for=waited_for), 1)
    assert large.failed is not None and large.get(cid(1)) is None
