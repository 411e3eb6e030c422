"""open(2) and creat(2): creation, modes, umask, times, flags, permission for each access mode, and each errno."""

from __future__ import annotations

import errno
import os
import stat

import pytest
from tests.mount.posix.conftest import OTHER, OWNER, Posix

CREATE = os.O_CREAT | os.O_WRONLY


@pytest.mark.parametrize("mode", [0o755, 0o644, 0o151, 0o345, 0o000, 0o777, 0o4755, 0o2755, 0o1644])
def test_created_file_has_mode_owner_and_group(posix: Posix, mode: int) -> None:
    path = posix.name()
    posix.root.create(path, CREATE, mode)
    found = os.lstat(path)
    assert stat.S_ISREG(found.st_mode) and stat.S_IMODE(found.st_mode) == mode
    assert (found.st_uid, found.st_gid, found.st_nlink, found.st_size) == (0, 0, 1, 0)


@pytest.mark.parametrize("umask,mode,expected", [(0o077, 0o151, 0o100), (0o070, 0o345, 0o305), (0o501, 0o345, 0o244), (0o022, 0o777, 0o755)])
def test_umask(posix: Posix, umask: int, mode: int, expected: int) -> None:
    path = posix.name()
    posix.root.umask(umask)
    try:
        posix.root.create(path, CREATE, mode)
    finally:
        posix.root.umask(0)
    assert stat.S_IMODE(os.lstat(path).st_mode) == expected


def test_created_file_belongs_to_its_maker(posix: Posix) -> None:
    directory = posix.make("dir", mode=0o777)
    posix.owner.create(directory + b"/f", CREATE, 0o644)
    found = os.lstat(directory + b"/f")
    assert (found.st_uid, found.st_gid) == OWNER[:2]


def test_setgid_directory_gives_its_group(posix: Posix) -> None:
    directory = posix.make("dir", mode=0o2777, owner=(0, 4321))
    posix.owner.create(directory + b"/f", CREATE, 0o644)
    assert os.lstat(directory + b"/f").st_gid == 4321
    posix.owner.mkdir(directory + b"/d", 0o755)
    found = os.lstat(directory + b"/d")
    assert found.st_gid == 4321 and found.st_mode & stat.S_ISGID, "a directory made in a setgid directory is setgid too"


def test_setgid_bit_is_dropped_when_the_maker_is_not_in_the_group(posix: Posix) -> None:
    directory = posix.make("dir", mode=0o2777, owner=(0, 4321))
    posix.owner.create(directory + b"/f", CREATE, 0o2755)
    assert not os.lstat(directory + b"/f").st_mode & stat.S_ISGID


def test_creation_touches_file_and_directory(posix: Posix) -> None:
    path = posix.name()
    with posix.touches(posix.dir):
        posix.root.create(path, CREATE)
    directory, file = os.lstat(posix.dir), os.lstat(path)
    assert abs(file.st_mtime_ns - directory.st_mtime_ns) < 2_000_000_000
    assert abs(file.st_atime_ns - file.st_mtime_ns) < 2_000_000_000


def test_opening_an_existing_file_with_creat_touches_nothing(posix: Posix) -> None:
    path = posix.make("file", data=b"abc")
    with posix.touches(posix.dir, path, unchanged=True):
        posix.root.create(path, CREATE, 0o600)
    assert stat.S_IMODE(os.lstat(path).st_mode) == 0o644 and os.lstat(path).st_size == 3


def test_truncate_flag(posix: Posix) -> None:
    path = posix.make("file", data=b"0123456789")
    with posix.touches(path):
        posix.root.create(path, os.O_WRONLY | os.O_TRUNC)
    assert os.lstat(path).st_size == 0
    assert posix.root.read_file(path) == b""


def test_truncate_flag_of_an_empty_file_touches_it(posix: Posix) -> None:
    path = posix.make("file")
    with posix.touches(path):
        posix.root.create(path, os.O_WRONLY | os.O_TRUNC)


def test_failed_truncate_leaves_the_content(posix: Posix) -> None:
    path = posix.make("file", data=b"0123456789", mode=0o444)
    directory_stays = os.lstat(path)
    posix.expect(errno.EACCES, posix.owner, "create", path, os.O_WRONLY | os.O_TRUNC)
    assert os.lstat(path).st_size == 10 and os.lstat(path).st_ctime_ns == directory_stays.st_ctime_ns


