"""Sending what was written: chunk buffers of all files of a client, in batches by node, several requests under way.

Invariants: dirty bytes of all files together stay under the limit: writers wait; a buffer that was submitted always comes to its end, and its file is
told (buffers.Owner); a failed send drops its bytes. What a file has to send, and when, is decided by dirty.py.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio

from kvfs.client.config import ClientConfig
from kvfs.client.file.buffers import ChunkBuffer
from kvfs.client.file.memory import Block, Memory
from kvfs.client.storage_client import StorageClient
from kvfs.client.storage_writes import WriteDone
from kvfs.common.boundary.clock import Clock
from kvfs.common.errors import InternalError, KvfsError

if TYPE_CHECKING:  # dirty imports this module
    from kvfs.client.file.dirty import DirtyChunks

log = logging.getLogger("kvfs.client")

STRETCHES_MIN = 4
"""So many stretches are within the limit of dirty bytes, at least."""


class _Line:
    """What goes to one node."""

    __slots__ = ("in_flight", "queue", "queued_bytes")

    def __init__(self) -> None:
        self.queue: deque[ChunkBuffer] = deque()
        self.queued_bytes = 0
        self.in_flight = 0


class WriteBack:
    def __init__(self, storage: StorageClient, memory: Memory, config: ClientConfig, clock: Clock, nursery: trio.Nursery) -> None:
        self._storage = storage
        self._memory = memory
        self._config = config
        self._clock = clock
        self._nursery = nursery
        self._lines: dict[int, _Line] = {}
        """By the node of the head of the chunk's chain, as it is when the buffer comes: should it move, only the batches are smaller."""
        self._gathering = 0
        self._sent_bytes = 0
        """Of memory, on its way or next."""
        self.dirty_bytes = 0
        self._room = trio.Event()
        self.files: set[DirtyChunks] = set()
        """Those that have a buffer being filled."""

    @property
    def stretch_bytes_max(self) -> int:
        return self._config.dirty_max_bytes // STRETCHES_MIN

    def stretch_bytes(self, chains: Iterable[int]) -> int:
        """A batch for every node that gets some of it."""
        nodes = {self._storage.head_node(chain) for chain in chains}
        return min(self._config.write_batch_bytes * len(nodes), self.stretch_bytes_max)

    @property
    def ahead_bytes(self) -> int:
        return self._config.write_ahead_bytes

    @property
    def send_bytes(self) -> int:
        """A buffer of that many bytes is sent without waiting for its chunk to be full."""
        return self._config.write_batch_bytes

    def full(self, size: int) -> bool:
        """Whether `size` more dirty bytes would be too many (a single buffer above the limit passes alone)."""
        return self.dirty_bytes > 0 and self.dirty_bytes + size > self._config.dirty_max_bytes

    async def make_room(self, size: int) -> None:
        """Send what there is, and wait until `size` more dirty bytes are within the limit."""
        while self.full(size):
            if self.dirty_bytes - self._sent_bytes + size > self._config.dirty_max_bytes:  # what is on its way will not do
                with self.gathered():
                    for dirty in list(self.files):
                        dirty.send_all()
                if not self.full(size):
                    return  # stretches held memory that nobody had filled
            self.hurry()
            if self._room.is_set():
                self._room = trio.Event()
            await self._room.wait()

    def block(self, size: int) -> Block:
        block = self._memory.allocate(size)
        self.dirty_bytes += size
        return block

    def grow(self, block: Block, size: int, used: int) -> Block:
        """A larger block with the first `used` bytes of the old one, which is let go."""
        larger = self._memory.allocate(size)
        larger.view[:used] = block.view[:used]
        self.dirty_bytes += size - block.size
        block.release()
        return larger

    def drop(self, block: Block) -> None:
        """It was not needed."""
        self.dirty_bytes -= block.size
        block.release()
        self._room.set()

    def submit(self, buffer: ChunkBuffer) -> None:
        self._sent_bytes += buffer.block.size
        node = self._storage.head_node(buffer.placement.chain(buffer.index))
        line = self._lines.get(node)
        if line is None:
            line = self._lines[node] = _Line()
        line.queue.append(buffer)
        line.queued_bytes += buffer.end - buffer.start
        if not self._gathering:
            self._pump(node, line)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """What is submitted inside goes out together."""
        self._gathering += 1
        try:
            yield
        finally:
            self._gathering -= 1
            if not self._gathering:
                self._pump_all(waited_for=False)

    def hurry(self) -> None:
        """Somebody waits: send what is queued, also what would still grow into a larger batch."""
        self._pump_all(waited_for=True)

    def _pump_all(self, *, waited_for: bool) -> None:
        for node, line in list(self._lines.items()):
            self._pump(node, line, waited_for=waited_for)

    def _pump(self, node: int, line: _Line, *, waited_for: bool = False) -> None:
        """A request costs as much as several chunks in it: while one is under way to a node, the next gathers a full batch."""
        config = self._config
        while line.queue and line.in_flight < config.writes_in_flight:
            if line.in_flight and line.queued_bytes < config.write_batch_bytes and not waited_for:
                return
            batch: list[ChunkBuffer] = []
            size = 0
            while line.queue and len(batch) < config.batch_max_ios:
                length = line.queue[0].end - line.queue[0].start
                if batch and size + length > config.write_batch_bytes:
                    break
                size += length
                batch.append(line.queue.popleft())
            line.queued_bytes -= size
            line.in_flight += 1
            self._nursery.start_soon(self._send, batch, node, line)
        if not line.queue and not line.in_flight:
            self._lines.pop(node, None)

    async def _send(self, batch: list[ChunkBuffer], node: int, line: _Line) -> None:
        done = 0
        try:
            try:
                outcomes = await self._storage.write_each([buffer.operation() for buffer in batch])
            except Exception as error:  # a fault of ours must cost these bytes (loudly), not the client with all its files
                log.exception("sending %d chunk buffers failed", len(batch))
                outcomes = [InternalError(f"sending failed: {error!r}")] * len(batch)
            for buffer, outcome in zip(batch, outcomes, strict=True):
                done += 1
                self._finish(buffer, outcome)
        finally:
            for buffer in batch[done:]:  # only when the client is being closed under it
                self._finish(buffer, KvfsError("the client was closed before the bytes were sent"))
            line.in_flight -= 1
            self._pump(node, line)

    def _finish(self, buffer: ChunkBuffer, outcome: WriteDone | KvfsError) -> None:
        self.dirty_bytes -= buffer.block.size
        self._sent_bytes -= buffer.block.size
        buffer.owner.written(buffer, outcome)
        buffer.block.release()
        buffer.done.set()
        self._room.set()

    async def flush_old(self) -> None:
        """For ever: send buffers that have been filling for longer than `dirty_age_s`."""
        age_s = self._config.dirty_age_s
        while True:
            await self._clock.sleep(age_s / 2)
            before = self._clock.monotonic() - age_s
            for dirty in list(self.files):
                dirty.send_older(before)
