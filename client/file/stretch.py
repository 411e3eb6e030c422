"""A stretch of a file that a writer's thread fills by itself, without a crossing to the client's thread for each write.

The client's thread makes it, with memory for the bytes that follow, and takes over what was filled when it is over. Invariants:
  - the writer's thread only appends, and publishes bytes (`ChunkBuffer.end`) after they are there: what is published is final while the
    stretch lasts, so the client's thread shows it to readers at any time;
  - no byte comes in after `stop`; `over` is set as soon as no writer is inside, and then the buffers are as all others;
  - the client's thread never blocks here. Its tasks may wait for who writes in this moment (`gone`), for a bounded time: a finalizer in that
    thread may be waiting for the client's thread in its turn.
The thread that fills it may touch nothing else of the client.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from kvfs.common.boundary.clock import Clock
from kvfs.common.errors import Busy

if TYPE_CHECKING:  # buffers imports this module
    from kvfs.client.file.buffers import ChunkBuffer

GONE_S = 5.0
_WHOLE = slice(None)


class Stretch:
    __slots__ = ("_at", "_clock", "_inside", "_on_over", "_published", "_stopped", "_token", "buffers", "end", "mtime_ns", "over", "start", "until")

    def __init__(
        self, buffers: list[ChunkBuffer], start: int, clock: Clock, published: Callable[[], None], on_over: Callable[[Stretch], None]
    ) -> None:
        """`published` is called in the writer's thread, `on_over` in the client's."""
        self.buffers = buffers
        self.start = start
        self.end = start
        """Of the file: what was put so far."""
        self.mtime_ns = 0
        self.until = float("-inf")
        """When the writer has to ask whether the file was truncated meanwhile."""
        self.over = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        self._clock = clock
        self._published = published
        self._on_over = on_over
        self._stopped = False
        self._inside: dict[str, object] = {}
        self._at = 0

    # --- the writer's thread ---------------------------------------------------------------------------------------------------------

    def put(self, offset: int, data: memoryview) -> int:
        """Take over bytes of the file from `offset` on. Gives how many it took: fewer, or none, when it is over, full, or they go elsewhere."""
        me = object()
        done = 0
        try:
            # Not a lock: whatever interrupts this (a signal) finds the way out below. One thread at a time; `stop` sees that somebody is inside.
            if self._inside.setdefault("writer", me) is not me or offset != self.end or self._clock.monotonic() >= self.until:
                return 0
            while done < len(data) and not self._stopped and self._at < len(self.buffers):
                done += self._fill(data[done:])
        finally:
            if self._inside.get("writer") is me:
                self._inside.clear()
                if self._stopped:
                    self._tell()
        return done

    def _fill(self, data: memoryview) -> int:
        buffer = self.buffers[self._at]
        used = buffer.end - buffer.start
        count = min(len(data), buffer.room)
        buffer.block.view[used : used + count][_WHOLE] = data[:count]
        buffer.end += count
        self.end += count
        self.mtime_ns = self._clock.wall_ns()
        self._published()
        buffer.hash_whole_units()
        if not buffer.room:
            self._at += 1
        return count

    def _tell(self) -> None:
        try:
            self._token.run_sync_soon(self._finish)
        except trio.RunFinishedError:
            pass  # with the client, what it held is gone

    # --- the client's thread ---------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        self._stopped = True
        self._finish()

    async def gone(self) -> None:
        """Stop it, and wait until it is over."""
        self.stop()
        if not self.over.is_set():
            with trio.move_on_after(GONE_S):
                await self.over.wait()
            if not self.over.is_set():
                raise Busy(f"a thread has been in the middle of a write to the file for {GONE_S:g} s")

    def _finish(self) -> None:
        if not self._inside and not self.over.is_set():
            self.over.set()
            self._on_over(self)
