"""A KV-cache block, opened as a file for reading.

Owns what is read ahead of one block, and the proof that all bytes given belong to the block that was opened. Invariants: every byte was verified by
the read path; after each fetch the block is looked at again, and unless its content is still the one that was opened (it may have been evicted, and
put anew by someone else, with other bytes) nothing of the fetch is given: StaleHandle. So a reader gets bytes of one content, or an error. Memory: a
window a file, of at most WINDOW_BYTES, of at most WINDOWS_MAX files at once.
"""

from __future__ import annotations

from collections import OrderedDict

import trio

from kvfs.client.file import memory as memories
from kvfs.client.spaces import Block, find_block
from kvfs.client.storage_client import StorageClient
from kvfs.client.storage_reads import ChunkRead
from kvfs.common.errors import ReadOnly, StaleHandle
from kvfs.common.ids import block_id

WINDOW_BYTES = 4 << 20
WINDOWS_MAX = 16
_EMPTY = memoryview(b"")


class BlockReader:
    """What the open blocks of a client share: the way to the storage, and the bound on what they hold."""

    def __init__(self, storage: StorageClient, memory: memories.Memory) -> None:
        self.storage = storage
        self.memory = memory
        self._holding: OrderedDict[BlockFile, None] = OrderedDict()

    def open(self, space: int, chain_id: int, block: Block) -> BlockFile:
        return BlockFile(self, space, chain_id, block)

    def holds(self, file: BlockFile) -> None:
        self._holding[file] = None
        self._holding.move_to_end(file)
        if len(self._holding) > WINDOWS_MAX:
            next(iter(self._holding)).drop_window()

    def lets_go(self, file: BlockFile) -> None:
        self._holding.pop(file, None)


class BlockFile:
    """Stands where an OpenFile stands. Made by BlockReader.open, of a block that has just been found."""

    session = b""

    def __init__(self, reader: BlockReader, space: int, chain_id: int, block: Block) -> None:
        self._reader = reader
        self._space = space
        self._chain_id = chain_id
        self._block = block
        self._turn = trio.Lock()
        self._window: memories.Block | None = None
        self._start = 0
        self._next = 0
        """Where a sequential reader goes on."""

    async def pread(self, offset: int, length: int) -> memoryview:
        """As OpenFile.pread."""
        end = min(offset + length, self._block.length)
        if end <= offset:
            return _EMPTY
        async with self._turn:
            window = self._window
            if window is None or not self._start <= offset < end <= self._start + window.size:
                self.drop_window()
                stop = min(max(end, offset + WINDOW_BYTES), self._block.length) if offset == self._next else end
                window = self._window = await self._fetch(offset, stop)
                self._start, self._next = offset, stop
            lent = window.lend(offset - self._start, end - self._start)
            if end == self._start + window.size:
                self.drop_window()
            else:
                self._reader.holds(self)
            return lent

    async def _fetch(self, start: int, stop: int) -> memories.Block:
        storage, memory = self._reader.storage, self._reader.memory
        block = memory.allocate(stop - start)
        try:
            chunk = block_id(self._space, self._block.digest)
            [done] = await storage.read([ChunkRead(self._chain_id, chunk, start, block.size, block.part(0, block.size))])
            if done.moved:  # a replica that hangs may still write into the memory it was given
                safe = memory.private(block.size)
                safe.view[: done.length] = done.view[: done.length]
                block.release()
                block = safe
            there = done.found and done.length == block.size
            if not there or not self._block.same_content(await find_block(storage, self._space, self._chain_id, self._block.digest)):
                raise StaleHandle(f"block {self._block.digest.hex()} was removed while it was open")
            return block
        except BaseException:
            block.release()
            raise

    def drop_window(self) -> None:
        self._reader.lets_go(self)
        if self._window is not None:
            self._window.release()
            self._window = None

    async def fsync(self) -> None:
        """Nothing was written."""

    async def report(self) -> None:
        """Nothing was written."""

    async def append(self, buffers: object) -> int:
        raise ReadOnly("a block is written by a put only")

    async def pwrite(self, offset: int, buffers: object) -> int:
        raise ReadOnly("a block is written by a put only")

    async def close(self) -> None:
        self.drop_window()
