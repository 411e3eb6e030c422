"""Chains that rest: begun by what no waiting mends, tried again briefly, ended by success or by other members."""

from __future__ import annotations

from kvfs.common.errors import ChecksumMismatch, DeadlineExceeded, NoServingTarget, NoSpace, Unreachable
from kvfs.kvcache.rests import Rests


def test_a_chain_rests_is_tried_once_and_rests_longer() -> None:
    rests = Rests(2.0, 7.0)
    assert not rests and rests.state(1, 5, 0.0) == "well"
    rests.note(1, 5, DeadlineExceeded(), 10.0)
    assert rests and rests.state(1, 5, 11.9) == "resting" and rests.state(2, 5, 11.9) == "well"
    assert rests.state(1, 5, 12.0) == "trial" and rests.state(1, 5, 12.0) == "resting"  # one tries it, the others go on without
    for length in (4.0, 7.0, 7.0):
        rests.note(1, 5, Unreachable(), 20.0)
        assert rests.state(1, 5, 20.0 + length - 0.01) == "resting" and rests.state(1, 5, 20.0 + length) == "trial"
    rests.note(1, 5, None, 30.0)
    assert not rests and rests.state(1, 5, 30.0) == "well"


def test_who_has_no_time_says_nothing_about_a_chain() -> None:
    rests = Rests(2.0, 7.0)
    for waited_s in (0.0, -1.0):
        rests.note(1, 5, DeadlineExceeded(), 10.0, waited_s)
        assert not rests
    rests.note(1, 5, DeadlineExceeded(), 10.0, 0.1)
    assert rests.state(1, 5, 10.39) == "resting" and rests.state(1, 5, 10.4) == "trial"
    rests.note(1, 5, DeadlineExceeded(), 11.0, 0.1)
    assert rests.state(1, 5, 11.39) == "resting" and rests.state(1, 5, 11.4) == "trial", "no longer than before"
    rests.note(1, 5, DeadlineExceeded(), 12.0, 0.5)
    assert rests.state(1, 5, 12.79) == "resting" and rests.state(1, 5, 12.8) == "trial"


def test_a_chain_that_changed_is_tried_at_once() -> None:
    rests = Rests(2.0, 7.0)
    rests.note(1, 5, NoServingTarget(), 0.0)
    assert rests.state(1, 5, 1.0) == "resting" and rests.state(1, 6, 1.0) == "well" and not rests


def test_what_is_no_reason_to_rest() -> None:
    rests = Rests(2.0, 7.0)
    rests.note(1, 5, NoSpace(), 0.0)
    rests.note(1, 5, ChecksumMismatch(), 0.0)
    assert not rests
    never = Rests(0.0, 0.0)
    never.note(1, 5, DeadlineExceeded(), 0.0)
    assert not never
