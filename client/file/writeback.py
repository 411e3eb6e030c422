"""Write-behind: what was written and is not yet acknowledged.

`WriteBack` (one a client) sends chunk buffers in batches by node, several requests under way; `DirtyChunks` (one a file) gathers writes into
chunk buffers. Invariants:
  - a buffer holds one unbroken range of one chunk, exactly the bytes written: nothing is read to fill a chunk up, so that writers of
    disjoint ranges in
    different clients never touch each other's bytes;
  - of one chunk at most one buffer is on its way and at most one is being filled: the later bytes are sent after the earlier ones are acknowledged;
  - a buffer of a stretch (stretch.py) belongs to the writer's thread until that is over: here its published bytes are read, and nothing is changed;
  - dirty bytes of all files together stay under the limit: writers wait;
  - a failed send drops its bytes and marks the file: the error comes out of the next write, flush, fsync and close, once per handle.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import trio

from kvfs.client.config import ClientConfig
from kvfs.client.file.memory import Block, Memory
from kvfs.client.file.stretch import Stretch
from kvfs.client.placement import Placement
from kvfs.client.storage_client import StorageClient
from kvfs.client.storage_writes import ChunkWrite
from kvfs.common.boundary.clock import Clock
from kvfs.common.checksum import CHECKSUM_BYTES, CHECKSUM_UNIT_BYTES, checksums
from kvfs.common.errors import InternalError, KvfsError

log = logging.getLogger("kvfs.client")

STREAM_BYTES = 4 << 20
"""Memory that a buffer of a sequential writer starts with, at most (a chunk may be 64 MiB)."""
LARGE_WRITE_BYTES = 64 * 1024
STRETCHES_MIN = 4
STRETCH_CHAINS = 8
"""So many stretches are within the limit of dirty bytes, at least."""


class Owner(Protocol):
    """What a buffer tells its file."""

    def written(self, buffer: ChunkBuffer, error: KvfsError | None) -> None: ...


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
                self._finish(buffer, outcome if isinstance(outcome, KvfsError) else None)
        finally:
            for buffer in batch[done:]:  # only when the client is being closed under it
                self._finish(buffer, KvfsError("the client was closed before the bytes were sent"))
            line.in_flight -= 1
            self._pump(node, line)

    def _finish(self, buffer: ChunkBuffer, error: KvfsError | None) -> None:
        self.dirty_bytes -= buffer.block.size
        self._sent_bytes -= buffer.block.size
        buffer.owner.written(buffer, error)
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


class DirtyChunks:
    """The unacknowledged bytes of one file."""

    def __init__(
        self,
        back: WriteBack,
        placement: Placement,
        clock: Clock,
        on_written: Callable[[int, int, KvfsError | None], None],
        on_stretched: Callable[[Stretch], None],
    ) -> None:
        """`on_written(start, end, error)`: a range of the file was acknowledged, or lost. `on_stretched`: a stretch is over."""
        self._back = back
        self._on_stretched = on_stretched
        self.stretches: tuple[Stretch, ...] = ()
        """Any thread may look."""
        self._placement = placement
        self._clock = clock
        self._on_written = on_written
        self._filling: dict[int, ChunkBuffer] = {}
        self._sending: dict[int, ChunkBuffer] = {}
        self._stream_end = -1
        """Where the last write ended: one that goes on there gets whole chunks of memory at once."""

    def __bool__(self) -> bool:
        return bool(self._filling or self._sending)

    async def write(self, offset: int, data: memoryview) -> None:
        """Take the bytes over. Waits for room, and for an earlier buffer of the same chunk where the new bytes do not adjoin."""
        streaming = len(data) >= LARGE_WRITE_BYTES or (offset == self._stream_end and offset > 0)
        full = False
        for piece in self._placement.pieces(offset, len(data)):
            await self._put(piece.index, piece.offset, data[piece.start : piece.start + piece.length], streaming)
            full = full or piece.offset + piece.length == self._placement.chunk_size
        self._stream_end = offset + len(data)
        if full:
            await trio.lowlevel.checkpoint()  # the sender's turn: a writer that never waits would keep it from starting

    async def _put(self, index: int, start: int, data: memoryview, streaming: bool) -> None:
        size = self._placement.chunk_size
        end = start + len(data)
        while True:
            buffer = self._filling.get(index)
            if buffer is not None and buffer.stretch is not None:
                await buffer.stretch.gone()
                continue
            if buffer is not None and not buffer.start <= start <= buffer.end:
                self._want(buffer)  # does not adjoin: the bytes before go first
                if not buffer.sealed:
                    await self._sending[index].done.wait()
                continue
            if buffer is None:
                want = max(len(data), min(size - start, STREAM_BYTES) if streaming else 4096)
                more = want
            elif end - buffer.start > buffer.block.size:
                want = min(size - buffer.start, max(end - buffer.start, 2 * buffer.block.size))
                more = want - buffer.block.size
            else:
                break
            if self._back.full(more):
                await self._back.make_room(more)
                continue  # the world may have changed meanwhile
            if buffer is None:
                buffer = ChunkBuffer(self, self._placement, index, start, self._back.block(want), self._clock.monotonic())
                self._filling[index] = buffer
                self._back.files.add(self)
            else:
                buffer.block = self._back.grow(buffer.block, want, buffer.end - buffer.start)
            break
        buffer.rewritten(start)
        buffer.block.view[start - buffer.start : end - buffer.start] = data
        buffer.end = max(buffer.end, end)
        if buffer.end == size or buffer.end - buffer.start >= self._back.send_bytes:
            self._want(buffer)

    def _want(self, buffer: ChunkBuffer) -> None:
        """Send it now, or as soon as the one before it is acknowledged, or the stretch is over."""
        buffer.wanted = True
        if buffer.stretch is not None:
            buffer.stretch.stop()
            return
        if buffer.index in self._sending:
            return
        buffer.sealed = True
        del self._filling[buffer.index]
        if not self._filling:
            self._back.files.discard(self)
        self._sending[buffer.index] = buffer
        self._back.submit(buffer)

    def written(self, buffer: ChunkBuffer, error: KvfsError | None) -> None:
        del self._sending[buffer.index]
        self._on_written(buffer.file_start, buffer.file_end, error)
        following = self._filling.get(buffer.index)
        if following is not None and following.wanted:
            self._want(following)

    def send_all(self) -> None:
        for buffer in list(self._filling.values()):
            if self._filling.get(buffer.index) is buffer:  # not gone meanwhile, with the stretch of another
                self._want(buffer)

    def send_older(self, born_before: float) -> None:
        for buffer in list(self._filling.values()):
            if buffer.born <= born_before and self._filling.get(buffer.index) is buffer:
                self._want(buffer)

    async def flush(self, first: int = 0, end: int | None = None) -> None:
        """Wait until all bytes taken before this call in [first, end) are acknowledged or lost (the file knows which)."""
        for stretch in self.stretches:
            await stretch.gone()
        size = self._placement.chunk_size
        waiting: list[ChunkBuffer] = []
        for table in (self._sending, self._filling):
            for buffer in list(table.values()):
                if buffer.end == buffer.start:
                    continue  # of a stretch that began meanwhile
                if (end is None or buffer.index * size < end) and (buffer.index + 1) * size > first:
                    waiting.append(buffer)
        with self._back.gathered():
            for buffer in waiting:
                if not buffer.sealed:
                    self._want(buffer)
        if waiting:
            self._back.hurry()
        for buffer in waiting:
            await buffer.done.wait()

    def overlapping(self, start: int, end: int) -> Iterator[ChunkBuffer]:
        """Buffers with bytes of [start, end), older ones before newer ones of the same chunk."""
        if not self._filling and not self._sending:
            return
        size = self._placement.chunk_size
        for index in range(start // size, -(-end // size)):
            for table in (self._sending, self._filling):
                buffer = table.get(index)
                if buffer is not None and buffer.end > buffer.start and buffer.file_start < end and buffer.file_end > start:
                    yield buffer

    def any(self, start: int, end: int) -> bool:
        """Whether some bytes of [start, end) are unacknowledged."""
        return next(self.overlapping(start, end), None) is not None

    @property
    def end(self) -> int:
        """The highest end of unacknowledged bytes."""
        buffers = [buffer for table in (self._filling, self._sending) for buffer in table.values()]
        return max((buffer.file_end for buffer in buffers if buffer.end > buffer.start), default=0)

    # --- stretches -------------------------------------------------------------------------------------------------------------------

    async def stretch(self, offset: int, published: Callable[[], None]) -> Stretch | None:
        """Memory for the bytes from `offset` on. None: there are other bytes in the way, which `write` deals with."""
        for stretch in self.stretches:
            if stretch.end == offset:
                await stretch.gone()  # full: this is its writer, who wants another
        while True:
            index, start = divmod(offset, self._placement.chunk_size)
            first = self._filling.get(index)
            if first is not None and first.stretch is not None:
                await first.stretch.gone()
                continue
            if first is not None and first.end != start:
                return None
            if sum(buffer.block.size for buffer in self._sending.values()) > self._back.ahead_bytes:
                self._back.hurry()
                await next(iter(self._sending.values())).done.wait()
                continue
            plan = self._plan(index, start, first)
            more = sum(size for _, _, size in plan) - (first.block.size if first is not None else 0)
            if more > 0 and self._back.full(more):
                await self._back.make_room(more)
                continue  # the world may have changed meanwhile
            break
        now = self._clock.monotonic()
        buffers = []
        for index, start, size in plan:
            buffer = self._filling.get(index)
            if buffer is None:
                buffer = self._filling[index] = ChunkBuffer(self, self._placement, index, start, self._back.block(size), now)
            elif size > buffer.block.size:
                buffer.block = self._back.grow(buffer.block, size, buffer.end - buffer.start)
            buffers.append(buffer)
        stretch = Stretch(buffers, offset, self._clock, published, self._stretch_over)
        for buffer in buffers:
            buffer.stretch = stretch
        self._back.files.add(self)
        self.stretches += (stretch,)
        return stretch

    def _plan(self, index: int, start: int, first: ChunkBuffer | None) -> list[tuple[int, int, int]]:
        """(chunk, where its buffer starts, how large it is) for a stretch."""
        chunk_size = self._placement.chunk_size
        chains = {self._placement.chain(index + step) for step in range(STRETCH_CHAINS)}
        left = self._back.stretch_bytes(chains)
        if first is not None:
            plan = [(index, first.start, max(first.block.size, min(chunk_size - first.start, STREAM_BYTES)))]
        else:
            plan = [(index, start, min(chunk_size - start, STREAM_BYTES))]
        while True:
            index, start, size = plan[-1]
            left -= size
            if start + size < chunk_size or left < chunk_size or index + 1 in self._filling:
                return plan
            plan.append((index + 1, 0, min(chunk_size, STREAM_BYTES)))

    def _stretch_over(self, stretch: Stretch) -> None:
        self.stretches = tuple(other for other in self.stretches if other is not stretch)
        self._on_stretched(stretch)
        with self._back.gathered():
            for buffer in stretch.buffers:
                buffer.stretch = None
                if buffer.end == buffer.start:
                    del self._filling[buffer.index]
                    self._back.drop(buffer.block)
                elif buffer.wanted or not buffer.room:
                    self._want(buffer)
        if not self._filling:
            self._back.files.discard(self)

    def stop_stretches(self) -> None:
        """The next write of every writer comes to the client's thread."""
        for stretch in self.stretches:
            stretch.stop()
