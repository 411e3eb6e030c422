"""Making the content of a new version: which bytes go where, and the checksums of its units. No lock is held here.

Rules:
- a write behind everything stored, into a block with room that no older version needs there, goes in place; every other write goes to a new
  block (copy-on-write), with the bytes around it copied;
- whole units keep the checksum that came with the bytes; copied units keep the one they had (so damage stays visible); a unit that is made
  of old and new bytes gets a fresh one, after its old bytes were verified;
- bytes that no one wrote are zeros: inside the block between old end and new write they are written, behind `stored` they are implied.
The bytes that come in are verified before they are used, by `check`; or, a large chunk that comes whole to the last of a chain, beside the write of
them, by another thread where one is free. The caller keeps the bytes unchanged until the call returns.
"""

from __future__ import annotations

import threading
from functools import lru_cache, partial

from kvfs.common.boundary.disk import DiskFile
from kvfs.common.checksum import CHECKSUM_BYTES, CHECKSUM_UNIT_BYTES, checksums, xxh3_64
from kvfs.common.errors import ChecksumMismatch, InvalidArgument
from kvfs.common.helpers import helpers
from kvfs.storage.engine.chunk import EMPTY, Content, units_of
from kvfs.storage.engine.classes import BLOCK_ALIGNMENT_BYTES, LARGEST_BLOCK_BYTES, Block, block_bytes_for
from kvfs.storage.engine.files import DataFiles
from kvfs.storage.engine.requests import Update, UpdateKind

_UNIT = CHECKSUM_UNIT_BYTES
_COPY_BYTES = 1 << 20
LARGE_BYTES = 1 << 20
PIECE_BYTES = 512 << 10
"""Of a large chunk: whole units."""
ZEROS = memoryview(bytes(_COPY_BYTES))
_local = threading.local()


@lru_cache(maxsize=512)
def zero_checksum(length: int) -> bytes:
    """Of that many zeros (at most a unit), as it stands in a list."""
    return xxh3_64(ZEROS[:length]).to_bytes(CHECKSUM_BYTES, "little")


def fill_zeros(view: memoryview) -> None:
    for at in range(0, len(view), _COPY_BYTES):
        part = view[at : at + _COPY_BYTES]
        part[:] = ZEROS[: len(part)]


def _copy_buffer() -> memoryview:
    """1 MiB per thread, kept: making it anew costs more than the copy."""
    buffer: memoryview | None = getattr(_local, "copy", None)
    if buffer is None:
        buffer = _local.copy = memoryview(bytearray(_COPY_BYTES))
    return buffer


def check(update: Update) -> None:
    """Limits of what came in, and its checksums if it is not large: `make` looks at those. InvalidArgument, ChecksumMismatch."""
    kind = update.kind
    if len(update.chunk_id) != 24:
        raise InvalidArgument(f"a chunk id has 24 bytes, not {len(update.chunk_id)}")
    if kind == UpdateKind.REMOVE:
        return
    end = update.offset + update.length
    limit = min(update.chunk_size, LARGEST_BLOCK_BYTES)
    if kind != UpdateKind.WRITE and update.offset:
        raise InvalidArgument(f"a {kind.name} has no offset, this one has {update.offset}")
    if update.offset < 0 or update.length < 0 or end > limit:
        raise InvalidArgument(f"an update of bytes {update.offset}..{end} in a chunk of at most {limit}")
    if update.slab_bytes % BLOCK_ALIGNMENT_BYTES or (update.slab_bytes and not end <= update.slab_bytes <= LARGEST_BLOCK_BYTES):
        raise InvalidArgument(f"{end} bytes in a block of {update.slab_bytes}: it must hold them, in a multiple of {BLOCK_ALIGNMENT_BYTES}")
    if kind == UpdateKind.TRUNCATE:
        return
    if update.data is None or len(update.data) != update.length or (kind == UpdateKind.WRITE and not update.length):
        raise InvalidArgument(f"an update of {update.length} bytes came with {0 if update.data is None else len(update.data)}")
    if update.damaged and (kind != UpdateKind.REPLACE or len(update.checksums) != units_of(update.length) * CHECKSUM_BYTES):
        raise InvalidArgument("damaged bytes are copied whole, with a checksum for each unit")
    if update.length < LARGE_BYTES and not update.damaged:
        _verify(update)


def _verify(update: Update) -> None:
    assert update.data is not None
    if checksums(update.data, update.offset) != update.checksums:
        raise _mismatch(update)


