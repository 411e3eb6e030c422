"""Disks that are lost, replaced, emptied and full, in clusters of real processes."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvfs.cli import cluster_dir
from kvfs.client import Client
from kvfs.kvcache import KVCache, SpaceParams

if TYPE_CHECKING:
    from tests.real_cluster import RealCluster

pytestmark = pytest.mark.cluster


def until(what: Callable[[], bool], timeout_s: float, message: str) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline_s, message
        time.sleep(0.1)


def write_files(client: Client, count: int, size: int) -> dict[str, bytes]:
    files = {f"/f{number}": os.urandom(size) for number in range(count)}
    for path, data in files.items():
        with client.open(path, "wb") as file:
            file.write(data)
    return files


def read(client: Client, path: str) -> bytes:
    with client.open(path, "rb") as file:
        return bytes(file.read())


def test_a_replaced_disk_rejoins_with_one_command_and_a_drained_node_may_go(new_cluster: Callable[[], RealCluster]) -> None:
    cluster = new_cluster()
    cluster.up("--storage", "3", "--replicas", "2", "--no-restart")
    with Client(str(cluster.path)) as client:
        files = write_files(client, 6, 400_000)
        cluster.kvfs("stop", "storage-2")
        shutil.rmtree(cluster.path / "storage-2")
        (cluster.path / "storage-2").mkdir()
        cluster.kvfs("start", "storage-2")
        until(lambda: set(cluster.serving()) == {2}, 60, "the empty disk is filled")
        cluster.kvfs("stop", "storage-1")  # so that the new disk has to have everything it shares with it
        assert {path: read(client, path) for path in files} == files
        cluster.kvfs("start", "storage-1")
        until(lambda: set(cluster.serving()) == {2}, 60, "all are back")
        rows = cluster.json("admin", "drain", "storage-3")
        assert rows and all(row["done"] and row["whole_node"] for row in rows)
        assert set(cluster.serving()) == {2} and not any(target["node"] == 103 for chain in cluster.status()["chains"] for target in chain["targets"])
        assert cluster.json("admin", "drain", "storage-3") == rows, "the same again changes nothing"
        until(lambda: not any((cluster.path / "storage-3" / "targets").iterdir()), 20, "its data is deleted")
        cluster.kvfs("stop", "storage-3")
        shutil.rmtree(cluster.path / "storage-3")
        refused = cluster.kvfs("admin", "drain", "storage-2", check=False)
        assert refused.returncode == 1 and "start another storage service first" in refused.stderr
        assert {path: read(client, path) for path in files} == files
    assert cluster.json("fsck", "--read-data")["clean"]
    assert cluster.status()["missing"] == []


def test_a_lost_target_does_not_hold_up_the_others_and_is_given_up_when_told_to(new_cluster: Callable[[], RealCluster]) -> None:
    """Replication 1: the cluster starts without it and says so; what was on it is an error by name, then gone."""
    cluster = new_cluster()
    cluster.up("--storage", "2", "--replicas", "1")
    with Client(str(cluster.path)) as client:
        files = write_files(client, 8, 3_000_000)
    cluster.kvfs("down")
    lost = max((cluster.path / "storage-1" / "targets").iterdir(), key=lambda path: sum(file.stat().st_blocks for file in path.rglob("*")))
    target = int(lost.name)
    shutil.rmtree(lost)
    started_s = time.monotonic()
    report = cluster.up()
    assert time.monotonic() - started_s < 40 and report["phase"] == "ready"
    (missing,) = report["missing"]
    assert str(target) in missing["reason"] and "accept-loss" in missing["reason"] and "gone from its disk" in missing["reason"]
    chain = missing["chain"]
    asked = cluster.kvfs("admin", "accept-loss", str(chain), check=False)
    assert asked.returncode == 1 and "files have chunks there" in asked.stdout and "Aborted" in asked.stderr
    told = cluster.json("admin", "accept-loss", str(target), "--yes")
    damaged = {row["path"] for row in told["files"]}
    assert damaged and damaged <= set(files)
    with Client(str(cluster.path)) as client:
        until(lambda: cluster.status()["missing"] == [], 20, "it serves again")
        for path, data in files.items():
            if path in damaged:
                with pytest.raises(OSError, match="Errno 5"):
                    read(client, path)
            else:
                assert read(client, path) == data
        report = cluster.kvfs("fsck", "--json", check=False)
        assert report.returncode == 1 and all(path in report.stdout for path in damaged)
        for path in damaged:
            client.unlink(path)
        again = write_files(client, 8, 3_000_000)
        assert {path: read(client, path) for path in again} == again
    until(lambda: cluster.kvfs("fsck", check=False).returncode == 0, 30, "nothing is lost any more")
    served = cluster.kvfs("admin", "accept-loss", str(chain), "--yes", check=False)
    assert served.returncode == 1 and "nothing is lost" in served.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, 256 MiB, on a loop device."""
    image, where = tmp_path / "disk.img", tmp_path / "disk"
    where.mkdir()
    if os.geteuid() or shutil.which("mkfs.ext4") is None:
        pytest.skip("a disk of its own needs root and mkfs.ext4")
    with open(image, "wb") as file:
        file.truncate(256 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    if subprocess.run(["mount", "-o", "loop", str(image), str(where)], capture_output=True, check=False).returncode:
        pytest.skip("this machine mounts no loop device")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def test_a_full_disk_refuses_at_once_and_harms_no_other_chain(new_cluster: Callable[[], RealCluster], small_disk: Path) -> None:
    cluster = new_cluster()
    cluster_dir.create(cluster.path, storage=2, replicas=1, mount=None, chunk_size_bytes=1 << 20, lease_ms=2000, base_port=None)
    (cluster.path / "storage-1").rmdir()
    os.symlink(small_disk, cluster.path / "storage-1")
    small = {chain["id"] for chain in cluster.up()["chains"] if chain["targets"][0]["node"] == 101}
    with Client(str(cluster.path)) as client:

        def write(path: str) -> float:
            """How long it took to be refused; 0: it was not."""
            began_s = time.monotonic()
            try:
                with client.open(path, "wb") as file:
                    file.write(data)
                return 0
            except OSError as error:
                assert error.errno == errno.ENOSPC, error
                return time.monotonic() - began_s

        def on_small_disk(path: str) -> bool:
            return client.stat(path).layout.chain_ids[0] in small

        data = os.urandom(1 << 20)
        written = [f"/n{number}" for number in range(1000)]
        for place, path in enumerate(written):
            if write(path):
                assert on_small_disk(path)
                written = written[:place]
                break
        refused_s = []
        for number in range(24):  # about half of them fall on the other disk
            path = f"/more{number}"
            took_s = write(path)
            if took_s:
                refused_s.append(took_s)
            else:
                written.append(path)
        assert len(refused_s) < 20, "the other disk takes what is its own"
        assert refused_s and min(refused_s) < 1.0, "a busy machine makes one slow, not all of them"
        assert len(written) > 60
        for path in written:
            assert read(client, path) == data
        for path in written:
            if on_small_disk(path):
                client.unlink(path)
        until(lambda: not any(write(f"/again{number}") for number in range(8)), 60, "space comes back")


def test_files_go_before_the_cache_on_a_disk_that_chains_share(new_cluster: Callable[[], RealCluster], small_disk: Path) -> None:
    """No file is refused while KV-cache blocks lie on its disk, of whichever chain."""
    cluster = new_cluster()
    cluster_dir.create(cluster.path, storage=1, replicas=1, mount=None, chunk_size_bytes=1 << 20, lease_ms=2000, base_port=None)
    (cluster.path / "storage-1").rmdir()
    os.symlink(small_disk, cluster.path / "storage-1")
    assert len(cluster.up()["chains"]) > 1
    with Client(str(cluster.path)) as client:
        free_bytes = client.statfs().free_bytes
        block = os.urandom(1 << 20)
        space = KVCache(client).create("m", SpaceParams(block_tokens=16, block_bytes=len(block), model="m"))
        for number in range(free_bytes * 85 // 100 // len(block)):
            space.put([number.to_bytes(16, "big")], [block])
        assert space.stats().blocks * len(block) > free_bytes * 7 // 10
        chain, saved = 0, 0
        for number in count():  # all in one chain, whose own blocks are not enough
            path = f"/{number}"
            with client.open(path, "wb") as file:
                mine = client.stat(path).layout.chain_ids[0]
                chain = chain or mine
                if mine == chain:
                    file.write(block)
                    saved += len(block)
            if mine == chain:
                assert read(client, path) == block
                if saved > free_bytes * 75 // 100:
                    break
