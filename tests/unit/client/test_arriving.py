"""Checksums made while bytes arrive are those that hashing afterwards gives, however the bytes come."""

from __future__ import annotations

import random

from kvfs.client.arriving import ArrivingSums
from kvfs.common.checksum import CHECKSUM_UNIT_BYTES, checksums

UNIT = CHECKSUM_UNIT_BYTES


def test_whatever_way_the_bytes_come() -> None:
    chance = random.Random(1)
    for _ in range(300):
        offsets = [chance.choice([0, UNIT, 5 * UNIT, 100]) for _ in range(chance.randrange(1, 6))]
        views = [memoryview(bytearray(chance.choice([0, 1, 999, UNIT, UNIT + 1, 3 * UNIT, 200_000]))) for _ in offsets]
        sums = ArrivingSums(offsets)
        assert [sums.of(place, len(view)) for place, view in enumerate(views)] == [None] * len(views), "nothing has come"
        sums.begin(views)
        count, total = 0, sum(map(len, views))
        while count < total:
            step = min(total - count, chance.choice([1, 10_000, UNIT, 100_000, total]))
            _fill(views, count, step, chance)
            count += step
            sums.arrived(count)
            for place, view in enumerate(views[:-1]):
                if count < sum(map(len, views[: place + 1])):
                    assert sums.of(place, len(view)) is None, "not all of it is here"
        sums.arrived(total)
        for place, (offset, view) in enumerate(zip(offsets, views, strict=True)):
            found = sums.of(place, len(view))
            assert found == (None if offset % UNIT else checksums(view, offset))
            assert sums.of(place, len(view) + 1) is None, "of other bytes it knows nothing"


def _fill(views: list[memoryview], start: int, count: int, chance: random.Random) -> None:
    """The bytes [start, start + count) of all views together get their content only now."""
    for view in views:
        here = view[min(start, len(view)) : min(start + count, len(view))]
        here[:] = chance.randbytes(len(here))
        count -= max(0, min(start + count, len(view)) - min(start, len(view)))
        start = max(0, start - len(view))
