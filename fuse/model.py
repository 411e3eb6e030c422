"""What the file system operations take and give, in plain types: no protocol here, and no kernel.

Invariant: `Attributes.mode` is the whole st_mode (type and permissions), so that whoever calls needs no table of types.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass

from kvfs.common.wire import meta_pb2 as pb

BLOCK_BYTES = 512
"""The unit of st_blocks, whatever the block size of the file system is."""

TYPE_BITS: dict[pb.InodeType, int] = {
    pb.FILE: stat.S_IFREG,
    pb.DIRECTORY: stat.S_IFDIR,
    pb.SYMLINK: stat.S_IFLNK,
    pb.FIFO: stat.S_IFIFO,
    pb.SOCKET: stat.S_IFSOCK,
    pb.CHAR_DEVICE: stat.S_IFCHR,
    pb.BLOCK_DEVICE: stat.S_IFBLK,
}

TYPE_OF_BITS: dict[int, pb.InodeType] = {bits: number for number, bits in TYPE_BITS.items()}


@dataclass(frozen=True, slots=True)
class Caller:
    """The process that made the system call. Its supplementary groups are looked up by pid, only when they matter."""

    uid: int
    gid: int
    pid: int = 0


@dataclass(slots=True)
class Attributes:
    inode: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    length: int
    blocks: int
    """Of 512 bytes, really stored."""
    block_size: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    lease_s: float
    """How long the kernel may trust these; 0: it must ask each time."""
    entry_lease_s: float = 0.0
    """How long the kernel may trust that the name under which these were found stands for this inode."""


@dataclass(frozen=True, slots=True)
class Changes:
    """The fields of a setattr that are set; None leaves alone."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    length: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    times_are_now: bool = False
    """The times that are set are the present: whoever may write the file may set those, and only its owner any other."""


@dataclass(frozen=True, slots=True)
class Opened:
    handle: int
    keep_cache: bool
    """The kernel's cached pages of the file are still true."""
    direct_io: bool
    """The kernel must not cache pages of this handle."""
    flush: bool
    """close(2) has something to wait for."""


@dataclass(frozen=True, slots=True)
class Statistics:
    block_size: int
    blocks: int
    blocks_free: int
    files: int
    files_free: int
    name_max: int = 255
