"""What holds for every suite: no deadlines, as the machines that run these tests are shared; and what passed leaves nothing on the disk.

A cluster of a test takes 0.1 to 3 GB, and there are more than a hundred of them: pytest removes `tmp_path` after a test that passed
(tmp_path_retention_policy in pyproject.toml), `module_path` does so for a module.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("house", deadline=None)
settings.load_profile("house")

# The folders of three workers at their fullest, and the gigabyte that every storage target keeps in reserve.
ROOM_BYTES = 8 << 30


def pytest_sessionstart(session: pytest.Session) -> None:
    """A disk without room fails tests at random, an hour's work to understand: said before the first test instead."""
    base = Path(session.config.option.basetemp or tempfile.gettempdir())
    free = shutil.disk_usage(base if base.exists() else base.parent).free
    if free < ROOM_BYTES:
        pytest.exit(f"{base} has {free / 1e9:.1f} GB free and the tests need {ROOM_BYTES / 1e9:.1f}: remove files, or set TMPDIR to a larger disk", 2)


# Whole files go to a worker (--dist loadfile), in this order: one that takes minutes and begins last would be waited for by all others.
FIRST = (
    "tests/mount/test_random_io.py",
    "tests/sim/",
    "tests/crash/",
    "tests/cluster/test_kvcache.py",
    "tests/cluster/",
    "tests/inference/",
    "tests/mount/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((number for number, start in enumerate(FIRST) if item.nodeid.startswith(f"tests/{start}")), len(FIRST))

    items.sort(key=place)


@pytest.fixture(scope="module")
def module_path(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Path]:
    """`tmp_path` for what all tests of a module share: kept only if one of them failed."""
    path = tmp_path_factory.mktemp(Path(request.node.name).stem)
    failed = request.session.testsfailed
    yield path
    if request.session.testsfailed == failed:
        shutil.rmtree(path, ignore_errors=True)
