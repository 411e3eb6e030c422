"""A run of many seeds says when it proves nothing: when a process dies, and when next to no operation succeeded."""

from __future__ import annotations

import signal
from collections import Counter

import pytest
from tests.sim.many import ENOUGH, LEAST, ProcessDied, Tally, each
from tests.sim.run import Verdict


def test_results_come_in_the_order_of_their_seeds() -> None:
    assert list(each(abs, range(10, 30), 2)) == list(range(10, 30))


def test_a_process_that_dies_ends_the_run_and_its_seed_is_named() -> None:
    with pytest.raises(ProcessDied, match=rf"\b{signal.SIGKILL:d}\b"):
        list(each(signal.raise_signal, [0, 0, signal.SIGKILL, 0], 2))


@pytest.mark.parametrize("kind", LEAST)
def test_a_run_in_which_a_kind_of_operation_never_succeeds_proves_nothing(kind: str) -> None:
    tally = Tally(1, ENOUGH)
    usual = Counter({kind: round(3 * least) + 1 for kind, least in LEAST.items()})
    for seed in range(1, ENOUGH + 1):
        tally.add(Verdict(seed, done=usual))
    assert tally.idle() == []
    tally.done[kind] = 0
    [idle] = tally.idle()
    assert idle.startswith(kind)
