"""mkdir(2), mkfifo(2), mknod(2), symlink(2): what they make, whose it is, which times they touch, and each errno."""

from __future__ import annotations

import errno
import os
import stat

import pytest
from tests.mount.posix.conftest import OWNER, Posix

MAKERS = {
    "mkdir": lambda path, mode: ("mkdir", path, mode),
    "mkfifo": lambda path, mode: ("mkfifo", path, mode),
    "mknod_file": lambda path, mode: ("mknod", path, stat.S_IFREG | mode),
    "mknod_fifo": lambda path, mode: ("mknod", path, stat.S_IFIFO | mode),
    "mknod_socket": lambda path, mode: ("mknod", path, stat.S_IFSOCK | mode),
    "mknod_char": lambda path, mode: ("mknod", path, stat.S_IFCHR | mode, os.makedev(1, 2)),
    "mknod_block": lambda path, mode: ("mknod", path, stat.S_IFBLK | mode, os.makedev(259, 70_000)),
}
TYPES = {
    "mkdir": stat.S_IFDIR, "mkfifo": stat.S_IFIFO, "mknod_file": stat.S_IFREG, "mknod_fifo": stat.S_IFIFO, "mknod_socket": stat.S_IFSOCK,
    "mknod_char": stat.S_IFCHR, "mknod_block": stat.S_IFBLK,
}  # fmt: skip
NEEDS_ROOT = ("mknod_char", "mknod_block")


@pytest.mark.parametrize("mode", [0o755, 0o151, 0o000, 0o700])
@pytest.mark.parametrize("what", MAKERS)
def test_type_and_mode(posix: Posix, what: str, mode: int) -> None:
    path = posix.name()
    posix.root.call(*MAKERS[what](path, mode))
    found = os.lstat(path)
    assert stat.S_IFMT(found.st_mode) == TYPES[what] and stat.S_IMODE(found.st_mode) == mode
    assert found.st_nlink == (2 if what == "mkdir" else 1)
    if what in NEEDS_ROOT:
        assert found.st_rdev == MAKERS[what](path, mode)[3]


@pytest.mark.parametrize("umask,mode,expected", [(0o077, 0o151, 0o100), (0o070, 0o345, 0o305), (0o501, 0o345, 0o244)])
@pytest.mark.parametrize("what", MAKERS)
def test_umask(posix: Posix, what: str, umask: int, mode: int, expected: int) -> None:
    path = posix.name()
    posix.root.umask(umask)
    try:
        posix.root.call(*MAKERS[what](path, mode))
    finally:
        posix.root.umask(0)
    assert stat.S_IMODE(os.lstat(path).st_mode) == expected


@pytest.mark.parametrize("what", [name for name in MAKERS if name not in NEEDS_ROOT])
def test_owner_and_group_of_the_maker(posix: Posix, what: str) -> None:
    directory = posix.make("dir", mode=0o777, owner=(4000, 4001))
    posix.owner.call(*MAKERS[what](directory + b"/x", 0o755))
    found = os.lstat(directory + b"/x")
    assert (found.st_uid, found.st_gid) == OWNER[:2]


@pytest.mark.parametrize("what", MAKERS)
def test_times(posix: Posix, what: str) -> None:
    path = posix.name()
    with posix.touches(posix.dir):
        posix.root.call(*MAKERS[what](path, 0o755))
    found = os.lstat(path)
    assert max(found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns) - min(found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns) < 10**9


@pytest.mark.parametrize("kind", ["file", "dir", "fifo", "socket", "char", "block", "symlink"])
@pytest.mark.parametrize("what", MAKERS)
def test_name_that_exists(posix: Posix, what: str, kind: str) -> None:
    path = posix.make(kind)
    before = os.lstat(path)
    with posix.touches(posix.dir, unchanged=True):
        posix.expect(errno.EEXIST, posix.root, *MAKERS[what](path, 0o644))
    assert os.lstat(path) == before


@pytest.mark.parametrize("what", NEEDS_ROOT)
def test_devices_are_for_root(posix: Posix, what: str) -> None:
    directory = posix.make("dir", mode=0o777)
    posix.expect(errno.EPERM, posix.owner, *MAKERS[what](directory + b"/x", 0o644))


