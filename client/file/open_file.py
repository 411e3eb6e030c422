"""An open file.

Owns a handle: its rights, its session, and which write errors it has already reported; how it reads is its `Reading`. All handles of one inode in a
client share a `FileState`, so they see each other's writes at once.
Invariants: a read is short only at the end of the file; an error of the write-behind comes out of every handle once; a handle that was closed stays
closed, also when closing failed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio

from kvfs.client.file.memory import bytes_of, size_of
from kvfs.client.file.reading import Reading
from kvfs.client.file.state import FileState
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


class OpenFile:
    """One open file of this client. Made by AsyncClient.open_file and path operations, not directly."""

    def __init__(
        self,
        state: FileState,
        *,
        session: bytes,
        read: bool,
        write: bool,
        append: bool,
        user: User,
        on_close: Callable[[OpenFile, FileState, bool], None],
    ) -> None:
        """`on_close`: told at the end of `close`, and whether the metadata service knows of it, or will."""
        self._state = state
        self._read = read
        self._write = write
        self._append = append
        self._on_close = on_close
        self._reading = Reading(state)
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
        if state.length:
            state.check_kept()
        return state.length

    # --- reading ---------------------------------------------------------------------------------------------------------------------

    async def pread(self, offset: int, length: int) -> memoryview:
        """Up to `length` bytes, fewer only at the end of the file. A read-only view of the client's registered memory, without a copy where it was
        read ahead: the memory goes back to the pool when the last view of it is gone, so hand it on or copy it, do not collect many."""
        end = await self._range(offset, length)
        return await self._reading.lend(offset, end) if offset < end else _EMPTY

    async def pread_into(self, offset: int, views: Sequence[Buffer]) -> int:
        """Fill writable views (or Spans of a RegisteredBuffer, which the storage fills without a copy) in order. The count is short only at the end
        of the file."""
        end = await self._range(offset, sum(map(size_of, views)))
        if end <= offset:
            return 0
        await self._reading.fill(offset, end, views)
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
            await self._reading.find_places(offset, end)
        return end

    def wants_more(self, offset: int) -> bool:
        """Whether a reader who has got so far should have `find_more` run, not waiting for it. True once, until that has run."""
        return self._reading.wants_more(offset)

    async def find_more(self, offset: int) -> None:
        """As `find_places`, for what a reader who has got to `offset` will want next."""
        start, stop = self._reading.more(offset)
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

    async def _range(self, offset: int, length: int) -> int:
        """Where the read ends."""
        if self._closed or not self._read:
            raise BadHandle("the file is not open for reading")
        if offset < 0 or length < 0:
            raise InvalidArgument(f"cannot read {length} bytes from {offset}")
        state = self._state
        if not state.leased:
            await state.fresh(self.user)
        end = min(offset + length, state.length)
        if end > offset:
            state.check_kept()
        return end

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
            await self.flush()
            await state.report(self.session, self.user, still_open=True)
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
            done = await write(writes)
        except KvfsError as error:
            state.failed(error)
            self._errors_seen = state.errors  # this handle hears of it now
            raise
        else:
            for each, outcome in zip(writes, done, strict=True):
                state.unsynced.note(each.chain_id, outcome.loss)
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
                    _, loss = await state.shared.storage.remove_range(chain, self.inode, first, stop)
                    state.unsynced.note(chain, loss)
        finally:
            state.forget_read()
        await self.report()

    async def flush(self) -> None:
        """Wait until everything written (through any handle of the inode in this client) is acknowledged by the storage."""
        await self._state.flush()
        self._raise_pending()

    async def fsync(self) -> None:
        """flush; then everything of the file synced on every replica; then the length and mtime known to the metadata service. UnsyncedLost, once a
        handle: a loss of power came first, and bytes that were acknowledged may be gone."""
        if self._closed:
            raise BadHandle("the file is closed")
        state = self._state
        await self.flush()
        await state.sync()
        self._raise_pending()
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
        """flush, report, end the session, all within one deadline. The handle is closed even when this raises or is cancelled: the rest is then done
        in the background. A second close does nothing.

        Returns when the metadata service knows what was written; where there is nothing to report, nobody waits for the end of the session.
        """
        if self._closed:
            return
        self._closed = True
        self._state.write_handles -= self._write
        began = trio.current_time()
        ended = False
        try:
            try:
                await self._end(lambda: self._report_since(began, still_open=False))
            except KvfsError:
                self._raise_pending()  # that bytes are lost says more
                raise
            ended = True
            if self._write:
                self._raise_pending()
        finally:
            self._on_close(self, self._state, ended)

    async def finish_close(self) -> None:
        """What a close that was cancelled, or failed, has not done."""
        await self._end(lambda: self._state.report(self.session, self.user, still_open=False))

    async def _end(self, report: Callable[[], Awaitable[None]]) -> None:
        state = self._state
        while self._through:
            self._through_gone = trio.Event()
            await self._through_gone.wait()
        if self._write and state.dirty:
            await state.flush()
        if self._write and state.must_report:
            await report()
        elif self.session:
            state.shared.meta.end_session(self.inode, self.session)

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
