"""A client that reads the data files of real storage processes, while another overwrites them and the processes die."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from kvfs.client import Client

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.real_cluster import RealCluster

pytestmark = pytest.mark.cluster

CHUNK = 1 << 20
CHUNKS = 8


def test_overwritten_chunks_are_read_whole_and_never_older_than_before(new_cluster: Callable[[], RealCluster]) -> None:
    """Each chunk is overwritten with one byte value, and synced, so that blocks are freed and used again under the reader."""
    cluster = new_cluster()
    cluster.up("--storage", "1", "--replicas", "1")
    with Client(cluster.path) as writer, Client(cluster.path) as reader:
        with writer.open("/f", "wb", buffering=0) as file:
            for _ in range(CHUNKS):
                file.write(bytes(CHUNK))
        stop = threading.Event()
        failures: list[BaseException] = []

        def write() -> None:
            try:
                with writer.open("/f", "r+b", buffering=0) as file:
                    version = 0
                    while not stop.is_set():
                        version += 1
                        for index in range(CHUNKS):
                            file.pwrite(bytes([version % 256]) * CHUNK, index * CHUNK)
                        file.fsync()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=write)
        thread.start()
        try:
            view = memoryview(bytearray(CHUNK))
            seen = [0] * CHUNKS
            rounds = 0
            with reader.open("/f", "rb", buffering=0) as file:
                end = time.monotonic() + 4
                while time.monotonic() < end and not failures:
                    rounds += 1
                    for index in range(CHUNKS):
                        assert file.preadv([view], index * CHUNK) == CHUNK
                        version = view[0]
                        assert view == bytes([version]) * CHUNK, "a chunk is read in one version"
                        assert (version - seen[index]) % 256 < 128, f"version {version} after {seen[index]}"
                        seen[index] = version
        finally:
            stop.set()
            thread.join(60)
        assert not failures
        assert rounds > 10 and len(set(seen)) <= 2 + CHUNKS and reader.counters.direct_bytes > 0


def test_a_killed_storage_process_costs_no_byte(new_cluster: Callable[[], RealCluster]) -> None:
    cluster = new_cluster()
    cluster.up("--storage", "2", "--replicas", "2", "--no-restart")
    data = os.urandom(CHUNK) * 16
    with Client(cluster.path) as client:
        client.write_bytes("/f", data)
        with client.open("/f", "rb", buffering=0) as file:
            assert file.read() == data and client.counters.direct_bytes > 0
            os.kill(cluster.process("storage-1")["pid"], signal.SIGKILL)
            for _ in range(10):
                file.seek(0)
                assert file.read() == data
                time.sleep(0.1)
