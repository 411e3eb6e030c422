"""Blocks that are damaged on every replica: removed, so that they can be put again.

Such a block would be a miss for every reader and "present" for every writer, for as long as its prefix is in use. Owns a short queue and the task
that works it off. Invariants: a block is removed only after it was read anew into memory that nobody else writes to, and had wrong bytes again (a
caller whose buffers overlap damages no one's blocks); one at a time, and what does not fit the queue is left for the next reader to find. Belongs to
the client's trio thread.
"""

from __future__ import annotations

from kvfs.client.async_client import AsyncClient
from kvfs.client.storage_reads import ChunkRead
from kvfs.client.storage_writes import ChunkWrite
from kvfs.common.errors import DataError
from kvfs.common.ids import ChunkId, block_id
from kvfs.common.wire import storage_pb2 as pb

QUEUE = 256
LIMIT_S = 5.0


class Spoilt:
    def __init__(self, client: AsyncClient, inode: int, block_bytes: int) -> None:
        self._client = client
        self._storage = client.storage
        self._inode = inode
        self._block_bytes = block_bytes
        self._queue: dict[bytes, int] = {}
        """Digest -> chain."""
        self._looking = False

    def look_at(self, chain: int, digest: bytes) -> None:
        """No replica has this block's bytes, it seems."""
        if len(self._queue) < QUEUE:
            self._queue[digest] = chain
        if not self._looking:
            self._looking = True
            self._client.in_background(self._work)

    async def _work(self) -> None:
        try:
            while self._queue:
                digest = next(iter(self._queue))
                await self._look(self._queue[digest], block_id(self._inode, digest))
                del self._queue[digest]
        finally:
            self._looking = False

    async def _look(self, chain: int, chunk: ChunkId) -> None:
        read = ChunkRead(chain, chunk, 0, self._block_bytes, memoryview(bytearray(self._block_bytes)), counted=True)
        [outcome] = await self._storage.read_each([read], deadline_s=LIMIT_S)
        if isinstance(outcome, DataError):
            await self._storage.write_each([ChunkWrite(chain, chunk, 0, 0, self._block_bytes, kind=pb.REMOVE)], deadline_s=LIMIT_S)
