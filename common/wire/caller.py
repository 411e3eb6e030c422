"""The calling side: one connection to one service, and the calls under way on it.

A call ends when its answer comes, its deadline passes, its caller is cancelled or the connection is lost; whichever is first. The channel stays
usable after a call that gave up: the late answer is dropped, and its payload is never written into memory that the caller has taken back. Memory that
a service reaches by itself (spans over a unix socket) cannot be taken back so: it stays pinned (transport/region.py) until the service has
answered or has closed the connection, which it does only when it is done with the memory. So a channel that ends on this side first keeps
listening for that end while it has pins.

A channel belongs to one trio thread.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import outcome
import trio

from kvfs.common.boundary.clock import Clock
from kvfs.common.boundary.net import ByteStream, Net
from kvfs.common.errors import (
    ConnectionLost,
    KvfsError,
    MalformedFrame,
    MessageTooBig,
    TransportError,
    Unreachable,
    from_wire,
)
from kvfs.common.transport.region import BufferPool
from kvfs.common.wire import base_pb2 as pb
from kvfs.common.wire.calls import Arrivals, Calls, Pending
from kvfs.common.wire.connection import Connection, Receive
from kvfs.common.wire.frame import Header, Kind, Limits, decode_table, encode, table_bytes
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.lending import BorrowedFiles
from kvfs.common.wire.outgoing import Buffer, Memory
from kvfs.common.wire.service import Method

log = logging.getLogger("kvfs.wire.channel")

DEFAULT_LIMITS: Final = Limits()
_MAX_DEADLINE_MS: Final = 86_400_000
_LINGER_S: Final = 3600.0


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
        self._calls = Calls(self._connection, limits.in_flight)
        self._next_id = 1
        self._greeted = trio.Event()
        self._scope = trio.CancelScope()
        self._alarm = trio.Event()
        self._alarm_at = math.inf
        self._used_at = clock.monotonic()
        self._seen = -1
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

    async def call(
        self,
        method: Method,
        request: Any,
        *,
        timeout_s: float,
        send: Sequence[Buffer] = (),
        receive: Sequence[Buffer] = (),
        arrivals: Arrivals | None = None,
        sent: Callable[[], None] | None = None,
    ) -> Any:
        """The reply message. `send` or `receive` name memory whose bytes go with the request or come with the reply; the request's `bulk` field is
        filled in here. `sent` is called when the request is on its way. Raises what the service raised, or a TransportError."""
        now = self._clock.monotonic()
        calls = self._calls
        if len(calls.table) >= self._limits.in_flight:
            await calls.wait_for_room(timeout_s)
        if calls.ended is not None:
            raise ConnectionLost(f"channel to {self.address} is closed: {calls.ended.message}")
        pending = Pending(method, now + timeout_s, self._connection.received, arrivals)
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
        if pending.deadline < self._alarm_at:
            self._alarm.set()
        if sent is not None:
            sent()
        return await calls.answer(request_id, pending, self)

    @property
    def ended(self) -> KvfsError | None:
        """Why no call can be made any more."""
        return self._calls.ended

    @property
    def suspect(self) -> bool:
        """A call ran out of time while nothing at all came: the peer or the network may hang."""
        return self._calls.suspect

    @property
    def idle(self) -> bool:
        return self._calls.live == 0

    def retire(self) -> None:
        """Takes no more calls; ends when those under way have."""
        self._calls.when_idle = self.close
        if self.idle:
            self.close()

    def close(self) -> None:
        """Ends at once: calls under way fail with ConnectionLost."""
        self._fail(ConnectionLost("it was closed on this side"))
        self._scope.cancel()

    def _fail(self, error: KvfsError) -> None:
        self._calls.fail(error)
        self._greeted.set()

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
            if not ended_there and self._calls.holds_memory:
                stream.close_sending()
                with trio.move_on_after(_LINGER_S):
                    ended_there = await self._await_end()
        finally:
            self._fail(ConnectionLost("the channel's pool was closed"))
            self._connection.close()
            self._memory.close()
            self.files.close()
            if ended_there or not stream.carries_fds:
                self._calls.let_go()

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
        except Exception:
            # A fault of ours. It ends this channel, not the client with all its others.
            log.exception("%s: reading failed", self.address)
            self._fail(ConnectionLost("reading from it failed: the log says why"))
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
            first = min(now + idle_s, self._calls.end_overdue(now))
            if self._calls.table or self._connection.received != self._seen:
                self._seen = self._connection.received
                self._used_at = now
            elif now - self._used_at >= idle_s:
                self.close()
                return
            self._alarm = trio.Event()
            self._alarm_at = first
            with trio.move_on_after(first - now):
                await self._alarm.wait()

    # --- what arrives ---

    async def resumed(self) -> None:
        """Never paused."""

    def on_frame(self, header: Header, message: memoryview) -> None:
        kind = header.kind
        if kind == Kind.REPLY or kind == Kind.REPLY_HELD:
            pending = self._asked(header)
            if pending.alive and header.status == 0 and pending.named is not None and pending.named.inline_receive:
                raise MalformedFrame(f"{pending.method.full_name}: the reply lacks its payload")
            self._calls.finish(header.request_id, pending, self._outcome(header, message, pending), held=kind == Kind.REPLY_HELD)
        elif kind == Kind.RELEASE:
            pending = self._asked(header)
            if pending.alive:
                raise MalformedFrame("memory was released before the call was answered")
            self._calls.release(header.request_id, pending)
        elif kind == Kind.FILE and self.peer.lends_files:
            if header.status:
                self.files.gone(header.request_id)
            else:
                self.files.arrived(header.request_id, self._connection.stream.taken_fds())
        elif kind == Kind.HELLO and not self._greeted.is_set():
            self._greet(header, message)
        elif kind == Kind.GOODBYE:
            self._goodbye = True
            raise ConnectionLost(f"the service closed the connection: {_error_of(header, message).message}")
        else:
            raise MalformedFrame(f"a frame of kind {kind} is out of place here")

    def _greet(self, header: Header, message: memoryview) -> None:
        if header.status:
            error = _error_of(header, message)
            raise (
                error
                if isinstance(error, TransportError)
                else MalformedFrame(f"the handshake was refused with no reason of its own: {error.message}")
            )
        self.peer = self._identity.hear(bytes(message))
        self._greeted.set()

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
            views = [view[:size] for view, size in zip(named.destinations(), placed, strict=True)]
            await receive.into(views, _watch(pending, views, receive.left))
        else:
            await receive.drop()
        self._calls.finish(header.request_id, pending, result, held=header.kind == Kind.REPLY_HELD)

    def _asked(self, header: Header) -> Pending:
        try:
            return self._calls.table[header.request_id]
        except KeyError:
            raise MalformedFrame(f"an answer to request {header.request_id}, which is not under way") from None

    def _outcome(self, header: Header, message: memoryview, pending: Pending) -> outcome.Outcome[Any]:
        if header.status:
            return outcome.Error(_error_of(header, message))
        if not pending.alive:
            return outcome.Value(None)
        try:
            return outcome.Value(pending.method.reply.FromString(bytes(message)))
        except Exception:
            raise MalformedFrame(f"the reply to {pending.method.full_name} does not parse") from None


def _watch(pending: Pending, views: Sequence[memoryview], size: int) -> Callable[[int], bool]:
    """For Receive.into: whether the caller is still there, who is told of what arrived."""
    arrivals = pending.arrivals
    if arrivals is not None:
        arrivals.begin(views)

    def wanted(left: int) -> bool:
        if pending.alive and arrivals is not None:
            arrivals.arrived(size - left)
        return pending.alive

    return wanted


def _error_of(header: Header, message: memoryview) -> KvfsError:
    try:
        return from_wire(header.status, pb.ErrorReply.FromString(bytes(message)).message)
    except Exception:
        raise MalformedFrame("an error reply does not parse") from None
