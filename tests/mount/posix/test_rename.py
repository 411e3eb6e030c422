"""rename(2) and renameat2(2): every pair of types, atomic replacement, link counts, times, loops, flags, sticky directories, and each errno."""

from __future__ import annotations

import errno
import os
import stat

import pytest
from tests.mount.agent import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT
from tests.mount.posix.conftest import OTHER, OWNER, Posix

NOT_DIRECTORIES = ["file", "fifo", "socket", "char", "block", "symlink"]
ANY = [*NOT_DIRECTORIES, "dir"]


@pytest.mark.parametrize("kind", ANY)
def test_to_a_new_name(posix: Posix, kind: str) -> None:
    old, new = posix.make(kind), posix.name()
    before = os.lstat(old)
    with posix.touches(posix.dir):
        posix.root.rename(old, new)
    after = os.lstat(new)
    assert not os.path.lexists(old)
    assert (after.st_ino, after.st_mode, after.st_nlink, after.st_mtime_ns) == (before.st_ino, before.st_mode, before.st_nlink, before.st_mtime_ns)


@pytest.mark.parametrize("kind", ANY)
def test_to_another_directory(posix: Posix, kind: str) -> None:
    a, b = posix.make("dir"), posix.make("dir")
    old, new = posix.make(kind, a + b"/x"), b + b"/y"
    before = os.lstat(old)
    links = os.lstat(a).st_nlink, os.lstat(b).st_nlink
    with posix.touches(a, b):
        posix.root.rename(old, new)
    assert os.lstat(new).st_ino == before.st_ino and os.listdir(a) == []
    moved = 1 if kind == "dir" else 0
    assert (os.lstat(a).st_nlink, os.lstat(b).st_nlink) == (links[0] - moved, links[1] + moved)


@pytest.mark.parametrize("target", NOT_DIRECTORIES)
@pytest.mark.parametrize("source", NOT_DIRECTORIES)
def test_over_something_that_is_no_directory(posix: Posix, source: str, target: str) -> None:
    old, new = posix.make(source), posix.make(target)
    number = os.lstat(old).st_ino
    posix.root.rename(old, new)
    assert os.lstat(new).st_ino == number and not os.path.lexists(old)


@pytest.mark.parametrize("target", NOT_DIRECTORIES)
def test_directory_over_no_directory(posix: Posix, target: str) -> None:
    old, new = posix.make("dir"), posix.make(target)
    posix.expect(errno.ENOTDIR, posix.root, "rename", old, new)
    assert os.path.isdir(old) and os.path.lexists(new)


@pytest.mark.parametrize("source", NOT_DIRECTORIES)
def test_no_directory_over_a_directory(posix: Posix, source: str) -> None:
    old, new = posix.make(source), posix.make("dir")
    posix.expect(errno.EISDIR, posix.root, "rename", old, new)
    assert os.path.lexists(old) and os.path.isdir(new)


def test_directory_over_an_empty_directory(posix: Posix) -> None:
    old, new = posix.make("dir"), posix.make("dir")
    posix.make("file", old + b"/f")
    number, links = os.lstat(old).st_ino, os.lstat(posix.dir).st_nlink
    posix.root.rename(old, new)
    assert os.lstat(new).st_ino == number and os.listdir(new) == [b"f"]
    assert os.lstat(posix.dir).st_nlink == links - 1


@pytest.mark.parametrize("kind", ANY)
def test_directory_over_a_directory_with_entries(posix: Posix, kind: str) -> None:
    old, new = posix.make("dir"), posix.make("dir")
    posix.make(kind, new + b"/x")
    posix.expect((errno.ENOTEMPTY, errno.EEXIST), posix.root, "rename", old, new)
    assert os.path.isdir(old) and os.listdir(new) == [b"x"]


def test_replaced_file_loses_a_link(posix: Posix) -> None:
    old, new, second = posix.make("file"), posix.make("file"), posix.name()
    os.link(new, second)
    with posix.touches(second, times="c"):
        posix.root.rename(old, new)
    assert os.lstat(second).st_nlink == 1


def test_replaced_open_file_stays_readable(posix: Posix) -> None:
    old, new = posix.make("file", data=b"new content"), posix.make("file", data=b"old content")
    fd = posix.root.open(new, os.O_RDONLY)
    posix.root.rename(old, new)
    assert posix.root.pread(fd, 100, 0) == b"old content"
    assert posix.root.read_file(new) == b"new content"
    posix.root.close(fd)


