"""XXH3-64 checksums of chunk bytes, one per checksum unit.

A chunk is cut into units of 32 KiB, counted from its start. A range of a chunk is cut at the same places into fragments, each with its own
checksum, so that whole units keep the checksum they are stored with and only the edges need a new one. A checksum list is 8 little-endian
bytes per fragment. An empty range has no fragments.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable
from typing import Final

from xxhash import xxh3_64_intdigest

CHECKSUM_UNIT_BYTES: Final = 32768
CHECKSUM_BYTES: Final = 8
FLIPPED_BITS_MAX: Final = 8
_UNIT: Final = CHECKSUM_UNIT_BYTES
_SLICES: Final = tuple(slice(start, start + CHECKSUM_UNIT_BYTES) for start in range(0, 64 << 20, CHECKSUM_UNIT_BYTES))
"""Of the units of the largest chunk: made once, since hashing a unit takes hardly longer than making its slice in Python."""


def fragments(offset: int, length: int) -> list[tuple[int, int]]:
    """(start, end) in the chunk of each fragment of the range."""
    end = offset + length
    if length <= 0:
        return []
    cuts = [offset, *range((offset // _UNIT + 1) * _UNIT, end, _UNIT), end]
    return list(itertools.pairwise(cuts))


def xxh3_64(data: bytes | bytearray | memoryview, seed: int = 0) -> int:
    return xxh3_64_intdigest(data, seed)  # type: ignore[no-any-return, unused-ignore]


def checksums(data: bytes | bytearray | memoryview, offset: int = 0) -> bytes:
    """The checksum list of `data`, which lies at `offset` in its chunk."""
    length = len(data)
    if length == 0:
        return b""
    first = _UNIT - offset % _UNIT
    if length <= first:
        return xxh3_64_intdigest(data).to_bytes(8, "little")
    view = memoryview(data)
    if first == _UNIT:
        return checksums_of((view,))
    digests = [xxh3_64_intdigest(view[:first])]
    digests += [xxh3_64_intdigest(view[start : start + _UNIT]) for start in range(first, length, _UNIT)]
    return struct.pack(f"<{len(digests)}Q", *digests)


def checksums_of(pieces: Iterable[memoryview]) -> bytes:
    """The checksum lists of these, one behind the other. Each begins at the start of a unit, and none is empty."""
    units: list[memoryview] = []
    for piece in pieces:
        length = len(piece)
        if length <= _UNIT:
            units.append(piece)
        elif length <= _SLICES[-1].stop:
            units.extend(map(piece.__getitem__, _SLICES[: -(-length // _UNIT)]))
        else:
            units.extend([piece[start : start + _UNIT] for start in range(0, length, _UNIT)])
    return struct.pack(f"<{len(units)}Q", *map(xxh3_64_intdigest, units))


def almost(data: bytes, expected: bytes) -> bool:
    """Whether `data` is `expected` with a few flipped bits: for bytes that carry their checksum no other valid ones are so near."""
    return len(data) == len(expected) and (int.from_bytes(data, "big") ^ int.from_bytes(expected, "big")).bit_count() <= FLIPPED_BITS_MAX


def verify(data: bytes | bytearray | memoryview, offset: int, expected: bytes) -> bool:
    """Whether `data`, at `offset` in its chunk, has this checksum list."""
    return checksums(data, offset) == expected
