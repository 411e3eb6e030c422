"""Read-ahead: ranges of a file fetched before they are asked for.

`Stream` (one a handle) notices sequential reading and says what to fetch; `Windows` (one a file) holds the fetched ranges; `ReadAhead` (one
a client) fetches
and keeps the sum bounded. Invariants:
  - windows of a file never overlap, and each holds the bytes as one fetch found them;
  - a window is dropped as soon as a local write, a truncate or news from another client touches it, also while its fetch is under way;
  - a window that was read through is dropped; memory lent out of it stays right until the reader lets go;
  - a failed fetch is dropped without a word: the reader asks the storage itself and gets the error first-hand. Only who has waited for the fetch to
    run out of time gets its error (`Window.wait`): asking again would take as long again.
"""

from __future__ import annotations

import logging
from collections import OrderedDict

import trio

from kvfs.client.config import ClientConfig
from kvfs.client.file.fetch import fetch_block
from kvfs.client.file.memory import Block, Memory
from kvfs.client.peers import Counters
from kvfs.client.placement import Placement
from kvfs.client.storage_client import StorageClient
from kvfs.common.boundary.clock import Clock
from kvfs.common.errors import DeadlineExceeded, KvfsError

log = logging.getLogger("kvfs.client")

SLACK_BYTES = 4 << 20
"""The kernel sends the reads of one stream in parallel: so far out of order is still sequential."""


class Window:
    """[start, end) of a file. Once `ready`, `block` has the bytes, or is None if they could not be fetched."""

    __slots__ = ("_users", "block", "consumed", "dropped", "end", "late", "owner", "ready", "start")

    def __init__(self, owner: Windows, start: int, end: int) -> None:
        self.owner = owner
        self.start = start
        self.end = end
        self.block: Block | None = None
        self.ready = trio.Event()
        self.late: DeadlineExceeded | None = None
        self.dropped = False
        self.consumed = 0
        self._users = 0

    async def wait(self, clock: Clock, deadline_s: float) -> Block | None:
        """Its bytes, or None if they could not be fetched. Raises DeadlineExceeded if that took about as long as the caller may take at all."""
        if not self.ready.is_set():
            began = clock.monotonic()
            await self.ready.wait()
            if self.late is not None and clock.monotonic() - began > deadline_s / 2:
                raise self.late
        return self.block

    def hold(self) -> None:
        """Someone reads from it: dropped or not, the bytes stay until `let_go`. (A read that found the window before it was dropped began before
        whatever made it stale.)"""
        self._users += 1

    def let_go(self) -> None:
        self._users -= 1
        self._maybe_free()

    def finish(self, block: Block | None) -> None:
        """The fetch is over; the window takes over the holder's count of the block."""
        self.block = block
        self.ready.set()
        self._maybe_free()

    def drop(self) -> None:
        self.dropped = True
        self._maybe_free()

    def _maybe_free(self) -> None:
        if self.dropped and not self._users and self.block is not None:
            self.block.release()
            self.block = None


class ReadAhead:
    def __init__(self, storage: StorageClient, memory: Memory, config: ClientConfig, counters: Counters, nursery: trio.Nursery) -> None:
        self._storage = storage
        self._memory = memory
        self._config = config
        self._counters = counters
        self._nursery = nursery
        self._recent: OrderedDict[Window, None] = OrderedDict()
        self.total_bytes = 0

    def begin(self, owner: Windows, start: int, end: int) -> Window | None:
        """Start fetching, if there is room (older windows make some)."""
        size = end - start
        while self.total_bytes + size > self._config.read_ahead_total_bytes:
            victim = next((window for window in self._recent if window.ready.is_set()), None)
            if victim is None:
                return None
            victim.owner.drop(victim)
        window = Window(owner, start, end)
        self.total_bytes += size
        self._recent[window] = None
        self._counters.window_fetches += 1
        self._nursery.start_soon(self._fetch, window)
        return window

    def touch(self, window: Window) -> None:
        if window in self._recent:
            self._recent.move_to_end(window)

    def forget(self, window: Window) -> None:
        if window in self._recent:
            del self._recent[window]
            self.total_bytes -= window.end - window.start

    async def _fetch(self, window: Window) -> None:
        block = self._memory.allocate(window.end - window.start)
        got: Block | None = None
        try:
            got = await fetch_block(self._storage, self._memory, window.owner.placement, window.start, block)
        except DeadlineExceeded as error:
            window.late = error
        except KvfsError:
            pass  # the reader will ask the storage itself
        except Exception:
            log.exception("reading ahead failed")
        finally:
            if got is None:
                block.release()
                window.owner.drop(window)
            window.finish(got)


