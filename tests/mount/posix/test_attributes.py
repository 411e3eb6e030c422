"""chmod(2), chown(2), utimensat(2) and their kin: what changes, who may, setuid and setgid, times, and each errno."""

from __future__ import annotations

import errno
import os
import stat
import time

import pytest
from tests.mount.agent import UTIME_NOW, UTIME_OMIT
from tests.mount.posix.conftest import OTHER, OWNER, Posix

KINDS = ["file", "dir", "fifo", "socket", "char", "block"]


def mode_of(path: bytes) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


# --- chmod ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [0o000, 0o111, 0o755, 0o4755, 0o2755, 0o1755, 0o7777])
def test_chmod(posix: Posix, kind: str, mode: int) -> None:
    path = posix.make(kind)
    with posix.touches(path, times="c"), posix.touches(path, times="ma", unchanged=True):
        posix.root.chmod(path, mode)
    assert mode_of(path) == mode


def test_chmod_follows_links(posix: Posix) -> None:
    path, link = posix.make("file"), posix.name()
    os.symlink(path, link)
    posix.root.chmod(link, 0o600)
    assert mode_of(path) == 0o600 and mode_of(link) == 0o777


def test_fchmod(posix: Posix) -> None:
    path = posix.make("file")
    fd = posix.root.open(path, os.O_RDONLY)
    posix.root.fchmod(fd, 0o640)
    posix.root.close(fd)
    assert mode_of(path) == 0o640


@pytest.mark.parametrize("kind", KINDS)
def test_chmod_by_owner_and_by_others(posix: Posix, kind: str) -> None:
    path = posix.make(kind, mode=0o777, owner=OWNER[:2])
    posix.expect(0, posix.owner, "chmod", path, 0o770)
    with posix.touches(path, times="c", unchanged=True):
        posix.expect(errno.EPERM, posix.other, "chmod", path, 0o777)
        posix.expect(errno.EPERM, posix.agent(OTHER[0], OWNER[1]), "chmod", path, 0o777)
    assert mode_of(path) == 0o770


def test_setgid_is_dropped_for_an_owner_outside_the_group(posix: Posix) -> None:
    path = posix.make("file", owner=(OWNER[0], OTHER[1]), mode=0o755)
    posix.owner.chmod(path, 0o2755)
    assert mode_of(path) == 0o755
    member = posix.agent(OWNER[0], OWNER[1], (OTHER[1],))
    member.chmod(path, 0o2755)
    assert mode_of(path) == 0o2755


def test_sticky_bit_of_a_file_by_an_ordinary_owner(posix: Posix) -> None:
    path = posix.make("file", owner=OWNER[:2])
    posix.owner.chmod(path, 0o1644)
    assert mode_of(path) == 0o1644


@pytest.mark.parametrize("mode", [0o4777, 0o2777, 0o6777])
def test_write_by_an_ordinary_user_clears_setuid_and_setgid(posix: Posix, mode: int) -> None:
    path = posix.make("file", data=b"x", mode=mode)
    fd = posix.owner.open(path, os.O_WRONLY)
    posix.owner.write(fd, b"y")
    assert stat.S_IMODE(posix.owner.fstat(fd)["st_mode"]) == 0o777
    posix.owner.close(fd)
    assert mode_of(path) == 0o777


def test_write_by_root_keeps_setuid(posix: Posix) -> None:
    path = posix.make("file", data=b"x", mode=0o6777)
    posix.root.write_file(path, b"y")
    assert mode_of(path) == 0o6777


def test_truncate_by_an_ordinary_user_clears_setuid_and_setgid(posix: Posix) -> None:
    path = posix.make("file", data=b"xyz", mode=0o6777)
    posix.owner.truncate(path, 1)
    assert mode_of(path) == 0o777
    path = posix.make("file", data=b"xyz", mode=0o6777)
    posix.owner.create(path, os.O_WRONLY | os.O_TRUNC)
    assert mode_of(path) == 0o777


# --- chown ---


@pytest.mark.parametrize("kind", [*KINDS, "symlink"])
def test_lchown(posix: Posix, kind: str) -> None:
    path = posix.make(kind)
    with posix.touches(path, times="c"):
        posix.root.lchown(path, 123, 456)
    found = os.lstat(path)
    assert (found.st_uid, found.st_gid) == (123, 456)
    posix.root.lchown(path, -1, 789)
    posix.root.lchown(path, 321, -1)
    found = os.lstat(path)
    assert (found.st_uid, found.st_gid) == (321, 789)


def test_chown_follows_links_and_lchown_does_not(posix: Posix) -> None:
    path, link = posix.make("file"), posix.name()
    os.symlink(path, link)
    posix.root.chown(link, 10, 20)
    posix.root.lchown(link, 30, 40)
    assert (os.lstat(path).st_uid, os.lstat(path).st_gid, os.lstat(link).st_uid, os.lstat(link).st_gid) == (10, 20, 30, 40)


