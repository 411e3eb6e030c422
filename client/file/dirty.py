"""Write-behind of one file: gathering writes into chunk buffers, and when each of them is sent.

Invariants:
  - of one chunk at most one buffer is on its way and at most one is being filled: the later bytes are sent after the earlier ones are acknowledged;
  - a buffer of a stretch (stretch.py) belongs to the writer's thread until that is over: here its published bytes are read, and nothing is changed;
  - a failed send marks the file: the error comes out of the next write, flush, fsync and close, once per handle.
How much may wait, and the sending itself, is WriteBack's (writeback.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import trio

from kvfs.client.file.buffers import ChunkBuffer
from kvfs.client.file.stretch import Stretch
from kvfs.client.file.writeback import WriteBack
from kvfs.client.placement import Placement
from kvfs.client.storage_writes import WriteDone
from kvfs.common.boundary.clock import Clock
from kvfs.common.errors import KvfsError

STREAM_BYTES = 4 << 20
"""Memory that a buffer of a sequential writer starts with, at most (a chunk may be 64 MiB)."""
LARGE_WRITE_BYTES = 64 * 1024
STRETCH_CHAINS = 8
"""A stretch is as long as the nodes of so many chunks that follow each other make it."""


class DirtyChunks:
    """The unacknowledged bytes of one file."""

    def __init__(
        self,
        back: WriteBack,
        placement: Placement,
        clock: Clock,
        on_written: Callable[[ChunkBuffer, WriteDone | KvfsError], None],
        on_stretched: Callable[[Stretch], None],
    ) -> None:
        """`on_written(buffer, outcome)`: its bytes were acknowledged, or lost. `on_stretched`: a stretch is over."""
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

    def written(self, buffer: ChunkBuffer, outcome: WriteDone | KvfsError) -> None:
        del self._sending[buffer.index]
        self._on_written(buffer, outcome)
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
