"""`kvfs cp` as a careful and as a careless user calls it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.real_cluster import RealCluster

pytestmark = pytest.mark.cluster


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory with what trips copies: links, modes, times, odd names."""
    source = tmp_path / "tree"
    (source / "below").mkdir(parents=True)
    (source / "below" / "data").write_bytes(os.urandom(1_200_003))
    (source / "tool").write_text("#!/bin/sh\n")
    (source / "[bold]x").write_text("brackets")
    (source / os.fsdecode(b"\xff\xfe")).write_text("no text")
    (source / "link").symlink_to("below/data")
    (source / "dangling").symlink_to("/nowhere")
    (source / "tool").chmod(0o4751)
    (source / "below").chmod(0o750)
    os.utime(source / "tool", ns=(1_000_000_001, 2_000_000_002))
    return source


def names(cluster: RealCluster, path: str) -> set[str]:
    return {os.path.basename(row["path"]) for row in cluster.json("ls", path)}


def test_permission_bits_go_along_in_both_directions(cluster: RealCluster, tree: Path, tmp_path: Path) -> None:
    cluster.kvfs("cp", "-r", str(tree), "kvfs:/modes")
    tool, below = cluster.json("stat", "/modes/tool", "/modes/below")
    assert (tool["mode"], below["mode"]) == ("0751", "0750"), "as cp does: no setuid without -p"
    cluster.kvfs("cp", "-r", "kvfs:/modes", str(tmp_path / "back"))
    assert (tmp_path / "back" / "tool").stat().st_mode & 0o7777 == 0o751
    assert (tmp_path / "back" / "below").stat().st_mode & 0o7777 == 0o750
    assert sorted(os.listdir(tmp_path / "back")) == sorted(os.listdir(tree))
    assert os.readlink(tmp_path / "back" / "dangling") == "/nowhere"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_preserve_takes_owner_times_and_all_mode_bits(cluster: RealCluster, tree: Path, tmp_path: Path) -> None:
    os.chown(tree / "tool", 1234, 2345)
    (tree / "tool").chmod(0o4751)
    cluster.kvfs("cp", "-rp", str(tree), "kvfs:/kept")
    (tool,) = cluster.json("stat", "/kept/tool")
    assert (tool["mode"], tool["uid"], tool["gid"]) == ("4751", 1234, 2345)
    assert (tool["atime_ns"], tool["mtime_ns"]) == (1_000_000_001, 2_000_000_002)
    cluster.kvfs("cp", "-rp", "kvfs:/kept", str(tmp_path / "back"))
    found = (tmp_path / "back" / "tool").stat()
    assert (found.st_uid, found.st_gid, found.st_mtime_ns, found.st_mode & 0o7777) == (1234, 2345, 2_000_000_002, 0o4751)
    assert (tmp_path / "back").stat().st_mtime_ns == tree.stat().st_mtime_ns


