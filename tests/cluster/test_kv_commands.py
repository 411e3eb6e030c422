"""`kvfs kv`, `kvfs bench` and `kvfs demo-kvcache` as a user runs them: real processes, JSON, errors in one line, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.cluster.test_lifecycle import wait_for

from kvfs.cli.bench_kv import client_config
from kvfs.client import Client

if TYPE_CHECKING:
    from tests.cluster.conftest import RealCluster

pytestmark = pytest.mark.cluster

KEY = "ab" * 16
BENCH_KEYS = {"blocks_per_s", "bytes_per_s", "p50_s", "p99_s", "cpu_s", "missed"}


def test_a_space_and_its_blocks(cluster: RealCluster, tmp_path: Path) -> None:
    sizes = ("--block-bytes", "64K", "--block-tokens", "16")
    made = cluster.json("kv", "create", "s", *sizes, "--model", "m", "--format", "tp=3", "--quota", "10M", "--ttl", "60", "--replicas", "3")
    assert made["format"] == {"model": "m", "tp": "3"} and made["block_bytes"] == 65536 and made["replication"] == 3
    assert cluster.json("kv", "create", "s", *sizes, "--model", "m", "--format", "tp=3", "--exist-ok")["inode"] == made["inode"]
    [row] = cluster.json("kv", "ls")
    assert row["name"] == "s" and row["quota_bytes"] == 10 << 20 and row["ttl_s"] == 60 and row["digest"] == made["digest"]
    assert "model=m" in cluster.kvfs("kv", "ls").stdout

    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(os.urandom(60_001))
    put = cluster.json("kv", "put", "s", KEY, str(source))
    assert (put["outcome"], put["form"], put["key"], put["bytes"]) == ("stored", "hex", KEY, 60_001)
    again = cluster.json("kv", "put", "s", KEY, "/etc/hostname")
    assert (again["outcome"], again["bytes"]) == ("present", None), "not the size of what was not stored"
    assert cluster.kvfs("kv", "put", "s", "a name", str(source), "--text").stdout.startswith("stored: ")
    assert cluster.json("kv", "get", "s", KEY, str(target))["bytes"] == 60_001
    assert target.read_bytes() == source.read_bytes()

    found = cluster.json("kv", "exists", "s", "a name", "--text")
    assert [entry["present"] for entry in found] == [True]
    half = cluster.kvfs("kv", "exists", "s", KEY, "cd" * 16, check=False)
    assert half.returncode == 1 and half.stdout == f"present: {KEY}\nabsent: {'cd' * 16}\n" and not half.stderr
    [stat] = cluster.json("kv", "stat", "s")
    assert (stat["blocks"], stat["bytes"], stat["stored"], stat["evicted"]) == (2, 120_002, 2, 0)
    assert 0 < stat["packing"] == stat["bytes"] / stat["allocated_bytes"] < 1
    assert "packing" in cluster.kvfs("kv", "stat").stdout
    assert cluster.json("kv", "evict", "s", "--all")["evicted"] == 2
    assert cluster.json("kv", "stat")[0]["blocks"] == 0
    missing = cluster.kvfs("kv", "get", "s", KEY, str(tmp_path / "no"), check=False)
    assert missing.returncode == 1 and KEY in missing.stderr and not (tmp_path / "no").exists()
    assert cluster.json("kv", "drop", "s") == {"dropped": "s"}
    assert cluster.json("kv", "ls") == []


def test_bad_input_is_said_in_words(cluster: RealCluster, tmp_path: Path) -> None:
    create = ("kv", "create", "e", "--block-bytes", "1K", "--block-tokens", "16")
    cluster.kvfs(*create)
    large, empty = tmp_path / "large", tmp_path / "empty"
    large.write_bytes(bytes(1025))
    empty.touch()
    for arguments, words in (
        (create, "/kvcache/e is there already"),
        ((*create, "--model", "x", "--exist-ok"), "model"),
        (("kv", "create", "f", "--block-bytes", "65M", "--block-tokens", "1"), "block_bytes"),
        (("kv", "create", "f", "--block-bytes", "1K", "--block-tokens", "1", "--quota", "0"), "quota"),
        (("kv", "create", "f", "--block-bytes", "1K", "--block-tokens", "1", "--table", "77"), "77"),
        (("kv", "create", "f", "--block-bytes", "1K", "--block-tokens", "1", "--ttl", "nan"), "ttl_s is nan"),
        (("kv", "create", "f", "--block-bytes", "1K", "--block-tokens", str(1 << 32)), "block_tokens"),
        (("kv", "create", "f", "--block-bytes", "1K", "--block-tokens", "1", "--model", "a\udcff"), "format fields are text"),
        (("kv", "put", "e", KEY, str(large)), "at most 1024"),
        (("kv", "put", "e", KEY, str(empty)), "empty"),
        (("kv", "put", "e", KEY, "/not/there"), "/not/there"),
        (("kv", "get", "unknown", KEY, "-"), "there is no space unknown; there are e"),
        (("kv", "stat", "unknown"), "unknown"),
        (("kv", "drop", "unknown"), "unknown"),
    ):
        done = cluster.kvfs(*arguments, check=False)
        assert done.returncode in (1, 2) and words in done.stderr, (arguments, done.stderr)
        assert done.stderr.startswith("kvfs: error: ") and done.stderr.count("\n") == 1, done.stderr
    for usage, words in ((("kv", "get", "e", "12", "-"), "--text"), (("kv", "evict", "e"), "--all"), (("bench", "trace"), "FILE")):
        done = cluster.kvfs(*usage, check=False)
        assert done.returncode == 2 and words in done.stderr, done.stderr
    shell = f"{sys.executable} -m kvfs.cli.main kv put e {KEY} - --cluster {cluster.path} <&-"
    done = subprocess.run(shell, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr == "kvfs: error: standard input is closed\n"
    cluster.kvfs("kv", "drop", "e")


def test_bench_kv_on_a_named_cluster(cluster: RealCluster) -> None:
    arguments = ("--block-bytes", "64K", "--batch", "4", "--clients", "2", "--transport", "shm", "--transport", "tcp", "--replicas", "3")
    rows = cluster.json("bench", "kv", *arguments, "--working-set", "2M", "--seconds", "0.2")
    assert [(row["operation"], row["transport"]) for row in rows] == [(what, how) for how in ("shm", "tcp") for what in ("put", "get", "exists")]
    for row in rows:
        assert row.keys() > BENCH_KEYS and row["missed"] == 0 and row["blocks_per_s"] > 0 and 0 < row["p50_s"] <= row["p99_s"]
    assert [row["blocks"] for row in rows if row["operation"] == "put"] == [32, 32]
    assert (
        "get 64.0 KiB x4 shm r3 c1"
        in cluster.kvfs("bench", "kv", *arguments[:4], "--replicas", "3", "--working-set", "1M", "--seconds", "0.1").stdout
    )
    assert cluster.json("kv", "ls") == []


def test_bench_kv_refuses_a_working_set_that_cannot_fit(cluster: RealCluster) -> None:
    refused = cluster.kvfs("bench", "kv", "--replicas", "3", "--working-set", "999T", check=False)
    assert refused.returncode == 1 and "999.0 TiB in 3 copies does not fit" in refused.stderr and "smaller --working-set" in refused.stderr
    assert cluster.json("kv", "ls") == []


def test_an_interrupted_bench_leaves_no_space_behind(cluster: RealCluster) -> None:
    command = [sys.executable, "-m", "kvfs.cli.main", "bench", "kv", "--cluster", str(cluster.path), "--replicas", "3", "--seconds", "60"]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: bool(cluster.json("kv", "ls")), 60, "its space is there")
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in errors, errors
    assert cluster.json("kv", "ls") == []


def test_bench_trace_counts_as_the_oracle_does(cluster: RealCluster, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    prompts = [[1, 2, 3], [1, 2, 4], [1, 2, 3, 5], [9], [1, 2]]
    lines = [{"timestamp": n, "input_length": 512 * len(each), "output_length": 1, "hash_ids": each} for n, each in enumerate(prompts)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    unlimited, limited = cluster.json("bench", "trace", str(file), "--capacity-blocks", "0", "--capacity-blocks", "100", "--replicas", "3", "--read")
    for row in (unlimited, limited):
        assert row["hit_rate"] == row["lru_hit_rate"] == row["unlimited_hit_rate"] == (2 + 3 + 2) / 13
        assert (row["requests"], row["blocks_stored"], row["blocks_read"], row["wrong_blocks"], row["evicted"]) == (5, 6, 7, 0, 0)
    assert cluster.json("bench", "trace", str(file), "--limit", "2", "--replicas", "3")[0]["hit_rate"] == 2 / 6
    assert "exact LRU" in cluster.kvfs("bench", "trace", "--workload", "laptop", "--limit", "5", "--replicas", "3").stdout
    file.write_text("{}\n")
    wrong = cluster.kvfs("bench", "trace", str(file), check=False)
    assert wrong.returncode == 1 and f"{file}:1" in wrong.stderr
    assert cluster.json("kv", "ls") == []


def alone(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    """A command to which no cluster is named, with its temporary directory in `tmp_path`."""
    variables = {name: value for name, value in os.environ.items() if name != "KVFS_CLUSTER"}
    command = [sys.executable, "-m", "kvfs.cli.main", *arguments, "--directory", str(tmp_path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)


def processes_below(path: Path) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # no process, or gone meanwhile
            continue
        if f"{path}/" in words and int(entry.name) != os.getpid():
            found.append(words)
    return found


def test_bench_without_a_cluster_takes_its_own_away_again(tmp_path: Path) -> None:
    arguments = (
        "--block-bytes",
        "4K",
        "--batch",
        "2",
        "--working-set",
        "64K",
        "--seconds",
        "0.1",
        "--storage",
        "2",
        "--replicas",
        "1",
        "--replicas",
        "2",
    )
    run = alone(tmp_path, "bench", "kv", *arguments, "--json")
    out, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert [row["replicas"] for row in json.loads(out)] == [1] * 3 + [2] * 3
    assert not list(tmp_path.iterdir()) and not processes_below(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    run = alone(tmp_path, "demo-kvcache", "--no-plot")
    wait_for(lambda: len(processes_below(tmp_path)) >= 4, 60, "its cluster is starting")
    if number == signal.SIGTERM:
        time.sleep(5)  # its clients are at work, or about to be
    run.send_signal(number)
    _, errors = run.communicate(timeout=90)
    assert run.returncode == 130 and "Traceback" not in errors, errors
    assert not list(tmp_path.iterdir())
    wait_for(lambda: not processes_below(tmp_path), 10, "all its processes are gone")


@pytest.mark.slow
def test_the_demo(tmp_path: Path) -> None:
    run = alone(tmp_path, "demo-kvcache", "--no-plot", "--json")
    out, errors = run.communicate(timeout=280)
    assert run.returncode == 0, errors
    facts = json.loads(out)
    replay = facts["replay"]
    assert replay["requests"] == 250 and replay["wrong_blocks"] == 0 and replay["blocks_refused"] == 0 and replay["evicted"] > 100
    assert replay["hit_rate"] < replay["unlimited_hit_rate"] and abs(replay["points_under_lru"]) < 5
    assert facts["blocks_after_restart"] == facts["put_blocks"]
    assert not list(tmp_path.iterdir())


def test_a_client_without_shared_memory_has_sockets_only(cluster: RealCluster) -> None:
    def staging() -> int:
        """Regions that this process shares with services."""
        return sum("memfd:kvfs-staging" in os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())

    for transport in ("shm", "tcp"):
        before = staging()
        with Client(str(cluster.path), config=client_config(transport)) as client:
            client.write_bytes(f"/{transport}", b"x" * 200_000)
            assert client.read_bytes(f"/{transport}") == b"x" * 200_000
            storage = client.portal.client.storage
            assert storage.nearby(next(iter(storage.routing.chains)).chain_id) is (transport == "shm")
            assert (staging() > before) is (transport == "shm")
            client.unlink(f"/{transport}")
