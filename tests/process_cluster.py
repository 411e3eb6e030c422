"""A real cluster whose processes the test itself starts, kills, stops for a while and cuts off from each other.

As `kvfs up` makes it (its directory, configuration and commands), without the supervisor: here nothing starts again by itself. With a `Network` each
process has a network namespace of its own. So many storage services as `near` says also listen on unix sockets: clients of this machine share memory
with them and are told where bytes lie. Those paths no cut reaches, only the way to the manager and the metadata service.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio
from tests.network import Network
from tests.real_cluster import RealCluster

from kvfs.cli import cluster_dir
from kvfs.cli.bring_up import bring_up
from kvfs.cli.status import collect
from kvfs.meta.cluster.config import ManagerConfig
from kvfs.meta.config import MetaConfig
from kvfs.storage.config import StorageConfig

READY_S = 150.0
SERVED_S = 90.0


def names(storage: int) -> list[str]:
    """The processes of a cluster with so many storage services, in the order of their start."""
    return ["manager", *(f"storage-{number}" for number in range(1, storage + 1)), "meta"]


class ProcessCluster(RealCluster):
    def __init__(self, path: Path, network: Network | None = None) -> None:
        super().__init__(path)
        self.network = network
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.paused: set[str] = set()
        self._ready: dict[str, int] = {}
        """Pipes on which those that are starting say that they serve."""
        self._lifeline_read, self._lifeline_write = os.pipe()

    def create(self, *, storage: int = 3, replicas: int = 3, lease_ms: int = 2000, near: int = 64) -> None:
        """Made, started and serving."""
        made = cluster_dir.create(
            self.path, storage=storage, replicas=replicas, mount=None, chunk_size_bytes=1 << 20, lease_ms=lease_ms, base_port=None
        )
        if self.network is not None:
            made = replace(made, managers=(f"tcp://{self._host('manager')}:{made.manager_port}",))
            made.save()
        for file in (self.path / "etc").iterdir():
            file.unlink()
        made.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        common = {"cluster_id": made.cluster_id, "managers": made.managers}
        cluster_dir.write_config(
            made, "manager", ManagerConfig(data=str(self.path / "manager"), listen=made.managers, cluster_id=made.cluster_id, lease_ms=lease_ms)
        )
        meta_address = f"tcp://{self._host('meta')}:{made.meta_port}"
        cluster_dir.write_config(made, "meta", MetaConfig(data=str(self.path / "meta"), listen=(meta_address,), **common))
        for number, name in enumerate(made.storage_names(), 1):
            sockets = (f"unix://{made.run_dir / name}.sock",) if number <= near else ()
            listen = (f"tcp://{self._host(name)}:0", *sockets)
            node = cluster_dir.FIRST_STORAGE_NODE + number
            cluster_dir.write_config(made, name, StorageConfig(data=(str(self.path / name),), listen=listen, node_id=node, **common))
        for name in names(storage):
            self.launch(name)
        for name in names(storage):
            self.wait_ready(name)
        trio.run(bring_up, made)

    def _host(self, name: str) -> str:
        return self.network.address(name) if self.network is not None else "127.0.0.1"

    # --- processes -------------------------------------------------------------------------------------------------------------------

    def launch(self, name: str) -> None:
        """Start a process that is not running; `wait_ready` waits until it serves."""
        assert name not in self.running or self.running[name].poll() is not None, f"{name} runs already"
        known = cluster_dir.load(self.path)
        argv = [sys.executable, "-m", "kvfs.cli.main", name.partition("-")[0], "--config", str(known.config_file(name))]
        ready_read, ready_write = os.pipe()
        with open(known.log_file(name), "ab") as log:
            self.running[name] = subprocess.Popen(
                self.network.inside(name, argv) if self.network is not None else argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "KVFS_READY_FD": str(ready_write), "KVFS_LIFELINE_FD": str(self._lifeline_read)},
                pass_fds=(ready_write, self._lifeline_read),
            )
        os.close(ready_write)
        self._ready[name] = ready_read

    def wait_ready(self, name: str) -> bool:
        """Whether it serves; False: it ended first."""
        ready = self._ready.pop(name)
        deadline_s = time.monotonic() + READY_S
        try:
            while time.monotonic() < deadline_s:
                if select.select([ready], [], [], 0.05)[0]:
                    return os.read(ready, 4096) != b""
            raise AssertionError(f"{name} did not start within {READY_S:g} s{self.logs()}")
        finally:
            os.close(ready)

    def start(self, name: str) -> None:
        self.launch(name)
        self.wait_ready(name)

    def status(self) -> dict[str, Any]:
        """As the manager tells it: there is no supervisor to ask."""
        return trio.run(collect, cluster_dir.load(self.path).managers, None)

    def alive(self, name: str) -> bool:
        return self.running[name].poll() is None

    def signal(self, name: str, number: signal.Signals) -> None:
        self.running[name].send_signal(number)

    def kill(self, name: str) -> None:
        self.signal(name, signal.SIGKILL)
        self.running[name].wait()
        self.paused.discard(name)

    def pause(self, name: str) -> None:
        self.signal(name, signal.SIGSTOP)
        self.paused.add(name)

    def resume(self, name: str) -> None:
        self.signal(name, signal.SIGCONT)
        self.paused.discard(name)

    def wait_serving(self, replicas: int, *, timeout_s: float = SERVED_S) -> None:
        """Until each chain has so many serving targets."""
        deadline_s = time.monotonic() + timeout_s
        while not (serving := self.serving()) or min(serving) < replicas:
            assert time.monotonic() < deadline_s, f"chains have {serving} serving targets after {timeout_s:g} s{self.logs()}"
            time.sleep(0.1)

    def stop(self) -> None:
        for name in list(self.paused):
            self.resume(name)
        for process in self.running.values():
            process.terminate()
        deadline_s = time.monotonic() + 10
        for process in self.running.values():
            try:
                process.wait(max(0.1, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.running.clear()
        shutil.rmtree(cluster_dir.load(self.path).run_dir, ignore_errors=True)
        for fd in (self._lifeline_read, self._lifeline_write, *self._ready.values()):
            os.close(fd)
