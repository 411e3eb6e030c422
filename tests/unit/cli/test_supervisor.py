"""The supervisor of a cluster directory: there is one."""

from __future__ import annotations

import os
import socket
from contextlib import closing
from pathlib import Path

import pytest
import trio

from kvfs.cli import cluster_dir
from kvfs.cli.supervisor import Supervisor
from kvfs.common.boundary.real_disk import RealDisk
from kvfs.common.errors import DirectoryInUse


def test_one_that_has_bound_its_socket_and_does_not_listen_yet_is_not_taken_for_dead(tmp_path: Path) -> None:
    cluster = cluster_dir.create(tmp_path / "c", storage=1, replicas=1, mount=None, chunk_size_bytes=1 << 20, lease_ms=2000, base_port=None)
    cluster.run_dir.mkdir(mode=0o700, exist_ok=True)
    second = Supervisor(cluster, restart=False, bring_up=lambda: None, stay_when_failed=False)

    async def main() -> None:
        with socket.socket(socket.AF_UNIX) as first, closing(RealDisk(cluster.run_dir)) as held:
            held.lock()
            first.bind(str(cluster.control_socket))
            inode = os.stat(cluster.control_socket).st_ino

            async def begin_to_listen() -> None:
                await trio.sleep(0.3)
                assert os.stat(cluster.control_socket).st_ino == inode
                first.listen()

            with trio.fail_after(20):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(begin_to_listen)
                    with pytest.raises(DirectoryInUse, match="already running"):
                        await second.run()

    trio.run(main)
