"""An open file.

Owns a handle: its rights, its session, how it reads, and which write errors it has already reported. All handles of one inode in a client share a
`FileState`, so they see each other's writes at once.
Invariants: no byte is given that was not verified or written here; a read is short only at the end of the file; an error of the
write-behind comes out
of every handle once; a handle that was closed stays closed, also when closing failed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from math import inf

import trio

from kvfs.client.file.fetch import fetch_block, fetch_into
from kvfs.client.file.memory import bytes_of, size_of
from kvfs.client.file.places import Reach
from kvfs.client.file.readahead import Stream, Window
from kvfs.client.file.state import FileState, Held, let_go
from kvfs.client.file.stretch import Stretch
from kvfs.client.peers import Buffer
from kvfs.client.placement import Placement
from kvfs.client.storage_writes import ChunkWrite, WriteDone
from kvfs.client.user import User
from kvfs.common.errors import BadHandle, DeadlineExceeded, InvalidArgument, KvfsError
from kvfs.common.transport.region import Span
from kvfs.common.wire import meta_pb2 as pb

_EMPTY = memoryview(b"")
LAST_WORDS = 1 / 8
"""Part of a deadline that the report of a file's length has where sending the bytes has used up all of it."""
INLINE_BYTES = 1 << 20
"""Read from the page cache in the client's thread before others get their turn."""


