"""The record of a target's scrubs: when a pass is due, what a restart knows, what a damaged file is worth."""

from __future__ import annotations

import pytest
from tests.unit.document import worked_bytes

from kvfs.common.ids import chunk_id
from kvfs.storage.scrub.record import DAMAGED_MAX, Pace, ScrubRecord, decode

CHUNK = bytes(range(24))
WEEK_S = 7 * 86400.0


def at(days: float) -> int:
    return 10**18 + int(days * 86400 * 1e9)


def test_a_pass_is_due_an_interval_after_the_last_one_began() -> None:
    record = ScrubRecord(started_ns=at(0))
    assert not record.due(at(6.9), WEEK_S) and record.due(at(7), WEEK_S)
    record.begin(at(7))
    assert record.due(at(7.1), WEEK_S), "what was interrupted goes on"
    record.end(at(8))
    assert record.passes == 1 and record.finished_ns == at(8)
    assert not record.due(at(13.9), WEEK_S) and record.due(at(14), WEEK_S)
    assert record.due(at(1), WEEK_S), "a clock that was set back makes it begin earlier, never later"
    assert not record.due(at(99), 0), "never by itself"


def test_a_restart_knows_where_it_was() -> None:
    record = ScrubRecord(started_ns=at(0))
    record.begin(at(7))
    record.found, record.repaired = 3, 2
    record.looked_at(CHUNK, 1000)
    record.looked_at(CHUNK[::-1], 24)
    record.lost(CHUNK, 5)
    found = decode(record.encode())
    assert found == record
    assert found is not None and (found.chunks, found.bytes_read, found.position, found.damaged) == (2, 1024, CHUNK[::-1], {CHUNK: 5})
    found.mended(CHUNK)
    found.begin(at(9))
    again = decode(found.encode())
    assert again is not None and (again.position, again.chunks, again.damaged) == (b"", 0, {})


def test_the_record_of_the_document() -> None:
    record = ScrubRecord(3, True, 1_700_000_000 * 10**9, 1_699_400_000 * 10**9, 2, 12_012, 1, 0, chunk_id(42, 2), {chunk_id(42, 1): 4})
    assert record.encode() == worked_bytes("scrub")
    assert decode(worked_bytes("scrub")) == record


def test_any_flipped_bit_makes_it_no_record() -> None:
    data = ScrubRecord(passes=3, started_ns=at(0), damaged={CHUNK: 7}).encode()
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        assert decode(bytes(damaged)) is None
    for length in range(len(data)):
        assert decode(data[:length]) is None


def test_what_is_remembered_of_damage_is_bounded() -> None:
    record = ScrubRecord()
    for number in range(DAMAGED_MAX + 5):
        record.lost(number.to_bytes(24, "big"), 1)
    record.lost(bytes(24), 2)
    assert len(record.damaged) == DAMAGED_MAX and record.damaged[bytes(24)] == 2


@pytest.mark.parametrize(("rate", "took_s", "rest_s"), [(1000, 0.5, 1.5), (1000, 3.0, 0.0), (0, 0.0, 0.0)])
def test_the_pace_leaves_what_the_work_did_not_take(rate: int, took_s: float, rest_s: float) -> None:
    assert Pace(rate).rest_s(2000, took_s) == rest_s
