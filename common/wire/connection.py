"""One connection's frames: a buffered reader that takes many frames from one receive, and a writer that puts many into one send.

Owned by Channel (the calling side) and server.py (the answering side), which give it a face for what arrives. Invariants: frames leave whole
and in order; a frame is handed over only after its checks passed; a payload goes straight into the views that the face names (but for what the
64 KiB read-ahead already has). `send` never waits: what the socket does not take is queued and a writer task finishes it; the queue is bounded by the
requests in flight. After an error the connection is dead: nothing more is sent.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import trio

from kvfs.common.boundary.net import ByteStream, ReadBuffer, after
from kvfs.common.errors import ConnectionLost, MalformedFrame
from kvfs.common.wire.frame import HEADER_BYTES, Header, Limits, check_message, decode_header

_BUFFER_BYTES: Final = 64 << 10
_READS_IN_A_ROW: Final = 16
_BATCH_BUFFERS: Final = 512
_DRAIN_BYTES: Final = 256 << 10


class Face(Protocol):
    """What a connection's owner does with what arrives."""

    paused: bool
    """Take no further frame for now; `resumed` waits until that is over."""

    async def resumed(self) -> None: ...

    def on_frame(self, header: Header, message: memoryview) -> None:
        """A frame without payload. The message's bytes are gone once this returns."""

    async def on_payload(self, header: Header, message: memoryview, receive: Receive) -> None:
        """A frame with payload: must take exactly its bytes through `receive`. The message's bytes are gone at the first wait."""


class Receive:
    """The payload of the frame at hand, for `Face.on_payload`."""

    __slots__ = ("_connection", "left")

    def __init__(self, connection: Connection, size: int) -> None:
        self._connection = connection
        self.left = size

    async def into(self, views: Sequence[memoryview], wanted: Callable[[int], bool] | None = None) -> None:
        """Fills the views. `wanted` is told now and then how many of their bytes are missing, last when none is. When it says no, the rest is thrown
        away and the views are not touched again."""
        rest = [view for view in views if view.nbytes]
        size = sum(view.nbytes for view in rest)
        if size > self.left:
            raise MalformedFrame(f"a payload ends {size - self.left} bytes early")
        self.left -= size
        await self._connection._fill(rest, wanted)

    async def drop(self) -> None:
        """Throws the rest away."""
        size, self.left = self.left, 0
        await self._connection._drain(size)


class Entry:
    """A frame on its way out."""

    __slots__ = ("buffers", "fds", "on_sent", "started")

    def __init__(self, buffers: list[memoryview], fds: Sequence[int], on_sent: Callable[[], None] | None) -> None:
        self.buffers = buffers
        self.fds = fds
        self.on_sent = on_sent
        self.started = False


