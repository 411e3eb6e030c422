"""`kvfs demo` (`make demo`): the whole story on real files, with separate processes and a real mount.

A cluster of three storage services with three replicas comes up, is mounted, takes a copy of Python's standard library and of large files, gives
every byte back through the mount and through the native client; a second copy loses a storage service to SIGKILL in its midst and still is right;
the service comes back and the chains serve with three replicas again. The last thing printed is a table beside the same copies on the local disk.
Everything lies in one temporary directory, which is gone at the end, also after an interrupt.
"""

from __future__ import annotations

import os
import signal
import sysconfig
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import trio

from kvfs.cli import cluster_dir, control
from kvfs.cli.context import common_options, console, human_bytes, print_json, table
from kvfs.cli.fsck import check_cluster
from kvfs.cli.measure import step_teller
from kvfs.cli.mount import check_mount_point
from kvfs.cli.own_cluster import shut_down, work_directory
from kvfs.cli.process import interruptible
from kvfs.cli.status import collect
from kvfs.cli.up import start_detached
from kvfs.client import Client
from kvfs.common.errors import DataError, DeadlineExceeded

STORAGE = 3
REPLICAS = 3
BLOCK_BYTES = 1 << 20
RECOVERY_TIMEOUT_S = 120.0
POLL_S = 0.05


@dataclass(slots=True)
class Source:
    """Files to copy: relative path -> size."""

    root: Path
    files: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.files.values())


@dataclass(slots=True)
class Row:
    what: str
    files: int
    bytes: int
    local_s: float
    kvfs_s: float


