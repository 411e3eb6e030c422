"""From a range of a file to ranges of chunks.

Owns the rule of layout: chunk i of a file lies on chain `chain_ids[i % len(chain_ids)]`. Pure functions; no other place of the client
computes a chain.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvfs.common.errors import InputOutput, InvalidArgument
from kvfs.common.ids import CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, ChunkId
from kvfs.common.wire import meta_pb2 as pb

MAX_FILE_BYTES = (1 << 63) - 1


@dataclass(slots=True)
class Piece:
    """`length` bytes of chunk `index` from `offset`, which are the bytes of the range from `start`."""

    index: int
    offset: int
    length: int
    start: int


@dataclass(frozen=True, slots=True)
class Placement:
    """A file's layout, unpacked once: the message's fields are slow to read."""

    inode: int
    chunk_size: int
    chain_ids: tuple[int, ...]
    prefix: bytes
    """First half of every chunk id."""

    @classmethod
    def of(cls, inode: pb.Inode) -> Placement:
        layout = inode.layout
        if not layout.chain_ids or layout.chunk_size <= 0:
            raise InputOutput(f"inode {inode.inode} has no layout: it is not a file with content")
        if not CHUNK_BYTES_MIN <= layout.chunk_size <= CHUNK_BYTES_MAX:
            # Whoever answers a byte makes a write of a megabyte a million writes.
            raise InputOutput(f"inode {inode.inode} is said to have chunks of {layout.chunk_size} bytes: {CHUNK_BYTES_MIN} to {CHUNK_BYTES_MAX}")
        return cls(inode.inode, layout.chunk_size, tuple(layout.chain_ids), inode.inode.to_bytes(8, "big"))

    def chain(self, index: int) -> int:
        return self.chain_ids[index % len(self.chain_ids)]

    def chunk(self, index: int) -> ChunkId:
        return ChunkId(self.prefix + index.to_bytes(16, "big"))

    def chains_up_to(self, length: int) -> tuple[int, ...]:
        """The chains that may hold bytes of a file of that length."""
        count = -(-length // self.chunk_size)
        return tuple(dict.fromkeys(self.chain_ids[: min(count, len(self.chain_ids))]))

    def pieces(self, offset: int, length: int) -> list[Piece]:
        """The range cut at chunk borders, in file order."""
        if offset < 0 or length < 0 or offset + length > MAX_FILE_BYTES:
            raise InvalidArgument(f"bytes {offset} to {offset + length} are outside of what a file can hold")
        found: list[Piece] = []
        size = self.chunk_size
        end = offset + length
        start = 0
        while offset < end:
            index, within = divmod(offset, size)
            count = min(size - within, end - offset)
            found.append(Piece(index, within, count, start))
            offset += count
            start += count
        return found