class Connection:
    def __init__(self, stream: ByteStream, limits: Limits) -> None:
        self.stream = stream
        self.limits = limits
        self.burst = 0
        """Frames that the last receive brought: above one, others are busy too and small frames are worth gathering."""
        self.received = 0
        """Grows with every receive."""
        self.dead: Exception | None = None
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0
        self._out: deque[Entry] = deque()
        self._corked = False
        self._resting = False
        """The reader waits for the next frame, and not for the rest of one."""
        self._handed_back = False
        self._writer: trio.lowlevel.Task | None = None
        self._writer_told = False

    # --- out ---

    def send(self, buffers: Sequence[ReadBuffer], *, fds: Sequence[int] = (), on_sent: Callable[[], None] | None = None) -> Entry | None:
        """Sends or queues a frame. Gives its entry if a part is still here. Raises ConnectionLost."""
        if self.dead is not None:
            raise ConnectionLost(f"connection with {self.stream.peer} is closed: {self.dead}")
        if not self._out and not self._corked and self.burst < 2:
            taken = self.stream.send_now(buffers, fds)
            if taken == (len(buffers[0]) if len(buffers) == 1 else sum(len(part) for part in buffers)):
                if on_sent is not None:
                    on_sent()
                return None
            rest = after([memoryview(part).cast("B") for part in buffers if len(part)], taken)
            entry = Entry(rest, () if taken else fds, on_sent)
            entry.started = taken > 0
        else:
            entry = Entry([memoryview(part).cast("B") for part in buffers if len(part)], fds, on_sent)
        self._out.append(entry)
        if not self._corked:
            self._tell_writer()
        return entry

    def withdraw(self, entry: Entry) -> bool:
        """Frees the sender's memory from a frame. True: nothing of it had been sent and nothing will be. False: it was sent, or a part was; then
        what is left has been copied, for a frame that was begun must be finished."""
        if entry in self._out:
            if not entry.started:
                self._out.remove(entry)
                return True
            entry.buffers = [memoryview(bytes(part)) for part in entry.buffers]
        return False

    def flush(self) -> None:
        """Sends what is queued as far as the socket takes it; the writer does the rest."""
        if self._out and not self._writer_told:
            self._push()
            if self._out:
                self._tell_writer()

    def flush_last(self) -> None:
        """Sends what the socket takes now, when no writer runs any more."""
        try:
            while self._out and self._push():
                pass
        except ConnectionLost:
            pass  # nobody is there to read it

    @property
    def drained(self) -> bool:
        return not self._out

    def _tell_writer(self) -> None:
        if not self._writer_told:
            self._writer_told = True
            if self._writer is not None:
                task, self._writer = self._writer, None
                trio.lowlevel.reschedule(task)

    def _push(self) -> bool:
        """One send of as many queued frames as possible. False when the socket is full."""
        out = self._out
        first = out[0]
        if len(out) == 1 or first.fds:
            count = 1
            buffers = first.buffers
        else:
            buffers = []
            count = 0
            for entry in out:
                if entry.fds or len(buffers) >= _BATCH_BUFFERS:
                    break
                buffers += entry.buffers
                count += 1
        taken = self.stream.send_now(buffers, first.fds)
        if not taken:
            return False
        first.fds = ()
        while count:
            entry = out[0]
            size = sum(part.nbytes for part in entry.buffers)
            if taken < size:
                entry.buffers = after(entry.buffers, taken)
                entry.started = True
                break
            taken -= size
            count -= 1
            out.popleft()
            if entry.on_sent is not None:
                entry.on_sent()
        return True

    async def write_loop(self) -> None:
        """Finishes what `send` queued. Runs until cancelled or the connection is lost."""
        while True:
            if not self._out:
                self._writer_told = False
                self._writer = trio.lowlevel.current_task()

                def give_up(_raise: object) -> trio.lowlevel.Abort:
                    self._writer = None
                    return trio.lowlevel.Abort.SUCCEEDED

                await trio.lowlevel.wait_task_rescheduled(give_up)
            while self._out:
                if not self._push():
                    await self.stream.wait_writable()

    def fail(self, error: Exception) -> None:
        """The connection is lost: frees what was queued."""
        if self.dead is None:
            self.dead = error
        while self._out:
            entry = self._out.popleft()
            if entry.on_sent is not None:
                entry.on_sent()

    # --- in ---

    async def read_loop(self, face: Face) -> None:
        """Hands every frame to `face`, until the end of the stream (returns) or an error (MalformedFrame, MessageTooBig, VersionMismatch,
        ConnectionLost). While the frames of one receive are handled, what they cause to be sent is gathered."""
        in_a_row = 0
        while True:
            self.burst = 0
            try:
                while (header := self._take_whole(face)) is not None:
                    self._uncork()
                    await self._take_slowly(face, header)
            finally:
                self._uncork()
            count = self._refill() if self.burst > 1 else None  # after a lone frame there is hardly ever another one to be had without waiting
            if count is None:
                in_a_row = 0
                self._resting = True
                try:
                    await self.stream.wait_readable()
                finally:
                    self._resting = False
                if self._handed_back:
                    self._handed_back = False
                    continue
                count = self._refill()
            elif count:
                in_a_row += 1
                if in_a_row >= _READS_IN_A_ROW:
                    in_a_row = 0
                    await trio.lowlevel.checkpoint()
            if count == 0:
                if self._end > self._start:
                    raise ConnectionLost(f"{self.stream.peer} closed the connection in the middle of a frame")
                return

    def take_over(self, task: trio.lowlevel.Task) -> bool:
        """Wakes `task`, which is about to wait, in place of the one in `read_loop`, to call `read_in_place`. False: it cannot be done now."""
        return self._resting and self.stream.take_over(task)

    def read_in_place(self, face: Face) -> bool:
        """For a task that was woken in place of the one in `read_loop`, which waits: hands over what can be had at once. False: that task must go on,
        for the rest must be waited for, or the connection ends; it has been woken."""
        if not self._resting:  # it was cancelled meanwhile: nothing more is to be read
            self.stream.give_back()
            return False
        try:
            count = self._refill()
            if count is None:
                return True
            if count:
                self.burst = 0
                if self._take_whole(face) is None:
                    return True
            self._handed_back = True
            self.stream.hand_back()
        except Exception as error:
            self.stream.hand_back(error)
        finally:
            self._uncork()
        return False

    def _take_whole(self, face: Face) -> Header | None:
        """Hands over the frames that are here whole, up to one that must be waited for, whose header it gives."""
        view = self._view
        limits = self.limits
        while self._end - self._start >= HEADER_BYTES:
            start = self._start
            header = decode_header(view, start, limits)
            stop = start + HEADER_BYTES + header.message_bytes
            if face.paused:
                return header
            if stop > self._end:
                return header if stop - start > _BUFFER_BYTES else None
            message = view[start + HEADER_BYTES : stop]
            check_message(header, message)
            if header.payload_bytes:
                return header
            self._start = stop
            self.burst += 1
            if stop < self._end:
                self._corked = True  # more frames follow: what they cause to be sent leaves together
            face.on_frame(header, message)
        return None

    async def _take_slowly(self, face: Face, header: Header) -> None:
        """The frame that must be waited for, or the wait before it."""
        if face.paused:
            await face.resumed()
            return
        start = self._start + HEADER_BYTES
        stop = start + header.message_bytes
        self.burst += 1
        if stop > self._end:
            self._start = start
            message = memoryview(bytearray(header.message_bytes))
            await self._fill([message], None)
            check_message(header, message)
        else:
            self._start = stop
            message = self._view[start:stop]
        if header.payload_bytes:
            receive = Receive(self, header.payload_bytes)
            await face.on_payload(header, message, receive)
            if receive.left:
                await receive.drop()
        else:
            face.on_frame(header, message)

    def _uncork(self) -> None:
        if self._corked:
            self._corked = False
            if self.dead is None:
                self.flush()

    def _refill(self) -> int | None:
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == _BUFFER_BYTES:
            size = self._end - self._start
            self._buffer[:size] = self._buffer[self._start : self._end]
            self._start, self._end = 0, size
        count = self.stream.receive_now((self._view[self._end :],))
        if count:
            self._end += count
            self.received += 1
        return count

    async def _fill(self, rest: list[memoryview], wanted: Callable[[int], bool] | None) -> None:
        left = sum(view.nbytes for view in rest)
        while rest and self._end > self._start:
            part = rest[0]
            count = min(part.nbytes, self._end - self._start)
            if wanted is not None and not wanted(left):
                await self._drain(left)
                return
            part[:count] = self._view[self._start : self._start + count]
            self._start += count
            left -= count
            rest = after(rest, count)
        in_a_row = 0
        try:
            while rest:
                if wanted is not None and not wanted(left):
                    await self._drain(left)
                    return
                got = self.stream.receive_now(rest)
                if got is None:
                    self.stream.expect(left)
                    await self.stream.wait_readable()
                elif got == 0:
                    raise ConnectionLost(f"{self.stream.peer} closed the connection in the middle of a frame")
                else:
                    self.received += 1
                    left -= got
                    rest = after(rest, got)
                    in_a_row += 1
                    if in_a_row >= _READS_IN_A_ROW:
                        in_a_row = 0
                        await trio.lowlevel.checkpoint()
        finally:
            self.stream.expect(1)
        if wanted is not None:
            wanted(0)

    async def _drain(self, size: int) -> None:
        here = min(size, self._end - self._start)
        self._start += here
        size -= here
        if size:
            scratch = memoryview(bytearray(min(size, _DRAIN_BYTES)))
            while size:
                part = scratch[: min(size, _DRAIN_BYTES)]
                await self._fill([part], None)
                size -= part.nbytes

    def close(self) -> None:
        self.fail(ConnectionLost(f"connection with {self.stream.peer} is closed"))
        for fd in self.stream.taken_fds():
            os.close(fd)
        self.stream.close()
