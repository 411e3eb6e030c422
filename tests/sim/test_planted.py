"""The simulation finds mistakes: each planted one by a known seed. test_sim.py runs the same seeds without a mistake, and they find nothing there."""

from __future__ import annotations

import pytest
from tests.sim.planted import FOUND, PLANTS, broken, planted
from tests.sim.run import TEST_SEEDS, run_seed


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_mistake_is_found(name: str) -> None:
    seed = FOUND[name]
    with planted(PLANTS[name]):
        found = broken(run_seed(seed))
    search = f"python -m tests.sim.planted --stress --limit {TEST_SEEDS} --only {name}"
    assert found, f"seed {seed} does not see that: {PLANTS[name].what}. If messages of the product have changed, pin what `{search}` finds"


def test_without_a_mistake_the_seeds_are_run_too() -> None:
    assert set(FOUND.values()) <= set(range(1, TEST_SEEDS + 1))
