"""Mutated frames against real processes: the manager, the metadata service and three storage services.

Whatever comes, a service answers with a typed error or closes the connection, goes on serving others, keeps its memory and descriptors bounded, and
harms nothing that it was not validly asked to harm. KVFS_FUZZ_FRAMES [20000] and KVFS_SEED choose how many and which; `make fuzz` is the release run.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
import time
from pathlib import Path

import pytest
import trio
from tests.real_cluster import RealCluster

from kvfs.cli.cluster_dir import load
from kvfs.cli.fsck import check_cluster
from kvfs.client.locate import locate
from kvfs.common.boundary.system_net import SystemNet

from .attack import Findings, attack
from .mutate import Mutator
from .scene import Scene, check_kept, prepare, process_facts, tidy

pytestmark = pytest.mark.cluster

FRAMES = int(os.environ.get("KVFS_FUZZ_FRAMES", "20000"))
SEED = int(os.environ.get("KVFS_SEED", "2026"))
AT_ONCE = 16
FAULTS_MAX = 20
FRAMES_A_CONNECTION = 20
GROWN_KIB_MAX = 96 << 10
SETTLE_S = 2.5
DESCRIPTORS_MAX = 12
"""More than before the attack: connections between services come and go."""


async def run(scene: Scene, frames: int) -> Findings:
    findings = Findings()
    net = SystemNet()
    sessions = iter(range(frames // FRAMES_A_CONNECTION + 1))

    async def attacker() -> None:
        for number in sessions:
            if len(findings.faults) > FAULTS_MAX:
                return
            chance = random.Random(f"{SEED}/{number}")
            door = scene.doors[number % len(scene.doors)]
            shots = Mutator(chance, scene.facts, scene.corpus).session(door.node, door.methods, FRAMES_A_CONNECTION, carries_fds=door.carries_fds)
            await attack(net, door.address, scene.hello(chance), shots, findings, f"seed {SEED}, connection {number}")

    async with trio.open_nursery() as nursery:
        for _ in range(AT_ONCE):
            nursery.start_soon(attacker)
    return findings


def log_faults(path: Path) -> list[str]:
    return [
        f"{file.name}: {line}"
        for file in path.glob("*.log")
        for line in file.read_text(errors="replace").splitlines()
        if re.search(r" (ERROR|CRITICAL) |Traceback", line)
    ]


def still_complaining(path: Path) -> list[str]:
    """Background work that what came keeps from its end, after all of it is gone. (What lies on a chain of made-up targets waits for them, and the
    truncation of a file that a made-up later turn was heard of waits for that one to end.)"""
    sizes = {file: file.stat().st_size for file in path.glob("*.log")}
    time.sleep(SETTLE_S)
    lines = [line for file, size in sizes.items() for line in file.read_bytes()[size:].decode(errors="replace").splitlines()]
    expected = ("no serving target", "declared dead", "another metadata service has a later one")
    return [line for line in lines if " WARNING " in line and not any(words in line for words in expected)]


def attack_supervisor(socket_path: Path) -> None:
    """Its control socket speaks JSON: what is no command is refused, and the cluster goes on."""
    chance = random.Random(SEED)
    good = json.dumps({"command": "status"}).encode()
    lines = [b"[1]", b"1", b"null", b'"x"', b"[" * 100_000, b'{"command": {}}', b'{"command": "start", "name": []}', b"\xff\xfe", b"x" * 1_000_000]
    lines += [b'{"command": "mount", "path": "a\\u0000b"}', b'{"command": "mount"}', b'{"command": "mount", "path": "/\\ud800"}']
    for _ in range(200):
        spoiled = bytearray(good)
        spoiled[chance.randrange(len(spoiled))] = chance.randrange(256)
        lines.append(bytes(spoiled))
    for line in lines:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            connection.connect(str(socket_path))
            connection.sendall(line.replace(b"\n", b" ") + b"\n")
            answer = json.loads(connection.makefile("rb").readline())
            assert isinstance(answer["ok"], bool) and (answer["ok"] or answer["error"]), line
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(socket_path))  # and leaves in the middle of a line
        connection.sendall(good[:5])


@pytest.mark.timeout(max(300, FRAMES // 100))
def test_services_survive_mutated_frames(tmp_path: Path) -> None:
    cluster = RealCluster(tmp_path / "cluster")
    try:
        cluster.up("--storage", "3", "--replicas", "3", "--no-restart")
        processes = cluster.status()["processes"]
        pids = {process["id"]: process["pid"] for process in processes}
        address = locate(cluster.path)
        scene = trio.run(prepare, address, processes)
        missing = {method.full_name for door in scene.doors for method in door.methods if (door.node, method.key) not in scene.corpus}
        print(f"seed {SEED}; {sum(map(len, scene.corpus.values()))} recorded requests; made up only: {', '.join(sorted(missing))}")
        before = {name: process_facts(pid, cluster.path) for name, pid in pids.items()}
        began_s = time.monotonic()
        findings = trio.run(run, scene, FRAMES)
        took_s = time.monotonic() - began_s
        print(f"seed {SEED}: {findings.frames} frames over {findings.connections} connections ({findings.late} greeted too late), {took_s:.1f} s")
        print(f"answers: {dict(findings.answers.most_common())}")
        attack_supervisor(load(cluster.path).control_socket)
        assert not findings.faults, "\n".join(findings.faults[:10]) + cluster.logs()
        assert {process["id"]: process["pid"] for process in cluster.status()["processes"] if process["state"] == "running"} == pids, cluster.logs()
        trio.run(check_kept, address)
        trio.run(tidy, scene)
        assert still_complaining(cluster.path / "log") == []
        after = {name: process_facts(pid, cluster.path) for name, pid in pids.items()}
        print(
            {name: (f"{before[name][0] >> 10} -> {after[name][0] >> 10} MiB", f"{before[name][1]} -> {after[name][1]} descriptors") for name in pids}
        )
        for name in pids:
            assert after[name][0] - before[name][0] < GROWN_KIB_MAX, f"{name} takes {after[name][0] - before[name][0]} KiB more memory"
            assert after[name][1] - before[name][1] < DESCRIPTORS_MAX, f"{name} has {after[name][1] - before[name][1]} more descriptors"
        assert log_faults(cluster.path / "log") == []
        trio.run(check_kept, address)
        report = trio.run(lambda: check_cluster(str(cluster.path), read_data=True))
        assert report.problems == []
    finally:
        cluster.stop()