def test_two_names_of_one_file_are_both_kept(posix: Posix) -> None:
    one, two = posix.make("file"), posix.name()
    os.link(one, two)
    posix.root.rename(one, two)
    assert os.lstat(one).st_nlink == 2 and os.lstat(one).st_ino == os.lstat(two).st_ino


def test_onto_itself(posix: Posix) -> None:
    for kind in ("file", "dir"):
        path = posix.make(kind)
        number = os.lstat(path).st_ino
        posix.root.rename(path, path)
        assert os.lstat(path).st_ino == number


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_directory_below_itself(posix: Posix, depth: int) -> None:
    top = posix.make("dir")
    below = top
    for _ in range(depth - 1):
        below = posix.make("dir", below + b"/d")
    posix.expect(errno.EINVAL, posix.root, "rename", top, below + b"/x")
    assert os.path.isdir(top)


def test_over_an_ancestor(posix: Posix) -> None:
    top = posix.make("dir")
    below = posix.make("dir", posix.make("dir", top + b"/a") + b"/b")
    posix.expect((errno.ENOTEMPTY, errno.EEXIST, errno.EINVAL), posix.root, "rename", below, top)


@pytest.mark.parametrize("end", [b"/.", b"/.."])
def test_dot_and_dot_dot(posix: Posix, end: bytes) -> None:
    directory = posix.make("dir")
    posix.expect((errno.EINVAL, errno.EBUSY), posix.root, "rename", directory + end, posix.name())
    posix.expect((errno.EINVAL, errno.EBUSY, errno.ENOTEMPTY, errno.EEXIST), posix.root, "rename", posix.make("dir"), directory + end)


def test_moved_directory_knows_its_new_parent(posix: Posix) -> None:
    a, b = posix.make("dir"), posix.make("dir")
    posix.make("dir", a + b"/d")
    posix.root.rename(a + b"/d", b + b"/d")
    assert os.lstat(b + b"/d/..").st_ino == os.lstat(b).st_ino


def test_moved_tree_keeps_its_content(posix: Posix) -> None:
    a = posix.make("dir")
    deep = posix.make("dir", posix.make("dir", a + b"/x") + b"/y")
    posix.make("file", deep + b"/f", data=b"deep")
    new = posix.name()
    posix.root.rename(a, new)
    assert posix.root.read_file(new + b"/x/y/f") == b"deep"


def test_moving_a_directory_needs_write_permission_on_it(posix: Posix) -> None:
    """Its ".." changes. Only when it really moves: within one parent the directory itself is not written."""
    a, b = posix.make("dir", owner=OWNER[:2]), posix.make("dir", owner=OWNER[:2])
    moved = posix.make("dir", a + b"/d", owner=OTHER[:2], mode=0o755)
    posix.expect(errno.EACCES, posix.owner, "rename", moved, b + b"/d")
    posix.expect(0, posix.owner, "rename", moved, a + b"/e")
    posix.expect(0, posix.owner, "rename", posix.make("dir", a + b"/mine", owner=OWNER[:2], mode=0o700), b + b"/mine")


@pytest.mark.parametrize("closed", ["source", "target"])
def test_parents_need_write_permission(posix: Posix, closed: str) -> None:
    a, b = posix.make("dir", owner=OWNER[:2]), posix.make("dir", owner=OWNER[:2])
    file = posix.make("file", a + b"/f", owner=OWNER[:2])
    os.chmod(a if closed == "source" else b, 0o555)
    with posix.touches(a, b, file, unchanged=True):
        posix.expect(errno.EACCES, posix.owner, "rename", file, b + b"/g")


STICKY_CASES = [
    ("owner", "owner", True), ("owner", "other", True), ("other", "owner", True), ("other", "other", False), ("root", "other", False),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["file", "dir", "symlink"])
@pytest.mark.parametrize("directory_owner,entry_owner,allowed", STICKY_CASES)
def test_out_of_a_sticky_directory(posix: Posix, directory_owner: str, entry_owner: str, allowed: bool, kind: str) -> None:
    ids = {"owner": OWNER[:2], "other": OTHER[:2], "root": (0, 0)}
    sticky = posix.make("dir", mode=0o1777, owner=ids[directory_owner])
    entry = posix.make(kind, sticky + b"/x", owner=ids[entry_owner], **({} if kind == "symlink" else {"mode": 0o777}))
    posix.expect(0 if allowed else (errno.EPERM, errno.EACCES), posix.owner, "rename", entry, sticky + b"/y")
    outside = posix.make("dir", mode=0o777)
    posix.expect(0 if allowed else (errno.EPERM, errno.EACCES), posix.owner, "rename", sticky + (b"/y" if allowed else b"/x"), outside + b"/z")


