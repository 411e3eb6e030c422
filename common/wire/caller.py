"""The calling side: one connection to one service, and the calls under way on it.

A call ends when its answer comes, its deadline passes, its caller is cancelled or the connection is lost; whichever is first. The channel stays
usable after a call that gave up: the late answer is dropped, and its payload is never written into memory that the caller has taken back. Memory that
a service reaches by itself (spans over a unix socket) cannot be taken back so: it stays pinned (transport/region.py) until the service has
answered or has closed the connection, which it does only when it is done with the memory. So a channel that ends on this side first keeps
listening for that end while it has pins.

The latest caller reads in the reader task's place until it has its answer: what it takes is handled as the reader would, for all callers.

A channel belongs to one trio thread.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, Final

import outcome
import trio

from kvfs.common.boundary.clock import Clock
from kvfs.common.boundary.net import ByteStream, Net
from kvfs.common.errors import (
    ConnectionLost,
    DeadlineExceeded,
    KvfsError,
    MalformedFrame,
    MessageTooBig,
    TransportError,
    Unreachable,
    from_wire,
)
from kvfs.common.transport.region import BufferPool
from kvfs.common.wire import base_pb2 as pb
from kvfs.common.wire.connection import Connection, Entry, Receive
from kvfs.common.wire.frame import Header, Kind, Limits, decode_table, encode, table_bytes
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.lending import BorrowedFiles
from kvfs.common.wire.outgoing import Buffer, Memory, Named
from kvfs.common.wire.service import Method

log = logging.getLogger("kvfs.wire.channel")

DEFAULT_LIMITS: Final = Limits()
_MAX_DEADLINE_MS: Final = 86_400_000
_LINGER_S: Final = 3600.0


class _Pending:
    """A call under way. `alive` until its caller has an outcome; it stays in the channel's table until the service has answered."""

    __slots__ = ("alive", "began", "deadline", "entry", "method", "named", "result", "task")

    def __init__(self, method: Method, deadline: float, began: int) -> None:
        self.method = method
        self.deadline = deadline
        self.began = began
        self.task: trio.lowlevel.Task | None = None
        self.named: Named | None = None
        self.entry: Entry | None = None
        self.result: outcome.Outcome[Any] | None = None
        """Of a caller that stands in the reader's place and is awake."""
        self.alive = True


