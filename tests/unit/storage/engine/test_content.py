"""Where bytes go and what their checksums are: append in place, copy-on-write, growth, gaps, cuts; and damage that must be seen."""

from __future__ import annotations

import pytest
from engine_world import LogDisk, cid, content_of, noise, open_engine, truncate, write

from kvfs.common.checksum import checksums
from kvfs.common.errors import ChecksumMismatch

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
