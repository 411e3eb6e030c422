"""System calls as somebody else: one small process per identity (uid, gid, supplementary groups), kept for the whole run.

Run as a program it is the agent: it takes an identity, then answers (name, arguments) with (errno, result) over its pipes. `Agent` is the
test's end of it.
A process per identity and not a fork per call: a POSIX suite makes thousands of calls.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def renameat2(old: bytes, new: bytes, flags: int) -> None:
    _checked(_libc.renameat2(AT_FDCWD, old, AT_FDCWD, new, ctypes.c_uint(flags)))


def utimensat(path: bytes, times: Sequence[tuple[int, int]] | None, follow: bool = True) -> None:
    array = None if times is None else (_Timespec * 2)(*(_Timespec(*time) for time in times))
    _checked(_libc.utimensat(AT_FDCWD, path, array, 0 if follow else AT_SYMLINK_NOFOLLOW))


def create(path: bytes, flags: int, mode: int = 0o644) -> None:
    os.close(os.open(path, flags, mode))


def write_file(path: bytes, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def read_file(path: bytes) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def stat_fields(found: os.stat_result) -> dict[str, int]:
    names = ("st_mode", "st_ino", "st_nlink", "st_uid", "st_gid", "st_size", "st_atime_ns", "st_mtime_ns", "st_ctime_ns", "st_rdev", "st_blocks")
    return {name: getattr(found, name) for name in names}


CALLS: dict[str, Callable[..., Any]] = {
    "open": os.open,
    "create": create,
    "close": os.close,
    "read": os.read,
    "write": os.write,
    "pread": os.pread,
    "pwrite": os.pwrite,
    "lseek": os.lseek,
    "fsync": os.fsync,
    "mkdir": os.mkdir,
    "rmdir": os.rmdir,
    "unlink": os.unlink,
    "rename": os.rename,
    "renameat2": renameat2,
    "link": lambda old, new: os.link(old, new, follow_symlinks=False),
    "symlink": os.symlink,
    "readlink": os.readlink,
    "chmod": os.chmod,
    "fchmod": os.fchmod,
    "chown": os.chown,
    "lchown": os.lchown,
    "fchown": os.fchown,
    "truncate": os.truncate,
    "ftruncate": os.ftruncate,
    "utimensat": utimensat,
    "mkfifo": os.mkfifo,
    "mknod": os.mknod,
    "stat": lambda path: stat_fields(os.stat(path)),
    "lstat": lambda path: stat_fields(os.lstat(path)),
    "fstat": lambda fd: stat_fields(os.fstat(fd)),
    "access": lambda path, mode: os.access(path, mode),
    "listdir": os.listdir,
    "umask": os.umask,
    "chdir": os.chdir,
    "write_file": write_file,
    "read_file": read_file,
    "setxattr": os.setxattr,
    "getxattr": os.getxattr,
    "listxattr": os.listxattr,
    "removexattr": os.removexattr,
}


def _receive(stream: BinaryIO) -> Any:
    header = stream.read(4)
    if len(header) < 4:
        raise EOFError
    return pickle.loads(stream.read(struct.unpack("<I", header)[0]))


def _send(stream: BinaryIO, value: Any) -> None:
    data = pickle.dumps(value)
    stream.write(struct.pack("<I", len(data)) + data)
    stream.flush()


def serve() -> None:
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    uid, gid, groups = _receive(requests)
    os.umask(0)
    if (uid, gid) != (0, 0) or groups:
        os.setgroups(groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    _send(replies, os.getpid())
    while True:
        try:
            name, arguments, keywords = _receive(requests)
        except EOFError:
            return
        try:
            _send(replies, (0, CALLS[name](*arguments, **keywords)))
        except OSError as error:
            _send(replies, (error.errno, None))


class Agent:
    """Makes system calls as one identity. A failed call raises the OSError that the call met."""

    def __init__(self, uid: int = 0, gid: int = 0, groups: Sequence[int] = ()) -> None:
        self.identity = (uid, gid, tuple(groups))
        self._process = subprocess.Popen([sys.executable, "-S", "-E", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/")
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        _send(self._requests, (uid, gid, list(groups)))  # type: ignore[arg-type]
        _receive(self._replies)  # type: ignore[arg-type]

    def call(self, name: str, *arguments: Any, **keywords: Any) -> Any:
        _send(self._requests, (name, arguments, keywords))  # type: ignore[arg-type]
        number, result = _receive(self._replies)  # type: ignore[arg-type]
        if number:
            raise OSError(number, f"{name}{arguments!r} as {self.identity}: {os.strerror(number)}")
        return result

    def errno(self, name: str, *arguments: Any, **keywords: Any) -> int:
        """0, or the errno of the call."""
        try:
            self.call(name, *arguments, **keywords)
        except OSError as error:
            return error.errno or -1
        return 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in CALLS:
            raise AttributeError(name)
        return lambda *arguments, **keywords: self.call(name, *arguments, **keywords)

    def stop(self) -> None:
        self._requests.close()
        self._process.wait(10)
        self._replies.close()


if __name__ == "__main__":
    serve()