@pytest.mark.parametrize("directory_owner,entry_owner,allowed", STICKY_CASES)
def test_over_an_entry_of_a_sticky_directory(posix: Posix, directory_owner: str, entry_owner: str, allowed: bool) -> None:
    ids = {"owner": OWNER[:2], "other": OTHER[:2], "root": (0, 0)}
    sticky = posix.make("dir", mode=0o1777, owner=ids[directory_owner])
    there = posix.make("file", sticky + b"/x", owner=ids[entry_owner])
    mine = posix.make("file", posix.make("dir", mode=0o777) + b"/m", owner=OWNER[:2])
    posix.expect(0 if allowed else (errno.EPERM, errno.EACCES), posix.owner, "rename", mine, there)


@pytest.mark.parametrize("target", ANY)
def test_noreplace(posix: Posix, target: str) -> None:
    old, there, new = posix.make("file"), posix.make(target), posix.name()
    number = os.lstat(there).st_ino
    posix.expect(errno.EEXIST, posix.root, "renameat2", old, there, RENAME_NOREPLACE)
    assert os.lstat(there).st_ino == number and os.path.lexists(old)
    posix.expect(0, posix.root, "renameat2", old, new, RENAME_NOREPLACE)
    assert os.path.lexists(new) and not os.path.lexists(old)


@pytest.mark.parametrize("two", ANY)
@pytest.mark.parametrize("one", ANY)
def test_exchange(posix: Posix, one: str, two: str) -> None:
    a, b = posix.make("dir"), posix.make("dir")
    first, second = posix.make(one, a + b"/x"), posix.make(two, b + b"/y")
    numbers = os.lstat(first).st_ino, os.lstat(second).st_ino
    with posix.touches(a, b):
        posix.root.renameat2(first, second, RENAME_EXCHANGE)
    assert (os.lstat(first).st_ino, os.lstat(second).st_ino) == (numbers[1], numbers[0])
    assert os.lstat(a).st_nlink == (3 if two == "dir" else 2) and os.lstat(b).st_nlink == (3 if one == "dir" else 2)


def test_exchange_of_directories_with_entries(posix: Posix) -> None:
    a, b = posix.make("dir"), posix.make("dir")
    posix.make("file", a + b"/in-a")
    posix.make("file", b + b"/in-b")
    posix.root.renameat2(a, b, RENAME_EXCHANGE)
    assert os.listdir(a) == [b"in-b"] and os.listdir(b) == [b"in-a"]


def test_exchange_with_nothing(posix: Posix) -> None:
    posix.expect(errno.ENOENT, posix.root, "renameat2", posix.make("file"), posix.name(), RENAME_EXCHANGE)


def test_exchange_with_a_descendant(posix: Posix) -> None:
    top = posix.make("dir")
    below = posix.make("dir", top + b"/d")
    posix.expect(errno.EINVAL, posix.root, "renameat2", top, below, RENAME_EXCHANGE)
    posix.expect((errno.EINVAL, errno.ENOTEMPTY), posix.root, "renameat2", below, top, RENAME_EXCHANGE)


def test_flags_that_exclude_each_other(posix: Posix) -> None:
    posix.expect(errno.EINVAL, posix.root, "renameat2", posix.make("file"), posix.make("file"), RENAME_NOREPLACE | RENAME_EXCHANGE)
    posix.expect(errno.EINVAL, posix.root, "renameat2", posix.make("file"), posix.make("file"), RENAME_WHITEOUT | RENAME_EXCHANGE)
    posix.expect(errno.EINVAL, posix.root, "renameat2", posix.make("file"), posix.make("file"), 1 << 10)


def test_trailing_slash(posix: Posix) -> None:
    posix.expect(errno.ENOTDIR, posix.root, "rename", posix.make("file") + b"/", posix.name())
    directory, new = posix.make("dir"), posix.name()
    posix.root.rename(directory + b"/", new + b"/")
    assert stat.S_ISDIR(os.lstat(new).st_mode)


def test_name_of_255_bytes(posix: Posix) -> None:
    long, longer = posix.dir + b"/" + b"a" * 255, posix.dir + b"/" + b"b" * 255
    posix.root.rename(posix.make("file"), long)
    posix.root.rename(long, longer)
    assert os.path.lexists(longer)
