"""One cluster and two mounts of it for the whole session; tests that break things start their own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # tests.* is importable however pytest was started

from tests.mount.cluster import Cluster, running_cluster


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.mount)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if not os.path.exists("/dev/fuse"):
        pytest.skip("there is no /dev/fuse")
    with running_cluster(storage=3, replicas=2) as running:
        yield running
        running.check()  # whatever the tests did, metadata and chunks must agree at the end


@pytest.fixture(scope="session")
def mount_point(cluster: Cluster) -> Path:
    return cluster.mount("one")


@pytest.fixture(scope="session")
def second_mount(cluster: Cluster, mount_point: Path) -> Path:
    return cluster.mount("two")


@pytest.fixture
def pair(mount_point: Path, second_mount: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """The same fresh directory through both mounts."""
    name = request.node.name.translate(str.maketrans("/[]", "___"))[:200]
    (mount_point / name).mkdir()
    return mount_point / name, second_mount / name


@pytest.fixture
def work(mount_point: Path, request: pytest.FixtureRequest) -> Path:
    """A fresh directory on the mount."""
    name = request.node.name.translate(str.maketrans("/[]", "___"))[:200]
    (mount_point / name).mkdir()
    return mount_point / name
