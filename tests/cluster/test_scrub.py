"""Bits flipped on the disks of a running cluster: mended by a scrub, or told by name and never read."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from kvfs.client import Client
from kvfs.kvcache import KVCache, SpaceParams

if TYPE_CHECKING:
    from tests.real_cluster import RealCluster

pytestmark = pytest.mark.cluster


def flip(cluster: RealCluster, data: bytes, offset: int, *, copies: int) -> int:
    """One bit of some bytes, wherever a target stores them. In how many copies it was done."""
    done = 0
    for path in sorted(cluster.path.glob("storage-*/targets/*/data/*")):
        at = path.read_bytes().find(data[:64])
        if at >= 0 and done < copies:
            with open(path, "r+b") as file:
                file.seek(at + offset)
                byte = file.read(1)[0]
                file.seek(at + offset)
                file.write(bytes((byte ^ 0x10,)))
            done += 1
    return done


def test_damage_is_mended_or_told_by_name(new_cluster: Callable[[], RealCluster]) -> None:
    cluster = new_cluster()
    cluster.up("--storage", "2", "--replicas", "2")
    files = {name: os.urandom(300_000) for name in ("mended", "lost")}
    blocks = [os.urandom(50_000) for _ in range(2)]
    with Client(str(cluster.path)) as client:
        for name, data in files.items():
            with client.open(f"/{name}", "wb") as file:
                file.write(data)
        space = KVCache(client).create("s", SpaceParams(block_tokens=16, block_bytes=50_000, model="m", replication=2))
        keys = space.keys(list(range(32)))
        assert all(outcome.name == "STORED" for outcome in space.put(keys, blocks))
        assert flip(cluster, files["mended"], 123_456, copies=1) == 1 and flip(cluster, blocks[0], 49_999, copies=1) == 1
        assert flip(cluster, files["lost"], 200_000, copies=2) == 2 and flip(cluster, blocks[1], 7, copies=2) == 2
        done = cluster.kvfs("admin", "scrub", "--all", "--now", "--json", check=False)
        assert done.returncode == 1, done.stderr
        rows = json.loads(done.stdout)
        assert sum(row["repaired"] for row in rows) == 2 and sum(row["damaged"] for row in rows) == 4
        assert all(row["passes"] == 1 and row["state"] == "idle" and row["finished_ns"] for row in rows)
        with client.open("/mended", "rb") as file:
            assert file.read() == files["mended"]
        with client.open("/lost", "rb") as file, pytest.raises(OSError, match="checksum"):
            file.read()
        report = json.loads(cluster.kvfs("fsck", "--json", check=False).stdout)
        assert len(report["problems"]) == 4 and not report["clean"]
        assert sum("/lost" in problem for problem in report["problems"]) == 2
        assert sum("/kvcache/s" in problem for problem in report["problems"]) == 2
        assert sum(row["damaged"] for row in cluster.json("status")["scrub"]) == 4
        assert "4 DAMAGED" in cluster.kvfs("status").stdout
        into = [bytearray(50_000), bytearray(50_000)]
        assert space.get(keys, into) == [50_000, None] and into[0] == blocks[0], "the right bytes or a miss"
        client.unlink("/lost")
        space.remove(keys[1:])
        deadline_s = time.monotonic() + 30
        while any(row["damaged"] for row in cluster.status()["scrub"]):  # the file's chunks go in the background
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
        assert cluster.kvfs("admin", "scrub", "--all", "--now").returncode == 0
        assert cluster.json("fsck", "--read-data")["clean"]
    unknown = cluster.kvfs("admin", "scrub", "77", "--now", check=False)
    assert unknown.returncode == 1 and "list-targets" in unknown.stderr