@pytest.mark.parametrize("kind", ["file", "dir", "fifo", "socket", "char", "block", "symlink"])
def test_exclusive_creation_meets_anything(posix: Posix, kind: str) -> None:
    posix.expect(errno.EEXIST, posix.root, "create", posix.make(kind), CREATE | os.O_EXCL)


def test_exclusive_creation_does_not_follow_a_dangling_link(posix: Posix) -> None:
    link = posix.name()
    os.symlink(posix.name(), link)
    posix.expect(errno.EEXIST, posix.root, "create", link, CREATE | os.O_EXCL)


def test_creation_through_a_dangling_link(posix: Posix) -> None:
    link, target = posix.name(), posix.name()
    os.symlink(target, link)
    posix.root.create(link, CREATE)
    assert stat.S_ISREG(os.lstat(target).st_mode)


def test_nofollow_at_a_link(posix: Posix) -> None:
    posix.expect(errno.ELOOP, posix.root, "create", posix.make("symlink"), os.O_RDONLY | os.O_NOFOLLOW)
    posix.expect(errno.ELOOP, posix.root, "create", posix.make("symlink"), CREATE | os.O_NOFOLLOW)


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_TRUNC])
def test_directory_for_writing(posix: Posix, flags: int) -> None:
    posix.expect(errno.EISDIR, posix.root, "create", posix.make("dir"), flags)


def test_directory_with_creat(posix: Posix) -> None:
    posix.expect(errno.EISDIR, posix.root, "create", posix.make("dir"), os.O_RDONLY | os.O_CREAT)


@pytest.mark.parametrize("kind", ["file", "fifo", "char"])
def test_directory_flag_on_something_else(posix: Posix, kind: str) -> None:
    posix.expect(errno.ENOTDIR, posix.root, "create", posix.make(kind), os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK)


def test_fifo_for_writing_without_a_reader(posix: Posix) -> None:
    posix.expect(errno.ENXIO, posix.root, "create", posix.make("fifo"), os.O_WRONLY | os.O_NONBLOCK)


def test_socket(posix: Posix) -> None:
    posix.expect(errno.ENXIO, posix.root, "create", posix.make("socket"), os.O_RDONLY)


def test_trailing_slash(posix: Posix) -> None:
    posix.expect(errno.ENOTDIR, posix.root, "create", posix.make("file") + b"/", os.O_RDONLY)
    posix.expect(errno.EISDIR, posix.root, "create", posix.name() + b"/", CREATE)


READ, WRITE, BOTH = os.O_RDONLY, os.O_WRONLY, os.O_RDWR


@pytest.mark.parametrize("kind", ["file", "fifo", "char"])
@pytest.mark.parametrize("flags,need", [(READ, 4), (WRITE, 2), (BOTH, 6), (READ | os.O_TRUNC, 6)])
@pytest.mark.parametrize("bits", range(8))
@pytest.mark.parametrize("who", ["owner", "group", "supplementary", "other"])
def test_access_mode_against_permission_bits(posix: Posix, who: str, bits: int, flags: int, need: int, kind: str) -> None:
    """The class that applies decides alone: its bits are `bits`, the other two classes have the opposite ones."""
    if kind != "file" and flags & os.O_TRUNC:
        need = 6  # O_TRUNC does nothing to these, but the kernel asks for write permission all the same
    opposite = ~bits & 7
    shift = {"owner": 6, "group": 3, "supplementary": 3, "other": 0}[who]
    mode = sum((bits if at == shift else opposite) << at for at in (6, 3, 0))
    path = posix.make(kind, mode=mode, owner=OWNER[:2], data=b"x")
    agent = {
        "owner": posix.owner,
        "group": posix.agent(OTHER[0], OWNER[1]),
        "supplementary": posix.agent(OTHER[0], OTHER[1], (7, OWNER[1])),
        "other": posix.other,
    }[who]
    allowed = 0 if bits & need == need else errno.EACCES
    if kind == "fifo" and allowed == 0:
        allowed = errno.ENXIO if flags & os.O_ACCMODE == WRITE else 0
    posix.expect(allowed, agent, "create", path, flags | os.O_NONBLOCK)


