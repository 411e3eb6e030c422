"""The connectors on a real cluster. The engines' side is theirs where they are installed (`make test-ecosystem`), else what `fakes` has of it:
the same tests run in both worlds, so that the fakes cannot drift from the engines."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.conftest import RealCluster

FAKES = Path(__file__).parent / "fakes"
for _engine in ("sglang", "lmcache", "vllm"):
    if importlib.util.find_spec(_engine) is None and str(FAKES / _engine) not in sys.path:
        sys.path.append(str(FAKES / _engine))


@pytest.fixture(scope="module")
def cluster(module_path: Path) -> Iterator[RealCluster]:
    """One running cluster for all tests of a module; each uses spaces of its own."""
    running = RealCluster(module_path / "cluster")
    try:
        running.up("--storage", "2", "--replicas", "1", "--no-restart")
        yield running
    finally:
        running.stop()


@pytest.fixture
def settings(cluster: RealCluster, request: pytest.FixtureRequest) -> dict[str, Any]:
    """What a user would write into the engine's configuration."""
    return {"cluster": str(cluster.path), "space": request.node.name}


@pytest.fixture
def new_services(tmp_path: Path) -> Iterator[RealCluster]:
    """A cluster of the test's own, to stop services of."""
    running = RealCluster(tmp_path / "cluster")
    try:
        running.up("--storage", "2", "--replicas", "1", "--no-restart")
        yield running
    finally:
        running.stop()
