"""A drain that is interrupted: the command that watches it, and the manager that carries it out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.process_cluster import ProcessCluster

from kvfs.client import Client
from kvfs.common.wire import meta_pb2

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]
FILES, FILE_BYTES, CHUNK_BYTES = 8, 2 << 20, 64 << 10
DRAINED = "103"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ProcessCluster]:
    # One small chunk at a time, so that a drain takes a while.
    monkeypatch.setenv("KVFS_STORAGE__RESYNC_CONCURRENCY", "1")
    monkeypatch.setenv("KVFS_STORAGE__RESYNC_BATCH_BYTES", str(CHUNK_BYTES))
    made = ProcessCluster(tmp_path / "cluster")
    try:
        made.create(storage=3, replicas=2, lease_ms=1000)
        yield made
    finally:
        made.stop()


def wait_for(what: Callable[[], Any], message: str) -> None:
    deadline_s = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline_s, message
        time.sleep(0.02)


def under_way(cluster: ProcessCluster) -> bool:
    return any(not drain["done"] for drain in cluster.status()["drains"])


def test_a_drain_goes_on_without_its_command_and_after_the_loss_of_the_manager(cluster: ProcessCluster) -> None:
    with Client(str(cluster.path)) as client:
        client.mkdir("/d", layout=meta_pb2.Layout(chunk_size=CHUNK_BYTES))
        files = {f"/d/{number}": os.urandom(FILE_BYTES) for number in range(FILES)}
        for path, data in files.items():
            client.write_bytes(path, data)
        command = [sys.executable, "-m", "kvfs.cli.main", "--cluster", str(cluster.path), "admin", "drain", DRAINED]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as drain:
            wait_for(lambda: under_way(cluster), "the drain has begun")
            drain.send_signal(signal.SIGINT)
            assert under_way(cluster), "the manager is to be lost in the middle"
            cluster.pause("manager")  # the end of the command may take longer than the rest of the drain
            _, errors = drain.communicate(timeout=30)
        assert drain.returncode == 130
        assert errors.splitlines() == [
            "kvfs: it goes on without you: the same command again watches it, with --cancel it is undone",
            "kvfs: interrupted",
        ]
        cluster.kill("manager")
        cluster.start("manager")
        rows = cluster.json("admin", "drain", DRAINED)
        assert rows and all(row["done"] for row in rows)
        chains = cluster.status()["chains"]
        assert all([target["state"] for target in chain["targets"]] == ["serving"] * 2 for chain in chains)
        assert not any(target["node"] == int(DRAINED) for chain in chains for target in chain["targets"])
        assert {path: client.read_bytes(path) for path in files} == files
    assert cluster.json("fsck", "--read-data")["clean"]
