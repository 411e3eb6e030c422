"""A whole cluster, its directory kept by the recorder, loses power at moments of its work: started again from what its disks hold, it serves, it has
every file that was fsynced, and fsck is clean. A client that lives on hears from fsync that bytes are lost. KVFS_POWER_LOSSES says how often,
KVFS_SEED where; about 10 s each."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))
from crash_disk import CrashDisk, State, lay_out
from recording import Recorded, recording, why_not
from replay import MEMORY
from tests.real_cluster import RealCluster

from kvfs.client import Client
from kvfs.common.errors import UnsyncedLost

LOSSES = int(os.environ.get("KVFS_POWER_LOSSES", "10"))
FILES = 24
CLEAN_S = 120.0
pytestmark = [
    pytest.mark.slow,
    pytest.mark.mount,
    pytest.mark.cluster,
    pytest.mark.skipif(why_not() != "", reason=f"nothing can be recorded: {why_not()}"),
    pytest.mark.timeout(300 + 60 * LOSSES),
]


def work(cluster: RealCluster, recorded: Recorded, dice: random.Random) -> None:
    """Files, most of them fsynced; a mark for each that was. Some get a new name, which is durable when the call returns."""
    with Client(str(cluster.path)) as client:
        for number in range(FILES):
            data = dice.randbytes(dice.choice((100, 70_000, 1_500_000, 3_000_000)))
            with client.open(f"/f{number}", "wb", buffering=0) as file:
                file.write(data)
                if dice.random() < 0.7:
                    file.fsync()
                    recorded.mark(f"/f{number} {hashlib.sha256(data).hexdigest()}".encode())
            if number % 5 == 4:
                client.rename(f"/f{number}", f"/r{number}")
                recorded.mark(f"/r{number} -".encode())


def promised(marks: list[bytes]) -> dict[str, str]:
    """Path -> digest of what must be there."""
    files: dict[str, str] = {}
    for mark in marks:
        path, digest = mark.decode().split()
        if digest == "-":
            digest = files.pop("/f" + path[2:], "")
        if digest:
            files[path] = digest
    return files


def check(cluster: RealCluster, files: dict[str, str], begun: set[str]) -> None:
    try:
        cluster.up()
        with Client(str(cluster.path)) as client:
            for path, digest in files.items():
                # A rename may have been done and not yet been acknowledged.
                there = path if client.exists(path) else path.replace("/f", "/r")
                assert there == path or there in begun, f"{path} is gone"
                with client.open(there, "rb") as file:
                    assert hashlib.sha256(file.read()).hexdigest() == digest, there
        end_s = time.monotonic() + CLEAN_S
        while cluster.serving() != [2] * len(cluster.serving()):
            assert time.monotonic() < end_s, "a replica is missing"
            time.sleep(0.2)
        # Of a file that was being written the length is not known before its client is given up.
        while not (report := json.loads(cluster.kvfs("fsck", "--json", check=False).stdout))["clean"]:
            assert time.monotonic() < end_s, report["problems"][:10]
            time.sleep(1)
    finally:
        cluster.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give processes another boot id")
def test_a_client_that_outlives_a_loss_of_power_hears_of_it() -> None:
    base = Path(tempfile.mkdtemp(prefix="kvfs-power-", dir=MEMORY if MEMORY.is_dir() else None))
    boot = base / "boot"
    boot.write_text("the next\n")
    old, new = os.urandom(3_000_000), os.urandom(3_000_000)
    cluster = RealCluster(base / "mount" / "c")
    try:
        with contextlib.ExitStack() as client_life:
            with recording(base) as recorded:
                try:
                    cluster.up("--storage", "2", "--replicas", "2")
                    client = client_life.enter_context(Client(str(cluster.path)))
                    file = client_life.enter_context(client.open("/f", "w+b", buffering=0))
                    file.write(old)
                    file.fsync()
                    file.seek(0)
                    file.write(new)
                    file.flush()
                    log = recorded.events()
                finally:
                    cluster.stop()
            disk = CrashDisk()
            for event in log:
                disk.play(event)
            lay_out(disk.nothing_unsynced(), recorded.folder)
            cluster.boot = boot
            cluster.up()
            with pytest.raises(OSError, match="write again") as lost:
                file.fsync()
            assert lost.value.errno == errno.EIO and isinstance(lost.value.__cause__, UnsyncedLost)
            assert client.read_bytes("/f") == old
            file.seek(0)
            file.write(new)
            file.fsync()
            file.seek(0)
            file.write(old)
            file.flush()
            for process in cluster.status()["processes"]:
                if process["role"] == "storage":
                    os.kill(process["pid"], signal.SIGKILL)
            file.fsync()  # the page cache has it all
            assert client.read_bytes("/f") == old
    finally:
        cluster.stop()
        shutil.rmtree(base)


def test_a_cluster_that_loses_power_has_what_was_fsynced() -> None:
    seed = int(os.environ.get("KVFS_SEED", "1"))
    print(f"seed {seed}")
    dice = random.Random(seed)
    base = Path(tempfile.mkdtemp(prefix="kvfs-power-", dir=MEMORY if MEMORY.is_dir() else None))
    try:
        with recording(base) as recorded:
            cluster = RealCluster(recorded.folder / "c")
            try:
                cluster.up("--storage", "2", "--replicas", "2")
                began = len(recorded.events())
                work(cluster, recorded, dice)
                log = recorded.events()
            finally:
                cluster.stop()
        for number in range(LOSSES):
            point = dice.randrange(began, len(log) + 1) if number else len(log)
            disk = CrashDisk()
            for event in log[:point]:
                disk.play(event)
            name = dice.choice(("everything", "nothing_unsynced", "torn"))
            state: State = disk.torn(dice) if name == "torn" else getattr(disk, name)()
            lay_out(state, recorded.folder)
            files = promised([event.data for event in log[:point] if event.kind == "mark"])
            print(f"{name}: power lost after {point} of {len(log)} changes and marks, {len(files)} files were fsynced")
            check(cluster, files, {f"/r{place}" for place in range(FILES)})
            shutil.rmtree(recorded.folder / "c")
    finally:
        shutil.rmtree(base)