def test_mkdir_grows_the_parents_link_count(posix: Posix) -> None:
    before = os.lstat(posix.dir).st_nlink
    path = posix.name()
    posix.root.mkdir(path, 0o755)
    assert os.lstat(posix.dir).st_nlink == before + 1
    os.rmdir(path)
    assert os.lstat(posix.dir).st_nlink == before


def test_mkdir_is_empty_with_dots(posix: Posix) -> None:
    path = posix.make("dir")
    assert os.listdir(path) == []
    assert os.lstat(path + b"/.").st_ino == os.lstat(path).st_ino
    assert os.lstat(path + b"/..").st_ino == os.lstat(posix.dir).st_ino


def test_mkdir_with_a_trailing_slash(posix: Posix) -> None:
    path = posix.name()
    posix.root.mkdir(path + b"/", 0o755)
    assert stat.S_ISDIR(os.lstat(path).st_mode)


@pytest.mark.parametrize("what", ["mkfifo", "mknod_file"])
def test_trailing_slash_on_what_is_no_directory(posix: Posix, what: str) -> None:
    posix.expect((errno.ENOENT, errno.ENOTDIR), posix.root, *MAKERS[what](posix.name() + b"/", 0o644))


def test_mkdir_over_a_dangling_link(posix: Posix) -> None:
    link = posix.name()
    os.symlink(posix.name(), link)
    posix.expect(errno.EEXIST, posix.root, "mkdir", link, 0o755)


def test_sticky_bit_of_a_new_directory(posix: Posix) -> None:
    path = posix.name()
    posix.root.mkdir(path, 0o1777)
    assert stat.S_IMODE(os.lstat(path).st_mode) == 0o1777


# --- symlink ---


@pytest.mark.parametrize(
    "target", [b"x", b"../../etc/passwd", b"/absolute", b"a" * 255, b"ab/" * 500, b"y" * 4095, bytes(range(1, 256)).replace(b"/", b"")]
)
def test_symlink_holds_its_target(posix: Posix, target: bytes) -> None:
    path = posix.name()
    with posix.touches(posix.dir):
        posix.root.symlink(target, path)
    found = os.lstat(path)
    assert stat.S_ISLNK(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o777
    assert os.readlink(path) == target and found.st_size == len(target)


def test_symlink_target_too_long_or_empty(posix: Posix) -> None:
    posix.expect(errno.ENAMETOOLONG, posix.root, "symlink", b"z" * 4096, posix.name())
    posix.expect(errno.ENOENT, posix.root, "symlink", b"", posix.name())


@pytest.mark.parametrize("kind", ["file", "dir", "fifo", "socket", "char", "block", "symlink"])
def test_symlink_over_something(posix: Posix, kind: str) -> None:
    with posix.touches(posix.dir, unchanged=True):
        path = posix.name()
    path = posix.make(kind)
    posix.expect(errno.EEXIST, posix.root, "symlink", b"target", path)


def test_symlink_belongs_to_its_maker(posix: Posix) -> None:
    directory = posix.make("dir", mode=0o777)
    posix.owner.symlink(b"x", directory + b"/l")
    found = os.lstat(directory + b"/l")
    assert (found.st_uid, found.st_gid) == OWNER[:2]


def test_symlinks_are_followed_in_the_middle(posix: Posix) -> None:
    directory = posix.make("dir")
    posix.make("file", directory + b"/f", data=b"here")
    one, two = posix.name(), posix.name()
    os.symlink(os.path.basename(directory), one)
    os.symlink(one, two)
    assert posix.root.read_file(two + b"/f") == b"here"
    assert posix.root.stat(two)["st_ino"] == os.lstat(directory).st_ino


def test_chain_of_forty_symlinks_is_the_limit(posix: Posix) -> None:
    target = posix.make("file")
    names = [posix.name() for _ in range(41)]
    for link, to in zip(names, [target, *names], strict=False):
        os.symlink(to, link)
    posix.expect(0, posix.root, "stat", names[39])
    posix.expect(errno.ELOOP, posix.root, "stat", names[40])


@pytest.mark.parametrize("kind", ["file", "dir", "fifo"])
def test_readlink_of_what_is_no_link(posix: Posix, kind: str) -> None:
    posix.expect(errno.EINVAL, posix.root, "readlink", posix.make(kind))
