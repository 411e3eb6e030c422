"""Clusters of real processes for tests: started by the `kvfs` command itself in a temporary folder, stopped whatever happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from kvfs.cli import cluster_dir, control
from kvfs.cli.status import collect
from kvfs.common.errors import SetupError

COMMAND_TIMEOUT_S = 150


class RealCluster:
    """A directory made by `kvfs up`, driven through the command line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def kvfs(self, *arguments: str, check: bool = True, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "kvfs.cli.main", *arguments]
        variables = {**os.environ, "KVFS_CLUSTER": str(self.path), **(environment or {})}
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, env=variables)
        assert "Traceback" not in done.stdout + done.stderr, done.stderr
        if check:
            assert done.returncode == 0, f"{' '.join(arguments)}: {done.returncode}\n{done.stdout}\n{done.stderr}{self.logs()}"
        return done

    def json(self, *arguments: str) -> Any:
        return json.loads(self.kvfs(*arguments, "--json").stdout)

    def up(self, *arguments: str) -> dict[str, Any]:
        found: dict[str, Any] = self.json("up", str(self.path), *arguments)
        return found

    def status(self) -> dict[str, Any]:
        """What `kvfs status --json` prints, without the start of a process each time."""
        known = cluster_dir.load(self.path)
        return trio.run(collect, known.managers, known)

    def process(self, name: str) -> dict[str, Any]:
        return next(process for process in self.status()["processes"] if process["id"] == name)

    def serving(self) -> list[int]:
        """Serving replicas of each chain."""
        return [sum(target["state"] == "serving" for target in chain["targets"]) for chain in self.status()["chains"]]

    def logs(self) -> str:
        """The ends of all logs, for a failure's message."""
        texts = []
        for file in sorted((self.path / "log").glob("*.log")):
            texts.append(f"\n--- {file.name}\n" + "\n".join(file.read_text(errors="replace").splitlines()[-15:]))
        return "".join(texts)

    def stop(self) -> None:
        try:
            known = cluster_dir.load(self.path)
        except SetupError:
            return  # never a cluster: nothing was started
        if control.is_running(known.control_socket):
            self.kvfs("down", str(self.path), check=False)


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
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealCluster]:
    """One running cluster with three replicas for all tests of a module: each leaves it whole."""
    running = RealCluster(tmp_path_factory.mktemp("shared") / "cluster")
    try:
        running.up("--storage", "3", "--replicas", "3", "--no-restart")
        yield running
    finally:
        running.stop()