def _mismatch(update: Update) -> ChecksumMismatch:
    end = update.offset + update.length
    return ChecksumMismatch(f"bytes {update.offset}..{end} of chunk {update.chunk_id.hex()} do not have the checksums they came with")


def _write_verified(file: DiskFile, update: Update, data: memoryview, start: int) -> None:
    """Write a whole chunk to `start` of the file. On an error, also ChecksumMismatch, some of it was written, where nobody looks yet.

    In one call: a file takes one write at a time, and the kernel puts a large one in large pages."""
    sums = update.checksums
    wrong: list[int] = []

    def look(at: int) -> None:
        part = data[at : at + PIECE_BYTES]
        first = at // _UNIT * CHECKSUM_BYTES
        if not wrong and checksums(part) != sums[first : first + -(-len(part) // _UNIT) * CHECKSUM_BYTES]:
            wrong.append(at)

    pieces = [partial(look, at) for at in range(0, len(data), PIECE_BYTES)]
    if len(sums) != -(-len(data) // _UNIT) * CHECKSUM_BYTES:
        raise _mismatch(update)
    beside = update.waited_for and file.parallel
    if beside:
        helpers().beside(partial(file.write, (data,), start), pieces)
    else:
        for piece in pieces:
            piece()
    if wrong:
        raise _mismatch(update)
    if not beside:
        file.write((data,), start)


def new_block_bytes(old: Content, update: Update) -> int:
    """The class of the block that the update needs; 0: none, it leaves the bytes alone or goes in place."""
    if update.kind == UpdateKind.WRITE:
        end = update.offset + update.length
        block = old.block
        if block is not None and not old.sealed and update.offset >= old.stored and end <= block.block_bytes:
            return 0
        return update.slab_bytes or block_bytes_for(max(end, old.stored))
    return update.slab_bytes or block_bytes_for(update.length) if update.kind == UpdateKind.REPLACE and update.length else 0


class ContentWriter:
    def __init__(self, files: DataFiles) -> None:
        self._files = files

    def make(self, old: Content, update: Update, new_block: Block | None) -> Content:
        """The content after `update`, its bytes written. `new_block` as `new_block_bytes` says."""
        if update.kind == UpdateKind.REMOVE:
            return EMPTY
        if update.kind == UpdateKind.TRUNCATE:
            return self._resize(old, update.length)
        data = update.data
        assert data is not None
        offset, end = update.offset, update.offset + update.length
        if update.kind == UpdateKind.REPLACE and new_block is None:
            return EMPTY
        if update.kind == UpdateKind.REPLACE or (not offset and end >= old.length):
            # A whole chunk: nothing old is left. (Never in place: stored bytes are never written over.)
            assert new_block is not None
            file = self._file(new_block)
            if update.length < LARGE_BYTES or update.damaged:
                file.write((data,), new_block.start)
            else:
                _write_verified(file, update, data, new_block.start)
            return Content(end, end, new_block, update.checksums, False)
        if update.length >= LARGE_BYTES:
            _verify(update)
        length = max(old.length, end)
        sums, edges = self._merge(old, update, length)
        pieces: list[memoryview] = []
        at = offset
        for start, view in edges:
            # The edge units as they were hashed: their part of the new bytes comes from our own copy.
            low, high = max(start, offset), min(start + len(view), end)
            if low > at:
                pieces.append(data[at - offset : low - offset])
            pieces.append(view[low - start : high - start])
            at = high
        if at < end:
            pieces.append(data[at - offset :])
        if new_block is None:
            block = old.block
            assert block is not None
            self._file(block).write([*_zeros(offset - old.stored), *pieces], block.start + old.stored)
            return Content(length, end, block, sums, False)
        self._copy_around(old, new_block, offset, end, pieces)
        return Content(length, max(old.stored, end), new_block, sums, False)

    def _file(self, block: Block) -> DiskFile:
        return self._files.get(block.block_bytes, block.file)

    # --- truncate ---

    def _resize(self, old: Content, length: int) -> Content:
        if length == old.length:
            return old
        shared = min(length, old.length)
        whole = shared // _UNIT
        sums = old.checksums[: whole * CHECKSUM_BYTES]
        start = whole * _UNIT
        if start < shared:
            unit = self.old_unit(old, whole, memoryview(bytearray(_UNIT)))
            end = min(start + _UNIT, length)
            sums += xxh3_64(unit[: end - start]).to_bytes(CHECKSUM_BYTES, "little")
            start = end
        if start < length:
            units, rest = divmod(length - start, _UNIT)
            sums += zero_checksum(_UNIT) * units + (zero_checksum(rest) if rest else b"")
        stored = min(old.stored, length)
        if not stored:
            return Content(length, 0, None, sums, False)
        return Content(length, stored, old.block, sums, old.sealed or stored < old.stored)

    # --- write ---

    def _merge(self, old: Content, update: Update, length: int) -> tuple[bytes, list[tuple[int, memoryview]]]:
        """The checksum list after a write, and the units made of old and new bytes: (start, bytes)."""
        data = update.data
        assert data is not None
        offset, end = update.offset, update.offset + update.length
        first, last = min(offset, old.length) // _UNIT, (end - 1) // _UNIT
        data_first = offset // _UNIT
        sums = [old.checksums[: first * CHECKSUM_BYTES]]
        edges: list[tuple[int, memoryview]] = []
        unit = first
        while unit <= last:
            start = unit * _UNIT
            stop = min(start + _UNIT, length)
            low, high = max(offset, start), min(end, stop)
            if low == start and high == stop:
                # All units between the edges are whole: take their checksums at once.
                run = (last + 1 if end == length else end // _UNIT) - unit
                sums.append(update.checksums[(unit - data_first) * CHECKSUM_BYTES : (unit - data_first + run) * CHECKSUM_BYTES])
                unit += run
                continue
            if low >= high and start >= old.length:
                sums.append(zero_checksum(_UNIT))
            else:
                view = memoryview(bytearray(_UNIT))  # zeros, where neither old nor new bytes are
                if start < old.length:
                    self.old_unit(old, unit, view)
                if low < high:
                    view[low - start : high - start] = data[low - offset : high - offset]
                    edges.append((start, view[: stop - start]))
                sums.append(xxh3_64(view[: stop - start]).to_bytes(CHECKSUM_BYTES, "little"))
            unit += 1
        sums.append(old.checksums[(last + 1) * CHECKSUM_BYTES :])
        return b"".join(sums), edges

    def old_unit(self, old: Content, unit: int, view: memoryview) -> memoryview:
        """Unit `unit` of a content, placed at the start of `view` (zeros before the call) and verified; ChecksumMismatch."""
        start = unit * _UNIT
        stored = min(old.stored, start + _UNIT) - start
        if stored > 0:
            block = old.block
            assert block is not None
            self._file(block).read_into((view[:stored],), block.start + start)
        bytes_of_unit = view[: min(old.length, start + _UNIT) - start]
        if xxh3_64(bytes_of_unit).to_bytes(CHECKSUM_BYTES, "little") != old.checksums[unit * CHECKSUM_BYTES : (unit + 1) * CHECKSUM_BYTES]:
            raise ChecksumMismatch(f"unit {unit} in {old.block} is damaged: the bytes beside it cannot be changed before it is repaired")
        return view

    def _copy_around(self, old: Content, new_block: Block, offset: int, end: int, pieces: list[memoryview]) -> None:
        """Write the new block: old bytes before the write, the write, old bytes behind it. Small chunks in one call."""
        target = self._file(new_block)
        before = min(offset, old.stored)
        zeros = _zeros(offset - before)
        behind = max(0, old.stored - end)
        if before + behind <= _COPY_BYTES:
            buffer = _copy_buffer()
            head, tail = buffer[:before], buffer[before : before + behind]
            self._read_old(old, 0, head)
            self._read_old(old, end, tail)
            target.write([part for part in (head, *zeros, *pieces, tail) if len(part)], new_block.start)
            return
        self._copy(old, new_block, 0, before)
        target.write([*zeros, *pieces], new_block.start + before)
        self._copy(old, new_block, end, end + behind)

    def _copy(self, old: Content, new_block: Block, start: int, end: int) -> None:
        target = self._file(new_block)
        buffer = _copy_buffer()
        for at in range(start, end, _COPY_BYTES):
            part = buffer[: min(_COPY_BYTES, end - at)]
            self._read_old(old, at, part)
            target.write((part,), new_block.start + at)

    def _read_old(self, old: Content, at: int, view: memoryview) -> None:
        if len(view):
            block = old.block
            assert block is not None
            if self._file(block).read_into((view,), block.start + at) != len(view):
                raise ChecksumMismatch(f"{block} ends before its chunk: the data file was cut")


def _zeros(length: int) -> list[memoryview]:
    return [ZEROS[: min(_COPY_BYTES, length - at)] for at in range(0, length, _COPY_BYTES)]
