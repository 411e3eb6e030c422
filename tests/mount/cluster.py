"""A whole cluster for the mount tests: real processes through the `kvfs` command, mounted, cleaned up whatever happens."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COMMAND_TIMEOUT_S = 150


class Cluster:
    """A cluster directory with its supervisor running."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.directory = base / "cluster"
        self.mounts: list[Path] = []

    def kvfs(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "XDG_STATE_HOME": str(self.base / "state")}
        done = subprocess.run(
            [sys.executable, "-m", "kvfs.cli.main", *arguments],
            capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, env=environment, cwd="/", check=False,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise AssertionError(f"kvfs {' '.join(arguments)}: status {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.logs()}")
        return done

    def logs(self) -> str:
        """The ends of all logs, for a failed test."""
        return "\n".join(
            f"--- {path.name}\n" + path.read_text(errors="replace")[-2000:]
            for folder in (self.directory / "log", self.base / "state" / "kvfs")
            if folder.is_dir()
            for path in sorted(folder.iterdir())
        )

    def up(self, *, storage: int, replicas: int, restart: bool = True) -> None:
        arguments = ["up", str(self.directory), "--storage", str(storage), "--replicas", str(replicas)]
        self.kvfs(*arguments, *([] if restart else ["--no-restart"]))

    def mount(self, name: str, *, options: str = "") -> Path:
        path = self.base / name
        path.mkdir(exist_ok=True)
        self.kvfs("mount", str(path), "--cluster", str(self.directory), *(["-o", options] if options else []))
        self.mounts.append(path)
        return path

    def umount(self, path: Path) -> None:
        self.kvfs("umount", str(path), "--cluster", str(self.directory))
        self.mounts.remove(path)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.kvfs("status", "--cluster", str(self.directory), "--json").stdout)
        return found

    def process(self, role: str, index: int = 0) -> dict[str, Any]:
        return [process for process in self.status()["processes"] if process["role"] == role][index]

    def kill(self, role: str, index: int = 0) -> str:
        """SIGKILL; gives the process's id."""
        found = self.process(role, index)
        os.kill(found["pid"], signal.SIGKILL)
        return str(found["id"])

    def start(self, name: str) -> None:
        self.kvfs("start", name, "--cluster", str(self.directory))

    def stop(self, name: str) -> None:
        self.kvfs("stop", name, "--cluster", str(self.directory))

    def check(self) -> None:
        """fsck of metadata against chunks and of replicas against each other, once every chain has all of its replicas."""
        eventually(
            lambda: all(target["state"] == "serving" for chain in self.status()["chains"] for target in chain["targets"]),
            message="a replica is missing",
        )

        def clean() -> bool:
            # Files closed a moment ago may be on their way from their directory to the garbage queue: in neither, for one look.
            report = json.loads(self.kvfs("fsck", "--cluster", str(self.directory), "--json", check=False).stdout)
            assert report["clean"], report["problems"][:20]
            return True

        eventually(clean, timeout_s=15)

    def close(self) -> None:
        for path in list(self.mounts):
            done = self.kvfs("umount", str(path), "--cluster", str(self.directory), check=False)
            if done.returncode != 0:
                subprocess.run(["umount", "-l", str(path)], check=False, capture_output=True)
        if self.directory.exists():
            self.kvfs("down", str(self.directory), check=False)
        for path in self.mounts:
            subprocess.run(["umount", "-l", str(path)], check=False, capture_output=True)


@contextmanager
def running_cluster(*, storage: int, replicas: int, restart: bool = True) -> Iterator[Cluster]:
    base = Path(tempfile.mkdtemp(prefix="kvfs-mount-"))
    base.chmod(0o755)
    cluster = Cluster(base)
    try:
        cluster.up(storage=storage, replicas=replicas, restart=restart)
        yield cluster
    finally:
        cluster.close()
        if not any(os.path.ismount(path) for path in cluster.mounts):
            shutil.rmtree(base, ignore_errors=True)


def eventually(check: Any, *, timeout_s: float = 30.0, message: str = "") -> Any:
    """Call until it gives something true (an AssertionError counts as not yet)."""
    give_up = time.monotonic() + timeout_s
    while True:
        try:
            found = check()
            if found:
                return found
            error = AssertionError(message or "not within the time")
        except AssertionError as caught:
            error = caught
        if time.monotonic() > give_up:
            raise error
        time.sleep(0.05)
