"""Bytes of a file from the storage into memory, holes as zeros.

Owns the step from a range of a file to verified bytes in given memory. It knows nothing of what is buffered or read ahead in the client.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvfs.client.file.memory import Block, Memory, zero
from kvfs.client.placement import Placement
from kvfs.client.storage_client import StorageClient
from kvfs.client.storage_reads import ChunkRead
from kvfs.common.transport.region import Span


def _part(memory: Span | memoryview, start: int, length: int) -> Span | memoryview:
    if isinstance(memory, Span):
        return memory if start == 0 and length == memory.length else memory.part(start, length)
    return memory[start : start + length]


async def fetch_into(storage: StorageClient, placement: Placement, parts: Sequence[tuple[int, Span | memoryview]]) -> None:
    """Fill every (file offset, memory) wholly: all chunk reads go out together."""
    reads: list[ChunkRead] = []
    for offset, memory in parts:
        for piece in placement.pieces(offset, len(memory)):
            into = _part(memory, piece.start, piece.length)
            reads.append(ChunkRead(placement.chain(piece.index), placement.chunk(piece.index), piece.offset, piece.length, into))
    for read, done in zip(reads, await storage.read(reads), strict=True):
        if done.moved or done.length < read.length:
            view = read.into.view if isinstance(read.into, Span) else read.into
            if done.moved:
                view[: done.length] = done.view[: done.length]
            zero(view[done.length :])


async def fetch_block(storage: StorageClient, memory: Memory, placement: Placement, offset: int, block: Block) -> Block:
    """Fill a block from `offset` on. Where a replica hangs that may still write into it, the bytes come back in a private block and the one
    given is let go."""
    reads = [
        ChunkRead(placement.chain(piece.index), placement.chunk(piece.index), piece.offset, piece.length, block.part(piece.start, piece.length))
        for piece in placement.pieces(offset, block.size)
    ]
    results = await storage.read(reads)
    if any(done.moved for done in results):
        safe = memory.private(block.size)
        start = 0
        for read, done in zip(reads, results, strict=True):
            safe.view[start : start + done.length] = done.view[: done.length]
            start += read.length
        block.release()
        return safe
    start = 0
    for read, done in zip(reads, results, strict=True):
        if done.length < read.length:
            zero(block.view[start + done.length : start + read.length])
        start += read.length
    return block
