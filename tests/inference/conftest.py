"""What these suites have in common: the micro checkpoint and its oracle are there before a test begins.

Making them imports transformers, which takes seconds: inside a test's own cluster that would be a service that stands still.
"""

from __future__ import annotations

import pytest
from tests.inference import oracles


@pytest.fixture(scope="session", autouse=True)
def micro_is_there() -> None:
    oracles.greedy(oracles.checkpoint("micro"), [2, 3, 4], 1)
