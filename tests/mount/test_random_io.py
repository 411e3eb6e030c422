"""The random-I/O verifier: on a local directory (which proves the verifier), and on two mounts of one cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.mount.agent import Agent
from tests.mount.random_io import Verifier

OPERATIONS = int(os.environ.get("KVFS_IO_OPERATIONS", "100000"))
SECONDS = float(os.environ.get("KVFS_IO_SECONDS", "240"))
"""The suite's budget, should the machine be too busy for all operations within it; KVFS_IO_SECONDS=100000 takes the time it takes."""
SEED = int(os.environ.get("KVFS_SEED", "0")) or int.from_bytes(os.urandom(4), "big")


@pytest.fixture(scope="module")
def agents() -> Iterator[list[Agent]]:
    made = [Agent(), Agent()]
    yield made
    for agent in made:
        agent.stop()


def test_on_a_local_directory(tmp_path: Path, agents: list[Agent]) -> None:
    print(f"seed {SEED}")
    Verifier([tmp_path], SEED, agents).run(5_000)


@pytest.mark.timeout(max(900, 2 * SECONDS))
def test_on_two_mounts(pair: tuple[Path, Path], agents: list[Agent]) -> None:
    print(f"seed {SEED}")
    verifier = Verifier(list(pair), SEED, agents)
    verifier.run(OPERATIONS, seconds=SECONDS)
    print(dict(verifier.counts))
    assert sum(verifier.counts.values()) >= min(OPERATIONS, 5_000)


def test_the_verifier_finds_a_wrong_byte(tmp_path: Path) -> None:
    """Planted: one byte of the file changes behind the verifier's back."""
    verifier = Verifier([tmp_path], SEED)
    verifier.run(200)
    verifier.model += b"tail"
    with open(verifier.path, "ab") as file:
        file.write(b"tAil")
    with pytest.raises(AssertionError, match="whole file"):
        verifier.switch()
