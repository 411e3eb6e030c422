"""Clusters of real processes for tests: started by the `kvfs` command itself, driven through the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import trio

from kvfs.cli import cluster_dir, control
from kvfs.cli.status import collect
from kvfs.common.errors import SetupError

COMMAND_TIMEOUT_S = 150
BOOT_ID = "/proc/sys/kernel/random/boot_id"


class RealCluster:
    """A directory made by `kvfs up`, driven through the command line."""

    def __init__(self, path: Path, *, state: Path | None = None, boot: Path | None = None) -> None:
        """`state`: where mounts that the tests start write their logs. `boot`: a file with the boot id of the machine that its processes are to see
        (needs root)."""
        self.path = path
        self.state = state
        self.boot = boot

    def kvfs(self, *arguments: str, check: bool = True, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "kvfs.cli.main", *arguments]
        if self.boot is not None:
            command = ["unshare", "--mount", "sh", "-c", f'mount --bind "$0" {BOOT_ID} && exec "$@"', str(self.boot), *command]
        variables = {**os.environ, "KVFS_CLUSTER": str(self.path), **(environment or {})}
        if self.state is not None:
            variables["XDG_STATE_HOME"] = str(self.state)
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, env=variables, check=False)
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
        for file in sorted([*(self.path / "log").glob("*.log"), *((self.state or self.path) / "kvfs").glob("*.log")]):
            texts.append(f"\n--- {file.name}\n" + "\n".join(file.read_text(errors="replace").splitlines()[-15:]))
        return "".join(texts)

    def start(self, name: str) -> None:
        """One process that died or was stopped."""
        self.kvfs("start", name)

    def stop(self) -> None:
        try:
            known = cluster_dir.load(self.path)
        except SetupError:
            return  # never a cluster: nothing was started
        if control.is_running(known.control_socket):
            self.kvfs("down", str(self.path), check=False)
