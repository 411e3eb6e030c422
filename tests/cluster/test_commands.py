"""The `kvfs` command against a running cluster: files in and out, lists, fsck, and errors that say what to do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.real_cluster import RealCluster

pytestmark = pytest.mark.cluster


def test_status_lists_processes_and_chains(cluster: RealCluster) -> None:
    report = cluster.json("status")
    roles = sorted(process["role"] for process in report["processes"])
    assert roles == ["manager", "meta", "storage", "storage", "storage"]
    for process in report["processes"]:
        assert set(process) >= {"role", "id", "pid", "address", "state"}
        assert process["state"] == "running" and process["address"]
        os.kill(process["pid"], 0)
    assert report["chains"]
    for chain in report["chains"]:
        assert [target["state"] for target in chain["targets"]] == ["serving"] * 3
        assert len({target["node"] for target in chain["targets"]}) == 3, "replicas of a chain lie on different nodes"
    assert "serving" in cluster.kvfs("status").stdout


def test_files_go_in_and_come_out_the_same(cluster: RealCluster, tmp_path: Path) -> None:
    source = tmp_path / "tree"
    (source / "below" / "empty").mkdir(parents=True)
    contents = {"a": b"", "below/b": b"x", "below/big": os.urandom(5_000_001)}
    for name, data in contents.items():
        (source / name).write_bytes(data)
    (source / "link").symlink_to("below/b")
    cluster.kvfs("cp", "-r", str(source), "kvfs:/tree")
    cluster.kvfs("cp", "-r", "kvfs:/tree", str(tmp_path / "back"))
    for name, data in contents.items():
        assert (tmp_path / "back" / name).read_bytes() == data
    assert os.readlink(tmp_path / "back" / "link") == "below/b"
    assert (tmp_path / "back" / "below" / "empty").is_dir()
    assert [row["path"] for row in cluster.json("ls", "/tree")] == ["/tree/a", "/tree/below", "/tree/link"]
    (facts,) = cluster.json("stat", "kvfs:/tree/below/big")
    assert facts["length"] == 5_000_001 and facts["layout"]["chunk_size"] == 1 << 20
    assert cluster.json("fsck")["clean"]


def test_cat_prints_bytes_and_rm_removes(cluster: RealCluster, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("hello\n")
    cluster.kvfs("mkdir", "-p", "/d/e")
    cluster.kvfs("cp", str(tmp_path / "f"), "kvfs:/d/e")
    assert cluster.kvfs("cat", "/d/e/f").stdout == "hello\n"
    refused = cluster.kvfs("rm", "/d", check=False)
    assert refused.returncode == 1 and "-r" in refused.stderr
    cluster.kvfs("rm", "-r", "/d")
    gone = cluster.kvfs("cat", "/d/e/f", check=False)
    assert gone.returncode == 1 and "/d/e/f" in gone.stderr


def test_admin_lists(cluster: RealCluster) -> None:
    nodes = cluster.json("admin", "list-nodes")
    assert sorted(node["role"] for node in nodes if node["role"] == "storage") == ["storage"] * 3
    chains = cluster.json("admin", "list-chains")
    targets = cluster.json("admin", "list-targets")
    assert {target["id"] for chain in chains for target in chain["targets"]} == {target["id"] for target in targets}
    assert all(target["state"] == "serving" and target["capacity_bytes"] > 0 for target in targets)
    assert isinstance(cluster.json("admin", "list-clients"), list)


def test_fsck_of_one_target_reads_its_data(cluster: RealCluster) -> None:
    assert cluster.json("fsck", "--read-data")["clean"]
    for target in cluster.json("admin", "list-targets"):
        assert cluster.json("fsck", "--target", str(target["id"]), "--read-data")["clean"]
    unknown = cluster.kvfs("fsck", "--target", "999999999", check=False)
    assert unknown.returncode == 1 and "list-targets" in unknown.stderr


def test_config_dump_shows_defaults_file_and_environment(cluster: RealCluster, tmp_path: Path) -> None:
    values = cluster.json("config", "dump")
    assert set(values) == {"manager", "meta", "storage", "client", "mount"}
    file = tmp_path / "c.toml"
    file.write_text("[client]\ndeadline_s = 7.0\n")
    assert cluster.json("config", "dump", "client", "--config", str(file))["client"]["deadline_s"] == 7.0
    done = cluster.kvfs("config", "dump", "client", "--config", str(file), environment={"KVFS_CLIENT__DEADLINE_S": "9"})
    assert "deadline_s = 9" in done.stdout
    file.write_text("[client]\n\ndeadlin_s = 7\n")
    wrong = cluster.kvfs("config", "dump", "client", "--config", str(file), check=False)
    assert wrong.returncode == 2 and ":3:" in wrong.stderr and "deadline_s" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ls", "/not/there"), "/not/there"),
        (("cp", "a", "b"), "kvfs:"),
        (("status", "--cluster", "/not/a/cluster"), "kvfs up"),
        (("status", "--cluster", "127.0.0.1:9"), "127.0.0.1:9"),
        (("mount", "/not/a/directory"), "mkdir"),
        (("mount", "/usr"), "empty"),
        (("umount", "/tmp"), "not mounted"),
        (("stop", "storage-77"), "storage-1"),
    ],
)
def test_user_errors_are_one_line_that_says_what_to_do(cluster: RealCluster, arguments: tuple[str, ...], words: str) -> None:
    done = cluster.kvfs(*arguments, check=False)
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("kvfs: error: ") and done.stderr.count("\n") == 1, done.stderr
    assert words in done.stderr
