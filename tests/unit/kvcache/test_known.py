"""Places known for a while: bounded in time and in bytes, and the touches of what was read by them."""

from __future__ import annotations

from kvfs.client.place import Place
from kvfs.kvcache.known import ENTRY_BYTES, KNOWN_BYTES, TOUCHES_MAX, KnownPlaces


def digest(number: int) -> bytes:
    return number.to_bytes(16, "big")


def place(number: int, checksums: int = 1) -> Place:
    return Place(0, 100, None, number, 0, 100, bytes(8 * checksums))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_place_is_known_until_its_time_is_over() -> None:
    clock = Clock()
    known = KnownPlaces(clock)
    known.learn(digest(1), place(1), 1.0)
    known.learn(digest(2), place(2), 2.0)
    assert known.find([digest(2), digest(3), digest(1)]) == [place(2), None, place(1)]
    clock.now = 1.0
    assert known.find([digest(1), digest(2)]) == [None, place(2)]
    assert known.tidy() and len(known) == 1
    clock.now = 2.0
    assert not known.tidy() and len(known) == 0


def test_what_is_stale_or_may_be_gone_is_forgotten() -> None:
    known = KnownPlaces(Clock())
    for number in range(4):
        known.learn(digest(number), place(number), 1.0)
    known.stale(digest(0))
    known.stale(digest(9))
    known.forget([digest(1), digest(8)])
    assert known.tidy()
    assert known.find(map(digest, range(4))) == [None, None, place(2), place(3)]
    known.learn(digest(2), place(7), 1.0)
    assert known.find([digest(2)]) == [place(7)]
    known.clear()
    assert not known.tidy() and known.find([digest(2)]) == [None]


def test_it_is_bounded_and_the_oldest_go() -> None:
    known = KnownPlaces(Clock())
    most = KNOWN_BYTES // (ENTRY_BYTES + 8 * 128)
    for number in range(most + 10):
        known.learn(digest(number), place(number, 128), 1.0)
    assert len(known) == most
    assert known.find([digest(9), digest(10)]) == [None, place(10, 128)]
    for _ in range(3):  # what is learnt again does not count twice
        known.learn(digest(most), place(1, 128), 1.0)
    assert len(known) == most


def test_touches_are_in_the_order_of_the_last_reads_and_count_them() -> None:
    known = KnownPlaces(Clock())
    known.touch(map(digest, (3, 2, 1)))
    known.touch(map(digest, (2, 1)))
    assert list(known.take_touches().items()) == [(digest(3), 1), (digest(2), 2), (digest(1), 2)]
    assert known.take_touches() == {}
    for number in range(TOUCHES_MAX + 10):
        known.touch([digest(number)])
    assert len(known.take_touches()) == TOUCHES_MAX