def test_a_file_is_not_copied_onto_itself(cluster: RealCluster, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("precious")
    cluster.kvfs("cp", str(tmp_path / "f"), "kvfs:/precious")
    for target in ("kvfs:/precious", "kvfs:precious", "kvfs:/"):
        refused = cluster.kvfs("cp", "kvfs:/precious", target, check=False)
        assert refused.returncode == 1 and "same file" in refused.stderr
    assert cluster.kvfs("cat", "/precious").stdout == "precious"


def test_a_directory_is_not_copied_into_itself(cluster: RealCluster, tree: Path) -> None:
    cluster.kvfs("cp", "-r", str(tree), "kvfs:/self")
    for target in ("kvfs:/self/below", "kvfs:/self/below/new", "kvfs:/self"):
        refused = cluster.kvfs("cp", "-r", "kvfs:/self", target, check=False)
        assert refused.returncode == 1 and "into itself" in refused.stderr, refused.stderr
    assert cluster.json("fsck")["clean"]


def test_a_fifo_is_refused_at_once_and_left_out_of_a_tree(cluster: RealCluster, tree: Path) -> None:
    os.mkfifo(tree / "fifo")
    refused = cluster.kvfs("cp", str(tree / "fifo"), "kvfs:/fifo", check=False)
    assert refused.returncode == 1 and "is a fifo" in refused.stderr
    done = cluster.kvfs("cp", "-r", str(tree), "kvfs:/nofifo")
    assert "fifo is a fifo: left out" in done.stderr
    assert names(cluster, "/nofifo") == set(os.listdir(tree)) - {"fifo"}


def test_a_second_copy_over_the_first_replaces_files_and_links(cluster: RealCluster, tree: Path) -> None:
    cluster.kvfs("cp", "-r", f"{tree}/.", "kvfs:/twice")
    (tree / "link").unlink()
    (tree / "link").symlink_to("tool")
    (tree / "tool").write_text("shorter")
    cluster.kvfs("cp", "-r", f"{tree}/.", "kvfs:/twice")
    assert cluster.kvfs("cat", "/twice/tool").stdout == "shorter"
    assert next(row["target"] for row in cluster.json("ls", "/twice") if row["path"] == "/twice/link") == "tool"
    assert names(cluster, "/twice") == set(os.listdir(tree))
    counts = cluster.json("cp", "-r", str(tree), "kvfs:/third")
    assert counts == {"files": 4, "directories": 2, "links": 2, "bytes": 1_200_003 + len("shorter") + len("brackets") + len("no text")}


def test_a_link_given_by_name_is_followed_unless_recursive(cluster: RealCluster, tree: Path, tmp_path: Path) -> None:
    cluster.kvfs("cp", str(tree / "link"), "kvfs:/followed")
    cluster.kvfs("cp", "-r", str(tree / "link"), "kvfs:/kept-link")
    followed, kept = cluster.json("stat", "/followed", "/kept-link")
    assert (followed["type"], followed["length"]) == ("file", 1_200_003)
    assert (kept["type"], kept["target"]) == ("symlink", "below/data")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("cp", "/not/there", "kvfs:/x"), "/not/there: No such file"),
        (("cp", "kvfs:/not-there", "/tmp/x"), "kvfs: error: /not-there: no such file"),
        (("cp", "/etc/passwd", "kvfs:/not/there/x"), "/not/there/x"),
        (("cp", "/etc/passwd", "kvfs:/not-there/"), "kvfs mkdir"),
        (("cp", "/etc", "kvfs:/x"), "-r"),
        (("cp", "/etc/passwd", "/etc/group", "kvfs:/x"), "not a directory"),
    ],
)
def test_wrong_copies_say_what_is_wrong(cluster: RealCluster, arguments: tuple[str, ...], words: str) -> None:
    done = cluster.kvfs(*arguments, check=False)
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_names_are_shown_as_they_are(cluster: RealCluster, tree: Path) -> None:
    """What looks like markup or is no text is neither swallowed nor an error, and nothing is folded for a reader that is no terminal."""
    (tree / ("n" * 200)).touch()
    cluster.kvfs("cp", "-r", str(tree), "kvfs:/names")
    plain = subprocess.run(
        [sys.executable, "-m", "kvfs.cli.main", "--cluster", str(cluster.path), "ls", "/names"], capture_output=True, check=True, timeout=60
    ).stdout
    assert sorted(plain.splitlines()) == sorted(
        os.fsencode(name + ("/" if (tree / name).is_dir() and not (tree / name).is_symlink() else "")) for name in os.listdir(tree)
    )
    lines = cluster.kvfs("ls", "-l", "/names").stdout.splitlines()
    assert len(lines) == len(os.listdir(tree)) + 1
    assert any(line.rstrip().endswith(" [bold]x") for line in lines) and any(line.rstrip().endswith("n" * 200) for line in lines)
    assert "[bold]x" in cluster.kvfs("stat", "/names/[bold]x").stdout


def test_cat_prints_json_too_and_minds_a_reader_that_leaves(cluster: RealCluster, tree: Path) -> None:
    cluster.kvfs("cp", "-r", str(tree), "kvfs:/cats")
    assert cluster.json("cat", "/cats/tool") == [{"path": "/cats/tool", "length": 10, "text": "#!/bin/sh\n"}]
    assert set(cluster.json("cat", "/cats/below/data")[0]) == {"path", "length", "base64"}
    command = [sys.executable, "-m", "kvfs.cli.main", "--cluster", str(cluster.path), "cat", "/cats/below/data"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as cat:
        assert cat.stdout is not None and cat.stderr is not None
        cat.stdout.read(10)
        cat.stdout.close()
        assert cat.stderr.read() == b"" and cat.wait(30) == 1
    closed = subprocess.run(f"{' '.join(command)} >&-", shell=True, capture_output=True, text=True, timeout=60)
    assert closed.returncode == 1 and "closed" in closed.stderr and closed.stderr.count("\n") == 1


def test_ctrl_c_ends_a_copy_at_once(cluster: RealCluster, tmp_path: Path) -> None:
    """Not after all that is queued."""
    with open(tmp_path / "big", "wb") as out:
        out.truncate(64 << 20)
    source = tmp_path / "many"
    source.mkdir()
    for number in range(64):
        os.link(tmp_path / "big", source / str(number))
    command = [sys.executable, "-m", "kvfs.cli.main", "--cluster", str(cluster.path), "cp", "-r", str(source), "kvfs:/many"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as copy:
        deadline_s = time.monotonic() + 30
        while "many" not in names(cluster, "/") or not names(cluster, "/many"):
            assert copy.poll() is None and time.monotonic() < deadline_s
        copy.send_signal(signal.SIGINT)
        asked_s = time.monotonic()
        _, errors = copy.communicate(timeout=60)
    assert copy.returncode == 130 and errors == "kvfs: interrupted\n"
    assert time.monotonic() - asked_s < 10 and len(names(cluster, "/many")) < 64
    cluster.kvfs("rm", "-r", "/many")