def test_fchown(posix: Posix) -> None:
    path = posix.make("file")
    fd = posix.root.open(path, os.O_RDONLY)
    posix.root.fchown(fd, 11, 22)
    posix.root.close(fd)
    assert (os.lstat(path).st_uid, os.lstat(path).st_gid) == (11, 22)


@pytest.mark.parametrize("kind", [*KINDS, "symlink"])
def test_owner_changes_group_only_to_one_of_its_own(posix: Posix, kind: str) -> None:
    member = posix.agent(OWNER[0], OWNER[1], (4444,))
    path = posix.make(kind, owner=(OWNER[0], 5555))
    with posix.touches(path, times="c"):
        posix.expect(0, member, "lchown", path, -1, 4444)
    posix.expect(0, member, "lchown", path, OWNER[0], OWNER[1])
    with posix.touches(path, times="c", unchanged=True):
        posix.expect(errno.EPERM, member, "lchown", path, -1, 5555)
        posix.expect(errno.EPERM, member, "lchown", path, OTHER[0], -1)
        posix.expect(errno.EPERM, member, "lchown", path, OTHER[0], OWNER[1])
        posix.expect(errno.EPERM, posix.other, "lchown", path, -1, OTHER[1])
        posix.expect(errno.EPERM, posix.other, "lchown", path, OTHER[0], OTHER[1])
    assert (os.lstat(path).st_uid, os.lstat(path).st_gid) == OWNER[:2]


@pytest.mark.parametrize("who", ["root", "owner"])
@pytest.mark.parametrize("mode,expected", [(0o6555, 0o555), (0o4755, 0o755), (0o2755, 0o755)])
def test_chown_clears_setuid_and_setgid_of_a_program(posix: Posix, mode: int, expected: int, who: str) -> None:
    path = posix.make("file", owner=OWNER[:2])
    os.chmod(path, mode)
    if who == "root":
        posix.root.chown(path, 999, 998)
    else:
        posix.owner.chown(path, OWNER[0], OWNER[1])
    assert mode_of(path) == expected


def test_chown_keeps_setgid_of_a_directory(posix: Posix) -> None:
    path = posix.make("dir", owner=OWNER[:2])
    os.chmod(path, 0o2755)
    posix.root.chown(path, 999, 998)
    assert mode_of(path) == 0o2755


# --- utimensat ---

