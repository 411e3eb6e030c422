"""The real Disk: a directory of the local file system, with LMDB for its ordered maps.

Must never hide an error: every OSError becomes a class of the tree through `from_os`, every sign of damage in an LMDB file IndexCorrupt, and neither
is followed by a repair.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import lmdb

from kvfs.common.boundary.disk import Disk, DiskFile, LentFile, OrderedMap, ReadableFile
from kvfs.common.boundary.lmdb_check import check_lmdb_file, check_lmdb_snapshot
from kvfs.common.boundary.net import after
from kvfs.common.errors import DirectoryInUse, IndexCorrupt, InputOutput, InvalidArgument, KvfsError, NoSpace, from_os

_IOV_MAX: Final = 1024
_KEEP_SIZE: Final = 0x01
_PUNCH_HOLE: Final = 0x02
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_LIBC.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_CORRUPT: Final = (lmdb.CorruptedError, lmdb.InvalidError, lmdb.VersionMismatchError, lmdb.PageNotFoundError, lmdb.PanicError, lmdb.IncompatibleError)


_LEFTOVER: Final = re.compile(r".+\.\d+-\d+\.tmp")


def is_leftover(name: str) -> bool:
    """Is this the name of a file that `write_file` had not finished when its process ended?"""
    return _LEFTOVER.fullmatch(name) is not None


class RealDisk(Disk):
    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._base = str(self.path)
        self._lock_fd = -1

    def _at(self, name: str) -> str:
        if name.startswith("/") or ".." in name.split("/") or "\0" in name:
            raise InvalidArgument(f"{name!r} is not a name inside {self.path}")
        return f"{self._base}/{name}" if name else self._base

    def open(self, name: str, *, create: bool = False) -> DiskFile:
        path = self._at(name)
        try:
            return RealFile(os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600), path)
        except OSError as error:
            raise from_os(error, f"open {path}") from error

    def exists(self, name: str) -> bool:
        return os.path.exists(self._at(name))

    def list(self, name: str = "") -> list[str]:
        path = self._at(name)
        with _typed(f"list {path}"):
            return sorted(os.listdir(path))

    def makedirs(self, name: str) -> None:
        path = Path(self._at(name))
        with _typed(f"make directory {path}"):
            missing: list[Path] = []
            while not path.is_dir():
                missing.append(path)
                path = path.parent
            # One that is there may have been made by a process that was killed before it could sync.
            with contextlib.suppress(PermissionError):
                _sync_directory(str(path.parent))
            for folder in reversed(missing):
                folder.mkdir(mode=0o700, exist_ok=True)
                _sync_directory(str(folder.parent))

    def rename(self, old: str, new: str) -> None:
        with _typed(f"rename {self._at(old)} to {new}"):
            os.rename(self._at(old), self._at(new))

    def unlink(self, name: str) -> None:
        with _typed(f"remove {self._at(name)}"):
            os.unlink(self._at(name))

    def remove_tree(self, name: str) -> None:
        path = self._at(name)
        with _typed(f"remove {path}"):
            if not os.path.lexists(path):
                return
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)
            _sync_directory(os.path.dirname(path))

    def sync_directory(self, name: str = "") -> None:
        path = self._at(name)
        with _typed(f"sync directory {path}"):
            _sync_directory(path)

    def read_file(self, name: str) -> bytes:
        path = self._at(name)
        with _typed(f"read {path}"), open(path, "rb") as file:
            return file.read()

    def write_file(self, name: str, data: bytes) -> None:
        path = self._at(name)
        temporary = f"{path}.{os.getpid()}-{threading.get_ident()}.tmp"
        with _typed(f"write {path}"):
            try:
                fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
                with open(fd, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(fd)
                os.rename(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
            _sync_directory(os.path.dirname(path))

    def space(self) -> tuple[int, int]:
        with _typed(f"statvfs {self.path}"):
            found = os.statvfs(self.path)
            return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize

    def lock(self) -> None:
        if self._lock_fd >= 0:
            return
        path = self._at("LOCK")
        with _typed(f"open {path}"):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            os.close(fd)
            who = f"process {holder}" if holder else "another process"
            raise DirectoryInUse(f"{self.path} is open in {who}: stop it first, or use another directory") from None
        except OSError as error:
            os.close(fd)
            raise from_os(error, f"lock {path}") from error
        self._lock_fd = fd
        try:
            with _typed(f"lock {path}"):
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
                self._tidy()
        except BaseException:
            self.close()
            raise

    def _tidy(self) -> None:
        """What a process left that was killed: halves of files that `write_file` was writing, and names that it had not synced."""
        for name in os.listdir(self.path):
            if is_leftover(name):
                os.unlink(self.path / name)
        _sync_directory(str(self.path))

    def open_map(self, name: str, *, size_bytes: int) -> OrderedMap:
        path = self._at(name)
        self.makedirs(name)
        if not os.path.exists(os.path.join(path, "data.mdb")):
            _make_map(path, size_bytes)
        # What a process wrote that was killed in a commit is in the page cache: who reads it acts on it, so it must not be lost any more.
        with _typed(f"sync index {path}"):
            _sync_file(os.path.join(path, "data.mdb"))
            _sync_directory(path)
        return LmdbMap(path, size_bytes)

    def close(self) -> None:
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


class _Readable(ReadableFile):
    """An open descriptor, as far as reading goes."""

    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self._path = path
        self._nowait = True

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        total = 0
        try:
            if len(buffers) == 1:  # hardly ever does this take a second call
                total = os.preadv(self._fd, buffers, offset)
                if total == buffers[0].nbytes:
                    return total
                rest = [buffers[0][total:]]
            else:
                rest = list(buffers)
            while rest:
                batch = rest[:_IOV_MAX]
                count = os.preadv(self._fd, batch, offset + total)
                total += count
                wanted = sum(part.nbytes for part in batch)
                if count == wanted:
                    del rest[:_IOV_MAX]
                elif count == 0:
                    break
                else:
                    rest = after(rest, count)
        except OSError as error:
            raise from_os(error, f"read {self._path}") from error
        return total

    def try_read_into(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        if not self._nowait or len(buffers) > _IOV_MAX:
            return None
        try:
            count = os.preadv(self._fd, buffers, offset, os.RWF_NOWAIT)
            wanted = buffers[0].nbytes if len(buffers) == 1 else sum([part.nbytes for part in buffers])
            if count == wanted or offset + count >= os.fstat(self._fd).st_size:
                return count
            return None
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                self._nowait = False
                return None
            raise from_os(error, f"read {self._path}") from error


class RealFile(_Readable, DiskFile):
    parallel = True

    def __init__(self, fd: int, path: str) -> None:
        super().__init__(fd, path)
        self._direct: _Readable | None = None
        self._direct_fd = -1

    def read_stored(self, buffer: memoryview, offset: int) -> int:
        if self._direct is None:
            try:
                self._direct_fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            except OSError:  # a file system without: what memory has must do
                self._direct = self
            else:
                self._direct = _Readable(self._direct_fd, self._path)
        try:
            return self._direct.read_into((buffer,), offset)
        except InvalidArgument:
            if self._direct is self:
                raise
            self._direct = self
            return self.read_into((buffer,), offset)

    def lend(self) -> int | None:
        with _typed(f"open {self._path}"):
            return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)

    def write(self, buffers: Sequence[bytes | bytearray | memoryview], offset: int) -> None:
        rest: list[Any] = list(buffers)
        try:
            while rest:
                batch = rest[:_IOV_MAX]
                count = os.pwritev(self._fd, batch, offset)
                offset += count
                if count == sum(len(part) for part in batch):
                    del rest[:_IOV_MAX]
                elif count == 0:
                    raise InputOutput(f"write {self._path}: the device takes no bytes")
                else:
                    rest = after([memoryview(part).cast("B") for part in rest], count)
        except OSError as error:
            raise from_os(error, f"write {self._path}") from error

    def allocate(self, offset: int, length: int) -> None:
        with _typed(f"allocate {self._path}"):
            os.posix_fallocate(self._fd, offset, length)

    def punch(self, offset: int, length: int) -> None:
        if length and _LIBC.fallocate(self._fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length) != 0:
            code = ctypes.get_errno()
            if code != errno.EOPNOTSUPP:
                raise from_os(OSError(code, os.strerror(code)), f"punch {self._path}")
            self._write_zeros(offset, length)  # this file system cannot give the space back; the bytes must still read as zeros

    def _write_zeros(self, offset: int, length: int) -> None:
        end = min(offset + length, self.size())
        zeros = bytes(1 << 20)
        while offset < end:
            step = min(len(zeros), end - offset)
            self.write([zeros[:step]], offset)
            offset += step

    def truncate(self, length: int) -> None:
        with _typed(f"truncate {self._path}"):
            os.ftruncate(self._fd, length)

    def size(self) -> int:
        with _typed(f"stat {self._path}"):
            return os.fstat(self._fd).st_size

    def sync(self) -> None:
        with _typed(f"sync {self._path}"):
            os.fdatasync(self._fd)

    def close(self) -> None:
        if self._direct_fd >= 0:
            os.close(self._direct_fd)
            self._direct, self._direct_fd = None, -1
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with _typed(f"close {self._path}"):
                os.close(fd)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


class RealLentFile(_Readable, LentFile):
    """Takes the descriptor over, also on failure. Refuses what is no file: reading it could wait for ever."""

    def __init__(self, fd: int, lender: str) -> None:
        super().__init__(fd, f"a file lent by {lender}")
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidArgument(f"{lender} lent a descriptor that is no file")

    def will_need(self, offset: int, length: int) -> None:
        with _typed(f"read ahead {self._path}"):
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def __del__(self) -> None:
        os.close(self._fd)


class LmdbMap(OrderedMap):
    """One LMDB environment. Its map is address space: a size far above what is ever stored costs nothing."""

    def __init__(self, path: str, size_bytes: int) -> None:
        self._path = path
        check_lmdb_file(os.path.join(path, "data.mdb"))
        with self._typed("open"):
            self._env = lmdb.open(path, map_size=size_bytes, subdir=True, max_readers=512, max_spare_txns=8, readahead=False, mode=0o600)

    def get(self, key: bytes) -> bytes | None:
        try:  # not `_typed`: this is called for every metadata read, and a context manager in Python costs twice the read
            with self._env.begin() as txn:
                found: bytes | None = txn.get(key)
                return found
        except lmdb.Error as error:
            raise self._translated(error, "read") from error

    def range(self, begin: bytes, end: bytes | None, *, limit: int = 0, reverse: bool = False) -> list[tuple[bytes, bytes]]:
        rows: list[tuple[bytes, bytes]] = []
        with self._typed("read"), self._env.begin() as txn, txn.cursor() as cursor:
            if not reverse:
                if not (cursor.set_range(begin) if begin else cursor.first()):
                    return rows
                for key, value in cursor.iternext(keys=True, values=True):
                    if end is not None and key >= end:
                        break
                    rows.append((key, value))
                    if len(rows) == limit:
                        break
                return rows
            if end is not None and cursor.set_range(end):
                if not cursor.prev():
                    return rows
            elif not cursor.last():
                return rows
            for key, value in cursor.iterprev(keys=True, values=True):
                if key < begin:
                    break
                rows.append((key, value))
                if len(rows) == limit:
                    break
        return rows

    def commit(self, writes: Mapping[bytes, bytes | None]) -> None:
        with self._typed("commit"), self._env.begin(write=True) as txn:
            for key in sorted(writes):
                value = writes[key]
                if value is None:
                    txn.delete(key)
                else:
                    txn.put(key, value)

    def check(self) -> Iterator[int]:
        # The pages of a snapshot stay as they are while a transaction reads it.
        with self._typed("check"), self._env.begin() as txn:
            yield from check_lmdb_snapshot(os.path.join(self._path, "data.mdb"), txn.id())

    def count(self) -> int:
        with self._typed("read"):
            return int(self._env.stat()["entries"])

    def close(self) -> None:
        self._env.close()

    @contextlib.contextmanager
    def _typed(self, what: str) -> Iterator[None]:
        try:
            yield
        except lmdb.Error as error:
            raise self._translated(error, what) from error

    def _translated(self, error: Any, what: str) -> KvfsError:
        if isinstance(error, _CORRUPT):
            return IndexCorrupt(f"{what} index {self._path}: damaged ({error}). {IndexCorrupt.ADVICE}")
        if isinstance(error, lmdb.MapFullError):
            return NoSpace(f"{what} index {self._path}: its configured size is full")
        if isinstance(error, lmdb.BadValsizeError):
            return InvalidArgument(f"{what} index {self._path}: {error}")
        return from_os(OSError(_lmdb_errno(error), str(error)), f"{what} index {self._path}")


def _make_map(path: str, size_bytes: int) -> None:
    """An empty map, under its name only when it is whole and synced: LMDB writes its first pages without a sync, and never syncs the file's name."""
    fresh = os.path.join(path, "data.mdb.new")
    with _typed(f"make index {path}"):
        for left in (fresh, fresh + "-lock"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(left)
        try:
            lmdb.open(fresh, map_size=size_bytes, subdir=False, mode=0o600).close()
        except lmdb.Error as error:
            raise from_os(OSError(_lmdb_errno(error), str(error)), f"make index {path}") from error
        _sync_file(fresh)
        os.rename(fresh, os.path.join(path, "data.mdb"))
        os.unlink(fresh + "-lock")


def _lmdb_errno(error: Any) -> int:
    if isinstance(error, lmdb.DiskError):
        return errno.ENOSPC if "space" in str(error).lower() else errno.EIO
    for code in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENOENT, errno.ENOMEM):
        if os.strerror(code) in str(error):
            return code
    return errno.EIO


def _sync_file(path: str) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_directory(path: str) -> None:
    fd = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _typed(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise from_os(error, what) from error