def standard_library() -> Source:
    """The standard library of this Python without site-packages: thousands of small files in a real tree."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    files = {}
    for directory, below, names in os.walk(stdlib):
        below[:] = [name for name in below if name not in ("site-packages", "dist-packages")]
        for name in names:
            path = Path(directory) / name
            if path.is_file() and not path.is_symlink():
                files[str(path.relative_to(stdlib))] = path.stat().st_size
    return Source(stdlib, files)


def large_files(into: Path, total_bytes: int) -> Source:
    """Four files of random bytes, so that no hole and no repeated block can hide an error."""
    files = {}
    for index in range(4):
        name = f"large-{index}.bin"
        with open(into / name, "wb") as out:
            for _ in range(total_bytes // 4 // BLOCK_BYTES):
                out.write(os.urandom(BLOCK_BYTES))
        files[name] = total_bytes // 4
    return Source(into, files)


def copy(source: Source, to: Path, progress: Callable[[int], None] = lambda count: None) -> float:
    """Copy all files block by block; returns seconds. The same code for the local disk and for the mount."""
    buffer = memoryview(bytearray(BLOCK_BYTES))
    start_s = time.perf_counter()
    made: set[Path] = set()
    for name in source.files:
        target = to / name
        if target.parent not in made:
            target.parent.mkdir(parents=True, exist_ok=True)
            made.add(target.parent)
        with open(source.root / name, "rb", buffering=0) as reader, open(target, "wb", buffering=0) as writer:
            while count := reader.readinto(buffer):
                writer.write(buffer[:count])
                progress(count)
    return time.perf_counter() - start_s


def compare(source: Source, open_copy: Callable[[str], Any]) -> float:
    """Read the copies and compare every byte; returns the seconds spent on reading them. Raises DataError at the first difference."""
    want, got = memoryview(bytearray(BLOCK_BYTES)), memoryview(bytearray(BLOCK_BYTES))
    reading_s = 0.0
    for name in source.files:
        start_s = time.perf_counter()
        with open(source.root / name, "rb", buffering=0) as original, open_copy(name) as copied:
            reading_s += time.perf_counter() - start_s
            offset = 0
            while True:
                count = original.readinto(want)
                start_s = time.perf_counter()
                filled = fill(copied, got[: max(count, 1)])
                reading_s += time.perf_counter() - start_s
                if filled != count or got[:count] != want[:count]:
                    raise DataError(f"{name} differs from the original in the block at {offset}")
                if count == 0:
                    break
                offset += count
    return reading_s


def local_opener(root: Path) -> Callable[[str], Any]:
    return lambda name: (root / name).open("rb", buffering=0)


def client_opener(client: Client, root: str) -> Callable[[str], Any]:
    return lambda name: client.open(f"{root}/{name}", "rb", buffering=0)


def fill(file: Any, view: memoryview) -> int:
    """Read until the view is full or the file ends."""
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            break
        done += count
    return done


class Demo:
    """The steps, in order; `say` prints what happens."""

    def __init__(self, base: Path, large_bytes: int, say: Callable[[str], None]) -> None:
        self.base, self.say = base, say
        self.mount = base / "mnt"
        self.local = base / "local"
        self.rows: list[Row] = []
        self.facts: dict[str, Any] = {}
        for directory in (self.mount, self.local, base / "large"):
            directory.mkdir()
        check_mount_point(str(self.mount))
        self.small = standard_library()
        self.large = large_files(base / "large", large_bytes)
        self.cluster = cluster_dir.create(
            base / "cluster", storage=STORAGE, replicas=REPLICAS, mount=str(self.mount), chunk_size_bytes=1 << 20, lease_ms=2000, base_port=None
        )

    def run(self) -> None:
        start_s = time.perf_counter()
        start_detached(self.cluster, restart=False)
        self.say(f"cluster {self.cluster.cluster_id} is up and mounted in {time.perf_counter() - start_s:.1f} s: {self.processes()}")
        self.first_copy()
        self.second_copy_with_a_kill()
        self.bring_back()
        self.check()

    def processes(self) -> str:
        children = control.request(self.cluster.control_socket, "status")["processes"]
        return ", ".join(f"{child['id']} ({child['pid']})" for child in children)

    def remount(self) -> None:
        """A new mount process has nothing cached: what it reads, it reads from storage."""
        for command in ("stop", "start"):
            control.request(self.cluster.control_socket, command, name="mount", timeout_s=60.0)

    def first_copy(self) -> None:
        sources = (("standard library", self.small), ("large files", self.large))
        local = {name: copy(source, self.local / "first" / name) for name, source in sources}
        for name, source in sources:
            kvfs_s = copy(source, self.mount / "first" / name)
            self.rows.append(Row(f"copy {name} into the mount", len(source.files), source.bytes, local[name], kvfs_s))
        self.say(f"copied {len(self.small.files) + len(self.large.files)} files, {human_bytes(self.small.bytes + self.large.bytes)}, into the mount")
        self.remount()
        with Client(str(self.cluster.path), description="demo") as client:
            for name, source in sources:
                local_s = compare(source, local_opener(self.local / "first" / name))
                mount_s = compare(source, local_opener(self.mount / "first" / name))
                native_s = compare(source, client_opener(client, f"/first/{name}"))
                self.rows.append(Row(f"read {name} through the mount", len(source.files), source.bytes, local_s, mount_s))
                self.rows.append(Row(f"read {name} with the native client", len(source.files), source.bytes, local_s, native_s))
        self.say("every byte is right, through the mount and through the native client")

    def second_copy_with_a_kill(self) -> None:
        local_s = copy(self.large, self.local / "second")
        copied = 0
        halfway = threading.Event()

        def progress(count: int) -> None:
            nonlocal copied
            copied += count
            if copied >= self.large.bytes // 2:
                halfway.set()

        victim = next(child for child in control.request(self.cluster.control_socket, "status")["processes"] if child["id"] == "storage-2")

        def kill() -> None:
            if halfway.wait(RECOVERY_TIMEOUT_S):
                os.kill(victim["pid"], signal.SIGKILL)

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        kvfs_s = copy(self.large, self.mount / "second", progress)
        killer.join()
        self.rows.append(Row("copy large files while storage-2 is killed", len(self.large.files), self.large.bytes, local_s, kvfs_s))
        self.wait_serving(REPLICAS - 1)
        self.say(
            f"killed storage-2 (pid {victim['pid']}) halfway through a second copy; the copy finished in {kvfs_s:.1f} s; chains serve with 2 replicas"
        )
        self.remount()
        compare(self.large, local_opener(self.mount / "second"))
        with Client(str(self.cluster.path), description="demo") as client:
            compare(self.large, client_opener(client, "/second"))
        self.say("every byte of the second copy is right")

    def bring_back(self) -> None:
        start_s = time.perf_counter()
        control.request(self.cluster.control_socket, "start", name="storage-2", timeout_s=60.0)
        self.wait_serving(REPLICAS)
        self.facts["recovery_s"] = time.perf_counter() - start_s
        self.say(f"restarted storage-2: every chain serves with {REPLICAS} replicas again after {self.facts['recovery_s']:.1f} s")

    def wait_serving(self, replicas: int) -> None:
        """Until every chain has exactly that many serving targets. Raises DeadlineExceeded."""
        deadline_s = time.monotonic() + RECOVERY_TIMEOUT_S
        while True:
            report = trio.run(collect, self.cluster.managers, self.cluster)
            counts = [sum(target["state"] == "serving" for target in chain["targets"]) for chain in report["chains"]]
            if counts and all(count == replicas for count in counts):
                return
            if time.monotonic() > deadline_s:
                raise DeadlineExceeded(f"chains have {counts} serving replicas after {RECOVERY_TIMEOUT_S:.0f} s, {replicas} were expected")
            time.sleep(POLL_S)

    def check(self) -> None:
        report = trio.run(check_cluster, str(self.cluster.path))
        self.facts["fsck_problems"] = report.problems
        if report.problems:
            raise DataError(f"fsck found {len(report.problems)} problems, the first: {report.problems[0]}")
        self.say(f"fsck: {report.inodes} inodes, {report.chunks} chunks on {report.replicas} replicas, clean")


def show(rows: list[Row]) -> None:
    made = table("step", "files", "size", "local disk", "kvfs", "ratio", right=("files", "size", "local disk", "kvfs", "ratio"))
    for row in rows:
        rates = [f"{human_bytes(row.bytes / seconds)}/s" for seconds in (row.local_s, row.kvfs_s)]
        made.add_row(row.what, str(row.files), human_bytes(row.bytes), *rates, f"{row.local_s / row.kvfs_s:.2f}")
    console.print(made)


@click.command()
@click.option("--size", "large_mib", type=click.IntRange(8, 1 << 20), default=256, help="MiB of large files.")
@click.option("--keep", is_flag=True, help="Leave the temporary directory (the cluster is stopped all the same).")
@click.option(
    "--directory", type=click.Path(file_okay=False, exists=True, path_type=Path), default=None, help="Where to make the temporary directory."
)
@common_options
def demo(options: Any, large_mib: int, keep: bool, directory: Path | None) -> None:
    """Start a cluster, mount it, copy real files, kill a storage service in the midst, compare every byte, recover, clean up."""
    with interruptible(), work_directory("kvfs-demo-", directory, keep=keep) as base, ExitStack() as stack:
        made = Demo(base, large_mib << 20, step_teller(quiet=options.as_json))
        stack.callback(shut_down, made.cluster)
        made.run()
        if options.as_json:
            rows = [{"step": r.what, "files": r.files, "bytes": r.bytes, "local_s": r.local_s, "kvfs_s": r.kvfs_s} for r in made.rows]
            print_json({"rows": rows, **made.facts})
        else:
            console.print(f"\n{REPLICAS} replicas on {STORAGE} storage services of this machine; local disk: {base}")
            show(made.rows)
