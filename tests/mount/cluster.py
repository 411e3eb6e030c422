"""A whole cluster for the mount tests: real processes through the `kvfs` command, mounted, cleaned up whatever happens."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.real_cluster import RealCluster


class Cluster(RealCluster):
    """A cluster directory below `base`, with its supervisor running and what is mounted of it."""

    def __init__(self, base: Path) -> None:
        super().__init__(base / "cluster", state=base / "state")
        self.base = base
        self.mounts: list[Path] = []

    def mount(self, name: str, *, options: str = "") -> Path:
        path = self.base / name
        path.mkdir(exist_ok=True)
        self.kvfs("mount", str(path), *(["-o", options] if options else []))
        self.mounts.append(path)
        return path

    def umount(self, path: Path) -> None:
        self.kvfs("umount", str(path))
        self.mounts.remove(path)

    def kill(self, role: str, index: int = 0) -> str:
        """SIGKILL; gives the process's id."""
        found = [process for process in self.status()["processes"] if process["role"] == role][index]
        os.kill(found["pid"], signal.SIGKILL)
        return str(found["id"])

    def check(self) -> None:
        """fsck of metadata against chunks and of replicas against each other, once every chain has all of its replicas."""
        eventually(
            lambda: all(target["state"] == "serving" for chain in self.status()["chains"] for target in chain["targets"]),
            message="a replica is missing",
        )

        def clean() -> bool:
            # Files closed a moment ago may be on their way from their directory to the garbage queue: in neither, for one look.
            report = json.loads(self.kvfs("fsck", "--json", check=False).stdout)
            assert report["clean"], report["problems"][:20]
            return True

        eventually(clean, timeout_s=15)

    def close(self) -> None:
        for path in list(self.mounts):
            done = self.kvfs("umount", str(path), check=False)
            if done.returncode != 0:
                subprocess.run(["umount", "-l", str(path)], check=False, capture_output=True)
        self.stop()
        for path in self.mounts:
            subprocess.run(["umount", "-l", str(path)], check=False, capture_output=True)


@contextmanager
def running_cluster(*, storage: int, replicas: int, restart: bool = True) -> Iterator[Cluster]:
    base = Path(tempfile.mkdtemp(prefix="kvfs-mount-"))
    base.chmod(0o755)
    cluster = Cluster(base)
    try:
        cluster.up("--storage", str(storage), "--replicas", str(replicas), *([] if restart else ["--no-restart"]))
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
