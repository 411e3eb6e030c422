"""Stored bytes of single chunks against their checksums, and the right bytes put back where wrong ones lie: what a scrub does to a target's data.

Reads past the page cache where the disk can, so that it sees what a restart would see and takes no memory from readers. Invariants: only bytes
that have the checksum which the index has for them are ever written, and only where the committed version says they belong; the block is pinned
meanwhile, so it is nobody else's. So a repair changes no version, length, checksum or place: neither the chain nor a reader can tell it from a disk
that was never damaged, and a torn one leaves damage where damage was. Bytes before `stored` never change while a chunk holds the block: no lock of
the chunk is needed.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from kvfs.common.checksum import CHECKSUM_BYTES, CHECKSUM_UNIT_BYTES, checksums, xxh3_64
from kvfs.common.errors import InputOutput
from kvfs.common.values import value
from kvfs.storage.engine.chunk import Content
from kvfs.storage.engine.classes import BLOCK_ALIGNMENT_BYTES
from kvfs.storage.engine.content import ZEROS
from kvfs.storage.engine.files import DataFiles
from kvfs.storage.engine.ledger import Ledger

_UNIT = CHECKSUM_UNIT_BYTES
_PART_BYTES = 1 << 20
_local = threading.local()


@value
class Inspection:
    """Of the committed version of a chunk."""

    chunk_id: bytes
    version: int
    length: int
    stored: int
    """Bytes that were read."""
    damaged: tuple[int, ...]
    """Units whose bytes do not have their checksum, or could not be read."""


def inspect(ledger: Ledger, chunk_id: bytes) -> Inspection | None:
    """Read all of a chunk's committed version. None: there is none."""
    with _committed(ledger, chunk_id) as found:
        if found is None:
            return None
        version, content = found
        return Inspection(chunk_id, version, content.length, content.stored, tuple(_damaged(ledger.files, content)))


def repair(ledger: Ledger, chunk_id: bytes, units: Mapping[int, memoryview]) -> list[int]:
    """Write these units (number -> its bytes up to the chunk's end) where they belong, synced, and read them again. The units that are right now.
    Bytes that do not have the chunk's checksum are left out: they are of another version. An error of the disk is raised."""
    with _committed(ledger, chunk_id) as found:
        if found is None:
            return []
        _, content = found
        block = content.block
        if block is None:
            return []
        file = ledger.files.get(block.block_bytes, block.file)
        written = []
        for unit, data in units.items():
            start = unit * _UNIT
            if start >= content.stored or xxh3_64(data) != _checksum(content, unit):
                continue
            file.write((data[: min(len(data), content.stored - start)],), block.start + start)
            written.append(unit)
        if not written:
            return []
        file.sync()
        return [unit for unit in written if _unit_whole(ledger.files, content, unit)]


@contextmanager
def _committed(ledger: Ledger, chunk_id: bytes) -> Iterator[tuple[int, Content] | None]:
    """(version, content), its block held."""
    with ledger.lock:
        meta = ledger.lookup(chunk_id)
        if meta is not None and meta.content.block is not None:
            ledger.allocator.pin(meta.content.block)
    if meta is None or not meta.version:
        yield None
        return
    try:
        yield meta.version, meta.content
    finally:
        if meta.content.block is not None:
            with ledger.lock:
                ledger.allocator.unpin(meta.content.block)


def _checksum(content: Content, unit: int) -> int:
    at = unit * CHECKSUM_BYTES
    return int.from_bytes(content.checksums[at : at + CHECKSUM_BYTES], "little")


def _damaged(files: DataFiles, content: Content) -> Iterator[int]:
    buffer = _buffer()
    for start in range(0, content.length, _PART_BYTES):
        part = buffer[: min(_PART_BYTES, content.length - start)]
        first = start // _UNIT
        try:
            whole = _fill(files, content, start, part)
        except InputOutput:  # a place that cannot be read: which one, is found unit by unit
            last = -(-(start + len(part)) // _UNIT)
            yield from (unit for unit in range(first, last) if not _unit_whole(files, content, unit))
            continue
        sums = checksums(part) if whole else b""
        expected = content.checksums[first * CHECKSUM_BYTES : first * CHECKSUM_BYTES + -(-len(part) // _UNIT) * CHECKSUM_BYTES]
        if sums != expected:
            for at in range(0, len(expected), CHECKSUM_BYTES):
                if sums[at : at + CHECKSUM_BYTES] != expected[at : at + CHECKSUM_BYTES]:
                    yield first + at // CHECKSUM_BYTES


def _unit_whole(files: DataFiles, content: Content, unit: int) -> bool:
    start = unit * _UNIT
    view = _buffer()[: min(_UNIT, content.length - start)]
    try:
        return _fill(files, content, start, view) and xxh3_64(view) == _checksum(content, unit)
    except InputOutput:
        return False


def _fill(files: DataFiles, content: Content, start: int, view: memoryview) -> bool:
    """The content from `start` into the view, a part of the buffer. False: the data file ends before."""
    stored = max(0, min(len(view), content.stored - start))
    if stored:
        block = content.block
        assert block is not None
        rounded = -(-stored // BLOCK_ALIGNMENT_BYTES) * BLOCK_ALIGNMENT_BYTES
        if files.get(block.block_bytes, block.file).read_stored(_buffer()[:rounded], block.start + start) < stored:
            return False
    for at in range(stored, len(view), len(ZEROS)):
        part = view[at : at + len(ZEROS)]
        part[:] = ZEROS[: len(part)]
    return True


def _buffer() -> memoryview:
    """Of this thread; it begins at a page of memory."""
    buffer: memoryview | None = getattr(_local, "buffer", None)
    if buffer is None:
        buffer = _local.buffer = memoryview(mmap.mmap(-1, _PART_BYTES))
    return buffer
