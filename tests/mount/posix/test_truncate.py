"""truncate(2) and ftruncate(2): cutting, extending with zeros, times, permission, and each errno."""

from __future__ import annotations

import errno
import os

import pytest
from tests.mount.posix.conftest import OWNER, Posix

MIB = 1 << 20


@pytest.mark.parametrize("call", ["truncate", "ftruncate"])
@pytest.mark.parametrize(
    "before,length", [(0, 0), (0, 1234567), (1234567, 567), (100, 100), (4096, 4097), (3 * MIB + 5, MIB), (3 * MIB + 5, 2 * MIB - 1), (10, 5 * MIB)]
)
def test_length_and_content(posix: Posix, call: str, before: int, length: int) -> None:
    data = os.urandom(before)
    path = posix.make("file", data=data)
    with posix.touches(path):
        if call == "truncate":
            posix.root.truncate(path, length)
        else:
            fd = posix.root.open(path, os.O_WRONLY)
            posix.root.ftruncate(fd, length)
            posix.root.close(fd)
    with open(path, "rb") as file:
        assert file.read() == data[:length] + bytes(max(0, length - before))
    assert os.lstat(path).st_size == length


def test_cut_bytes_do_not_come_back(posix: Posix) -> None:
    path = posix.make("file", data=b"x" * 3000)
    os.truncate(path, 1000)
    os.truncate(path, 3000)
    assert posix.root.read_file(path) == b"x" * 1000 + bytes(2000)
    os.truncate(path, 500)
    with open(path, "r+b") as file:
        file.seek(2500)
        file.write(b"end")
    assert posix.root.read_file(path) == b"x" * 500 + bytes(2000) + b"end"


def test_cut_bytes_do_not_come_back_over_chunks(posix: Posix) -> None:
    path = posix.make("file", data=b"y" * (2 * MIB + 100))
    os.truncate(path, 100)
    os.truncate(path, 2 * MIB + 100)
    assert posix.root.read_file(path) == b"y" * 100 + bytes(2 * MIB)


def test_ftruncate_with_unwritten_data(posix: Posix) -> None:
    path = posix.name()
    fd = os.open(path, os.O_CREAT | os.O_RDWR)
    os.write(fd, b"0123456789")
    os.ftruncate(fd, 4)
    os.pwrite(fd, b"Z", 8)
    assert os.pread(fd, 100, 0) == b"0123" + bytes(4) + b"Z" and os.fstat(fd).st_size == 9
    os.close(fd)
    assert posix.root.read_file(path) == b"0123" + bytes(4) + b"Z"


def test_truncate_of_an_open_file_is_seen_through_the_descriptor(posix: Posix) -> None:
    path = posix.make("file", data=b"0123456789")
    fd = posix.root.open(path, os.O_RDONLY)
    assert posix.root.pread(fd, 10, 0) == b"0123456789"
    os.truncate(path, 3)
    assert posix.root.pread(fd, 10, 0) == b"012"
    os.truncate(path, 5)
    assert posix.root.pread(fd, 10, 0) == b"012\0\0" and posix.root.fstat(fd)["st_size"] == 5
    posix.root.close(fd)


@pytest.mark.parametrize("bits,allowed", [(0o200, True), (0o600, True), (0o400, False), (0o077, False)])
def test_truncate_needs_write_permission(posix: Posix, bits: int, allowed: bool) -> None:
    path = posix.make("file", data=b"abc", mode=bits, owner=OWNER[:2])
    posix.expect(0 if allowed else errno.EACCES, posix.owner, "truncate", path, 1)
    assert os.lstat(path).st_size == (1 if allowed else 3)


def test_failed_truncate_touches_nothing(posix: Posix) -> None:
    path = posix.make("file", data=b"abc", mode=0o444)
    with posix.touches(path, unchanged=True):
        posix.expect(errno.EACCES, posix.owner, "truncate", path, 0)


def test_ftruncate_needs_a_descriptor_for_writing(posix: Posix) -> None:
    path = posix.make("file", data=b"abc")
    fd = posix.root.open(path, os.O_RDONLY)
    posix.expect((errno.EINVAL, errno.EBADF), posix.root, "ftruncate", fd, 0)
    posix.root.close(fd)


def test_directory(posix: Posix) -> None:
    posix.expect(errno.EISDIR, posix.root, "truncate", posix.make("dir"), 0)


@pytest.mark.parametrize("kind", ["fifo", "socket"])
def test_what_has_no_length(posix: Posix, kind: str) -> None:
    posix.expect(errno.EINVAL, posix.root, "truncate", posix.make(kind), 0)


def test_negative_length(posix: Posix) -> None:
    path = posix.make("file", data=b"abc")
    posix.expect(errno.EINVAL, posix.root, "truncate", path, -1)
    fd = posix.root.open(path, os.O_WRONLY)
    posix.expect(errno.EINVAL, posix.root, "ftruncate", fd, -(1 << 40))
    posix.root.close(fd)
    assert os.lstat(path).st_size == 3


def test_holes_read_as_zeros(posix: Posix) -> None:
    path = posix.name()
    fd = os.open(path, os.O_CREAT | os.O_RDWR)
    os.pwrite(fd, b"far", 5 * MIB + 17)
    assert os.pread(fd, 100, 3 * MIB) == bytes(100)
    assert os.pread(fd, 30, 5 * MIB) == bytes(17) + b"far"
    os.close(fd)
    assert os.lstat(path).st_size == 5 * MIB + 20