class Channel:
    """Made by `open`; its tasks live in the nursery given there."""

    def __init__(self, stream: ByteStream, clock: Clock, identity: Identity, limits: Limits, staging: BufferPool | None) -> None:
        self._clock = clock
        self._identity = identity
        self._limits = limits
        self._connection = Connection(stream, limits)
        self._memory = Memory(self._connection, limits, staging)
        self.address = stream.peer
        self.peer = Identity(host_id="", pid=0, hostname="", software="")
        """Who answers; true once `open` has returned."""
        self.files = BorrowedFiles(stream.peer, limits.files)
        """What the service has lent."""
        self.ended: KvfsError | None = None
        """Why no call can be made any more."""
        self.suspect = False
        """A call ran out of time while nothing at all came: the peer or the network may hang."""
        self._pending: dict[int, _Pending] = {}
        self._live = 0
        self._deputy: _Pending | None = None
        """The caller that stands in the reader's place."""
        self._next_id = 1
        self._room = trio.lowlevel.ParkingLot()
        self._greeted = trio.Event()
        self._scope = trio.CancelScope()
        self._alarm = trio.Event()
        self._alarm_at = math.inf
        self._used_at = clock.monotonic()
        self._seen = -1
        self._retired = False
        self._goodbye = False
        self.paused = False

    @classmethod
    async def open(
        cls,
        nursery: trio.Nursery,
        net: Net,
        clock: Clock,
        identity: Identity,
        address: str,
        *,
        timeout_s: float,
        limits: Limits = DEFAULT_LIMITS,
        staging: BufferPool | None = None,
    ) -> Channel:
        """Connects and shakes hands. Raises Unreachable, WrongCluster, VersionMismatch, Unauthenticated."""
        until = clock.monotonic() + timeout_s
        stream = await net.connect(address, timeout_s=timeout_s)
        channel = cls(stream, clock, identity, limits, staging)
        try:
            channel._connection.send([encode(Kind.HELLO, 0, identity.hello())])
        except ConnectionLost as error:
            stream.close()
            raise Unreachable(error.message) from None
        nursery.start_soon(channel._run)
        with trio.move_on_after(max(0.0, until - clock.monotonic())):
            await channel._greeted.wait()
        if channel.ended is not None:
            if isinstance(channel.ended, ConnectionLost):
                raise Unreachable(channel.ended.message)
            raise channel.ended
        if not channel._greeted.is_set():
            channel.close()
            raise Unreachable(f"{address} did not shake hands within {timeout_s:g} s")
        return channel

    async def call(self, method: Method, request: Any, *, timeout_s: float, send: Sequence[Buffer] = (), receive: Sequence[Buffer] = ()) -> Any:
        """The reply message. `send` or `receive` name memory whose bytes go with the request or come with the reply; the request's `bulk` field is
        filled in here. Raises what the service raised, or a TransportError."""
        now = self._clock.monotonic()
        if len(self._pending) >= self._limits.in_flight:
            await self._wait_for_room(timeout_s)
        if self.ended is not None:
            raise ConnectionLost(f"channel to {self.address} is closed: {self.ended.message}")
        pending = _Pending(method, now + timeout_s, self._connection.received)
        request_id = self._next_id
        self._next_id += 1
        payload: Sequence[bytes | memoryview] = ()
        if method.has_bulk:
            pending.named = named = self._memory.name(request.bulk, send, receive)
            payload = named.payload
        try:
            message: bytes = request.SerializeToString()
            if len(message) > self._limits.message_bytes:
                raise MessageTooBig(
                    f"a {method.full_name} request of {len(message)} bytes is above the limit of {self._limits.message_bytes}: send less at a time"
                )
            frame = encode(
                Kind.REQUEST,
                request_id,
                message,
                method=method.key,
                deadline_ms=min(max(1, int(timeout_s * 1000)), _MAX_DEADLINE_MS),
                payload_bytes=sum(map(len, payload)) if payload else 0,
            )
            pending.entry = self._connection.send((frame, *payload) if payload else (frame,))
        except BaseException as error:
            if pending.named is not None:
                pending.named.done()
            if isinstance(error, ConnectionLost):
                self._fail(error)
            raise
        self._pending[request_id] = pending
        self._live += 1
        if pending.deadline < self._alarm_at:
            self._alarm.set()
        pending.task = task = trio.lowlevel.current_task()

        def abandon(_raise: object) -> trio.lowlevel.Abort:
            self._abandon(request_id, pending)
            return trio.lowlevel.Abort.SUCCEEDED

        # The latest caller takes the reader's place, and reads for all until it has its answer: alone, that is a turn of the loop less.
        connection = self._connection
        if connection.take_over(task):
            self._deputy = pending
        reply = await trio.lowlevel.wait_task_rescheduled(abandon)
        while reply is None:  # woken to read
            goes_on = pending.result is not None or connection.read_in_place(self)
            if pending.result is not None:
                if self._deputy is pending:
                    self._deputy = None
                    if goes_on:
                        connection.stream.give_back()
                result, pending.result = pending.result, None
                try:
                    return result.unwrap()
                finally:
                    del result  # an error's traceback leads here: no circle, or the caller's memory lives until the collector comes
            self._deputy = pending if goes_on and connection.take_over(task) else None
            reply = await trio.lowlevel.wait_task_rescheduled(abandon)
        return reply

    @property
    def idle(self) -> bool:
        return self._live == 0

    def retire(self) -> None:
        """Takes no more calls; ends when those under way have."""
        self._retired = True
        if self._live == 0:
            self.close()

    def close(self) -> None:
        """Ends at once: calls under way fail with ConnectionLost."""
        self._fail(ConnectionLost("it was closed on this side"))
        self._scope.cancel()

    async def _wait_for_room(self, timeout_s: float) -> None:
        with trio.move_on_after(timeout_s):
            while len(self._pending) >= self._limits.in_flight and self.ended is None:
                await self._room.park()
            return
        raise DeadlineExceeded(f"{self._limits.in_flight} calls to {self.address} are under way already, and none ended in {timeout_s:g} s")

    # --- how a call ends ---

    def _finish(self, request_id: int, pending: _Pending, result: outcome.Outcome[Any], *, held: bool = False) -> None:
        """The service has answered."""
        named = pending.named
        if named is not None:
            if pending.alive:
                named.arrived()
            if not held:
                named.done()
        if not held:
            del self._pending[request_id]
            if self._room:
                self._room.unpark()
        self._resolve(pending, result)

    def _resolve(self, pending: _Pending, result: outcome.Outcome[Any]) -> None:
        """The caller gets its outcome, if it is still there."""
        if pending.alive:
            pending.alive = False
            self._live -= 1
            self._wake(pending, result)
            if self._retired and self._live == 0:
                self.close()

    def _wake(self, pending: _Pending, result: outcome.Outcome[Any]) -> None:
        task, pending.task = pending.task, None
        if pending is self._deputy:
            if task is trio.lowlevel.current_task() or not self._connection.stream.give_back():
                pending.result = result  # it is awake
                return
            self._deputy = None
        if task is not None:
            trio.lowlevel.reschedule(task, result)

    def _abandon(self, request_id: int, pending: _Pending) -> None:
        """The caller gives up before an answer: frees what it lent, as far as that can be."""
        pending.alive = False
        pending.task = None
        if pending is self._deputy:
            self._deputy = None
            self._connection.stream.give_back()
        self._live -= 1
        if pending.entry is not None and self._connection.withdraw(pending.entry):
            if pending.named is not None:
                pending.named.done()
            del self._pending[request_id]
            if self._room:
                self._room.unpark()
        if self._retired and self._live == 0:
            self.close()

    def _fail(self, error: KvfsError) -> None:
        """No further call; those under way end."""
        if self.ended is None:
            self.ended = error
        self._greeted.set()
        for pending in list(self._pending.values()):
            if pending.alive:
                lost = ConnectionLost(f"{pending.method.full_name} at {self.address}: {error.message}")
                self._resolve(pending, outcome.Error(lost))
        self._room.unpark_all()

    def _let_go(self) -> None:
        """The service has ended the connection: nobody touches our memory any more."""
        pending, self._pending = self._pending, {}
        for entry in pending.values():
            if entry.named is not None:
                entry.named.done()

    # --- tasks ---

    async def _run(self) -> None:
        stream = self._connection.stream
        ended_there = False
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                nursery.start_soon(self._keep_time)
                with self._scope:
                    ended_there = await self._read()
                nursery.cancel_scope.cancel()
            if not ended_there and any(entry.named is not None and entry.named.pins for entry in self._pending.values()):
                stream.close_sending()
                with trio.move_on_after(_LINGER_S):
                    ended_there = await self._await_end()
        finally:
            self._fail(ConnectionLost("the channel's pool was closed"))
            self._connection.close()
            self._memory.close()
            self.files.close()
            if ended_there or not stream.carries_fds:
                self._let_go()

    async def _read(self) -> bool:
        """Whether the service ended the connection."""
        try:
            await self._connection.read_loop(self)
            self._fail(ConnectionLost("the service closed the connection"))
            return True
        except ConnectionLost as error:
            self._fail(error)
            return not self._goodbye  # after a goodbye the service closes only when it is done with our memory
        except TransportError as error:
            log.warning("%s: %s", self.address, error)
            self._fail(error)
            return False

    async def _await_end(self) -> bool:
        scratch = memoryview(bytearray(64 << 10))
        try:
            while await self._connection.stream.receive_into(scratch):
                pass
            return True
        except ConnectionLost:
            return True

    async def _write(self) -> None:
        try:
            await self._connection.write_loop()
        except ConnectionLost as error:
            self._fail(error)
            self._connection.fail(error)

    async def _keep_time(self) -> None:
        """Ends calls at their deadlines, and the channel when it is idle for long. One alarm for all calls: a scope for each would cost as much as
        the rest of a call."""
        idle_s = self._limits.idle_s * 2 / 3
        while True:
            now = self._clock.monotonic()
            first = min(now + idle_s, self._end_overdue(now))
            if self._pending or self._connection.received != self._seen:
                self._seen = self._connection.received
                self._used_at = now
            elif now - self._used_at >= idle_s:
                self.close()
                return
            self._alarm = trio.Event()
            self._alarm_at = first
            with trio.move_on_after(first - now):
                await self._alarm.wait()

    def _end_overdue(self, now: float) -> float:
        """When the next deadline is. (Apart from the loop above, whose frame would keep the last call's memory alive while it sleeps.)"""
        first = math.inf
        for request_id, pending in list(self._pending.items()):
            if pending.alive and pending.deadline <= now:
                self._expire(request_id, pending)
            elif pending.alive:
                first = min(first, pending.deadline)
        return first

    def _expire(self, request_id: int, pending: _Pending) -> None:
        if pending.began == self._connection.received:
            self.suspect = True
        self._wake(pending, outcome.Error(DeadlineExceeded(f"{pending.method.full_name} at {self.address}: no answer in time")))
        self._abandon(request_id, pending)

    # --- what arrives ---

    async def resumed(self) -> None:
        """Never paused."""

    def on_frame(self, header: Header, message: memoryview) -> None:
        kind = header.kind
        if kind == Kind.REPLY or kind == Kind.REPLY_HELD:
            pending = self._asked(header)
            if pending.alive and header.status == 0 and pending.named is not None and pending.named.inline_receive:
                raise MalformedFrame(f"{pending.method.full_name}: the reply lacks its payload")
            self._finish(header.request_id, pending, self._outcome(header, message, pending), held=kind == Kind.REPLY_HELD)
        elif kind == Kind.RELEASE:
            pending = self._asked(header)
            if pending.alive:
                raise MalformedFrame("memory was released before the call was answered")
            if pending.named is not None:
                pending.named.done()
            del self._pending[header.request_id]
            if self._room:
                self._room.unpark()
        elif kind == Kind.FILE and self.peer.lends_files:
            self.files.arrived(header.request_id, self._connection.stream.taken_fds())
        elif kind == Kind.HELLO and not self._greeted.is_set():
            if header.status:
                raise _error_of(header, message)
            self.peer = self._identity.meet(pb.Hello.FromString(bytes(message)))
            self._greeted.set()
        elif kind == Kind.GOODBYE:
            self._goodbye = True
            raise ConnectionLost(f"the service closed the connection: {_error_of(header, message).message}")
        else:
            raise MalformedFrame(f"a frame of kind {kind} is out of place here")

    async def on_payload(self, header: Header, message: memoryview, receive: Receive) -> None:
        if header.kind not in (Kind.REPLY, Kind.REPLY_HELD):
            raise MalformedFrame(f"a frame of kind {header.kind} has a payload")
        pending = self._asked(header)
        result = self._outcome(header, message, pending)
        named = pending.named
        if named is None or header.status or not named.lengths:
            raise MalformedFrame(f"{pending.method.full_name}: a payload that nobody asked for")
        table = bytearray(table_bytes(len(named.lengths)))
        await receive.into([memoryview(table)])
        placed = decode_table(table, len(named.lengths))
        if any(size > room for size, room in zip(placed, named.lengths, strict=True)):
            raise MalformedFrame(f"{pending.method.full_name}: more bytes came than were asked for")
        named.placed = placed
        if receive.left != (sum(placed) if named.inline_receive else 0):
            raise MalformedFrame(f"{pending.method.full_name}: the payload's length does not match its table")
        if pending.alive and receive.left:
            await receive.into([view[:size] for view, size in zip(named.destinations(), placed, strict=True)], lambda: pending.alive)
        else:
            await receive.drop()
        self._finish(header.request_id, pending, result, held=header.kind == Kind.REPLY_HELD)

    def _asked(self, header: Header) -> _Pending:
        try:
            return self._pending[header.request_id]
        except KeyError:
            raise MalformedFrame(f"an answer to request {header.request_id}, which is not under way") from None

    def _outcome(self, header: Header, message: memoryview, pending: _Pending) -> outcome.Outcome[Any]:
        if header.status:
            return outcome.Error(_error_of(header, message))
        if not pending.alive:
            return outcome.Value(None)
        try:
            return outcome.Value(pending.method.reply.FromString(bytes(message)))
        except Exception:
            raise MalformedFrame(f"the reply to {pending.method.full_name} does not parse") from None


def _error_of(header: Header, message: memoryview) -> KvfsError:
    try:
        return from_wire(header.status, pb.ErrorReply.FromString(bytes(message)).message)
    except Exception:
        raise MalformedFrame("an error reply does not parse") from None
