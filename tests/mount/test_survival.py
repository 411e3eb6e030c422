"""The mount outlives its servers: a storage service killed in the middle of writes and reads, a metadata service killed and started again,
a mount killed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.mount.cluster import Cluster, eventually, running_cluster

MIB = 1 << 20
DEADLINE_S = 40


@pytest.fixture(scope="module")
def fragile() -> Iterator[Cluster]:
    with running_cluster(storage=3, replicas=3, restart=False) as running:
        yield running


@pytest.fixture(scope="module")
def mounted(fragile: Cluster) -> Path:
    return fragile.mount("m")


def all_serving(cluster: Cluster) -> bool:
    return all(target["state"].lower() == "serving" for chain in cluster.status()["chains"] for target in chain["targets"])


def test_storage_service_killed_while_files_are_written_and_read(fragile: Cluster, mounted: Path) -> None:
    blocks = {f"f{number}": os.urandom(2 * MIB + number) for number in range(24)}
    for name in list(blocks)[:4]:
        (mounted / name).write_bytes(blocks[name])
    errors: list[BaseException] = []
    written = threading.Event()

    def write() -> None:
        try:
            for name, data in list(blocks.items())[4:]:
                (mounted / name).write_bytes(data)
                if name == "f8":
                    written.set()
        except BaseException as error:
            errors.append(error)
        finally:
            written.set()

    def read() -> None:
        try:
            for _ in range(12):
                for name in list(blocks)[:4]:
                    fd = os.open(mounted / name, os.O_RDONLY | os.O_DIRECT)
                    os.close(fd)
                    assert (mounted / name).read_bytes() == blocks[name]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write), threading.Thread(target=read)]
    for thread in threads:
        thread.start()
    assert written.wait(60)
    killed = fragile.kill("storage")
    for thread in threads:
        thread.join(90)
        assert not thread.is_alive(), "a call hangs past its deadline"
    assert not errors, errors
    for name, data in blocks.items():
        assert (mounted / name).read_bytes() == data
    fragile.start(killed)
    eventually(lambda: all_serving(fragile), timeout_s=60, message="the chains do not serve with three replicas again")
    for name, data in blocks.items():
        assert (mounted / name).read_bytes() == data


def test_metadata_service_restarts(fragile: Cluster, mounted: Path) -> None:
    fd = os.open(mounted / "open", os.O_CREAT | os.O_RDWR, 0o644)
    os.write(fd, b"before")
    os.fsync(fd)  # else the close of this descriptor in a forked child, `kvfs start` below, would wait for the service that it is to start
    killed = fragile.kill("meta")
    outcome: list[object] = []

    def work() -> None:
        try:
            (mounted / "during").write_bytes(b"made while the service was away")
            outcome.append("made")
        except OSError as error:
            outcome.append(error.errno)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(1.0)
    fragile.start(killed)
    thread.join(DEADLINE_S)
    assert not thread.is_alive(), "a call hangs past its deadline"
    assert outcome == ["made"]
    os.write(fd, b" and after")
    os.close(fd)
    assert (mounted / "open").read_bytes() == b"before and after"
    assert (mounted / "during").read_bytes() == b"made while the service was away"


def test_without_a_metadata_service_calls_end_with_an_errno(fragile: Cluster, mounted: Path) -> None:
    killed = fragile.kill("meta")
    started = time.monotonic()
    with pytest.raises(OSError) as refused:
        (mounted / "never").write_bytes(b"x")
    took = time.monotonic() - started
    assert took < DEADLINE_S and refused.value.errno in (errno.ETIMEDOUT, errno.EIO, errno.EHOSTUNREACH, errno.ECONNRESET)
    fragile.start(killed)
    eventually(lambda: (mounted / "later").write_bytes(b"x") == 1, timeout_s=30)


def test_killed_mount_leaves_a_dead_mount_point_that_can_be_cleared(fragile: Cluster) -> None:
    path = fragile.mount("victim")
    (path / "kept").write_bytes(b"kept")
    pids = subprocess.run(["pgrep", "-f", f"mount {path} --foreground"], capture_output=True, text=True, check=False).stdout.split()
    assert len(pids) == 1
    os.kill(int(pids[0]), signal.SIGKILL)
    eventually(lambda: _errno_of_stat(path) == errno.ENOTCONN)
    refused = fragile.kvfs("mount", str(path), "--cluster", str(fragile.path), check=False)
    assert refused.returncode != 0 and "umount" in refused.stderr
    fragile.umount(path)
    again = fragile.mount("victim")
    assert (again / "kept").read_bytes() == b"kept"


def _errno_of_stat(path: Path) -> int:
    try:
        os.stat(path)
    except OSError as error:
        return error.errno or 0
    return 0


def test_termination_flushes_and_unmounts(fragile: Cluster, mounted: Path) -> None:
    path = fragile.mount("term")
    fd = os.open(path / "unflushed", os.O_CREAT | os.O_WRONLY, 0o644)
    os.write(fd, b"y" * 100_000)
    pids = subprocess.run(["pgrep", "-f", f"mount {path} --foreground"], capture_output=True, text=True, check=False).stdout.split()
    os.kill(int(pids[0]), signal.SIGTERM)
    eventually(lambda: not os.path.ismount(path), timeout_s=30, message="SIGTERM did not unmount")
    fragile.mounts.remove(path)
    eventually(lambda: (mounted / "unflushed").read_bytes() == b"y" * 100_000, timeout_s=30)
    with pytest.raises(OSError):
        os.close(fd)
        os.stat(f"/proc/self/fd/{fd}")


@pytest.mark.parametrize("what,words", [("missing", "does not exist"), ("file", "not a directory"), ("full", "not empty"), ("mounted", "mounted")])
def test_unfit_mount_points(fragile: Cluster, mounted: Path, what: str, words: str) -> None:
    path = fragile.base / f"unfit-{what}"
    if what == "file":
        path.touch()
    elif what == "full":
        path.mkdir()
        (path / "entry").touch()
    elif what == "mounted":
        path = mounted
    refused = fragile.kvfs("mount", str(path), "--cluster", str(fragile.path), check=False)
    assert refused.returncode != 0 and words in refused.stderr and "Traceback" not in refused.stderr
