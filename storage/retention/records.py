"""The records of a target's retention log (docs/format.md, "Retention log"): touch times, spaces and counters, as bytes. Pure.

A file is a header and records, in the order in which things happened: the last word on a block or a space counts. Invariants: a record that is not
whole is never believed; one that is followed by a whole record is damage, otherwise it is a tail that a crash tore off. The log is advice about order
and counters: which blocks there are is said by the chunk index alone.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from kvfs.common.checksum import xxh3_64
from kvfs.common.errors import FormatTooNew, IndexCorrupt
from kvfs.common.ids import DIGEST_BYTES
from kvfs.storage.retention.table import COUNTERS, Counts, Policy

MAGIC = b"kvfs-ret"
FORMAT = 1
_HEADER = struct.Struct("<8sII")  # magic, format, low 32 bits of XXH3-64 of the 12 bytes before
HEADER_BYTES = _HEADER.size
_RECORD = b"KVRT"
_START = struct.Struct("<4sIQ")  # magic, bytes of the body, XXH3-64 of all behind this field
_REST = struct.Struct("<B7xQ")  # kind, inode
_BODY_AT = _START.size + _REST.size
_TOUCH = struct.Struct(f"<{DIGEST_BYTES}sQ")  # digest, touched_ms
_SPACE = struct.Struct(f"<IIQQQ{len(COUNTERS)}Q")  # block bytes, 0, quota, ttl, version, counters
TOUCHES, SPACE, FORGOTTEN = 1, 2, 3
TOUCHES_A_RECORD = 16_384
TOUCH_BYTES = _TOUCH.size
_ALIGNMENT = 8
_MAX_BODY_BYTES = TOUCHES_A_RECORD * _TOUCH.size


def header() -> bytes:
    start = _HEADER.pack(MAGIC, FORMAT, 0)[:12]
    return start + (xxh3_64(start) & 0xFFFFFFFF).to_bytes(4, "little")


def _record(kind: int, inode: int, body: bytes = b"") -> bytes:
    rest = _REST.pack(kind, inode) + body
    return _START.pack(_RECORD, len(body), xxh3_64(rest)) + rest + bytes(-len(body) % _ALIGNMENT)


def touches(inode: int, touched: Iterable[tuple[bytes, int]]) -> Iterator[bytes]:
    """Records of (digest, touched_ms), in the order of the touches."""
    entries = [_TOUCH.pack(digest, at_ms) for digest, at_ms in touched]
    for first in range(0, len(entries), TOUCHES_A_RECORD):
        yield _record(TOUCHES, inode, b"".join(entries[first : first + TOUCHES_A_RECORD]))


def space(inode: int, policy: Policy, counts: tuple[int, ...]) -> bytes:
    return _record(SPACE, inode, _SPACE.pack(policy.block_bytes, 0, policy.quota_bytes, policy.ttl_ms, policy.version, *counts))


def forgotten(inode: int) -> bytes:
    return _record(FORGOTTEN, inode)


@dataclass(slots=True)
class Told:
    """What a log says of one space."""

    policy: Policy = field(default_factory=Policy)
    counts: Counts = field(default_factory=Counts)
    touched: dict[bytes, int] = field(default_factory=dict)
    """digest -> touched_ms, in the order of the last touches."""


@dataclass(slots=True)
class Replay:
    spaces: dict[int, Told]
    end: int
    """Where the next record goes; 0: there is no file to go on with."""
    problem: IndexCorrupt | None
    """The log is damaged: `spaces` has what its whole records say, and it must be written anew."""


def replay(data: bytes) -> Replay:
    """What the file says. Raises FormatTooNew."""
    spaces: dict[int, Told] = {}
    if not data:
        return Replay(spaces, 0, None)
    at = HEADER_BYTES
    problem = _check_header(data)
    if problem is not None:
        at = _next_whole(data, 0) or len(data)
    while at < len(data):
        end = _whole(data, at)
        if end:
            _take(spaces, data[at:end])
            at = end
            continue
        behind = _next_whole(data, at)
        if not behind:
            break
        problem = problem or IndexCorrupt(f"the retention log is damaged at byte {at}: touches since then may be lost, no block is")
        at = behind
    return Replay(spaces, 0 if problem is not None else min(at, len(data)), problem)


def _check_header(data: bytes) -> IndexCorrupt | None:
    if len(data) >= HEADER_BYTES:
        magic, form, check = _HEADER.unpack_from(data)
        if magic == MAGIC and check == xxh3_64(data[:12]) & 0xFFFFFFFF:
            if form > FORMAT:
                raise FormatTooNew(f"the retention log has format {form}, this version of kvfs knows {FORMAT}: upgrade; nothing was touched")
            return None
    return IndexCorrupt("the retention log has no header: the order of its blocks is taken from the chunk index")


def _whole(data: bytes, at: int) -> int:
    """Where the record at `at` ends; 0: there is no whole one."""
    if len(data) - at < _BODY_AT or data[at : at + 4] != _RECORD:
        return 0
    length: int
    _, length, check = _START.unpack_from(data, at)
    end = at + _BODY_AT + length
    if length > _MAX_BODY_BYTES or end > len(data) or xxh3_64(memoryview(data)[at + _START.size : end]) != check:
        return 0
    return min(end + -length % _ALIGNMENT, len(data))


def _next_whole(data: bytes, at: int) -> int:
    """Of the first whole record behind `at`; 0: there is none."""
    found = data.find(_RECORD, at + 1)
    while found >= 0:
        if _whole(data, found):
            return found
        found = data.find(_RECORD, found + 1)
    return 0


def _take(spaces: dict[int, Told], record: bytes) -> None:
    _, length, _ = _START.unpack_from(record)
    kind, inode = _REST.unpack_from(record, _START.size)
    body = record[_BODY_AT : _BODY_AT + length]
    if kind == FORGOTTEN:
        spaces.pop(inode, None)
        return
    told = spaces.setdefault(inode, Told())
    if kind == TOUCHES and length % _TOUCH.size == 0:
        touched = told.touched
        for digest, at_ms in _TOUCH.iter_unpack(body):
            touched.pop(digest, None)
            touched[digest] = at_ms
    elif kind == SPACE and length == _SPACE.size:
        block_bytes, _, quota_bytes, ttl_ms, version, *counts = _SPACE.unpack(body)
        told.policy = Policy(block_bytes, quota_bytes, ttl_ms, version)
        told.counts = Counts(*counts)


def snapshot(spaces: Mapping[int, tuple[Policy, tuple[int, ...], list[tuple[bytes, int]]]]) -> bytes:
    """A whole file: for each space its policy, counters and blocks, least recently touched first."""
    parts = [header()]
    for inode, (policy, counts, blocks) in spaces.items():
        parts.append(space(inode, policy, counts))
        parts += touches(inode, blocks)
    return b"".join(parts)
