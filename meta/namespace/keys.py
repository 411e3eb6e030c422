"""The keys of the namespace in the KV store: four letters that name the record, then big-endian numbers, then bytes.

Owns every key layout of the namespace (docs/format.md repeats them). Invariants: numbers are big-endian, so that the order of keys is the order
of numbers; a variable part (a name) only ever comes last, so that no key of one record kind is a prefix of another owner's range.
This module must never read or write the store.
"""

from __future__ import annotations

from struct import Struct

_U64 = Struct(">Q")
_U64X2 = Struct(">QQ")
_U32 = Struct(">I")

INODE = b"INOD"
"""INOD inode -> the inode."""
ENTRY = b"DENT"
"""DENT parent name -> inode and type."""
DIRECTORY_TIMES = b"DTIM"
"""DTIM directory -> mtime and ctime from changes of its entries: written blind, so that creations in one directory do not conflict."""
DIRECTORY_LINKS = b"DLNK"
"""DLNK directory -> its link count, changed by mkdir, rmdir and renames of directories only."""
XATTR = b"XATR"
"""XATR inode name -> value."""
SESSION = b"SESS"
"""SESS inode session -> client: a file that is open."""
REQUEST = b"IDEM"
"""IDEM period request -> the reply of a change that was applied: a retry is answered with it."""
GARBAGE = b"GCQU"
"""GCQU due-time inode -> kind: to be freed."""
CUT = b"TRNC"
"""TRNC inode -> length: chunks above it are to be cut before the file may be cut again."""
GENERAL = b"META"
"""META name -> value: format version, inode allocator, period of request records."""

FORMAT = GENERAL + b"format"
NEXT_INODE = GENERAL + b"next-inode"
PERIOD = GENERAL + b"request-period"


def inode(number: int) -> bytes:
    return INODE + _U64.pack(number)


def entry(parent: int, name: bytes) -> bytes:
    return ENTRY + _U64.pack(parent) + name


def entries(parent: int) -> tuple[bytes, bytes]:
    """The range of one directory's entries."""
    return ENTRY + _U64.pack(parent), ENTRY + _U64.pack(parent + 1)


def directory_times(number: int) -> bytes:
    return DIRECTORY_TIMES + _U64.pack(number)


def directory_links(number: int) -> bytes:
    return DIRECTORY_LINKS + _U64.pack(number)


def xattr(number: int, name: bytes) -> bytes:
    return XATTR + _U64.pack(number) + name


def xattrs(number: int) -> tuple[bytes, bytes]:
    return XATTR + _U64.pack(number), XATTR + _U64.pack(number + 1)


def session(number: int, name: bytes) -> bytes:
    return SESSION + _U64.pack(number) + name


def sessions(number: int) -> tuple[bytes, bytes]:
    return SESSION + _U64.pack(number), SESSION + _U64.pack(number + 1)


def request(period: int, request_id: bytes) -> bytes:
    return REQUEST + _U32.pack(period) + request_id


def garbage(due_ns: int, number: int) -> bytes:
    return GARBAGE + _U64X2.pack(due_ns, number)


def cut(number: int) -> bytes:
    return CUT + _U64.pack(number)


def span(kind: bytes) -> tuple[bytes, bytes]:
    """The range of all records of one kind."""
    return kind, kind[:-1] + bytes([kind[-1] + 1])


def owner(key: bytes) -> int:
    """The number that follows the kind: inode, parent, directory."""
    return int(_U64.unpack_from(key, 4)[0])


def tail(key: bytes) -> bytes:
    """What follows kind and number: a name or a session."""
    return key[12:]


def garbage_parts(key: bytes) -> tuple[int, int]:
    """Due time and inode of a GCQU key."""
    due_ns, number = _U64X2.unpack_from(key, 4)
    return int(due_ns), int(number)
