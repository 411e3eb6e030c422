"""The journal's bytes: what is read back after every kind of end a segment can have."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.document import worked_bytes

from kvfs.common.errors import IndexCorrupt
from kvfs.meta.kv.journal import BLOCK_BYTES, encode_changes, encode_record, read_segment, replay

SEED = 0x1234567890ABCDEF


def record(previous: int, version: int, changes: dict[bytes, bytes | None], seed: int = SEED) -> bytes:
    return encode_record(previous, version, len(changes), encode_changes(changes), seed)


def segment(*records: bytes, blocks: int = 16) -> bytearray:
    data = bytearray(b"".join(records))
    return data + bytes(max(0, blocks * BLOCK_BYTES - len(data)))


def versions(data: bytearray, base: int = 0) -> list[int]:
    return [found.version for found in read_segment("journal-0", memoryview(data), base, SEED)]


def test_the_worked_example_of_the_format_document():
    data = record(6, 7, {b"k": b"v", b"gone": None})
    assert data == worked_bytes("journal").ljust(BLOCK_BYTES, b"\0")


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.binary(min_size=1, max_size=500), st.none() | st.binary(max_size=3000), max_size=20))
def test_changes_come_back(changes):
    found = read_segment("journal-0", memoryview(segment(record(0, 1, changes), blocks=32)), 0, SEED)
    assert [dict(one.changes()) for one in found] == [changes]


def test_records_come_back_in_order_and_only_those_after_the_base():
    data = segment(*(record(version - 1, version, {b"k": b"%d" % version}) for version in range(1, 6)))
    assert versions(data) == [1, 2, 3, 4, 5]
    assert versions(data, base=3) == [4, 5]
    assert versions(segment()) == []


def test_what_is_left_of_earlier_use_is_told_apart():
    old = segment(*(record(version - 1, version, {b"k": b"old"}) for version in range(1, 9)))
    new = record(8, 9, {b"k": b"new"}) + record(9, 10, {b"k": b"newer"})
    assert versions(bytearray(new) + old[len(new) :], base=8) == [9, 10]
    assert versions(bytearray(new) + old[len(new) :], base=0) == [9, 10]


@pytest.mark.parametrize("at", [0, 5, 20, 30, 40, 100, BLOCK_BYTES + 10])
def test_a_torn_last_record_is_left_out(at):
    whole = record(0, 1, {b"k": b"v"})
    torn = bytearray(record(1, 2, {b"k": bytes(range(256)) * 20}))
    torn[at] ^= 0x10
    assert versions(segment(whole, bytes(torn))) == [1]
    assert versions(segment(whole, bytes(torn[:at]))) == [1]


def test_a_damaged_record_before_a_good_one_is_reported_not_skipped():
    parts = [record(version - 1, version, {b"k": b"%d" % version}) for version in (1, 2, 3)]
    parts[1] = bytes(BLOCK_BYTES)
    with pytest.raises(IndexCorrupt, match="journal-0 is damaged at byte 4096"):
        versions(segment(*parts))
    parts[2] = bytes(BLOCK_BYTES)
    assert versions(segment(*parts)) == [1]


def test_a_record_of_another_store_does_not_pass():
    """Nor one that a user has put into a value: nobody outside knows the seed."""
    forged = record(1, 2, {b"owned": b""}, seed=SEED + 1)
    assert versions(segment(record(0, 1, {b"k": b"v"}), forged)) == [1]


def test_replay_gives_the_newest_state_of_each_key_over_all_segments():
    first = read_segment("a", memoryview(segment(record(0, 2, {b"x": b"1", b"y": b"1"}), record(2, 3, {b"x": None}))), 0, SEED)
    second = read_segment("b", memoryview(segment(record(3, 4, {b"y": b"2", b"z": b"2"}))), 0, SEED)
    assert replay(second + first, 0) == (4, {b"x": None, b"y": b"2", b"z": b"2"})
    assert replay(second + first, 1) == (4, {b"x": None, b"y": b"2", b"z": b"2"}), "a base within a batch"
    assert replay([], 7) == (7, {})


@pytest.mark.parametrize("missing", [0, 1])
def test_replay_reports_a_gap(missing):
    found = read_segment("a", memoryview(segment(*(record(version - 1, version, {b"k": b""}) for version in (1, 2, 3)))), 0, SEED)
    del found[missing]
    with pytest.raises(IndexCorrupt, match="lacks versions"):
        replay(found, 0)
