"""The simulation finds mistakes: each planted one by a known seed, which finds nothing without it. `make planted` is the whole search."""

from __future__ import annotations

import pytest
from tests.sim.planted import FOUND, PLANTS, broken, planted
from tests.sim.run import run_seed


@pytest.mark.parametrize("name", FOUND)
def test_a_planted_mistake_is_found(name: str) -> None:
    seed = FOUND[name]
    with planted(PLANTS[name]):
        assert broken(run_seed(seed)), f"seed {seed} does not see that: {PLANTS[name].what}. After a change of the product, search anew: make planted"
    assert run_seed(seed).problems == []
