"""The answering side: listens, shakes hands, and runs handlers for the requests that come.

A handler object has one method per RPC, by its snake-case name, called as `handler.read(request, call)`. It may be a plain `def` that returns the
reply (run inline in the connection's reader: the fast way for what never waits), an `async def` (run in a worker task), or a `def` that returns
either a reply or an awaitable. A handler runs to its end even if the caller's connection is lost; past its deadline and a grace it is cancelled.

Invariants: every request is answered once; requests under way are bounded per connection; a connection is closed only when no handler can touch the
caller's memory any more, so that the end of the connection tells the caller that its memory is its own again. An exception of a handler never
ends the server.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Awaitable, Sequence
from typing import Any, Final, cast

import trio

from kvfs.common.boundary.clock import Clock
from kvfs.common.boundary.net import ByteStream, Listener, Net
from kvfs.common.errors import (
    BadRequest,
    ConnectionLost,
    DeadlineExceeded,
    InternalError,
    KvfsError,
    MalformedFrame,
    MessageTooBig,
    Overloaded,
    ServiceStopping,
    TransportError,
    UnknownMethod,
    UnknownRegion,
)
from kvfs.common.transport.region import BufferPool, Region, Span
from kvfs.common.wire import base_pb2 as pb
from kvfs.common.wire.bulk import ServerBulk, build
from kvfs.common.wire.connection import Connection, Receive
from kvfs.common.wire.frame import Header, Kind, Limits, encode
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.service import SERVICES, Method

log = logging.getLogger("kvfs.wire.server")

DEADLINE_GRACE_S: Final = 1.0
_HELD_AT_STOP_S: Final = 5.0
_MESSAGE_CHARS: Final = 4000
_NO_BULK: Final = pb.Bulk()
_REGION_SIZE_BYTES: Final = 8


class Call:
    """What a handler gets beside the request."""

    __slots__ = ("_clock", "bulk", "deadline", "method", "peer")

    def __init__(self, peer: Identity, deadline: float, bulk: ServerBulk, method: Method, clock: Clock) -> None:
        self.peer = peer
        self.deadline = deadline
        """On the service's own monotonic clock."""
        self.bulk = bulk
        self.method = method
        self._clock = clock

    def remaining_s(self) -> float:
        return self.deadline - self._clock.monotonic()


