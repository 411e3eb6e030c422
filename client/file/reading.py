"""How one open file reads: from bytes that lie on this machine, from what was read ahead, from this client's own writes, from the storage.

Owns the reader's habits: how far ahead bytes are fetched (`Stream`), and places asked for (`Reach`). Every range given to it lies inside the file,
and whoever asks may read: `OpenFile` has seen to both.
Invariant: no byte is given that was not verified or written here. A write that no storage has acknowledged yet wins over what was fetched.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import trio

from kvfs.client.file.fetch import fetch_block, fetch_into
from kvfs.client.file.memory import bytes_of, size_of
from kvfs.client.file.places import Reach
from kvfs.client.file.readahead import Stream, Window
from kvfs.client.file.state import FileState, Held, let_go
from kvfs.client.peers import Buffer
from kvfs.common.transport.region import Span

INLINE_BYTES = 1 << 20
"""Read from the page cache in the client's thread before others get their turn."""


class Reading:
    """Of one handle; another handle of the same file has habits of its own."""

    def __init__(self, state: FileState) -> None:
        self._state = state
        self._stream = Stream(state.shared.config)
        self._reach = Reach()

    async def lend(self, offset: int, end: int) -> memoryview:
        """All of it, in registered memory that is given back when the last view is gone."""
        state = self._state
        if state.windows.at(offset) is None:
            block = state.shared.memory.allocate(end - offset)
            try:
                if await self._read_places(offset, block.view) == block.size:
                    return block.lend(0, block.size)
            finally:
                block.release()
        await self._read_ahead(offset, end)
        held = state.hold_unacknowledged(offset, end)
        try:
            window = state.windows.at(offset)
            if window is not None and not held and window.end >= end:
                window.hold()
                try:
                    if await window.wait(state.shared.clock, state.shared.config.deadline_s) is not None:
                        assert window.block is not None
                        state.shared.storage.counters.window_hits += 1
                        lent = window.block.lend(offset - window.start, end - window.start)
                        state.windows.consumed(window, end - offset)
                        return lent
                finally:
                    window.let_go()
            block = state.shared.memory.allocate(end - offset)
            try:
                if held or window is not None:
                    await self._gather(offset, block.part(0, block.size), held)
                else:
                    block = await fetch_block(state.shared.storage, state.shared.memory, state.placement, offset, block)
                return block.lend(0, block.size)
            finally:
                block.release()
        finally:
            let_go(held)

    async def fill(self, offset: int, end: int, views: Sequence[Buffer]) -> None:
        """The views in order, as far as the range goes."""
        if self._state.windows.at(offset) is None:
            start = offset
            for view in views:
                into = bytes_of(view)[: end - start]
                done = await self._read_places(start, into)
                start += done
                if done < len(into):
                    break
            if start == end:
                return
        if not isinstance(views[0], Span):
            await self._read_ahead(offset, end)
        held = self._state.hold_unacknowledged(offset, end)
        try:
            start = offset
            parts: list[tuple[int, Span | memoryview]] = []
            for view in views:
                count = min(size_of(view), end - start)
                if not count:
                    continue
                if isinstance(view, Span):
                    parts.append((start, view if count == view.length else view.part(0, count)))
                else:
                    parts.append((start, bytes_of(view)[:count]))
                start += count
            if len(parts) > 1 and not held and not self._state.windows.overlapping(offset, end):
                await fetch_into(self._state.shared.storage, self._state.placement, parts)
            else:
                for start, part in parts:
                    await self._gather(start, part, held)
        finally:
            let_go(held)

    async def find_places(self, offset: int, end: int) -> None:
        """Where these bytes lie, and, as reading goes on, more and more around them."""
        await self._state.find_places(*self._reach.next(self._state.places, offset, end, self._state.token))

    def wants_more(self, offset: int) -> bool:
        """Whether `more` is worth asking for. True once, until then."""
        if offset < self._reach.more_at:
            return False
        self._reach.more_at = inf
        return offset < self._state.length

    def more(self, offset: int) -> tuple[int, int]:
        """The places that a reader who has got to `offset` will want next."""
        return self._reach.more(self._state.places, offset)

    async def _read_places(self, offset: int, into: memoryview) -> int:
        """As `OpenFile.read_now`, in the client's thread: asks for places where none are known, and never waits for the disk."""
        state = self._state
        places = state.places
        done = 0
        asked = False
        while done < len(into) and not places.resting:
            step = into[done : done + INLINE_BYTES]
            count = places.read(offset + done, step, state.token, nowait=True)
            done += count
            if count:
                asked = False
            if count == len(step):
                if done < len(into):
                    await trio.lowlevel.checkpoint()
                continue
            if asked or places.covers(offset + done, state.token):
                break  # it would wait for the disk, or the bytes have been replaced
            asked = True
            await self.find_places(offset + done, offset + len(into))
        return done

    async def _read_ahead(self, offset: int, end: int) -> None:
        """[offset, end) is about to be read from the service."""
        state = self._state
        # A read of more than the read-ahead is a batch by itself.
        if end < offset + state.shared.config.read_ahead_bytes and self._stream.advance(state.windows, offset, end, state.length):
            await trio.lowlevel.checkpoint()  # the fetches' turn: a reader that finds all it wants would keep them from starting

    async def _gather(self, offset: int, into: Span | memoryview, held: list[Held]) -> None:
        """Fill `into` from our own unacknowledged writes, from what was read ahead, and from the storage for the rest."""
        state = self._state
        end = offset + len(into)
        view = into.view if isinstance(into, Span) else into
        missing = _without([(offset, end)], [(part.start, part.end) for part in held])
        windows: list[Window] = []
        for start, stop in missing:
            windows += [window for window in state.windows.overlapping(start, stop) if window not in windows]
        for window in windows:
            window.hold()
        try:
            direct = _without(missing, [(window.start, window.end) for window in windows])
            await self._fetch_parts(offset, into, direct)
            for window in windows:
                block = await window.wait(state.shared.clock, state.shared.config.deadline_s)
                parts = _within(missing, window.start, window.end)
                if block is None:
                    await self._fetch_parts(offset, into, parts)
                    continue
                for start, stop in parts:
                    view[start - offset : stop - offset] = block.view[start - window.start : stop - window.start]
                    state.windows.consumed(window, stop - start)
        finally:
            for window in windows:
                window.let_go()
        for part in held:
            start, stop = max(part.start, offset), min(part.end, end)
            if start < stop:
                first = part.offset + start - part.start
                view[start - offset : stop - offset] = part.block.view[first : first + stop - start]

    async def _fetch_parts(self, offset: int, into: Span | memoryview, ranges: list[tuple[int, int]]) -> None:
        if not ranges:
            return
        parts: list[tuple[int, Span | memoryview]] = []
        for start, stop in ranges:
            part = into.part(start - offset, stop - start) if isinstance(into, Span) else into[start - offset : stop - offset]
            parts.append((start, part))
        await fetch_into(self._state.shared.storage, self._state.placement, parts)


def _without(ranges: list[tuple[int, int]], holes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges less the holes, in order."""
    for low, high in holes:
        left = []
        for start, stop in ranges:
            if start < low:
                left.append((start, min(stop, low)))
            if stop > high:
                left.append((max(start, high), stop))
            # what lies in [low, high) is gone
        ranges = [(start, stop) for start, stop in left if start < stop]
    return ranges


def _within(ranges: list[tuple[int, int]], low: int, high: int) -> list[tuple[int, int]]:
    return [(max(start, low), min(stop, high)) for start, stop in ranges if start < high and stop > low]
