"""A cluster's life: made, stopped, started again with its data; services killed and brought back; setups that cannot work are refused."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvfs.cli import cluster_dir
from kvfs.client import Client

if TYPE_CHECKING:
    from tests.real_cluster import RealCluster

pytestmark = pytest.mark.cluster

LEASE_S = 2.0


def wait_for(what: Callable[[], bool], timeout_s: float, message: str) -> None:
    """Until `what` holds; fails after the time-out."""
    start = time.monotonic()
    while not what():
        assert time.monotonic() - start < timeout_s, message
        time.sleep(0.1)


def test_second_up_starts_the_same_cluster_with_its_data(new_cluster: Callable[[], RealCluster]) -> None:
    cluster = new_cluster()
    first = cluster.up("--storage", "2", "--replicas", "2")
    data = os.urandom(3_000_000)
    with Client(str(cluster.path)) as client, client.open("/kept", "wb") as file:
        file.write(data)
    cluster.kvfs("down")
    assert cluster.status()["phase"] == "stopped"
    again = cluster.up()
    assert again["cluster_id"] == first["cluster_id"]
    assert again["managers"] == first["managers"]
    with Client(str(cluster.path)) as client, client.open("/kept", "rb") as file:
        assert file.read() == data
    refused = cluster.kvfs("up", str(cluster.path), "--replicas", "1", check=False)
    assert refused.returncode == 2 and "--replicas 2" in refused.stderr
    wait_for(lambda: cluster.serving() == [2] * len(cluster.serving()), 30, "all replicas serve again after a restart")
    assert cluster.json("fsck")["clean"]


def test_a_killed_storage_service_leaves_its_chains_and_comes_back(new_cluster: Callable[[], RealCluster]) -> None:
    """Writes and reads go on through the kill; the chains drop it within two leases; started again it is brought up to date."""
    cluster = new_cluster()
    cluster.up("--storage", "3", "--replicas", "3", "--no-restart")
    blocks = {f"/f{number}": os.urandom(700_000) for number in range(12)}
    with Client(str(cluster.path)) as client:
        errors: list[BaseException] = []

        def write_all() -> None:
            try:
                for path, data in blocks.items():
                    with client.open(path, "wb") as file:
                        file.write(data)
                    time.sleep(0.1)
            except BaseException as error:
                errors.append(error)

        writer = threading.Thread(target=write_all)
        writer.start()
        time.sleep(0.4)
        os.kill(cluster.process("storage-2")["pid"], signal.SIGKILL)
        # The bound of two leases is checked on the virtual clock in tests/unit/meta/cluster: here the machine is shared and noisy.
        wait_for(lambda: cluster.serving() == [2] * len(cluster.serving()), 30, "chains drop a dead service")
        writer.join(60)
        assert not writer.is_alive() and not errors, errors
        for path, data in blocks.items():
            with client.open(path, "rb") as file:
                assert file.read() == data
        assert cluster.process("storage-2")["state"] == "failed"
        cluster.kvfs("start", "storage-2")
        wait_for(lambda: cluster.serving() == [3] * len(cluster.serving()), 60, "the returning service serves again")
        for path, data in blocks.items():
            with client.open(path, "rb") as file:
                assert file.read() == data
    report = cluster.json("fsck")
    assert report["clean"], report["problems"]


def test_the_supervisor_starts_again_what_died(new_cluster: Callable[[], RealCluster]) -> None:
    cluster = new_cluster()
    cluster.up("--storage", "1", "--replicas", "1")
    before = cluster.process("meta")["pid"]
    with Client(str(cluster.path)) as client:
        client.mkdir("/before")
        os.kill(before, signal.SIGKILL)
        client.mkdir("/after")  # waits for the new one
        assert sorted(client.listdir("/")) == ["after", "before"]
    after = cluster.process("meta")
    assert after["pid"] != before and after["restarts"] == 1


def test_children_do_not_outlive_a_killed_supervisor(new_cluster: Callable[[], RealCluster]) -> None:
    cluster = new_cluster()
    cluster.up("--storage", "1", "--replicas", "1")
    pids = [process["pid"] for process in cluster.status()["processes"]]
    supervisor = int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(supervisor, signal.SIGKILL)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 30, "all children stop")
    cluster.up()
    assert cluster.serving() and all(cluster.serving())


def test_manager_restart_keeps_chains_serving(new_cluster: Callable[[], RealCluster]) -> None:
    cluster = new_cluster()
    cluster.up("--storage", "2", "--replicas", "2")
    versions = {chain["id"]: chain["version"] for chain in cluster.status()["chains"]}
    os.kill(cluster.process("manager")["pid"], signal.SIGKILL)
    wait_for(lambda: cluster.process("manager")["state"] == "running", 20, "the manager comes back")
    with Client(str(cluster.path)) as client, client.open("/x", "wb") as file:
        file.write(b"x" * 100_000)
    time.sleep(2 * LEASE_S)
    assert {chain["id"]: chain["version"] for chain in cluster.status()["chains"]} == versions, "a quick manager restart changes no chain"


def test_a_port_in_use_is_said_and_nothing_is_left_running(new_cluster: Callable[[], RealCluster]) -> None:
    cluster = new_cluster()
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        done = cluster.kvfs("up", str(cluster.path), "--storage", "1", "--port", str(port), check=False)
    assert done.returncode == 2 and str(port) in done.stderr, done.stderr
    assert cluster.status()["phase"] == "stopped"


def test_a_cluster_in_the_foreground_that_cannot_start_ends(new_cluster: Callable[[], RealCluster]) -> None:
    cluster = new_cluster()
    cluster.up("--storage", "1", "--replicas", "1")
    cluster.kvfs("down")
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", cluster_dir.load(cluster.path).manager_port))
        holder.listen()
        done = cluster.kvfs("up", "--foreground", check=False)
    assert done.returncode == 2 and "is in use" in done.stderr.splitlines()[-1], done.stderr
    assert cluster.status()["phase"] == "stopped"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("children", [1, 3], ids=["as its supervisor begins", "as services begin"])
def test_an_interrupted_up_leaves_nothing_running(new_cluster: Callable[[], RealCluster], children: int, number: signal.Signals) -> None:
    cluster = new_cluster()

    def running() -> list[str]:
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                command = (directory / "cmdline").read_bytes()
            except OSError:
                continue
            if str(cluster.path).encode() in command and int(directory.name) != up.pid:
                found.append(command.replace(b"\0", b" ").decode())
        return found

    up = subprocess.Popen([sys.executable, "-m", "kvfs.cli.main", "up", str(cluster.path)], stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: len(running()) >= children, 20, "its processes start")
        up.send_signal(number)
        assert up.wait(60) != 0
    finally:
        up.kill()
    assert not running()


def test_two_at_once_start_one_cluster(new_cluster: Callable[[], RealCluster]) -> None:
    cluster = new_cluster()
    cluster.up("--storage", "1", "--replicas", "1")
    cluster.kvfs("down")
    reports: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda: reports.append(cluster.up())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    pids = [[process["pid"] for process in report["processes"]] for report in reports]
    assert len(pids) == 2 and pids[0] == pids[1]


def test_status_names_the_processes_of_a_stopped_cluster_too(new_cluster: Callable[[], RealCluster]) -> None:
    cluster = new_cluster()
    report = cluster.up("--storage", "1", "--replicas", "1")
    assert report["capacity_bytes"] >= report["free_bytes"] > 0, "space is known as soon as the cluster is up"
    stopped = cluster.json("stop", "storage-1")
    assert (stopped["state"], stopped["pid"]) == ("stopped", None)
    cluster.kvfs("down")
    after = cluster.json("status")
    assert after["phase"] == "stopped"
    assert [(entry["id"], entry["state"], entry["pid"]) for entry in after["processes"]] == [
        (name, "stopped", None) for name in ("manager", "storage-1", "meta")
    ]


@pytest.mark.parametrize(("arguments", "words"), [(("/proc/none",), "/proc/none"), (("/dev/null/below",), "/dev/null"), ((), "address")])
def test_places_where_no_cluster_can_be_made(new_cluster: Callable[[], RealCluster], arguments: tuple[str, ...], words: str) -> None:
    done = new_cluster().kvfs("up", *arguments, check=False, environment={"KVFS_CLUSTER": "127.0.0.1:1234"})
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_more_replicas_than_services_are_refused(new_cluster: Callable[[], RealCluster]) -> None:
    done = new_cluster().kvfs("up", "--storage", "2", "--replicas", "3", check=False)
    assert done.returncode == 2 and "--storage 3" in done.stderr


def test_a_directory_with_other_things_in_it_is_refused(new_cluster: Callable[[], RealCluster]) -> None:
    cluster = new_cluster()
    cluster.path.mkdir()
    (cluster.path / "thesis.tex").write_text("mine")
    done = cluster.kvfs("up", str(cluster.path), check=False)
    assert done.returncode == 2 and "not empty" in done.stderr
    assert os.listdir(cluster.path) == ["thesis.tex"]


def test_a_directory_of_a_newer_format_is_refused_untouched(new_cluster: Callable[[], RealCluster]) -> None:
    cluster = new_cluster()
    cluster.path.mkdir()
    text = json.dumps({"cluster_id": "kvfs-x", "managers": [], "format": 99})
    (cluster.path / "cluster.json").write_text(text)
    done = cluster.kvfs("up", str(cluster.path), check=False)
    assert done.returncode == 2 and "upgrade" in done.stderr
    assert (cluster.path / "cluster.json").read_text() == text and os.listdir(cluster.path) == ["cluster.json"]


def test_a_storage_directory_of_another_cluster_is_refused_untouched(new_cluster: Callable[[], RealCluster]) -> None:
    one, other = new_cluster(), new_cluster()
    one.up("--storage", "1", "--replicas", "1")
    other.up("--storage", "1", "--replicas", "1")
    one.kvfs("down")
    other.kvfs("down")
    (one.path / "storage-1").rename(one.path / "kept")
    (other.path / "storage-1").rename(one.path / "storage-1")
    before = sorted(str(path.relative_to(one.path)) for path in (one.path / "storage-1").rglob("*"))
    done = one.kvfs("up", check=False)
    assert done.returncode == 2 and "cluster" in done.stderr, done.stderr
    assert sorted(str(path.relative_to(one.path)) for path in (one.path / "storage-1").rglob("*")) == before


def test_an_unknown_key_in_a_config_file_is_said_with_its_line(new_cluster: Callable[[], RealCluster]) -> None:
    cluster = new_cluster()
    cluster.up("--storage", "1", "--replicas", "1")
    cluster.kvfs("down")
    config = cluster.path / "etc" / "storage-1.toml"
    lines = config.read_text().count("\n")
    config.write_text(config.read_text() + "replicass = 3\n")
    done = cluster.kvfs("up", check=False)
    assert done.returncode == 2 and f"storage-1.toml:{lines + 1}" in done.stderr and "replicass" in done.stderr, done.stderr


def test_fsck_of_a_target_directory_finds_a_flipped_bit(new_cluster: Callable[[], RealCluster]) -> None:
    """Offline, on the directory itself: clean as written; with one bit flipped in a data file, a problem and exit status 1."""
    cluster = new_cluster()
    cluster.up("--storage", "1", "--replicas", "1")
    data = os.urandom(900_000)
    with Client(str(cluster.path)) as client, client.open("/f", "wb") as file:
        file.write(data)
    target = next(
        target for target in sorted((cluster.path / "storage-1" / "targets").iterdir()) if any(data[:64] in f.read_bytes() for f in files_of(target))
    )
    busy = cluster.kvfs("fsck", "--target", str(target), check=False)
    assert busy.returncode == 2 and "is open in process" in busy.stderr, busy.stderr
    cluster.kvfs("down")
    assert cluster.json("fsck", "--target", str(target), "--read-data")["clean"]
    broken = next(file for file in files_of(target) if data[:64] in file.read_bytes())
    at = broken.read_bytes().index(data[:64]) + 500_000
    with open(broken, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))
    found = cluster.kvfs("fsck", "--target", str(target), "--read-data", "--json", check=False)
    assert found.returncode == 1 and not json.loads(found.stdout)["clean"]


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size < 1 << 30)


def test_a_damaged_target_is_said_and_left_as_it_is_and_the_others_serve(new_cluster: Callable[[], RealCluster]) -> None:
    cluster = new_cluster()
    cluster.up("--storage", "1", "--replicas", "1")
    cluster.kvfs("down")
    page = next((cluster.path / "storage-1" / "targets").iterdir()) / "index" / "data.mdb"
    with open(page, "r+b") as file:
        file.write(b"\xa5" * 64)
    before = page.read_bytes()
    report = cluster.up()
    (missing,) = report["missing"]
    assert str(page) in missing["reason"] and "is damaged" in missing["reason"] and "Restore" in missing["reason"]
    assert sorted(cluster.serving()) == [0] + [1] * (len(report["chains"]) - 1)
    assert page.read_bytes() == before and "Traceback" not in cluster.logs()


@pytest.mark.parametrize("what", ["metadata", "manager"])
def test_a_damaged_index_page_is_said_at_once_and_left_as_it_is(new_cluster: Callable[[], RealCluster], what: str) -> None:
    cluster = new_cluster()
    cluster.up("--storage", "1", "--replicas", "1")
    cluster.kvfs("down")
    folder = {
        "metadata": cluster.path / "meta" / "kv" / "map",
        "manager": cluster.path / "manager" / "kv" / "map",
    }[what]
    page = folder / "data.mdb"
    with open(page, "r+b") as file:
        file.write(b"\xa5" * 64)
    before = page.read_bytes()
    started_s = time.monotonic()
    done = cluster.kvfs("up", check=False)
    assert done.returncode == 2 and str(page) in done.stderr and "is damaged" in done.stderr and "Restore" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in cluster.logs()
    assert page.read_bytes() == before
    assert time.monotonic() - started_s < 40, "it does not wait for what cannot come"
    assert cluster.status()["phase"] == "stopped"
