"""Clusters of real processes for tests in a temporary folder, stopped whatever happens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # tests.* is importable however pytest was started

from tests.real_cluster import RealCluster


@pytest.fixture
def new_cluster(tmp_path: Path) -> Iterator[Callable[[], RealCluster]]:
    """Makes clusters that are stopped at the end of the test; nothing is started yet."""
    made: list[RealCluster] = []

    def make() -> RealCluster:
        made.append(RealCluster(tmp_path / f"cluster-{len(made)}"))
        return made[-1]

    yield make
    for cluster in made:
        cluster.stop()


@pytest.fixture(scope="module")
def cluster(module_path: Path) -> Iterator[RealCluster]:
    """One running cluster with three replicas for all tests of a module: each leaves it whole."""
    running = RealCluster(module_path / "cluster")
    try:
        running.up("--storage", "3", "--replicas", "3", "--no-restart")
        yield running
    finally:
        running.stop()
