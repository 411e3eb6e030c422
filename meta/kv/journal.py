"""The write-ahead journal's format: how a batch of commits becomes one record, and what a segment holds after a crash.

Owns bytes only; lmdb_engine.py owns the files. docs/format.md has the layout with a worked example.

A segment is a file of blocks. A record starts at a block and is padded with zeros to the end of its last one, so that no write ever touches a block
of an acknowledged record. One record holds one batch, written and synced alone: after power loss only the newest record can be torn. So a bad record
with a newer good one behind it is damage, not a torn tail, and is reported, never skipped.
Segments are used again without being erased: what is left of earlier use has lower versions, which is how it is told apart. The checksum is seeded
with a secret of the store, so that no value that a user stores can pass for a record.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import xxhash

from kvfs.common.errors import IndexCorrupt

BLOCK_BYTES: Final = 4096
MAGIC: Final = b"KVJ1"
_HEADER: Final = struct.Struct("<4sIQQI")
_CHECKSUM: Final = struct.Struct("<Q")
_HEADER_BYTES: Final = _HEADER.size + _CHECKSUM.size
_CHANGE: Final = struct.Struct("<HI")
_REMOVED: Final = 0xFFFFFFFF

Changes = Mapping[bytes, bytes | None]


@dataclass(frozen=True, slots=True)
class Record:
    """One batch: the changes that lead from version `previous` to `version`."""

    previous: int
    version: int
    payload: memoryview
    count: int

    def changes(self) -> Iterator[tuple[bytes, bytes | None]]:
        """Keys and values (None: removed) in commit order."""
        at = 0
        for _ in range(self.count):
            key_bytes, value_bytes = _CHANGE.unpack_from(self.payload, at)
            at += _CHANGE.size
            key = bytes(self.payload[at : at + key_bytes])
            at += key_bytes
            if value_bytes == _REMOVED:
                yield key, None
            else:
                yield key, bytes(self.payload[at : at + value_bytes])
                at += value_bytes


def encode_changes(changes: Changes) -> bytes:
    parts: list[bytes] = []
    for key, value in changes.items():
        if value is None:
            parts += (_CHANGE.pack(len(key), _REMOVED), key)
        else:
            parts += (_CHANGE.pack(len(key), len(value)), key, value)
    return b"".join(parts)


def encode_record(previous: int, version: int, count: int, payload: bytes, seed: int) -> bytes:
    """A whole number of blocks."""
    head = _HEADER.pack(MAGIC, len(payload), previous, version, count)
    padding = -(_HEADER_BYTES + len(payload)) % BLOCK_BYTES
    return b"".join((head, _CHECKSUM.pack(_checksum(head, payload, seed)), payload, bytes(padding)))


def read_segment(name: str, data: memoryview, base_version: int, seed: int) -> list[Record]:
    """The records of a segment that are newer than `base_version`, in order; the torn tail, if any, is left out."""
    records: list[Record] = []
    newest = 0
    at = 0
    while (record := _record_at(data, at, seed)) is not None and record.version > newest:
        newest = record.version
        if newest > base_version:
            records.append(record)
        at += _blocks(record) * BLOCK_BYTES
    torn_at = at
    for at in range(torn_at, len(data), BLOCK_BYTES):
        record = _record_at(data, at, seed)
        if record is not None and record.version > max(newest, base_version):
            raise IndexCorrupt(
                f"journal segment {name} is damaged at byte {torn_at}, whole commits follow. Nothing was changed; restore it from a copy"
            )
    return records


def replay(records: list[Record], base_version: int) -> tuple[int, dict[bytes, bytes | None]]:
    """The version that the journal leads to and the state of every key that changed since the base. The records come from all segments."""
    version = base_version
    changes: dict[bytes, bytes | None] = {}
    for record in sorted(records, key=lambda record: record.version):
        # The first record may start before the base (a checkpoint ends at any commit); its changes are whole states, so doing them again is harmless.
        if record.previous > version or (record.previous < version and version != base_version):
            raise IndexCorrupt(f"the journal lacks versions {version} to {record.previous}. Nothing was changed; restore this directory from a copy")
        changes.update(record.changes())
        version = record.version
    return version, changes


def _record_at(data: memoryview, at: int, seed: int) -> Record | None:
    if len(data) - at < _HEADER_BYTES or bytes(data[at : at + 4]) != MAGIC:
        return None
    head = data[at : at + _HEADER.size]
    _, length, previous, version, count = _HEADER.unpack(head)
    start = at + _HEADER_BYTES
    if length > len(data) - start:
        return None
    payload = data[start : start + length]
    (checksum,) = _CHECKSUM.unpack_from(data, at + _HEADER.size)
    if checksum != _checksum(head, payload, seed):
        return None
    return Record(previous, version, payload, count)


def _blocks(record: Record) -> int:
    return -(-(_HEADER_BYTES + len(record.payload)) // BLOCK_BYTES)


def _checksum(head: bytes | memoryview, payload: bytes | memoryview, seed: int) -> int:
    hasher = xxhash.xxh3_64(head, seed=seed)
    hasher.update(payload)
    return int(hasher.intdigest())