class RpcServer:
    def __init__(self, net: Net, clock: Clock, identity: Identity, *, limits: Limits = Limits()) -> None:  # noqa: B008 (frozen)
        self.net = net
        self.clock = clock
        self.identity = identity
        self.limits = limits
        self.handlers: dict[int, tuple[Method, Any]] = {}
        self.services: dict[str, object] = {}
        self._pool: BufferPool | None = None
        self._workers: trio.Nursery | None = None
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._peers: set[_Peer] = set()

    def add(self, service: str, handler: object, methods: dict[str, Method] | None = None) -> None:
        """Serves `handler` as `service`. A method it lacks answers UnknownMethod. `methods` is for services outside the product's table (tests)."""
        self.services[service] = handler
        for method in (methods if methods is not None else SERVICES[service]).values():
            function = getattr(handler, method.attribute, None)
            if function is not None:
                self.handlers[method.key] = (method, function)

    @property
    def connections(self) -> list[Identity]:
        """Who is connected now."""
        return [peer.identity for peer in self._peers if peer.identity is not None]

    async def serve(self, addresses: Sequence[str], *, task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled. Starts with the list of real addresses, which is what others are to be told."""
        listeners: list[Listener] = []
        try:
            for address in addresses:
                listeners.append(await self.net.listen(address))
            async with trio.open_nursery() as workers:
                self._workers = workers
                async with trio.open_nursery() as nursery:
                    for listener in listeners:
                        nursery.start_soon(self._accept, listener, nursery)
                    nursery.start_soon(self._close_idle)
                    nursery.start_soon(self._end_overdue)
                    task_status.started([self._public(listener.address) for listener in listeners])
        finally:
            with trio.CancelScope(shield=True):
                for listener in listeners:
                    await listener.aclose()
            self._idle.clear()
            if self._pool is not None:
                self._pool.close()

    def _public(self, address: str) -> str:
        """A unix address means something on this machine and to this process only: it says which."""
        if address.startswith("unix://") and self.identity.client_id:
            return f"{address}?host={self.identity.host_id}&server={self.identity.client_id.hex()}"
        return address

    def payload_pool(self) -> BufferPool:
        if self._pool is None:
            self._pool = BufferPool(self.limits.payload_pool_bytes, name="kvfs-payload")
        return self._pool

    async def _accept(self, listener: Listener, nursery: trio.Nursery) -> None:
        while True:
            stream = await listener.accept()
            if len(self._peers) >= self.limits.connections:
                log.warning("refused %s: %d connections are open already", stream.peer, len(self._peers))
                stream.close()
                continue
            nursery.start_soon(_Peer(self, stream).run)

    async def _close_idle(self) -> None:
        while True:
            await self.clock.sleep(self.limits.idle_s / 2)
            for peer in list(self._peers):
                peer.close_if_idle()

    def run(self, peer: _Peer, method: Method, request_id: int, call: Call, awaitable: Awaitable[Any]) -> None:
        """Hands an awaitable to a worker task."""
        job = (peer, method, request_id, call, awaitable)
        if self._idle:
            worker = self._idle.pop()
            worker.job = job
            trio.lowlevel.reschedule(worker.task)
        else:
            assert self._workers is not None
            self._workers.start_soon(self._work, _Worker(job))

    async def _work(self, worker: _Worker) -> None:
        worker.task = trio.lowlevel.current_task()
        with worker.scope:
            while (job := worker.job) is not None:
                self._busy.add(worker)
                peer, method, request_id, call, awaitable = job
                try:
                    reply = await awaitable
                    peer.answer(method, request_id, reply, call.bulk)
                except Exception as error:
                    peer.refuse(request_id, error, call.bulk, method)
                except BaseException:
                    if worker.overdue:
                        peer.refuse(request_id, DeadlineExceeded(f"{method.full_name} did not finish within its deadline"), call.bulk)
                    else:
                        peer.refuse(request_id, ServiceStopping("the service is stopping"), call.bulk)
                    raise
                finally:
                    self._busy.discard(worker)
                worker.job = job = peer = call = awaitable = reply = None  # type: ignore[assignment]  # an idle worker keeps nothing alive
                if len(self._idle) >= self.limits.in_flight or worker.overdue:
                    return
                self._idle.append(worker)
                await trio.lowlevel.wait_task_rescheduled(worker.give_up(self._idle))

    async def _end_overdue(self) -> None:
        """Cancels handlers past their deadline and the grace. One look at all of them now and then: a timer for each would cost a tenth of a call."""
        while True:
            await self.clock.sleep(DEADLINE_GRACE_S / 2)
            now = self.clock.monotonic()
            for worker in [worker for worker in self._busy if worker.job is not None and worker.job[3].deadline + DEADLINE_GRACE_S / 2 <= now]:
                worker.overdue = True
                worker.scope.cancel()


_Job = tuple["_Peer", Method, int, Call, Awaitable[Any]]


class _Worker:
    __slots__ = ("job", "overdue", "scope", "task")

    task: trio.lowlevel.Task

    def __init__(self, job: _Job) -> None:
        self.job: _Job | None = job
        self.overdue = False
        self.scope = trio.CancelScope()

    def give_up(self, idle: list[_Worker]) -> Any:
        def abort(_raise: object) -> trio.lowlevel.Abort:
            if self in idle:
                idle.remove(self)
            return trio.lowlevel.Abort.SUCCEEDED

        return abort


class _Peer:
    """One connection."""

    def __init__(self, server: RpcServer, stream: ByteStream) -> None:
        self._server = server
        self._limits = server.limits
        self._connection = Connection(stream, server.limits)
        self._scope = trio.CancelScope()
        self.identity: Identity | None = None
        self._regions: dict[int, Region] = {}
        self._retired: list[Region] = []
        self._fds: list[int] = []
        self._handlers = 0
        self._held = 0
        """Requests answered, but with memory of the caller still in use."""
        self._moved = trio.Event()
        self._seen = -1
        self.paused = False

    async def run(self) -> None:
        self._server._peers.add(self)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                nursery.start_soon(self._expect_handshake)
                with self._scope:
                    await self._read()
                await self._settle()
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(
                shield=True
            ):  # the whole server is cancelled: handlers end, but memory that a third process holds is not waited for long
                while self._handlers:
                    await self._wait_moved()
                # The writer is gone: what is queued can not leave any more, and waiting for it would only make stopping slow.
                with trio.move_on_after(_HELD_AT_STOP_S):
                    while self._held:
                        await self._wait_moved()
            self._connection.close()
            for region in [*self._regions.values(), *self._retired]:
                region.close()
            for fd in self._fds:
                os.close(fd)
            self._server._peers.discard(self)

    async def _read(self) -> None:
        try:
            await self._connection.read_loop(self)
        except ConnectionLost:
            pass
        except TransportError as error:
            log.info("%s: %s", self._connection.stream.peer, error)
            with contextlib.suppress(ConnectionLost):
                self._connection.send([_error_frame(Kind.GOODBYE, 0, error)])
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
            self.identity = self._server.identity.meet(pb.Hello.FromString(bytes(message)))
        except KvfsError as error:
            self._connection.send([_error_frame(Kind.HELLO, 0, error)])
            raise ConnectionLost(error.message) from None
        except Exception:
            raise MalformedFrame("the first message is no Hello") from None
        self._connection.send([encode(Kind.HELLO, 0, self._server.identity.hello())])

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
            bulk = build(
                request.bulk if method.has_bulk else _NO_BULK, payload, header.payload_bytes, self._regions, self._limits, server.payload_pool
            )
            call = Call(cast(Identity, self.identity), server.clock.monotonic() + header.deadline_ms / 1000, bulk, method, server.clock)
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
        frame = _error_frame(Kind.REPLY_HELD if held else Kind.REPLY, request_id, error)
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


def _error_frame(kind: Kind, request_id: int, error: KvfsError) -> bytes:
    return encode(kind, request_id, pb.ErrorReply(message=error.message[:_MESSAGE_CHARS]).SerializeToString(), status=error.code)
