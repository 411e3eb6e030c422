"""3FS's user-space I/O for Python, over a kvfs mount: the same names, arguments and errors as hf3fs_fuse.io of 3FS.

Open files through the mount, `register_fd` them, make an iovec over shared memory and an ioring, then prepare, submit, wait: the bytes go between the
storage services and the memory through kvfs's native client, past FUSE. Invariants: results come in the order of prepare; an I/O that `wait` gave up
touches nothing any more, and its late answer is never taken for another's; every failure of a call is an OSError with 3FS's errno, every failure of
an I/O is its negative result.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.shared_memory import SharedMemory
from typing import Any

from hf3fs_fuse import files, memory
from hf3fs_fuse.clusters import client_of, mount_over
from hf3fs_fuse.memory import iovec
from kvfs.fuse.kernel import MountEntry

__all__ = [
    "IorPriority",
    "deregister_fd",
    "extract_mount_point",
    "force_fsync",
    "hardlink",
    "ioring",
    "iovec",
    "make_ioring",
    "make_iovec",
    "punch_hole",
    "read_file",
    "register_fd",
]

PUNCH_RANGES_MAX = 1000
ALLOW_READ_UNCOMMITTED = 1
FORBID_READ_HOLES = 2
ENTRY_BYTES = 128


class IorPriority:
    """Accepted; all rings are served alike."""

    HIGH = -1
    NORMAL = 0
    LOW = 1


# --- files and mounts ----------------------------------------------------------------------------------------------------------------------


def extract_mount_point(path: str) -> str | None:
    """Where the kvfs that holds `path` is mounted, as /proc/self/mountinfo has it; None: it is on no kvfs."""
    mount = mount_over(path)
    return None if mount is None else mount.mount_point


def register_fd(fd: int, flags: int = 0) -> None:
    """Let rings read and write the file of a descriptor, as it was opened. EINVAL: it is registered; EBADF: it is not of a kvfs mount."""
    files.register(fd)


def deregister_fd(fd: int) -> None:
    """Before os.close(fd): waits for what rings do with it, and makes the length that they wrote known. Nothing if it is not registered."""
    files.deregister(fd)


def force_fsync(fd: int) -> int:
    """What was written survives power loss, and stat() shows the true length. Gives 0."""
    file = files.registered(fd)
    if file is not None:
        file.fsync()
    os.fsync(fd)
    return 0


def hardlink(target: str, link_name: str) -> None:
    os.link(target, link_name)


def punch_hole(filename_or_fd: str | os.PathLike[str] | int, start: Sequence[int], end: Sequence[int], flags: int = 0) -> None:
    """Ranges [start[i], end[i]) read as zeros and take no space: whole chunks, at most 1000 ranges, else EINVAL."""
    if len(start) != len(end) or len(start) > PUNCH_RANGES_MAX or flags:
        raise OSError(errno.EINVAL, f"punch_hole takes as many ends as starts, at most {PUNCH_RANGES_MAX}, and no flags")
    if not isinstance(filename_or_fd, int):
        fd = os.open(filename_or_fd, os.O_RDWR)
        try:
            punch_hole(fd, start, end)
        finally:
            os.close(fd)
        return
    entry = files.describe(filename_or_fd)
    if entry.access == os.O_RDONLY:
        raise OSError(errno.EBADF, f"file descriptor {filename_or_fd} is not open for writing")
    with files.open_native(filename_or_fd, entry) as file:
        for first, stop in zip(start, end, strict=True):
            file.punch(first, stop)


# --- memory and rings ----------------------------------------------------------------------------------------------------------------------


def make_iovec(shm: SharedMemory, hf3fs_mount_point: str, block_size: int = 0, numa: int = -1) -> iovec:
    """Memory for rings, over all of `shm`, which may be unlinked right after. `block_size` and `numa` have no effect."""
    if block_size < 0:
        raise OSError(errno.EINVAL, f"a block size of {block_size}")
    _mounted(hf3fs_mount_point)
    return memory.over(shm)


def make_ioring(
    hf3fs_mount_point: str,
    entries: int,
    for_read: bool = True,
    io_depth: int = 0,
    priority: int | None = None,
    timeout: int | None = None,
    numa: int = -1,
    flags: int = 0,
) -> ioring:
    """A ring for reads or for writes. `io_depth`: 0 issues all that is submitted, N above 0 in batches of exactly N (at most `timeout` ms are waited
    for a full one, if given), below 0 in batches of at most -N. `flags`: 2 makes reading a hole an error (-ENODATA)."""
    if priority not in (None, IorPriority.HIGH, IorPriority.NORMAL, IorPriority.LOW):
        raise OSError(errno.EINVAL, f"there is no priority {priority}")
    if flags & ~(ALLOW_READ_UNCOMMITTED | FORBID_READ_HOLES):
        raise OSError(errno.EINVAL, f"unknown flags {flags:#x}")
    return ioring(_mounted(hf3fs_mount_point), entries, for_read, io_depth, timeout, bool(flags & FORBID_READ_HOLES))


def _mounted(mount_point: str) -> MountEntry:
    mount = mount_over(mount_point)
    if mount is None or os.path.realpath(mount_point) != mount.mount_point:
        raise OSError(errno.EINVAL, f"{mount_point} is not where a kvfs is mounted")
    return mount


class ioring:
    """Made by make_ioring. One thread may prepare and submit while another waits."""

    def __init__(self, mount: MountEntry, entries: int, for_read: bool, io_depth: int, timeout_ms: int | None, forbid_holes: bool) -> None:
        self._source = mount.source
        self._ring = client_of(mount).make_ring(
            entries,
            for_read=bool(for_read),
            io_depth=io_depth,
            timeout_s=None if timeout_ms is None else timeout_ms / 1000,
            forbid_holes=forbid_holes,
        )

    @staticmethod
    def size_for_entries(entries: int) -> int:
        """What 3FS would want of shared memory for a ring; this one takes none."""
        return entries * ENTRY_BYTES

    @property
    def entries(self) -> int:
        return self._ring.entries

    def prepare(self, iov: iovec, read: bool, fd: int, off: int, userdata: Any = None) -> ioring:
        """All of `iov`, to or from the file at `off`. EINVAL: `read` is not what the ring is for, or no bytes; EBADF: not registered; EACCES: not
        opened for that; EAGAIN: `entries` are under way."""
        if not isinstance(iov, iovec):
            raise TypeError(f"a {type(iov).__name__} is not an iovec")
        if bool(read) != self._ring.for_read:
            raise OSError(errno.EINVAL, f"the ring is for {'reads' if self._ring.for_read else 'writes'}")
        entry = files.find(fd)
        if entry.access == (os.O_WRONLY if read else os.O_RDONLY):
            raise OSError(errno.EACCES, f"file descriptor {fd} is not open for {'reading' if read else 'writing'}")
        if entry.source != self._source:
            raise OSError(errno.EINVAL, f"file descriptor {fd} is of another cluster than the ring")
        assert entry.file is not None
        self._ring.prepare(iov.view, entry.file, off, userdata=(iov, userdata))
        return self

    def submit(self) -> ioring:
        self._ring.submit()
        return self

    def wait(self, *, max_results: int = 0, min_results: int = 0, timeout: timedelta | None = None) -> list[iovec]:
        """Parts of memory with `result`, in the order of prepare: at least `min_results`, at most `max_results` (or `min_results`, or one). When the
        time is over, those waited for are too: their result is -ETIMEDOUT, and they may be prepared anew."""
        done = self._ring.wait(max_results=max_results, min_results=min_results, timeout=None if timeout is None else timeout.total_seconds())
        if len(done) < min_results:
            done += self._ring.retire(min_results - len(done))
        found = []
        for each in done:
            iov, userdata = each.userdata
            part = iov[:]
            part.result, part.userdata = each.result, userdata
            found.append(part)
        return found


def read_file(
    fn: str | os.PathLike[str],
    hf3fs_mount_point: str | None = None,
    block_size: int = 1 << 30,
    off: int = 0,
    priority: int | None = None,
    cb: Callable[[memoryview, int], Any] | None = None,
) -> bytes | None:
    """A file from `off` on. With `cb`, None: it is called with each block and its offset; an int from it is where to go on, something true ends."""
    fd = os.open(fn, os.O_RDONLY)
    try:
        entry = files.describe(fd)
        with files.open_native(fd, entry) as file:
            ring = file.client.make_ring(1)
            parts: list[bytes] = []
            with file.client.register(max(1, min(block_size, file.length - off))) as buffer:
                while True:
                    [done] = ring.prepare(buffer.span(), file, off).submit().wait(min_results=1)
                    if done.result < 0:
                        raise OSError(-done.result, os.strerror(-done.result), os.fspath(fn))
                    if not done.result:
                        break
                    block = buffer.view[: done.result]
                    if cb is None:
                        parts.append(bytes(block))
                    else:
                        answer = cb(block, off)
                        if type(answer) is int:
                            off = answer
                            continue
                        if answer:
                            break
                    off += done.result
            return None if cb is not None else b"".join(parts)
    finally:
        os.close(fd)
