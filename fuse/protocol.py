"""The kernel's FUSE protocol, version 7: numbers, and the shapes of messages as precompiled structs (linux/fuse.h is the reference).

A request on /dev/fuse is an IN_HEADER and what the operation adds to it; an answer is an OUT_HEADER and what the operation adds. All numbers
are in the machine's own byte order, and every struct has its padding spelt out. `entry_reply` and `attribute_reply` pack header and body in
one step: they are most of what a mount answers.
This module must never do I/O and never decide: it only knows how things look.
"""

from __future__ import annotations

import errno
from enum import IntEnum, IntFlag
from struct import Struct

from kvfs.fuse.model import Attributes

VERSION_MAJOR = 7
VERSION_MINOR = 45
"""The newest minor version that these structs were compared with (Linux 6.18)."""
VERSION_MINOR_OLDEST = 31
"""Linux 5.4: below it, structs had other sizes."""

PAGE_BYTES = 4096
REQUEST_BYTES_MAX = 1 << 20
"""Of data in one READ or WRITE."""
REQUEST_PAGES_MAX = REQUEST_BYTES_MAX // PAGE_BYTES + 1
"""As many pages as a program's buffer of that size lies on when it does not begin with a page: without the last one the kernel sends two requests for
most of what is written in pieces of 1 MiB."""


class Op(IntEnum):
    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47


class Init(IntFlag):
    """Flags of INIT; those from bit 32 on travel in `flags2`."""

    ASYNC_READ = 1 << 0
    ATOMIC_O_TRUNC = 1 << 3
    EXPORT_SUPPORT = 1 << 4
    BIG_WRITES = 1 << 5
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    INIT_EXT = 1 << 30
    HAS_EXPIRE_ONLY = 1 << 35


class Notify(IntEnum):
    INVAL_INODE = 2
    INVAL_ENTRY = 3
    INC_EPOCH = 8


INC_EPOCH_MINOR = 44
"""The minor version from which on the kernel knows Notify.INC_EPOCH."""
EXPIRE_ONLY = 1
"""Flag of INVAL_ENTRY: the entry is asked for again at its next use, and stays if it is still the same."""


# Flags in the answer to OPEN and CREATE.
DIRECT_IO = 1 << 0
KEEP_CACHE = 1 << 1
NOFLUSH = 1 << 5
"""close(2) is not told of: there is nothing to flush."""


