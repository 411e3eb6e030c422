"""One connection of a server: the handshake, what arrives, what leaves, and when it may be closed.

Invariants: every request is answered once; requests under way are bounded (beyond the limit nothing more is read); the connection is closed only when
no handler, and no third process that was lent the caller's memory, can touch that memory any more, so that the end of the connection tells the caller
that its memory is its own again. Must never let a handler's exception out.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, Final, cast

import trio

from kvfs.common.boundary.clock import Clock
from kvfs.common.boundary.net import ByteStream
from kvfs.common.errors import (
    BadRequest,
    ConnectionLost,
    DeadlineExceeded,
    InternalError,
    KvfsError,
    MalformedFrame,
    MessageTooBig,
    Overloaded,
    TransportError,
    UnknownMethod,
    UnknownRegion,
)
from kvfs.common.transport.region import Region, Span
from kvfs.common.wire import base_pb2 as pb
from kvfs.common.wire.bulk import ServerBulk, build
from kvfs.common.wire.connection import Connection, Receive
from kvfs.common.wire.frame import Header, Kind, encode
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.lending import Lender
from kvfs.common.wire.service import Method

if TYPE_CHECKING:
    from kvfs.common.wire.server import RpcServer

log = logging.getLogger("kvfs.wire.server")

_HELD_AT_STOP_S: Final = 5.0
_MESSAGE_CHARS: Final = 4000
_REGION_SIZE_BYTES: Final = 8


class Call:
    """What a handler gets beside the request."""

    __slots__ = ("_clock", "bulk", "deadline", "files", "method", "peer")

    def __init__(self, peer: Identity, deadline: float, bulk: ServerBulk, method: Method, clock: Clock, files: Lender | None = None) -> None:
        self.peer = peer
        self.files = files
        """Lends files to this caller; None: this one gets none."""
        self.deadline = deadline
        """On the service's own monotonic clock."""
        self.bulk = bulk
        self.method = method
        self._clock = clock

    def remaining_s(self) -> float:
        return self.deadline - self._clock.monotonic()


