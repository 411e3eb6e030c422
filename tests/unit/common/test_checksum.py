"""Checksum lists: cut at unit bounds of the chunk, one XXH3-64 per fragment, and any changed bit shows."""

from __future__ import annotations

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvfs.common.checksum import CHECKSUM_UNIT_BYTES, checksums, fragments, verify, xxh3_64

U = CHECKSUM_UNIT_BYTES


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, 0, []),
        (5, 0, []),
        (0, 1, [(0, 1)]),
        (0, U, [(0, U)]),
        (0, U + 1, [(0, U), (U, U + 1)]),
        (U - 1, 1, [(U - 1, U)]),
        (U - 1, 2, [(U - 1, U), (U, U + 1)]),
        (100, 2 * U, [(100, U), (U, 2 * U), (2 * U, 2 * U + 100)]),
    ],
)
def test_fragments(offset: int, length: int, expected: list[tuple[int, int]]) -> None:
    assert fragments(offset, length) == expected


@given(st.integers(0, 5 * U), st.integers(0, 3 * U))
def test_fragments_cover_the_range_and_the_list_has_one_checksum_each(offset: int, length: int) -> None:
    cuts = fragments(offset, length)
    assert sum(end - start for start, end in cuts) == length
    assert all(start // U == (end - 1) // U for start, end in cuts)
    data = bytes(length)
    assert checksums(data, offset) == b"".join(xxhash.xxh3_64_intdigest(data[s - offset : e - offset]).to_bytes(8, "little") for s, e in cuts)


def test_a_changed_bit_shows() -> None:
    data = bytearray(range(256)) * 400
    expected = checksums(data, 1000)
    assert verify(memoryview(data), 1000, expected)
    for place in (0, 31_767, 31_768, len(data) - 1):
        data[place] ^= 16
        assert not verify(data, 1000, expected)
        data[place] ^= 16
    assert not verify(data, 1001, expected)
    assert not verify(data[:-1], 1000, expected)
    assert not verify(data, 1000, expected[:-8])


def test_known_value() -> None:
    """XXH3-64 of nothing, from its specification."""
    assert xxh3_64(b"") == 0x2D06800538D394C2
