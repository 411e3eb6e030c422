"""Clusters that a command starts for itself and takes away again: demos, and benchmarks when no cluster is named.

Owns their end: whatever happens, also an interrupt, the processes stop, mounts go and the directory is removed, each step also when the one before
failed. A cluster that the user named is only ever used.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from kvfs.cli import cluster_dir, control
from kvfs.cli.bring_up import DEFAULT_TABLE, all_chains_serve, get_routing
from kvfs.cli.cluster_dir import ClusterDir
from kvfs.cli.context import Options, err_console
from kvfs.cli.manager_calls import manager_calls
from kvfs.cli.mount import is_mounted, unmount
from kvfs.cli.process import interruptible
from kvfs.cli.up import start_detached, stop_supervisor
from kvfs.common.errors import ClusterNotFound, DeadlineExceeded, KvfsError
from kvfs.common.wire import cluster_pb2

TABLE_TIMEOUT_S = 60.0
POLL_S = 0.05


@contextmanager
def work_directory(prefix: str, parent: Path | None, *, keep: bool = False) -> Iterator[Path]:
    """A new directory, gone at the end unless it is to be kept."""
    base = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield base
    finally:
        if not keep:
            shutil.rmtree(base, ignore_errors=True)


def shut_down(cluster: ClusterDir) -> None:
    """Unmount and stop whatever runs of it."""
    if control.is_running(cluster.control_socket):
        try:
            stop_supervisor(cluster)
        except KvfsError as error:
            err_console.print(error.message, style="yellow")
    if cluster.mount and is_mounted(cluster.mount):
        unmount(cluster.mount, lazy=True)
    if cluster.run_dir.parent != cluster.path:
        shutil.rmtree(cluster.run_dir, ignore_errors=True)


def process_ids(cluster: ClusterDir) -> list[int]:
    """Of its services and its mount, where they run under a supervisor of this machine."""
    try:
        return [child["pid"] for child in control.request(cluster.control_socket, "status")["processes"] if child["pid"]]
    except ClusterNotFound:
        return []


@dataclass(frozen=True, slots=True)
class Place:
    """A cluster to measure on."""

    spec: str
    """As --cluster takes it."""
    pids: tuple[int, ...]
    """Of its processes; none where they are not on this machine."""
    own: bool
    description: str


@contextmanager
def place_to_measure(options: Options, *, storage: int, replicas: Sequence[int], parent: Path | None) -> Iterator[Place]:
    """The cluster that was named; without one a new one, with a chain table for each of these replications."""
    named = options.cluster or os.environ.get("KVFS_CLUSTER", "")
    if named:
        directory = options.directory()
        with interruptible():  # what is made on it for the measurement goes, also then
            yield Place(options.cluster_spec(), tuple(process_ids(directory)) if directory else (), False, f"cluster {named}")
        return
    with ExitStack() as stack:
        stack.enter_context(interruptible())
        base = stack.enter_context(work_directory("kvfs-bench-", parent))
        first, *others = dict.fromkeys(replicas)
        cluster = cluster_dir.create(
            base / "cluster", storage=storage, replicas=first, mount=None, chunk_size_bytes=1 << 20, lease_ms=2000, base_port=None
        )
        stack.callback(shut_down, cluster)
        start_detached(cluster, restart=False)
        trio.run(_add_tables, cluster, others)
        yield Place(str(cluster.path), tuple(process_ids(cluster)), True, f"a cluster of its own ({storage} storage services in {base})")


async def _add_tables(cluster: ClusterDir, replicas: Sequence[int]) -> None:
    async with manager_calls(cluster.managers, cluster.cluster_id) as manager:
        for number, count in enumerate(replicas, DEFAULT_TABLE + 1):
            request = cluster_pb2.CreateTargetsRequest(table_id=number, replicas=count, expected_nodes=cluster.storage, description="bench")
            await manager.call("CreateTargets", request, timeout_s=TABLE_TIMEOUT_S)
        with trio.move_on_after(TABLE_TIMEOUT_S):
            while not all_chains_serve(await get_routing(manager)):
                await trio.sleep(POLL_S)
            return
    raise DeadlineExceeded(f"not every chain serves after {TABLE_TIMEOUT_S:.0f} s: see the storage services' logs")
