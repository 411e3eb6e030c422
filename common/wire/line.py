"""A connection for threads: one call at a time, sent and answered in the calling thread.

A call through a loop crosses threads twice, and each crossing waits for a processor and for the interpreter: for a thread that waits anyway, that
is most of what the call costs. Owns the socket and what is registered on it. Invariants: a call ends within its time; after any error of the
transport the line is broken, and nothing more is sent on it; what a service answers is checked as a channel checks it. Memory that is named in a
call is only read by the service: `Line` has no way to receive bytes. It must never be used in a child of the process that made it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import parse_qs

from kvfs.common.boundary.net import Net
from kvfs.common.boundary.thread_stream import ThreadStream
from kvfs.common.errors import ConnectionLost, KvfsError, MalformedFrame, TransportError, Unreachable, from_wire
from kvfs.common.transport.region import Region, Span
from kvfs.common.wire import base_pb2 as pb
from kvfs.common.wire.frame import HEADER_BYTES, Header, Kind, Limits, check_message, decode_header, encode
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.service import Method

_BUFFER_BYTES: Final = 64 << 10
_UNIX: Final = "unix://"


def unix_address(addresses: Sequence[str], identity: Identity) -> tuple[str, str] | None:
    """(path, server's id) of a peer that can be reached through a socket of this machine; None: it cannot."""
    for address in reversed(addresses):
        where, _, query = address.partition("?")
        facts = parse_qs(query)
        if where.startswith(_UNIX) and facts.get("host") == [identity.host_id] and "server" in facts:
            return where[len(_UNIX) :], facts["server"][0]
    return None


class Line:
    """Made by `open`."""

    def __init__(self, stream: ThreadStream, identity: Identity, limits: Limits) -> None:
        self._stream = stream
        self._identity = identity
        self._limits = limits
        self._view = memoryview(bytearray(_BUFFER_BYTES))
        self._have = 0
        self._numbers: dict[Region, int] = {}
        self._gone: deque[int] = deque()
        self._busy = threading.Lock()
        self._count = 0
        self.broken = False
        self.used_s = 0.0
        """When a call last ended, on its owner's clock."""

    @classmethod
    def open(cls, net: Net, identity: Identity, path: str, server: str, *, timeout_s: float, limits: Limits) -> Line:
        """Connects and shakes hands. Raises Unreachable, WrongCluster, VersionMismatch, Unauthenticated."""
        stream = net.connect_thread(path, timeout_s=timeout_s)
        if stream is None:
            raise Unreachable(f"{path}: this network has no streams for threads")
        line = cls(stream, identity, limits)
        try:
            stream.send(encode(Kind.HELLO, 0, identity.hello()))
            header, message = line._receive()
            if header.kind != Kind.HELLO:
                raise MalformedFrame(f"a frame of kind {header.kind} came first")
            if header.status:
                raise _error_of(header, message)
            if identity.hear(message).client_id.hex() != server:
                raise Unreachable(f"another process than the one that was sought answers at {path}")
        except BaseException:
            line.close()
            raise
        return line

    def call(self, method: Method, request: Any, span: Span, *, timeout_s: float) -> Any:
        """The reply to a request that sends the bytes of a span. Raises what the service raised, or a TransportError: then it may have been done."""
        with self._busy:
            if self.broken:
                raise ConnectionLost(f"the line to {self._stream.peer} is broken")
            try:
                self._stream.within(timeout_s)
                request.bulk.length.append(span.length)
                request.bulk.region.append(self._number(span.region))
                request.bulk.offset.append(span.offset)
                self._count += 1
                number = self._count
                deadline_ms = max(1, int(timeout_s * 1000))
                self._stream.send(encode(Kind.REQUEST, number, request.SerializeToString(), method=method.key, deadline_ms=deadline_ms))
                header, message = self._answer(number)
                answer = _error_of(header, message) if header.status else _parse(method, message)
            except BaseException:  # also an interrupt: the answer would be taken for the next call's
                self.broken = True
                raise
            self._forget_gone()
        if header.status:
            raise answer
        return answer

    def close(self) -> None:
        self.broken = True
        for region in list(self._numbers):
            region.drop_on_close(self._closed)
        self._stream.close()

    # --- memory ---

    def _number(self, region: Region) -> int:
        number = self._numbers.get(region)
        if number is None:
            if region.fd is None or len(self._numbers) >= self._limits.regions // 2:
                raise ConnectionLost("no more memory can be registered on this line")
            self._count += 1
            number = self._count
            self._stream.send(encode(Kind.REGION, number, region.size.to_bytes(8, "little")), (region.fd,))
            self._numbers[region] = number
            region.on_close(self._closed)
        return number

    def _closed(self, region: Region) -> None:
        """Whoever held the memory closes it, in any thread: the service is told by whoever has the line."""
        number = self._numbers.pop(region, None)
        if number is not None:
            self._gone.append(number)
            if self._busy.acquire(blocking=False):
                try:
                    self._forget_gone()
                finally:
                    self._busy.release()

    def _forget_gone(self) -> None:
        while self._gone and not self.broken:
            try:
                self._stream.send(encode(Kind.FORGET_REGION, self._gone.popleft()))
            except TransportError:
                self.broken = True

    # --- what arrives ---

    def _answer(self, number: int) -> tuple[Header, bytes]:
        while True:
            header, message = self._receive()
            if header.kind == Kind.RELEASE:
                continue  # of an earlier call: who sends does not wait for the memory
            if header.kind == Kind.GOODBYE:
                raise ConnectionLost(f"the service closed the connection: {_error_of(header, message).message}")
            if header.kind not in (Kind.REPLY, Kind.REPLY_HELD) or header.request_id != number:
                raise MalformedFrame(f"a frame of kind {header.kind} for request {header.request_id} came as the answer to {number}")
            return header, message

    def _receive(self) -> tuple[Header, bytes]:
        """One frame."""
        self._fill(HEADER_BYTES)
        header = decode_header(self._view, 0, self._limits)
        end = HEADER_BYTES + header.message_bytes
        if header.payload_bytes or end > _BUFFER_BYTES:
            raise MalformedFrame(f"a frame with {header.message_bytes} and {header.payload_bytes} bytes is out of place here")
        self._fill(end)
        message = bytes(self._view[HEADER_BYTES:end])
        check_message(header, message)
        self._have -= end
        if self._have:
            self._view[: self._have] = bytes(self._view[end : end + self._have])
        return header, message

    def _fill(self, count: int) -> None:
        while self._have < count:
            self._have += self._stream.receive(self._view[self._have :])


def _parse(method: Method, message: bytes) -> Any:
    try:
        return method.reply.FromString(message)
    except Exception:
        raise MalformedFrame(f"the reply to {method.full_name} does not parse") from None


def _error_of(header: Header, message: bytes) -> KvfsError:
    try:
        return from_wire(header.status, pb.ErrorReply.FromString(message).message)
    except Exception:
        raise MalformedFrame("an error reply does not parse") from None