class Set(IntEnum):
    """Flags: which fields of SETATTR count."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    HANDLE = 1 << 6
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8


IN_HEADER = Struct("=IIQQIIIHH")
"""length, opcode, unique, node, uid, gid, pid, extensions in 8 bytes, padding."""
OUT_HEADER = Struct("=IiQ")
"""length, minus errno, unique. In a notification: length, code, 0."""
HEADER_BYTES = IN_HEADER.size
OUT_HEADER_BYTES = OUT_HEADER.size

INIT_IN = Struct("=IIII")
"""major, minor, max_readahead, flags; with INIT_EXT follows:"""
INIT_FLAGS2_IN = Struct("=I")
INIT_OUT = Struct("=IIIIHHIIHHIIH22x")
"""major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time granularity, max_pages, map alignment, flags2,
max_stack_depth, request_timeout."""

SETATTR_IN = Struct("=IIQQQqqqIIIIIIII")
"""valid, padding, handle, size, lock owner, atime, mtime, ctime, their nanoseconds, mode, unused, uid, gid, unused."""
MKNOD_IN = Struct("=IIII")
MKDIR_IN = Struct("=II")
NODE_IN = Struct("=Q")
"""RENAME: the new directory. LINK: the inode that gets a name."""
RENAME2_IN = Struct("=QII")
OPEN_IN = Struct("=II")
CREATE_IN = Struct("=IIII")
HANDLE_IN = Struct("=QII")
"""handle, flags of the operation: RELEASE, FSYNC, FLUSH."""
READ_IN = Struct("=QQIIQII")
WRITE_IN = READ_IN
"""handle, offset, size, flags of the operation, lock owner, open flags, padding."""
SETXATTR_IN = Struct("=II")
GETXATTR_IN = Struct("=II")
ACCESS_IN = Struct("=II")
INTERRUPT_IN = Struct("=Q")
FORGET_IN = Struct("=Q")
BATCH_FORGET_IN = Struct("=II")
FORGET_ONE = Struct("=QQ")

OPEN_OUT = Struct("=QII")
"""handle, flags, backing id."""
WRITE_OUT = Struct("=II")
GETXATTR_OUT = Struct("=II")
STATFS_OUT = Struct("=QQQQQIII4x24x")
"""blocks, free, available, files, files free, block size, name length, fragment size."""
DIRENT = Struct("=QQII")
"""inode, position behind it, length of the name, type; then the name, padded to 8 bytes."""

_ATTRIBUTES = "QQQqqqIIIIIIIIII"
"""inode, size, blocks, atime, mtime, ctime, their nanoseconds, mode, nlink, uid, gid, rdev, block size, flags."""
_ENTRY = "QQQQII"
"""node, generation, seconds of the name and of the attributes, their nanoseconds."""
ENTRY_OUT = Struct("=" + _ENTRY + _ATTRIBUTES)
ATTRIBUTES_OUT = Struct("=" + "QII" + _ATTRIBUTES)
_ENTRY_REPLY = Struct("=IiQ" + _ENTRY + _ATTRIBUTES)
_ATTRIBUTE_REPLY = Struct("=IiQ" + "QII" + _ATTRIBUTES)

INVAL_INODE_OUT = Struct("=IiQ" + "Qqq")
INVAL_ENTRY_OUT = Struct("=IiQ" + "QII")

SECOND_NS = 1_000_000_000


def pack_entry(entry: Attributes) -> bytes:
    """The body of what answers LOOKUP and all that makes an entry."""
    name_s, name_ns = _split(entry.entry_lease_s)
    lease_s, lease_ns = _split(entry.lease_s)
    return ENTRY_OUT.pack(entry.inode, 0, name_s, lease_s, name_ns, lease_ns, *_fields(entry))


def entry_reply(unique: int, entry: Attributes) -> bytes:
    """A whole answer."""
    name_s, name_ns = _split(entry.entry_lease_s)
    lease_s, lease_ns = _split(entry.lease_s)
    return _ENTRY_REPLY.pack(_ENTRY_REPLY.size, 0, unique, entry.inode, 0, name_s, lease_s, name_ns, lease_ns, *_fields(entry))


def pack_attributes(shown: Attributes) -> bytes:
    """The body of what answers GETATTR and SETATTR."""
    lease_s, lease_ns = _split(shown.lease_s)
    return ATTRIBUTES_OUT.pack(lease_s, lease_ns, 0, *_fields(shown))


def attribute_reply(unique: int, attributes: Attributes) -> bytes:
    """A whole answer."""
    lease_s, lease_ns = _split(attributes.lease_s)
    return _ATTRIBUTE_REPLY.pack(_ATTRIBUTE_REPLY.size, 0, unique, lease_s, lease_ns, 0, *_fields(attributes))


def absent_reply(unique: int, lease_s: float) -> bytes:
    """A whole answer."""
    return error_reply(unique, errno.ENOENT) if lease_s <= 0 else reply(unique, pack_absent(lease_s))


def pack_absent(lease_s: float) -> bytes:
    """The body of an answer to LOOKUP: surely no such entry, for that long."""
    seconds, nanoseconds = _split(lease_s)
    return ENTRY_OUT.pack(0, 0, seconds, 0, nanoseconds, 0, *[0] * 16)


def reply(unique: int, body: bytes) -> bytes:
    return OUT_HEADER.pack(OUT_HEADER_BYTES + len(body), 0, unique) + body


def error_reply(unique: int, number: int) -> bytes:
    return OUT_HEADER.pack(OUT_HEADER_BYTES, -number, unique)


def inval_inode(inode: int, *, attributes_only: bool) -> bytes:
    return INVAL_INODE_OUT.pack(INVAL_INODE_OUT.size, Notify.INVAL_INODE, 0, inode, -1 if attributes_only else 0, 0)


def inval_entry(parent: int, name: bytes, *, expire_only: bool) -> bytes:
    size = INVAL_ENTRY_OUT.size + len(name) + 1
    return INVAL_ENTRY_OUT.pack(size, Notify.INVAL_ENTRY, 0, parent, len(name), EXPIRE_ONLY if expire_only else 0) + name + b"\0"


def inc_epoch() -> bytes:
    return OUT_HEADER.pack(OUT_HEADER_BYTES, Notify.INC_EPOCH, 0)


def pack_dirent(inode: int, mode: int, name: bytes, position: int) -> bytes:
    """One record of READDIR."""
    return DIRENT.pack(inode, position, len(name), mode >> 12) + name + bytes(-len(name) % 8)


NO_ENTRY = bytes(ENTRY_OUT.size)
"""In front of a record of READDIRPLUS: nothing is said about the entry but its name."""


def _split(lease_s: float) -> tuple[int, int]:
    if lease_s <= 0:
        return 0, 0
    whole = int(lease_s)
    return whole, int((lease_s - whole) * SECOND_NS)


def _fields(shown: Attributes) -> tuple[int, ...]:
    atime_ns, mtime_ns, ctime_ns = shown.atime_ns, shown.mtime_ns, shown.ctime_ns
    return (
        shown.inode,
        shown.length,
        shown.blocks,
        atime_ns // SECOND_NS,
        mtime_ns // SECOND_NS,
        ctime_ns // SECOND_NS,
        atime_ns % SECOND_NS,
        mtime_ns % SECOND_NS,
        ctime_ns % SECOND_NS,
        shown.mode,
        shown.nlink,
        shown.uid,
        shown.gid,
        shown.rdev,
        shown.block_size,
        0,
    )


CAN_BE_GIVEN_UP = frozenset({Op.LOOKUP, Op.GETATTR, Op.READLINK, Op.READ, Op.STATFS, Op.GETXATTR, Op.LISTXATTR, Op.READDIR, Op.READDIRPLUS, Op.FSYNC})
"""Operations that may end in the middle with EINTR: they change nothing."""

ANSWERLESS = frozenset({Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT, Op.NOTIFY_REPLY})

NOT_OFFERED = errno.ENOSYS
"""The kernel does not ask again, and does without."""
