"""When a directory is listed ahead: after misses in a row, page after page, for one lease, and not without end."""

from __future__ import annotations

import pytest
from tests.unit.fuse.conftest import Clock

from kvfs.fuse.look_ahead import DIRECTORIES_MAX, MISSES, PAGES_MAX, PAUSE_S, ROUND_S, LookAhead


@pytest.fixture
def ahead(clock: Clock) -> LookAhead:
    return LookAhead(clock)


def misses(ahead: LookAhead, directory: int = 1) -> bytes | None:
    """MISSES of them in a row: only the last may ask for a page."""
    assert [ahead.missed(directory) for _ in range(MISSES - 1)] == [None] * (MISSES - 1)
    return ahead.missed(directory)


def test_pages_follow_one_another(ahead: LookAhead) -> None:
    assert misses(ahead) == b""
    ahead.listed(1, b"m", more=True)
    assert misses(ahead) == b"m"
    ahead.listed(1, b"z", more=False)
    assert misses(ahead) is None, "all of it has been listed; what is missed now is not there or has changed"


def test_next_lease_starts_from_the_beginning(ahead: LookAhead, clock: Clock) -> None:
    assert misses(ahead) == b""
    ahead.listed(1, b"z", more=False)
    clock.now_s += ROUND_S
    assert misses(ahead) == b""


def test_misses_far_apart_are_not_in_a_row(ahead: LookAhead, clock: Clock) -> None:
    for _ in range(5 * MISSES):
        assert ahead.missed(1) is None
        clock.now_s += ROUND_S


def test_directories_are_counted_apart(ahead: LookAhead) -> None:
    for number in range(MISSES - 1):
        assert ahead.missed(1) is None and ahead.missed(2) is None, number
    assert ahead.missed(1) == b"" and ahead.missed(2) == b""


def test_very_large_directory_is_left_alone_for_a_while(ahead: LookAhead, clock: Clock) -> None:
    for page in range(PAGES_MAX):
        assert misses(ahead) is not None
        ahead.listed(1, b"%d" % page, more=True)
    assert misses(ahead) is None
    clock.now_s += PAUSE_S / 2
    assert misses(ahead) is None
    clock.now_s += PAUSE_S
    assert misses(ahead) == b""


def test_table_is_bounded(ahead: LookAhead) -> None:
    for number in range(DIRECTORIES_MAX + 50):
        ahead.missed(number)
    assert len(ahead._watched) == DIRECTORIES_MAX