class OpenFile:
    """One open file of this client. Made by AsyncClient.open_file and path operations, not directly."""

    def __init__(
        self, state: FileState, *, session: bytes, read: bool, write: bool, append: bool, user: User, on_close: Callable[[OpenFile, FileState], None]
    ) -> None:
        self._state = state
        self._read = read
        self._write = write
        self._append = append
        self._on_close = on_close
        self._stream = Stream(state.shared.config)
        self._reach = Reach()
        self._errors_seen = state.errors
        self._closed = False
        self._through = 0
        self._through_gone = trio.Event()
        self.inode = state.number
        self.session = session
        self.user = user

    @property
    def length(self) -> int:
        """The length as this client sees it, unflushed writes included."""
        return self._state.length

    async def current_length(self) -> int:
        """The length as the metadata service has it now, or as this client made it."""
        await self._state.fresh(self.user)
        return self._state.length

    @property
    def token(self) -> int:
        """Changes whenever bytes read earlier may no longer be those of the file. Any thread may look."""
        return self._state.token

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def writable(self) -> bool:
        return self._write

    @property
    def appending(self) -> bool:
        """Whether every write goes to the end."""
        return self._append

    def attributes(self) -> pb.Inode:
        """The newest attributes known, with the local length and mtime. Do not change the message."""
        return self._state.view()

    @property
    def placement(self) -> Placement:
        """Where the chunks of the file lie."""
        return self._state.placement

    async def settled_length(self) -> int:
        """For who reads from the storage itself: what this client has buffered is there now. Gives the length, true at this moment."""
        if self._closed or not self._read:
            raise BadHandle("the file is not open for reading")
        state = self._state
        if state.dirty:
            await state.flush()
        await state.fresh(self.user)
        return state.length

    # --- reading ---------------------------------------------------------------------------------------------------------------------

    async def pread(self, offset: int, length: int) -> memoryview:
        """Up to `length` bytes, fewer only at the end of the file. A read-only view of the client's registered memory, without a copy where
        it was read
        ahead: the memory goes back to the pool when the last view of it is gone, so hand it on or copy it, do not collect many."""
        end = await self._range(offset, length)
        if end <= offset:
            return _EMPTY
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

    async def pread_into(self, offset: int, views: Sequence[Buffer]) -> int:
        """Fill writable views (or Spans of a RegisteredBuffer, which the storage fills without a copy) in order. The count is short only at the end
        of the file."""
        total = sum(map(size_of, views))
        end = await self._range(offset, total)
        if end <= offset:
            return 0
        if self._state.windows.at(offset) is None:
            start = offset
            for view in views:
                into = bytes_of(view)[: end - start]
                done = await self._read_places(start, into)
                start += done
                if done < len(into):
                    break
            if start == end:
                return end - offset
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
        return end - offset

    def read_now(self, offset: int, into: memoryview) -> int:
        """Bytes that could be read in the caller's own thread, whichever that is, because their places are known (`find_places`). Waits for the disk
        only. Fewer than there is room for: `pread` knows the rest."""
        return self._state.places.read(offset, into, self._state.token) if self._read and not self._closed else 0

    async def find_places(self, offset: int, length: int) -> int:
        """Learn where the bytes from `offset` on lie, for `read_now`: these and, as reading goes on, more and more around them. Gives where a read of
        that length ends, as `pread` would."""
        end = await self._range(offset, length)
        if offset < end:
            await self._state.find_places(*self._reach.next(self._state.places, offset, end, self._state.token))
        return end

    def wants_more(self, offset: int) -> bool:
        """Whether a reader who has got so far should have `find_more` run, not waiting for it. True once, until that has run."""
        if offset < self._reach.more_at:
            return False
        self._reach.more_at = inf
        return offset < self._state.length

    async def find_more(self, offset: int) -> None:
        """As `find_places`, for what a reader who has got to `offset` will want next."""
        start, stop = self._reach.more(self._state.places, offset)
        await self._range(offset, 0)
        await self._state.find_places(start, stop)

    def places_until(self, offset: int, end: int) -> float:
        """Until when bytes that `read_now` gave may be used."""
        return self._state.places.until(offset, end)

    @property
    def lease_end(self) -> float:
        """Until when the attributes are trusted, and with them what was read since `token` changed last."""
        return self._state.lease_end

    @property
    def tells_places(self) -> bool:
        """Whether it is worth asking for places: not when none were told a moment ago."""
        return not self._state.places.resting

    async def _read_places(self, offset: int, into: memoryview) -> int:
        """As `read_now`, in the client's thread: asks for places where none are known, and never waits for the disk."""
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
            await state.find_places(*self._reach.next(places, offset + done, offset + len(into), state.token))
        return done

    async def _range(self, offset: int, length: int) -> int:
        """Where the read ends."""
        if self._closed or not self._read:
            raise BadHandle("the file is not open for reading")
        if offset < 0 or length < 0:
            raise InvalidArgument(f"cannot read {length} bytes from {offset}")
        state = self._state
        if not state.leased:
            await state.fresh(self.user)
        return min(offset + length, state.length)

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

    # --- writing ---------------------------------------------------------------------------------------------------------------------

    async def pwrite(self, offset: int, buffers: Sequence[Buffer]) -> int:
        """Write bytes-likes: copied before this returns, sent behind it; an error of the sending comes out of a later pwrite, flush, fsync or close.
        Spans of a RegisteredBuffer are sent from where they are, and acknowledged before this returns. Gives the count."""
        self._check_writable(offset)
        if self._append:
            await self.append(buffers)
            return sum(map(size_of, buffers))
        await self._state.fresh_for_writing(self.user)
        return await self._put(offset, buffers)

    async def stretch(self, offset: int) -> Stretch | None:
        """For a thread that writes on from `offset`: memory that it fills by itself, instead of calling pwrite each time; what pwrite promises is
        true of it too. None: use pwrite."""
        self._check_writable(offset)
        if self._append:
            return None
        await self._state.fresh_for_writing(self.user)
        self._raise_pending()
        return await self._state.stretch(offset, self.session, self.user)

    async def append(self, buffers: Sequence[Buffer]) -> int:
        """Write at the end of the file, whoever else appends; gives the offset."""
        self._check_writable(0)
        state = self._state
        total = sum(map(size_of, buffers))
        if not total:
            return await self.current_length()
        if state.written_end > state.attributes.length:
            # The end that the metadata service knows must be the true one before it gives out what is behind it.
            await self._flush_and_report()
        reply = await state.shared.meta.append(self.inode, self.session, total, user=self.user)
        state.adopt(reply.inode, own=True)
        await self._put(reply.offset, buffers)
        return reply.offset

    async def _put(self, offset: int, buffers: Sequence[Buffer]) -> int:
        state = self._state
        self._raise_pending()
        start = offset
        for buffer in buffers:
            count = size_of(buffer)
            if not count:
                continue
            async with state.writing(start, count, self.session, self.user):
                if isinstance(buffer, Span):
                    await self._send_now(start, buffer, state.shared.storage.write)
                else:
                    await state.dirty.write(start, bytes_of(buffer))
            start += count
        return start - offset

    async def write_through(self, offset: int, data: Span | memoryview, write: Callable[[list[ChunkWrite]], Awaitable[list[WriteDone]]]) -> None:
        """As pwrite of a Span, the requests made by `write`, which may gather those of several calls. `close` waits for it."""
        self._check_writable(offset)
        self._through += 1
        try:
            state = self._state
            await state.fresh_for_writing(self.user)
            self._raise_pending()
            async with state.writing(offset, len(data), self.session, self.user):
                await self._send_now(offset, data, write)
        finally:
            self._through -= 1
            if not self._through:
                self._through_gone.set()

    async def _send_now(self, offset: int, data: Span | memoryview, write: Callable[[list[ChunkWrite]], Awaitable[list[WriteDone]]]) -> None:
        """From the caller's memory straight to the storage, behind what is buffered of the same chunks."""
        state = self._state
        placement = state.placement
        end = offset + len(data)
        await state.dirty.flush(offset, end)
        writes = [
            ChunkWrite(
                placement.chain(piece.index),
                placement.chunk(piece.index),
                piece.offset,
                piece.length,
                placement.chunk_size,
                data.part(piece.start, piece.length) if isinstance(data, Span) else data[piece.start : piece.start + piece.length],
            )
            for piece in placement.pieces(offset, len(data))
        ]
        try:
            await write(writes)
        except KvfsError as error:
            state.failed(error)
            self._errors_seen = state.errors  # this handle hears of it now
            raise
        else:
            state.acknowledged(end)
        finally:
            state.windows.drop_range(offset, end)

    async def punch(self, start: int, end: int) -> None:
        """Whole chunks [start, end) of the file (the last one up to the file's end) read as zeros from now on and take no space."""
        self._check_writable(start)
        state = self._state
        placement = state.placement
        await state.fresh_for_writing(self.user)
        self._raise_pending()
        size = placement.chunk_size
        if start > end or start % size or (end % size and end < state.length):
            raise InvalidArgument(f"bytes {start} to {end} are not whole chunks of {size} bytes")
        end = min(end, state.length)
        if start >= end:
            return
        first, stop = start // size, -(-end // size)
        try:
            async with state.writing(start, end - start, self.session, self.user):
                await state.dirty.flush(start, end)
                for chain in dict.fromkeys(placement.chain(index) for index in range(first, min(stop, first + len(placement.chain_ids)))):
                    await state.shared.storage.remove_range(chain, self.inode, first, stop)
        finally:
            state.forget_read()
        await self.report()

    async def flush(self) -> None:
        """Wait until everything written (through any handle of the inode in this client) is acknowledged by the storage."""
        await self._state.flush()
        self._raise_pending()

    async def fsync(self) -> None:
        """flush; then everything of the file synced on every replica; then the length and mtime known to the metadata service."""
        if self._closed:
            raise BadHandle("the file is closed")
        state = self._state
        await self.flush()
        chains = state.placement.chains_up_to(state.length)
        if chains:
            await state.shared.storage.sync(chains)
        if state.must_report:
            await state.report(self.session, self.user, still_open=True)

    async def report(self) -> None:
        """flush; then the length and mtime known to the metadata service, so that other clients see what was written. The session stays."""
        if self._closed:
            raise BadHandle("the file is closed")
        began = trio.current_time()
        await self.flush()
        if self._state.must_report:
            await self._report_since(began, still_open=True)

    async def _report_since(self, began: float, *, still_open: bool) -> None:
        """Report in what is left of the deadline of a call that began then."""
        limit_s = self._state.shared.config.deadline_s
        with trio.move_on_after(max(began + limit_s - trio.current_time(), LAST_WORDS * limit_s)) as scope:
            await self._state.report(self.session, self.user, still_open=still_open)
        if scope.cancelled_caught:
            raise DeadlineExceeded(f"the metadata service could not be told of what was written within {limit_s:g} s")

    async def hint(self) -> None:
        """Let others know about how long the file is by now. Not exact, and no error if it cannot be told: fsync and close are."""
        if self._write and not self._closed:
            await self._state.hint(self.session, self.user)

    async def truncate(self, length: int) -> pb.Inode:
        """Cut or extend to `length`, in order with this client's writes."""
        self._check_writable(length)
        self._raise_pending()
        return await self._state.truncate(length, self.session, self.user)

    async def close(self) -> None:
        """flush, report, end the session, all within one deadline. The handle is closed even when this raises; a second close does nothing.

        Returns when the metadata service knows what was written; where there is nothing to report, nobody waits for the end of the session.
        """
        if self._closed:
            return
        self._closed = True
        state = self._state
        try:
            began = trio.current_time()
            while self._through:
                self._through_gone = trio.Event()
                await self._through_gone.wait()
            if self._write and state.dirty:
                await state.flush()
            if self._write and state.must_report:
                try:
                    await self._report_since(began, still_open=False)
                except KvfsError:
                    self._raise_pending()  # that bytes are lost says more
                    raise
            elif self.session:
                state.shared.meta.end_session(self.inode, self.session)
            if self._write:
                self._raise_pending()
        finally:
            self._on_close(self, state)

    async def _flush_and_report(self) -> None:
        await self.flush()
        await self._state.report(self.session, self.user, still_open=True)

    def _check_writable(self, offset: int) -> None:
        if self._closed or not self._write:
            raise BadHandle("the file is not open for writing")
        if offset < 0:
            raise InvalidArgument(f"{offset} is before the start of the file")

    def _raise_pending(self) -> None:
        state = self._state
        if self._errors_seen != state.errors:
            self._errors_seen = state.errors
            error = state.last_error
            assert isinstance(error, KvfsError)
            raise type(error)(f"earlier written bytes are lost: {error.message}") from error


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
