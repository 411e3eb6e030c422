"""`kvfs mount`, `kvfs umount` and `mount.kvfs`: in the foreground, detached, from an fstab line, and where they must refuse."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvfs.cli.mount_helper import parse
from kvfs.fuse import kernel

if TYPE_CHECKING:
    from tests.real_cluster import RealCluster

pytestmark = [pytest.mark.cluster, pytest.mark.mount, pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="there is no /dev/fuse")]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A mount point that is free again after the test."""
    path = tmp_path / "mnt"
    path.mkdir()
    yield path
    while kernel.mount_entry(str(path)) is not None:
        kernel.unmount(str(path), lazy=True)


def helper(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "kvfs.cli.mount_helper", *arguments], capture_output=True, text=True, timeout=90)


def test_a_detached_mount_is_usable_when_the_command_returns(cluster: RealCluster, place: Path) -> None:
    reply = cluster.json("mount", str(place))
    (place / "x").write_bytes(b"here")
    assert cluster.kvfs("cat", "/x").stdout == "here"
    entry = kernel.mount_entry(str(place))
    assert entry is not None and entry.type == "fuse.kvfs" and entry.source.startswith("kvfs#")
    assert str(place) in [client["description"] for client in cluster.json("admin", "list-clients")]
    again = cluster.kvfs("mount", str(place), check=False)
    assert again.returncode == 2 and "umount" in again.stderr
    cluster.kvfs("umount", str(place))
    assert kernel.mount_entry(str(place)) is None
    give_up = time.monotonic() + 30
    while os.path.exists(f"/proc/{reply['pid']}") and Path(f"/proc/{reply['pid']}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < give_up, "the mount's process ends after umount"
        time.sleep(0.1)
    cluster.kvfs("rm", "/x")


def test_sigterm_unmounts_and_keeps_what_was_written(cluster: RealCluster, place: Path) -> None:
    pid = cluster.json("mount", str(place))["pid"]
    (place / "y").write_bytes(b"kept" * 1000)
    os.kill(pid, signal.SIGTERM)
    give_up = time.monotonic() + 30
    while kernel.mount_entry(str(place)) is not None:
        assert time.monotonic() < give_up
        time.sleep(0.1)
    assert cluster.kvfs("cat", "/y").stdout == "kept" * 1000
    cluster.kvfs("rm", "/y")


def test_a_dead_mount_is_named_and_umount_clears_it(cluster: RealCluster, place: Path) -> None:
    pid = cluster.json("mount", str(place))["pid"]
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.5)
    refused = cluster.kvfs("mount", str(place), check=False)
    assert refused.returncode == 2 and "umount" in refused.stderr
    cluster.kvfs("umount", str(place))
    cluster.kvfs("mount", str(place))
    cluster.kvfs("umount", str(place))


def test_what_cannot_be_mounted_on_is_refused_in_words(cluster: RealCluster, place: Path) -> None:
    (place / "file").write_text("mine")
    for target, words in ((place, "not empty"), (place / "none", "mkdir"), (place / "file", "not a directory")):
        done = cluster.kvfs("mount", str(target), check=False)
        assert done.returncode == 2 and words in done.stderr, done.stderr
    (place / "file").unlink()
    unknown = cluster.kvfs("mount", str(place), "-o", "bogus=1", check=False)
    assert unknown.returncode == 2 and "bogus" in unknown.stderr, unknown.stderr


def test_read_only_mounts_refuse_writes(cluster: RealCluster, place: Path) -> None:
    cluster.kvfs("mount", str(place), "-o", "ro")
    with pytest.raises(OSError) as caught:
        (place / "no").write_bytes(b"x")
    assert caught.value.errno == 30  # EROFS
    cluster.kvfs("umount", str(place))


def test_the_helper_of_mount_8(cluster: RealCluster, place: Path) -> None:
    """As mount(8) calls it for an fstab line: returns once the mount is visible; 1 for wrong usage, 32 for a mount that failed."""
    manager = cluster.json("status")["managers"][0].removeprefix("tcp://")
    assert helper(manager, str(place), "-f").returncode == 0 and kernel.mount_entry(str(place)) is None
    done = helper(manager, str(place), "-n", "-o", "rw,_netdev,nofail,allow_other")
    assert done.returncode == 0, done.stderr
    (place / "z").write_bytes(b"fstab")
    assert cluster.kvfs("cat", "/z").stdout == "fstab"
    cluster.kvfs("rm", "/z")
    assert helper(manager, str(place)).returncode == 32
    cluster.kvfs("umount", str(place))
    assert helper("127.0.0.1:9", str(place)).returncode == 32
    assert helper("only-one").returncode == 1


def test_a_refused_mount_point_is_not_in_the_way_of_the_next_start(new_cluster: Callable[[], RealCluster], place: Path, tmp_path: Path) -> None:
    taken, other = tmp_path / "taken", tmp_path / "other"
    taken.mkdir()
    other.mkdir()
    (taken / "file").touch()
    cluster = new_cluster()
    one = ("--storage", "1", "--replicas", "1")
    refused = cluster.kvfs("up", *one, "--mount", str(taken), check=False)
    assert refused.returncode == 2 and "not empty" in refused.stderr and not cluster.path.exists()
    assert [process["state"] for process in cluster.up(*one, "--mount", str(place))["processes"]] == ["running"] * 4
    refused = cluster.kvfs("up", str(cluster.path), "--mount", str(other), check=False)
    assert refused.returncode == 2 and str(place) in refused.stderr
    cluster.kvfs("down")
    assert kernel.mount_entry(str(place)) is None
    refused = cluster.kvfs("up", str(cluster.path), "--mount", str(taken), check=False)
    assert refused.returncode == 2 and "not empty" in refused.stderr
    cluster.up()
    (place / "file").write_text("there again")
    cluster.kvfs("down")
    assert "mount" not in [process["id"] for process in cluster.up("--no-mount")["processes"]]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a:1", "/m"], ("a:1", "/m", "", False)),
        (["a:1", "/m", "-sfn", "-o", "ro,x"], ("a:1", "/m", "ro,x", True)),
        (["-t", "kvfs", "a:1", "/m", "-oro"], ("a:1", "/m", "ro", False)),
        (["a:1"], None),
        (["a:1", "/m", "-q"], None),
        (["a:1", "/m", "-o"], None),
    ],
)
def test_the_helpers_arguments(arguments: list[str], expected: object) -> None:
    assert parse(arguments) == expected
