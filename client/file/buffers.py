"""A part of a chunk that was written and is not yet acknowledged, with its checksums.

Invariant: a buffer holds one unbroken range of one chunk, exactly the bytes written: nothing is read to fill a chunk up, so that writers of disjoint
ranges in different clients never touch each other's bytes. Who may put bytes in, and when it is sent, is decided by dirty.py.
"""

from __future__ import annotations

from typing import Protocol

import trio

from kvfs.client.file.memory import Block
from kvfs.client.file.stretch import Stretch
from kvfs.client.placement import Placement
from kvfs.client.storage_writes import ChunkWrite, WriteDone
from kvfs.common.checksum import CHECKSUM_BYTES, CHECKSUM_UNIT_BYTES, checksums
from kvfs.common.errors import KvfsError


class Owner(Protocol):
    """What a buffer tells its file."""

    def written(self, buffer: ChunkBuffer, outcome: WriteDone | KvfsError) -> None: ...


class ChunkBuffer:
    """A range [start, end) of chunk `index`; `block` begins with the byte at `start`."""

    __slots__ = ("_checksums", "_hashed", "block", "born", "done", "end", "index", "owner", "placement", "sealed", "start", "stretch", "wanted")

    def __init__(self, owner: Owner, placement: Placement, index: int, start: int, block: Block, born: float) -> None:
        self.owner = owner
        self.placement = placement
        self.index = index
        self.start = start
        self.end = start
        self.block = block
        self.born = born
        self.sealed = False
        """On its way: no more bytes come in."""
        self.wanted = False
        """To be sent as soon as the chunk's buffer before it is acknowledged."""
        self.stretch: Stretch | None = None
        """Filled by a thread of its own for now."""
        self.done = trio.Event()
        self._checksums = bytearray()
        self._hashed = start
        """Up to here `_checksums` has the units."""

    @property
    def room(self) -> int:
        """Bytes that may follow."""
        return min(self.start + self.block.size, self.placement.chunk_size) - self.end

    def hash_whole_units(self) -> None:
        """While they are hot."""
        whole = self.end - self.end % CHECKSUM_UNIT_BYTES
        if whole > self._hashed:
            self._checksums += checksums(self.bytes(self._hashed, whole), self._hashed)
            self._hashed = whole

    def rewritten(self, start: int) -> None:
        """The bytes from `start` on are others now."""
        if start < self._hashed:
            self._hashed = max(self.start, start - start % CHECKSUM_UNIT_BYTES)
            fragments = 0 if self._hashed == self.start else self._hashed // CHECKSUM_UNIT_BYTES - self.start // CHECKSUM_UNIT_BYTES
            del self._checksums[fragments * CHECKSUM_BYTES :]

    @property
    def file_start(self) -> int:
        return self.index * self.placement.chunk_size + self.start

    @property
    def file_end(self) -> int:
        return self.index * self.placement.chunk_size + self.end

    def bytes(self, start: int, end: int) -> memoryview:
        """Bytes of the chunk, from offset to offset, all within the buffer's range."""
        return self.block.view[start - self.start : end - self.start]

    def operation(self) -> ChunkWrite:
        placement = self.placement
        length = self.end - self.start
        return ChunkWrite(
            placement.chain(self.index),
            placement.chunk(self.index),
            self.start,
            length,
            placement.chunk_size,
            self.block.part(0, length),
            checksums=bytes(self._checksums) + checksums(self.bytes(self._hashed, self.end), self._hashed),
        )