class Peer:
    """One connection. The server keeps it in `peers` while it lasts."""

    def __init__(self, server: RpcServer, stream: ByteStream) -> None:
        self._server = server
        self._limits = server.limits
        self._connection = Connection(stream, server.limits)
        self._scope = trio.CancelScope()
        self.identity: Identity | None = None
        self._regions: dict[int, Region] = {}
        self._retired: list[Region] = []
        self._fds: list[int] = []
        self._files = Lender(self._connection, server.limits.files) if server.lends_files and stream.trusted else None
        self._handlers = 0
        self._held = 0
        """Requests answered, but with memory of the caller still in use."""
        self._moved = trio.Event()
        self.listener: trio.lowlevel.Task | None = None
        """The worker that waits in the reader's place."""
        self._seen = -1
        self.paused = False

    async def run(self) -> None:
        self._server.peers.add(self)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                nursery.start_soon(self._expect_handshake)
                with self._scope:
                    await self._read()
                await self._settle()
                nursery.cancel_scope.cancel()
        finally:
            # When the whole server is cancelled: handlers end, but memory that a third process holds is not waited for long.
            with trio.CancelScope(shield=True):
                while self._handlers:
                    await self._wait_moved()
                # The writer is gone: what the socket does not take at once cannot leave any more.
                self._connection.flush_last()
                with trio.move_on_after(_HELD_AT_STOP_S):
                    while self._held:
                        await self._wait_moved()
            self._connection.close()
            for region in [*self._regions.values(), *self._retired]:
                region.close()
            for fd in self._fds:
                os.close(fd)
            self._server.peers.discard(self)

    async def _read(self) -> None:
        try:
            await self._connection.read_loop(self)
        except ConnectionLost:
            pass
        except TransportError as error:
            log.info("%s: %s", self._connection.stream.peer, error)
            with contextlib.suppress(ConnectionLost):
                self._connection.send([error_frame(Kind.GOODBYE, 0, error)])
        except Exception:
            log.exception("%s: reading failed", self._connection.stream.peer)

    async def _write(self) -> None:
        try:
            await self._connection.write_loop()
        except ConnectionLost as error:
            self._connection.fail(error)
            self._scope.cancel()

    async def _expect_handshake(self) -> None:
        await self._server.clock.sleep(self._limits.handshake_s)
        if self.identity is None:
            self._scope.cancel()

    async def _settle(self) -> None:
        """Waits until nothing of this connection is under way: handlers are bounded by their deadlines."""
        while self._handlers or self._held:
            await self._wait_moved()
        with trio.move_on_after(self._limits.handshake_s):
            while not self._connection.drained:
                await self._server.clock.sleep(0.01)

    def close_if_idle(self) -> None:
        if self._handlers + self._held == 0 and self._connection.received == self._seen:
            self._scope.cancel()
        self._seen = self._connection.received

    async def resumed(self) -> None:
        while self.paused:
            await self._wait_moved()

    async def _wait_moved(self) -> None:
        self._moved = trio.Event()
        await self._moved.wait()

    # --- a worker in the reader's place ---

    def take_over(self, task: trio.lowlevel.Task) -> bool:
        return self._connection.take_over(task)

    def read_in_place(self) -> None:
        self._connection.read_in_place(self)

    def give_back(self) -> None:
        self._connection.stream.give_back()

    def leave(self, _raise: object) -> trio.lowlevel.Abort:
        self.give_back()
        return trio.lowlevel.Abort.SUCCEEDED

    # --- what arrives ---

    def on_frame(self, header: Header, message: memoryview) -> None:
        if header.kind == Kind.REQUEST and self.identity is not None:
            self._request(header, self._parse(header, message), None)
        elif header.kind == Kind.HELLO and self.identity is None:
            self._greet(message)
        elif header.kind == Kind.REGION and self.identity is not None:
            self._register(header, message)
        elif header.kind == Kind.FORGET_REGION and self.identity is not None:
            region = self._regions.pop(header.request_id, None)
            if region is not None:
                self._retired.append(region)
                self._close_retired()
        elif header.kind == Kind.GOODBYE:
            raise ConnectionLost("the caller said goodbye")
        else:
            raise MalformedFrame(f"a frame of kind {header.kind} is out of place here")

    async def on_payload(self, header: Header, message: memoryview, receive: Receive) -> None:
        if header.kind != Kind.REQUEST or self.identity is None:
            raise MalformedFrame(f"a frame of kind {header.kind} has a payload")
        parsed = self._parse(header, message)
        if parsed is None:
            return
        span: Span | None = None
        with trio.move_on_after(min(self._limits.payload_wait_s, header.deadline_ms / 1000)):
            span = await self._server.payload_pool().acquire(header.payload_bytes)
        if span is None:
            self.refuse(header.request_id, Overloaded("the service has no memory for the payload now"), None)
            return
        try:
            await receive.into([span.view])
        except BaseException:
            self._server.payload_pool().release(span)
            raise
        self._request(header, parsed, span)

    def _greet(self, message: memoryview) -> None:
        try:
            self.identity = self._server.identity.hear(bytes(message))
        except MalformedFrame:
            raise
        except KvfsError as error:
            self._connection.send([error_frame(Kind.HELLO, 0, error)])
            raise ConnectionLost(error.message) from None
        self._connection.send([encode(Kind.HELLO, 0, self._server.identity.hello(lends_files=self._files is not None))])

    def _register(self, header: Header, message: memoryview) -> None:
        self._fds += self._connection.stream.taken_fds()
        if not self._fds or len(message) != _REGION_SIZE_BYTES:
            raise MalformedFrame("a region came without its memory")
        fd = self._fds.pop(0)
        if header.request_id == 0 or header.request_id in self._regions or len(self._regions) >= self._limits.regions:
            os.close(fd)
            raise UnknownRegion(f"region {header.request_id} cannot be registered: taken, or above the limit of {self._limits.regions} regions")
        self._regions[header.request_id] = Region.adopt(fd, int.from_bytes(message, "little"))

    def _parse(self, header: Header, message: memoryview) -> tuple[Method, Any, Any] | None:
        """Handler and request, or None when it was refused."""
        entry = self._server.handlers.get(header.method)
        if entry is None:
            error: KvfsError = UnknownMethod(f"this {self._server.identity.role} has no method {header.method >> 8}.{header.method & 255}")
        elif header.deadline_ms == 0:
            error = DeadlineExceeded("the request came with no time left")
        else:
            try:
                return entry[0], entry[1], entry[0].request.FromString(bytes(message))
            except Exception:
                error = BadRequest(f"a {entry[0].full_name} request does not parse")
        self.refuse(header.request_id, error, None)
        return None

    def _request(self, header: Header, parsed: tuple[Method, Any, Any] | None, payload: Span | None) -> None:
        if parsed is None:
            return
        method, handler, request = parsed
        server = self._server
        request_id = header.request_id
        bulk: ServerBulk | None = None
        try:
            if method.has_bulk:
                bulk = build(request.bulk, payload, header.payload_bytes, self._regions, self._limits, server.payload_pool)
            elif payload is None:
                bulk = ServerBulk([], [], server.payload_pool)
            else:
                raise BadRequest(f"{method.full_name} takes no payload")
            call = Call(cast(Identity, self.identity), server.clock.monotonic() + header.deadline_ms / 1000, bulk, method, server.clock, self._files)
            self._handlers += 1
        except Exception as error:
            if payload is not None:
                server.payload_pool().release(payload)
            self.refuse(request_id, error, None, method)
            return
        try:
            result = handler(request, call)
        except Exception as error:
            self.refuse(request_id, error, bulk, method)
            return
        if type(result) is method.reply:
            self.answer(method, request_id, result, bulk)
        elif isinstance(result, Awaitable):
            if self._handlers + self._held >= self._limits.in_flight:
                self.paused = True
            server.run(self, method, request_id, call, result)
        else:
            self.refuse(request_id, TypeError(f"the handler gave a {type(result).__name__}"), bulk, method)

    # --- what leaves ---

    def answer(self, method: Method, request_id: int, reply: Any, bulk: ServerBulk) -> None:
        if type(reply) is not method.reply:
            self.refuse(request_id, TypeError(f"the handler gave a {type(reply).__name__}"), bulk, method)
            return
        message: bytes = reply.SerializeToString()
        if len(message) > self._limits.message_bytes:
            self.refuse(request_id, MessageTooBig(f"the reply to {method.full_name} has {len(message)} bytes: ask for less at a time"), bulk)
            return
        if not bulk.count:
            self._finish([encode(Kind.REPLY, request_id, message)], None, request_id)
            return
        payload = bulk.reply_payload()
        kind = Kind.REPLY_HELD if bulk.held() else Kind.REPLY
        frame = encode(kind, request_id, message, payload_bytes=sum(map(len, payload)))
        self._finish([frame, *payload], bulk, request_id)

    def refuse(self, request_id: int, error: Exception, bulk: ServerBulk | None, method: Method | None = None) -> None:
        """Answers with an error. `bulk` is None for a request that never counted as under way."""
        if not isinstance(error, KvfsError):
            log.error("%s failed", method.full_name if method else "a request", exc_info=error)
            error = InternalError(f"{method.full_name if method else 'the request'} failed in the service: its log says why")
        held = bulk is not None and bool(bulk.held())
        frame = error_frame(Kind.REPLY_HELD if held else Kind.REPLY, request_id, error)
        if bulk is None:
            with contextlib.suppress(ConnectionLost):
                self._connection.send([frame])
        else:
            self._finish([frame], bulk, request_id)

    def _finish(self, frame: list[bytes | memoryview], bulk: ServerBulk | None, request_id: int) -> None:
        try:
            if bulk is None:
                self._connection.send(frame)
            else:
                self._connection.send(frame, on_sent=bulk.release)
        except ConnectionLost:
            if bulk is not None:
                bulk.release()
        held = bulk.held() if bulk is not None else []
        if held:
            left = len(held)
            self._held += 1

            def freed() -> None:
                nonlocal left
                left -= 1
                if left == 0:
                    with contextlib.suppress(ConnectionLost):
                        self._connection.send([encode(Kind.RELEASE, request_id)])
                    self._held -= 1
                    self._progress()

            for span in held:
                span.when_unpinned(freed)
        self._handlers -= 1
        self._progress()

    def _progress(self) -> None:
        """Something ended: wakes whoever waits for that."""
        under_way = self._handlers + self._held
        if self.paused and under_way < self._limits.in_flight:
            self.paused = False
            self._moved.set()
        if self._handlers == 0:
            self._moved.set()
            if self._retired:
                self._close_retired()

    def _close_retired(self) -> None:
        if self._handlers + self._held == 0:
            retired, self._retired = self._retired, []
            for region in retired:
                region.close()


def error_frame(kind: Kind, request_id: int, error: KvfsError) -> bytes:
    return encode(kind, request_id, pb.ErrorReply(message=error.message[:_MESSAGE_CHARS]).SerializeToString(), status=error.code)
