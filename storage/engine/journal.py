"""The journal of a target: every change of the index, in order, as checksummed records in segment files (docs/format.md, "Journal record").

A record is a set of rows (key -> value, or removed) that take effect together. It is written without a sync: it survives the death of the
process; `sync` makes it survive power loss. Sequence numbers grow by one a record, over segments and restarts. A segment's name is the
sequence of its first record. Every record also says what was safe when it was written: `settled` (the data of all records below it was
synced) and `durable` (all records below it were synced themselves).

Replay stops at the first record that is not whole: what a power loss tears off was never synced. If a later record proves that the missing one
had been durable, that is damage and not a torn tail: IndexCorrupt, and nothing is touched.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from kvfs.common.boundary.disk import Disk, DiskFile
from kvfs.common.checksum import xxh3_64
from kvfs.common.errors import IndexCorrupt

FOLDER = "journal"
MAGIC = b"KVCJ"
_START = struct.Struct("<4sIQ")  # magic, bytes of the body, check: XXH3-64 of all that follows it (rest of the header and body)
_REST = struct.Struct("<QQQ")  # sequence, settled, durable
HEADER_BYTES = _START.size + _REST.size
_ROW = struct.Struct("<HI")  # key bytes, value bytes (REMOVED: the key is removed)
_REMOVED = 0xFFFFFFFF
_ALIGNMENT = 8
_PADDING = [bytes((-n) % _ALIGNMENT) for n in range(_ALIGNMENT)]
Rows = Mapping[bytes, bytes | None]


@dataclass(frozen=True, slots=True)
class Record:
    sequence: int
    settled: int
    durable: int
    rows: dict[bytes, bytes | None]


def encode_record(sequence: int, settled: int, durable: int, rows: Rows) -> bytes:
    parts = [_REST.pack(sequence, settled, durable)]
    for key, value in rows.items():
        if value is None:
            parts += (_ROW.pack(len(key), _REMOVED), key)
        else:
            parts += (_ROW.pack(len(key), len(value)), key, value)
    rest = b"".join(parts)
    return _START.pack(MAGIC, len(rest) - _REST.size, xxh3_64(rest)) + rest + _PADDING[len(rest) % _ALIGNMENT]


def decode_record(data: memoryview) -> tuple[Record, int] | None:
    """The record at the start of `data` and its size with padding; None: there is no whole record there."""
    if len(data) < HEADER_BYTES or data[:4] != MAGIC:
        return None
    _, length, check = _START.unpack_from(data)
    end = HEADER_BYTES + length
    if end > len(data) or check != xxh3_64(data[_START.size : end]):
        return None
    sequence, settled, durable = _REST.unpack_from(data, _START.size)
    rows: dict[bytes, bytes | None] = {}
    at = HEADER_BYTES
    while at < end:
        key_bytes, value_bytes = _ROW.unpack_from(data, at)
        at += _ROW.size
        key = bytes(data[at : at + key_bytes])
        at += key_bytes
        if value_bytes == _REMOVED:
            rows[key] = None
        else:
            rows[key] = bytes(data[at : at + value_bytes])
            at += value_bytes
    return Record(sequence, settled, durable, rows), end + (-end) % _ALIGNMENT


def segment_name(first_sequence: int) -> str:
    return f"{FOLDER}/{first_sequence:016x}"


def segments(disk: Disk) -> list[int]:
    """First sequences of the segments in the directory, in order."""
    if not disk.exists(FOLDER):
        return []
    found = []
    for name in disk.list(FOLDER):
        try:
            found.append(int(name, 16))
        except ValueError:
            continue  # not ours: left alone
    return sorted(found)


def replay(disk: Disk, floor: int) -> tuple[list[Record], int]:
    """The records from `floor` on, where a segment begins, in order up to the first that is not whole, and the sequence that follows. Reads only.

    Older segments are not looked at: the index map has what they hold, and of one that a killed process left, only a part may have survived a loss
    of power since: replayed, it would take chunks back in time.
    """
    records: list[Record] = []
    expected = 0
    for first in segments(disk):
        if first < floor:
            continue
        data = memoryview(disk.read_file(segment_name(first)))
        at = 0
        # A segment that does not go on where the one before ended is what a torn tail leaves: only searched for proof of damage.
        if first == expected or not expected:
            expected = first
            while (found := decode_record(data[at:])) is not None and found[0].sequence == expected:
                records.append(found[0])
                at += found[1]
                expected += 1
        if _proves_durable(data[at:], expected):
            raise IndexCorrupt(f"record {expected} of the target's journal is damaged, though it had been synced. {IndexCorrupt.ADVICE}")
    return records, expected or floor


def remove_segments_behind(disk: Disk, next_sequence: int) -> None:
    """Remove what lies behind a torn tail: it must not follow new records in a later replay."""
    for first in segments(disk):
        if first > next_sequence:
            _remove_segment(disk, first)


def _remove_segment(disk: Disk, first: int) -> None:
    """Durably, one at a time and the oldest first: what is left of a journal must be an end of it, or a replay would go back in time."""
    disk.unlink(segment_name(first))
    disk.sync_directory(FOLDER)


def _proves_durable(data: memoryview, sequence: int) -> bool:
    """Whether a whole record anywhere in these bytes says that record `sequence` had been synced."""
    raw = bytes(data)
    at = raw.find(MAGIC)
    while at >= 0:
        found = decode_record(data[at:])
        if found is not None and found[0].durable > sequence:
            return True
        at = raw.find(MAGIC, at + len(MAGIC))
    return False


class Journal:
    """The writing end. Calls come under the engine's lock, but for `sync` and `remove_before`."""

    def __init__(self, disk: Disk, next_sequence: int, segment_bytes: int) -> None:
        self._disk = disk
        self._segment_bytes = segment_bytes
        self.next_sequence = next_sequence
        self.position = 0
        self._file: DiskFile
        self._first = 0
        self._closed: list[tuple[int, DiskFile]] = []
        """Full segments that are still needed: (first sequence, file)."""
        disk.makedirs(FOLDER)
        self._start_segment()

    def append(self, rows: Rows, settled: int, durable: int) -> int:
        """Write a record; its sequence. On an error nothing has happened: the next record goes to the same place."""
        sequence = self.next_sequence
        record = encode_record(sequence, settled, durable, rows)
        self._file.write((record,), self.position)
        self.position += len(record)
        self.next_sequence = sequence + 1
        return sequence

    def rotate(self) -> int:
        """Further records go to a new segment; its first sequence. Nothing happens when the segment is empty."""
        if self.position:
            old = (self._first, self._file)
            self._start_segment()
            self._closed.append(old)
        return self._first

    def _start_segment(self) -> None:
        name = segment_name(self.next_sequence)
        file = self._disk.open(name, create=True)
        # Allocated ahead, so that a record does not meet a full disk: a removal must work then.
        file.truncate(0)
        file.allocate(0, self._segment_bytes)
        self._disk.sync_directory(FOLDER)
        self._file, self._first, self.position = file, self.next_sequence, 0

    def files(self) -> list[DiskFile]:
        """The files whose sync makes all records so far durable. Under the engine's lock; sync them without it."""
        return [*(file for _, file in self._closed), self._file]

    def starts(self) -> list[int]:
        """First sequences of the segments that are still needed, in order."""
        return [*(start for start, _ in self._closed), self._first]

    def remove_before(self, first: int) -> None:
        """The index has everything of the segments before the one that starts at `first`."""
        kept = []
        for start, file in self._closed:
            if start < first:
                file.close()
            else:
                kept.append((start, file))
        self._closed = kept
        for start in segments(self._disk):
            if start < first:
                _remove_segment(self._disk, start)

    def close(self) -> None:
        for _, file in self._closed:
            file.close()
        self._closed.clear()
        self._file.close()
