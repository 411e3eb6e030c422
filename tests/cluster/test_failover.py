"""The head, the middle or the tail of a chain is killed while a client and a mount read from it, and a writer keeps an update under way: reads go on
within two leases, every byte is right, and no client and no mount has to be started again."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import trio
from tests.bench.recovery import POSITIONS, Loss, at_work, lose
from tests.process_cluster import ProcessCluster

LEASE_S = 2.0


@pytest.mark.cluster
@pytest.mark.mount
def test_reads_go_on_within_two_leases(tmp_path: Path) -> None:
    cluster, mounted = ProcessCluster(tmp_path / "cluster"), tmp_path / "mounted"
    mounted.mkdir()
    try:
        cluster.create(lease_ms=int(LEASE_S * 1000))
        cluster.kvfs("mount", str(mounted))
        for loss in trio.run(lose_each, cluster, mounted):
            print(loss)
            assert loss.detected_s < 2 * LEASE_S, loss
            assert max(loss.read_s, loss.mount_s) < 2 * LEASE_S, loss
        cluster.kvfs("umount", str(mounted))
        found = cluster.json("fsck")
        assert found["clean"], found["problems"]
    finally:
        subprocess.run(["umount", "-l", str(mounted)], check=False, capture_output=True)
        cluster.stop()


async def lose_each(cluster: ProcessCluster, mounted: Path) -> list[Loss]:
    async with at_work(cluster, mounted) as work:
        return [await lose(cluster, work, position, "killed") for position in POSITIONS]
