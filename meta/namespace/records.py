"""What the namespace stores: records and their bytes.

Every record begins with one byte, the version of its format; a version that this module does not know raises FormatTooNew and nothing is changed.
An inode is the wire message Inode with the fields that belong to a reply (writers, attr_lease_ms) left out; the other records are fixed structs.
This module must never read or write the store.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct

from kvfs.common.errors import FormatTooNew
from kvfs.common.wire import meta_pb2 as pb

FORMAT_VERSION = 1
"""Of the store as a whole (META format)."""
_V1 = b"\x01"

_ENTRY = Struct(">BQB")
_TIMES = Struct(">Bqq")
_LINKS = Struct(">BI")
_SESSION = Struct(">BBq16s")
_GARBAGE = Struct(">BB")
_CUT = Struct(">BQQ")
_TAKEN = Struct(">I16s")
"""Behind _CUT, unless nobody has taken it up."""
_TURN_BITS = 24
_U64 = Struct(">Q")

FILE_GARBAGE = 1
"""A file without a name: its chunks, then itself."""
TREE_GARBAGE = 2
"""A directory cut off by a recursive removal: what is below it, then itself."""
SPACE_GARBAGE = 3
"""A dropped KV-cache space: its blocks, then once more as SWEPT_SPACE_GARBAGE."""
SWEPT_SPACE_GARBAGE = 4
"""A dropped space whose blocks were removed once: those that a client put meanwhile, then itself."""
SWEPT_FILE_GARBAGE = 5
"""A file of a writer that was thought dead, whose chunks were removed once: what that one wrote meanwhile, then itself."""


@dataclass(frozen=True, slots=True)
class Entry:
    inode: int
    type: int


@dataclass(frozen=True, slots=True)
class Session:
    client_id: bytes
    write: bool
    opened_ns: int


@dataclass(frozen=True, slots=True)
class Cut:
    """A truncation whose chunks may still be there."""

    length: int
    truncate_version: int
    tries: int = 0
    """How often it was taken up."""
    taker: bytes = b""
    """Which run of a service did so last; empty: none."""

    @property
    def turn(self) -> int:
        """Of two tries at truncations of one file the later one has the greater turn."""
        return self.truncate_version << _TURN_BITS | min(self.tries, (1 << _TURN_BITS) - 1)


def _check(version: int, what: str) -> None:
    if version != 1:
        raise FormatTooNew(f"{what} record of format {version}: this kvfs knows formats up to 1; upgrade it")


def encode_inode(inode: pb.Inode) -> bytes:
    inode.ClearField("writers")
    inode.ClearField("attr_lease_ms")
    return _V1 + inode.SerializeToString()


def decode_inode(data: bytes) -> pb.Inode:
    if data[0] != 1:
        _check(data[0], "inode")
    return pb.Inode.FromString(data[1:])


def decode_inode_into(inode: pb.Inode, data: bytes) -> None:
    if data[0] != 1:
        _check(data[0], "inode")
    inode.MergeFromString(data[1:])


def encode_entry(inode: int, kind: int) -> bytes:
    return _ENTRY.pack(1, inode, kind)


def decode_entry(data: bytes) -> Entry:
    version, inode, kind = _ENTRY.unpack_from(data)
    if version != 1:
        _check(version, "entry")
    return Entry(inode, kind)


def encode_times(mtime_ns: int, ctime_ns: int) -> bytes:
    return _TIMES.pack(1, mtime_ns, ctime_ns)


def decode_times(data: bytes) -> tuple[int, int]:
    version, mtime_ns, ctime_ns = _TIMES.unpack_from(data)
    _check(version, "directory times")
    return mtime_ns, ctime_ns


def encode_links(nlink: int) -> bytes:
    return _LINKS.pack(1, nlink)


def decode_links(data: bytes) -> int:
    version, nlink = _LINKS.unpack_from(data)
    _check(version, "directory links")
    return int(nlink)


def encode_session(session: Session) -> bytes:
    return _SESSION.pack(1, 1 if session.write else 0, session.opened_ns, session.client_id)


def decode_session(data: bytes) -> Session:
    version, write, opened_ns, client_id = _SESSION.unpack_from(data)
    _check(version, "session")
    return Session(client_id, bool(write), opened_ns)


def encode_garbage(kind: int) -> bytes:
    return _GARBAGE.pack(1, kind)


def decode_garbage(data: bytes) -> int:
    version, kind = _GARBAGE.unpack_from(data)
    _check(version, "garbage")
    return int(kind)


def encode_cut(cut: Cut) -> bytes:
    return _CUT.pack(1, cut.length, cut.truncate_version) + (_TAKEN.pack(cut.tries, cut.taker) if cut.tries else b"")


def decode_cut(data: bytes) -> Cut:
    version, length, truncate_version = _CUT.unpack_from(data)
    _check(version, "truncation")
    tries, taker = _TAKEN.unpack_from(data, _CUT.size) if len(data) > _CUT.size else (0, b"")
    return Cut(length, truncate_version, tries, taker)


def encode_number(number: int) -> bytes:
    return _V1 + _U64.pack(number)


def decode_number(data: bytes) -> int:
    _check(data[0], "number")
    return int(_U64.unpack_from(data, 1)[0])