SECOND = 1_000_000_000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("atime,mtime", [
    ((1900000000, 123456789), (1950000000, 987654321)), ((0, 0), (0, 1)), ((1, 999_999_999), (2, 0)), ((4294967295, 5), (4294967296, 7)),
])  # fmt: skip
def test_given_times_to_the_nanosecond(posix: Posix, kind: str, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    path = posix.make(kind)
    with posix.touches(path, times="c"):
        posix.root.utimensat(path, (atime, mtime))
    found = os.lstat(path)
    assert found.st_atime_ns == atime[0] * SECOND + atime[1]
    assert found.st_mtime_ns == mtime[0] * SECOND + mtime[1]


def test_times_before_1970(posix: Posix) -> None:
    path = posix.make("file")
    posix.root.utimensat(path, ((-10, 5), (-1, 999_999_999)))
    found = os.lstat(path)
    assert (found.st_atime_ns, found.st_mtime_ns) == (-10 * SECOND + 5, -1)


def test_omit(posix: Posix) -> None:
    path = posix.make("file")
    posix.root.utimensat(path, ((100, 1), (200, 2)))
    posix.root.utimensat(path, ((0, UTIME_OMIT), (300, 3)))
    assert (os.lstat(path).st_atime_ns, os.lstat(path).st_mtime_ns) == (100 * SECOND + 1, 300 * SECOND + 3)
    posix.root.utimensat(path, ((400, 4), (0, UTIME_OMIT)))
    assert (os.lstat(path).st_atime_ns, os.lstat(path).st_mtime_ns) == (400 * SECOND + 4, 300 * SECOND + 3)
    with posix.touches(path, times="cma", unchanged=True):
        posix.root.utimensat(path, ((0, UTIME_OMIT), (0, UTIME_OMIT)))


@pytest.mark.parametrize("times", [None, ((0, UTIME_NOW), (0, UTIME_NOW))])
def test_now(posix: Posix, times: object) -> None:
    path = posix.make("file")
    posix.root.utimensat(path, ((100, 1), (200, 2)))
    before = time.time_ns() - SECOND // 20
    posix.root.utimensat(path, times)
    found = os.lstat(path)
    assert before <= found.st_atime_ns <= time.time_ns() and before <= found.st_mtime_ns <= time.time_ns()


def test_symlink_times(posix: Posix) -> None:
    link = posix.make("symlink")
    posix.root.utimensat(link, ((100, 1), (200, 2)), False)
    assert (os.lstat(link).st_atime_ns, os.lstat(link).st_mtime_ns) == (100 * SECOND + 1, 200 * SECOND + 2)


@pytest.mark.parametrize("who,mode,now,given", [
    ("owner", 0o444, 0, 0), ("owner", 0o000, 0, 0), ("other", 0o444, errno.EACCES, errno.EPERM), ("other", 0o646, 0, errno.EPERM), ("root",
    0o000, 0, 0),
])  # fmt: skip
def test_who_may_set_times(posix: Posix, who: str, mode: int, now: int, given: int) -> None:
    """The owner always; whoever may write, to now; nobody else."""
    path = posix.make("file", mode=mode, owner=OWNER[:2])
    agent = {"owner": posix.owner, "other": posix.other, "root": posix.root}[who]
    posix.expect(now, agent, "utimensat", path, None)
    posix.expect(now, agent, "utimensat", path, ((0, UTIME_NOW), (0, UTIME_NOW)))
    posix.expect(given, agent, "utimensat", path, ((1, 0), (2, 0)))
    posix.expect(given, agent, "utimensat", path, ((0, UTIME_NOW), (0, UTIME_OMIT)))


def test_reading_does_not_change_mtime_and_writing_does(posix: Posix) -> None:
    path = posix.make("file", data=b"abc")
    with posix.touches(path, times="mc", unchanged=True):
        posix.root.read_file(path)
    with posix.touches(path):
        posix.root.write_file(path, b"x")
    with posix.touches(path):
        fd = posix.root.open(path, os.O_WRONLY)
        posix.root.write(fd, b"y")
        posix.root.fsync(fd)
        after_write = os.lstat(path)
        posix.root.close(fd)
    assert os.lstat(path).st_mtime_ns == after_write.st_mtime_ns, "closing is not writing"


def test_set_times_survive_a_close(posix: Posix) -> None:
    """tar and rsync: write, set the times through the name, then close."""
    path = posix.name()
    fd = posix.root.open(path, os.O_CREAT | os.O_WRONLY, 0o644)
    posix.root.write(fd, b"data")
    posix.root.utimensat(path, ((1000, 0), (2000, 5)))
    posix.root.close(fd)
    assert os.lstat(path).st_mtime_ns == 2000 * SECOND + 5


# --- stat ---


def test_stat_and_access(posix: Posix) -> None:
    path = posix.make("file", mode=0o640, owner=OWNER[:2], data=b"x" * 1000)
    found = os.lstat(path)
    assert (found.st_size, found.st_nlink, found.st_uid, found.st_gid) == (1000, 1, *OWNER[:2]) and found.st_blocks > 0
    assert posix.owner.access(path, os.R_OK | os.W_OK) and not posix.owner.access(path, os.X_OK)
    assert not posix.other.access(path, os.R_OK)
    assert posix.agent(OTHER[0], OWNER[1]).access(path, os.R_OK) and not posix.agent(OTHER[0], OWNER[1]).access(path, os.W_OK)


# --- extended attributes ---


def test_xattr(posix: Posix) -> None:
    path = posix.make("file")
    with posix.touches(path, times="c"):
        posix.root.setxattr(path, b"user.one", b"1")
    posix.root.setxattr(path, b"user.two", b"")
    posix.root.setxattr(path, b"user.one", bytes(range(256)))
    assert sorted(posix.root.listxattr(path)) == ["user.one", "user.two"]
    assert posix.root.getxattr(path, b"user.one") == bytes(range(256)) and posix.root.getxattr(path, b"user.two") == b""
    posix.root.removexattr(path, b"user.one")
    posix.expect(errno.ENODATA, posix.root, "getxattr", path, b"user.one")
    posix.expect(errno.ENODATA, posix.root, "removexattr", path, b"user.one")
    assert posix.root.listxattr(path) == ["user.two"]


def test_xattr_create_and_replace(posix: Posix) -> None:
    path = posix.make("file")
    posix.expect(errno.ENODATA, posix.root, "setxattr", path, b"user.x", b"1", os.XATTR_REPLACE)
    posix.expect(0, posix.root, "setxattr", path, b"user.x", b"1", os.XATTR_CREATE)
    posix.expect(errno.EEXIST, posix.root, "setxattr", path, b"user.x", b"2", os.XATTR_CREATE)
    posix.expect(0, posix.root, "setxattr", path, b"user.x", b"2", os.XATTR_REPLACE)


def test_xattr_permissions(posix: Posix) -> None:
    path = posix.make("file", mode=0o640, owner=OWNER[:2])
    posix.expect(0, posix.owner, "setxattr", path, b"user.x", b"1")
    posix.expect(errno.EACCES, posix.other, "setxattr", path, b"user.x", b"1")
    posix.expect(errno.EACCES, posix.other, "getxattr", path, b"user.x")
    posix.expect(errno.EPERM, posix.root, "setxattr", posix.make("fifo"), b"user.x", b"1")


def test_xattr_moves_with_the_file(posix: Posix) -> None:
    path, new = posix.make("file"), posix.name()
    os.setxattr(path, b"user.x", b"kept")
    os.rename(path, new)
    assert os.getxattr(new, b"user.x") == b"kept"
    os.mkdir(path)
    os.setxattr(path, b"user.d", b"directory")
    assert os.getxattr(path, b"user.d") == b"directory"