class Windows:
    """The fetched ranges of one file, in file order."""

    def __init__(self, ahead: ReadAhead, placement: Placement) -> None:
        self._ahead = ahead
        self.placement = placement
        self._windows: list[Window] = []

    def at(self, offset: int) -> Window | None:
        for window in self._windows:
            if window.start <= offset < window.end:
                return window
        return None

    def overlapping(self, start: int, end: int) -> list[Window]:
        return [window for window in self._windows if window.start < end and window.end > start]

    def fetch(self, start: int, end: int) -> int:
        """Begin to fetch [start, end) as far as it is not here; gives where the next fetch would start (`start` itself when there is no room)."""
        known = self.at(start)
        if known is not None:
            return known.end
        following = min((window.start for window in self._windows if window.start > start), default=end)
        window = self._ahead.begin(self, start, min(end, following))
        if window is None:
            return start
        self._windows.append(window)
        self._windows.sort(key=lambda window: window.start)
        return window.end

    def consumed(self, window: Window, count: int) -> None:
        window.consumed += count
        if window.consumed >= window.end - window.start:
            self.drop(window)
        else:
            self._ahead.touch(window)

    def drop(self, window: Window) -> None:
        if window.dropped:
            return
        self._windows.remove(window)
        self._ahead.forget(window)
        window.drop()

    def drop_range(self, start: int, end: int) -> None:
        if self._windows:
            for window in self.overlapping(start, end):
                self.drop(window)

    def drop_all(self) -> None:
        for window in list(self._windows):
            self.drop(window)


class Stream:
    """How one handle reads."""

    __slots__ = ("_ahead_end", "_config", "_next", "_run", "_size")

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self._next = 0
        self._run = 0
        self._ahead_end = 0
        self._size = config.read_ahead_first_bytes

    def advance(self, windows: Windows, offset: int, end: int, length: int) -> bool:
        """The handle reads [offset, end) of a file of that length: fetch ahead if it goes on like a sequential reader. Whether a fetch was begun."""
        sequential = offset == self._next if self._run == 0 else self._next - SLACK_BYTES <= offset <= self._next + SLACK_BYTES
        if not sequential:
            self._next = end
            self._run = 0
            self._size = self._config.read_ahead_first_bytes
            return False
        self._ahead_end = offset if self._run == 0 else max(self._ahead_end, offset)
        self._run += 1
        self._next = max(self._next, end)
        goal = min(length, end + self._size)
        step = min(self._size, self._config.read_window_bytes)
        if self._ahead_end >= end and goal - self._ahead_end < step and goal < length:
            return False  # not yet worth a request
        began = False
        while self._ahead_end < goal:
            stop = self._stop(windows.placement.chunk_size, max(step, min(end - self._ahead_end, self._config.read_window_bytes)), length)
            reached = windows.fetch(self._ahead_end, stop)
            if reached == self._ahead_end:
                break  # no room: the reader is served directly
            self._ahead_end = reached
            began = True
        self._size = min(2 * self._size, self._config.read_ahead_bytes)
        return began

    def _stop(self, chunk_size: int, size: int, length: int) -> int:
        """Where a window ends: at a chunk's end, where chunks are not larger than windows, so that each chunk is asked for once."""
        stop = self._ahead_end + size
        if chunk_size <= self._config.read_window_bytes:
            stop = -(-stop // chunk_size) * chunk_size
        return min(stop, length)