def test_root_opens_anything(posix: Posix) -> None:
    path = posix.make("file", mode=0o000, owner=OWNER[:2])
    for flags in (READ, WRITE, BOTH):
        posix.expect(0, posix.root, "create", path, flags)


def test_creator_of_an_unwritable_file_may_write_through_the_descriptor(posix: Posix) -> None:
    directory = posix.make("dir", mode=0o777)
    path = directory + b"/f"
    fd = posix.owner.open(path, os.O_CREAT | os.O_RDWR, 0o000)
    assert posix.owner.write(fd, b"test") == 4
    assert posix.owner.pread(fd, 10, 0) == b"test"
    posix.owner.close(fd)
    posix.expect(errno.EACCES, posix.owner, "create", path, os.O_RDONLY)


def test_descriptor_outlives_a_change_of_mode_and_owner(posix: Posix) -> None:
    path = posix.make("file", owner=OWNER[:2], mode=0o644)
    fd = posix.owner.open(path, os.O_RDWR)
    os.chmod(path, 0)
    os.chown(path, 0, 0)
    assert posix.owner.pwrite(fd, b"still", 0) == 5
    posix.owner.ftruncate(fd, 3)
    assert posix.owner.pread(fd, 10, 0) == b"sti"
    posix.owner.close(fd)


def test_reading_a_write_only_descriptor(posix: Posix) -> None:
    path = posix.make("file", data=b"x")
    fd = posix.root.open(path, os.O_WRONLY)
    posix.expect(errno.EBADF, posix.root, "read", fd, 1)
    posix.root.close(fd)
    fd = posix.root.open(path, os.O_RDONLY)
    posix.expect(errno.EBADF, posix.root, "write", fd, b"x")
    posix.root.close(fd)


def test_append_ignores_the_position(posix: Posix) -> None:
    path = posix.make("file", data=b"abc")
    fd = posix.root.open(path, os.O_RDWR | os.O_APPEND)
    posix.root.lseek(fd, 0, os.SEEK_SET)
    posix.root.write(fd, b"def")
    assert posix.root.pread(fd, 10, 0) == b"abcdef"
    posix.root.close(fd)
    assert posix.root.read_file(path) == b"abcdef"


def test_append_sees_another_descriptors_growth(posix: Posix) -> None:
    path = posix.make("file", data=b"abc")
    appender, writer = posix.root.open(path, os.O_WRONLY | os.O_APPEND), posix.root.open(path, os.O_RDWR)
    posix.root.pwrite(writer, b"0123456789", 0)
    posix.root.write(appender, b"end")
    posix.root.pwrite(writer, b"more", 20)
    posix.root.write(appender, b"END")
    assert posix.root.pread(writer, 100, 0) == b"0123456789end" + bytes(7) + b"moreEND"
    for fd in (appender, writer):
        posix.root.close(fd)


def test_unlinked_file_stays_readable_and_writable(posix: Posix) -> None:
    path = posix.make("file", data=b"before")
    fd = posix.root.open(path, os.O_RDWR)
    os.unlink(path)
    assert posix.root.fstat(fd)["st_nlink"] == 0
    posix.root.pwrite(fd, b"after unlink", 0)
    assert posix.root.pread(fd, 100, 0) == b"after unlink"
    posix.root.ftruncate(fd, 5)
    assert posix.root.fstat(fd)["st_size"] == 5
    posix.root.close(fd)
    assert not os.path.lexists(path)


def test_unlinked_file_opened_for_reading_stays_readable(posix: Posix) -> None:
    path = posix.make("file", data=b"before")
    fd = posix.root.open(path, os.O_RDONLY)
    os.unlink(path)
    posix.tick()
    assert posix.root.pread(fd, 100, 0) == b"before"
    assert posix.root.fstat(fd)["st_size"] == 6
    posix.root.close(fd)


def test_running_program_is_busy_or_replaced(posix: Posix) -> None:
    """A file with execute permission only can be run and not read."""
    path = posix.make("file", data=b"#!/bin/sh\n", mode=0o711, owner=(0, 0))
    posix.expect(errno.EACCES, posix.owner, "create", path, os.O_RDONLY)
