"""unlink(2) and rmdir(2): what goes, what stays, link counts and times, sticky directories, and each errno."""

from __future__ import annotations

import errno
import os
import stat

import pytest
from tests.mount.posix.conftest import OTHER, OWNER, Posix

KINDS = ["file", "fifo", "socket", "char", "block", "symlink"]


@pytest.mark.parametrize("kind", KINDS)
def test_unlink(posix: Posix, kind: str) -> None:
    path = posix.make(kind)
    with posix.touches(posix.dir):
        posix.root.unlink(path)
    posix.expect(errno.ENOENT, posix.root, "lstat", path)
    assert os.listdir(posix.dir) == []


@pytest.mark.parametrize("kind", ["file", "fifo", "socket", "char", "block"])
def test_unlink_of_one_of_two_names(posix: Posix, kind: str) -> None:
    path, second = posix.make(kind), posix.name()
    os.link(path, second)
    with posix.touches(second, times="c"):
        posix.root.unlink(path)
    assert os.lstat(second).st_nlink == 1


def test_failed_unlink_touches_nothing(posix: Posix) -> None:
    directory = posix.make("dir", mode=0o755)
    path = posix.make("file", directory + b"/f")
    with posix.touches(path, directory, unchanged=True):
        posix.expect(errno.EACCES, posix.owner, "unlink", path)


def test_unlink_of_a_directory(posix: Posix) -> None:
    path = posix.make("dir")
    posix.expect(errno.EISDIR, posix.root, "unlink", path)
    assert stat.S_ISDIR(os.lstat(path).st_mode)


def test_unlink_of_a_link_to_a_directory(posix: Posix) -> None:
    directory, link = posix.make("dir"), posix.name()
    os.symlink(directory, link)
    posix.root.unlink(link)
    assert os.path.isdir(directory)


def test_unlink_with_a_trailing_slash(posix: Posix) -> None:
    posix.expect(errno.ENOTDIR, posix.root, "unlink", posix.make("file") + b"/")


def test_open_unlinked_file_keeps_its_content_until_closed(posix: Posix) -> None:
    path = posix.make("file", data=b"content")
    fd = posix.root.open(path, os.O_RDWR)
    posix.root.unlink(path)
    found = posix.root.fstat(fd)
    assert found["st_nlink"] == 0 and found["st_size"] == 7
    assert posix.root.pread(fd, 7, 0) == b"content"
    posix.make("file", path, data=b"another")
    assert posix.root.pread(fd, 7, 0) == b"content"
    posix.root.close(fd)


# --- rmdir ---


def test_rmdir(posix: Posix) -> None:
    path = posix.make("dir")
    with posix.touches(posix.dir):
        posix.root.rmdir(path)
    assert not os.path.lexists(path)


@pytest.mark.parametrize("kind", [*KINDS, "dir"])
def test_rmdir_of_a_directory_with_an_entry(posix: Posix, kind: str) -> None:
    path = posix.make("dir")
    posix.make(kind, path + b"/below")
    with posix.touches(posix.dir, path, unchanged=True):
        posix.expect((errno.ENOTEMPTY, errno.EEXIST), posix.root, "rmdir", path)


@pytest.mark.parametrize("kind", KINDS)
def test_rmdir_of_what_is_no_directory(posix: Posix, kind: str) -> None:
    posix.expect(errno.ENOTDIR, posix.root, "rmdir", posix.make(kind))


def test_rmdir_of_a_link_to_a_directory(posix: Posix) -> None:
    directory, link = posix.make("dir"), posix.name()
    os.symlink(directory, link)
    posix.expect(errno.ENOTDIR, posix.root, "rmdir", link)
    posix.expect(errno.ENOTDIR, posix.root, "rmdir", link + b"/")


def test_rmdir_of_dot(posix: Posix) -> None:
    path = posix.make("dir")
    posix.expect(errno.EINVAL, posix.root, "rmdir", path + b"/.")
    posix.make("dir", path + b"/below")
    posix.expect((errno.ENOTEMPTY, errno.EEXIST), posix.root, "rmdir", path + b"/below/..")


def test_removed_directory_takes_no_entries(posix: Posix) -> None:
    path = posix.make("dir")
    agent = posix.agent(0, 0, (77,))
    agent.chdir(path)
    posix.root.rmdir(path)
    posix.expect(errno.ENOENT, agent, "create", b"f", os.O_CREAT | os.O_WRONLY)
    posix.expect(errno.ENOENT, agent, "mkdir", b"d", 0o755)
    posix.expect(errno.ENOENT, agent, "symlink", b"x", b"l")
    assert agent.listdir(b".") == []
    agent.chdir(b"/")


# --- sticky ---


@pytest.mark.parametrize("call,kind", [("unlink", kind) for kind in KINDS] + [("rmdir", "dir")])
@pytest.mark.parametrize("directory_owner,file_owner,allowed", [
    ("owner", "owner", True), ("owner", "other", True), ("other", "owner", True), ("other", "other", False), ("root", "root", False),
    ("root", "owner", True),
])  # fmt: skip
def test_sticky_directory(posix: Posix, call: str, kind: str, directory_owner: str, file_owner: str, allowed: bool) -> None:
    """In a sticky directory only the owner of the file or of the directory may remove it; `owner` makes the call."""
    ids = {"owner": OWNER[:2], "other": OTHER[:2], "root": (0, 0)}
    directory = posix.make("dir", mode=0o1777, owner=ids[directory_owner])
    path = posix.make(kind, directory + b"/f", owner=ids[file_owner])
    posix.expect(0 if allowed else (errno.EPERM, errno.EACCES), posix.owner, call, path)
    assert os.path.lexists(path) != allowed


def test_root_removes_in_a_sticky_directory(posix: Posix) -> None:
    directory = posix.make("dir", mode=0o1777, owner=OWNER[:2])
    posix.root.unlink(posix.make("file", directory + b"/f", owner=OTHER[:2]))
