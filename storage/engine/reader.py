"""Reading a content: bytes into the caller's memory, checksums beside them. No lock is held here; the caller pins the block.

Whole units go straight into the caller's memory and keep their stored checksum: the reader at the far end verifies them. Units of which
only a part is asked go through a buffer of ours, are verified here, and the part gets a fresh checksum (over our copy: the caller's memory
may be shared with a client that writes into it).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from kvfs.common.checksum import CHECKSUM_BYTES, CHECKSUM_UNIT_BYTES, checksums, xxh3_64
from kvfs.common.errors import ChecksumMismatch
from kvfs.storage.engine.chunk import Content
from kvfs.storage.engine.content import fill_zeros
from kvfs.storage.engine.files import DataFiles
from kvfs.storage.engine.requests import Place

_UNIT = CHECKSUM_UNIT_BYTES
_local = threading.local()


def _edge_buffers() -> tuple[memoryview, memoryview]:
    buffers: tuple[memoryview, memoryview] | None = getattr(_local, "edges", None)
    if buffers is None:
        buffers = _local.edges = (memoryview(bytearray(_UNIT)), memoryview(bytearray(_UNIT)))
    return buffers


def read_content(files: DataFiles, content: Content, offset: int, end: int, into: memoryview, nowait: bool, what: bytes) -> bytes | None:
    """Place [offset, end) (not empty, inside the content) at the start of `into`; the checksums of its fragments. None: would block."""
    first, last = offset // _UNIT, (end - 1) // _UNIT
    first_start, last_start = first * _UNIT, last * _UNIT
    last_end = min(last_start + _UNIT, content.length)
    head_whole = offset == first_start and (end == last_end if first == last else True)
    tail_whole = end == last_end
    head_buffer, tail_buffer = _edge_buffers()
    buffers: list[memoryview] = []
    if first == last and not (head_whole and tail_whole):
        head = head_buffer[: last_end - first_start]
        if not _fill(files, content, first_start, [head], nowait):
            return None
        _verify_unit(content, first, head, what)
        wanted = head[offset - first_start : end - first_start]
        into[: end - offset] = wanted
        return xxh3_64(wanted).to_bytes(CHECKSUM_BYTES, "little")
    if not head_whole:
        buffers.append(head_buffer)
    middle_start = first_start if head_whole else first_start + _UNIT
    middle_end = end if tail_whole else last_start
    if middle_start < middle_end:
        buffers.append(into[middle_start - offset : middle_end - offset])
    if not tail_whole:
        buffers.append(tail_buffer[: last_end - last_start])
    if not _fill(files, content, first_start, buffers, nowait):
        return None
    sums = content.checksums[middle_start // _UNIT * CHECKSUM_BYTES : -(-middle_end // _UNIT) * CHECKSUM_BYTES]
    if not head_whole:
        _verify_unit(content, first, head_buffer, what)
        part = head_buffer[offset - first_start :]
        into[: len(part)] = part
        sums = xxh3_64(part).to_bytes(CHECKSUM_BYTES, "little") + sums
    if not tail_whole:
        _verify_unit(content, last, buffers[-1], what)
        part = tail_buffer[: end - last_start]
        into[last_start - offset : end - offset] = part
        sums += xxh3_64(part).to_bytes(CHECKSUM_BYTES, "little")
    return sums


def place_of(files: DataFiles, content: Content, offset: int, length: int, version: int, pending_version: int) -> Place:
    """Where the units of [offset, offset + length) lie, as far as the content goes."""
    block = content.block
    if offset == 0 and content.stored == content.length <= length and block is not None:  # a whole block: hundreds are asked for at once
        file = files.get(block.block_bytes, block.file)
        return Place(content.length, content.checksums, version, content.length, pending_version, file, block.start, content.length)
    end = min(offset + length, content.length)
    if offset >= end:
        return Place(0, b"", version, content.length, pending_version, None, 0, 0)
    first, behind = offset // _UNIT, -(-end // _UNIT)
    start = first * _UNIT
    sums = content.checksums[first * CHECKSUM_BYTES : behind * CHECKSUM_BYTES]
    stored = min(behind * _UNIT, content.stored) - start
    if block is None or stored <= 0:
        return Place(end - offset, sums, version, content.length, pending_version, None, 0, 0)
    file = files.get(block.block_bytes, block.file)
    return Place(end - offset, sums, version, content.length, pending_version, file, block.start + start, stored)


def _verify_unit(content: Content, unit: int, view: memoryview, what: bytes) -> None:
    if xxh3_64(view).to_bytes(CHECKSUM_BYTES, "little") != content.checksums[unit * CHECKSUM_BYTES : (unit + 1) * CHECKSUM_BYTES]:
        raise ChecksumMismatch(f"unit {unit} of chunk {what.hex()} in {content.block} does not have its checksum: read another replica")


def _fill(files: DataFiles, content: Content, start: int, buffers: list[memoryview], nowait: bool) -> bool:
    """Fill the buffers with the content from `start`. False: nowait and it would block."""
    total = sum(map(len, buffers))
    stored = content.stored - start
    if stored < total:
        buffers, implied = _split(buffers, max(0, stored))
        for view in implied:
            fill_zeros(view)
        total = max(0, stored)
    if not total:
        return True
    block = content.block
    assert block is not None
    file = files.get(block.block_bytes, block.file)
    count = file.try_read_into(buffers, block.start + start) if nowait else file.read_into(buffers, block.start + start)
    if count is None:
        return False
    if count != total:
        raise ChecksumMismatch(f"{block} ends before its chunk: the data file was cut; read another replica")
    return True


def _split(buffers: list[memoryview], at: int) -> tuple[list[memoryview], list[memoryview]]:
    """The first `at` bytes of the buffers, and the rest."""
    before, after = [], []
    for view in buffers:
        if at >= len(view):
            before.append(view)
        elif at <= 0:
            after.append(view)
        else:
            before.append(view[:at])
            after.append(view[at:])
        at -= len(view)
    return before, after


def damaged_units(files: DataFiles, content: Content) -> Iterator[int]:
    """Units whose stored bytes do not have their checksum (implied zeros included). Reads everything, a megabyte at a time."""
    buffer = memoryview(bytearray(1 << 20))
    for start in range(0, content.length, len(buffer)):
        part = buffer[: min(len(buffer), content.length - start)]
        try:
            _fill(files, content, start, [part], False)
        except ChecksumMismatch:
            yield start // _UNIT
            return
        first = start // _UNIT * CHECKSUM_BYTES
        found = checksums(part, 0)
        expected = content.checksums[first : first + len(found)]
        if found != expected:
            for at in range(0, len(found), CHECKSUM_BYTES):
                if found[at : at + CHECKSUM_BYTES] != expected[at : at + CHECKSUM_BYTES]:
                    yield (first + at) // CHECKSUM_BYTES
