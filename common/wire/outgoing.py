"""The calling side's memory in a request: which of it the service reaches by itself, and which travels as payload.

Over a unix socket a span is named by its region, which is registered with the connection when it is first used; plain memory above a few KiB is
staged through a small registered pool (one copy); what cannot be shared goes as payload, as everything does over TCP. A request is all one way
or all the other.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Final

import trio

from kvfs.common.errors import ConnectionLost, InvalidArgument, MessageTooBig, Overloaded
from kvfs.common.transport.region import BufferPool, Region, Span
from kvfs.common.wire.connection import Connection
from kvfs.common.wire.frame import Kind, Limits, encode
from kvfs.common.wire.lending import send_descriptor

Buffer = Span | memoryview | bytes | bytearray

_STAGE_FROM_BYTES: Final = 16 << 10


class Named:
    """The memory of one call."""

    __slots__ = ("_buffers", "_memory", "_staged", "inline_receive", "lengths", "payload", "pins", "placed")

    def __init__(self, memory: Memory, buffers: Sequence[Buffer], lengths: list[int]) -> None:
        self._memory = memory
        self._buffers = buffers
        self.lengths = lengths
        self.pins: list[Span] = []
        """Spans that the service may touch by itself."""
        self._staged: list[tuple[Span, memoryview | None]] = []
        self.payload: list[bytes | memoryview] = []
        self.inline_receive = False
        self.placed: list[int] | None = None

    def destinations(self) -> list[memoryview]:
        return [_view(part) for part in self._buffers]

    def arrived(self) -> None:
        """The service has placed its bytes and the caller is still there: brings staged ones home."""
        for index, (span, home) in enumerate(self._staged):
            if home is not None:
                size = self.placed[index] if self.placed is not None else span.length
                home[:size] = span.view[:size]

    def done(self) -> None:
        """The service cannot touch the memory any more."""
        pins, self.pins = self.pins, []
        for span in pins:
            span.unpin()
        staged, self._staged = self._staged, []
        for span, _home in staged:
            self._memory.give_back(span)


class Memory:
    """What is registered on one connection."""

    def __init__(self, connection: Connection, limits: Limits, staging: BufferPool | None) -> None:
        self._connection = connection
        self._limits = limits
        self._staging = staging if connection.stream.carries_fds else None
        self._numbers: dict[Region, int] = {}
        self._next = 1
        self._token: trio.lowlevel.TrioToken | None = None
        """Of the loop that the connection belongs to, from the first region on."""

    def name(self, bulk: Any, send: Sequence[Buffer], receive: Sequence[Buffer]) -> Named:
        """Fills in `bulk`."""
        bulk.Clear()
        buffers = send or receive
        if not buffers:
            return Named(self, (), [])
        if send and receive:
            raise InvalidArgument("one call either sends or receives bulk bytes, not both")
        lengths = [len(part) for part in buffers]
        total = sum(lengths)
        if total > self._limits.payload_bytes or len(lengths) > self._limits.spans:
            raise MessageTooBig(f"{len(lengths)} buffers of {total} bytes are above the limit of one call: make several")
        named = Named(self, buffers, lengths)
        bulk.length.extend(lengths)
        if not (self._connection.stream.carries_fds and self._share(named, bulk, bool(send), total)):
            if send:
                named.payload = [_view(part) for part in send if len(part)]
            else:
                named.inline_receive = True
        return named

    def _share(self, named: Named, bulk: Any, sending: bool, total: int) -> bool:
        plain = not all(type(part) is Span for part in named._buffers)
        if plain and (total < _STAGE_FROM_BYTES or self._staging is None):
            return False
        numbers: list[int] = []
        offsets: list[int] = []
        try:
            for part in named._buffers:
                if type(part) is Span:
                    span = part
                    span.pin()
                    named.pins.append(span)
                    if plain:
                        named._staged.append((_NO_SPAN, None))
                else:
                    assert self._staging is not None
                    view = _view(part)
                    span = self._staging.allocate(view.nbytes)
                    named._staged.append((span, None if sending else view))
                    span.pin()
                    named.pins.append(span)
                    if sending:
                        span.view[:] = view
                numbers.append(self._number(span.region))
                offsets.append(span.offset)
        except (Overloaded, InvalidArgument, ConnectionLost) as error:
            named.done()
            if isinstance(error, ConnectionLost):
                raise
            return False
        bulk.region.extend(numbers)
        bulk.offset.extend(offsets)
        return True

    def _number(self, region: Region) -> int:
        number = self._numbers.get(region)
        if number is None:
            if region.fd is None or len(self._numbers) >= self._limits.regions // 2:
                raise Overloaded("this memory cannot be registered")
            number = self._next
            self._next += 1
            fd = os.dup(region.fd)  # of its own: the frame may still wait to be sent when the region is closed
            send_descriptor(self._connection, encode(Kind.REGION, number, region.size.to_bytes(8, "little")), fd)
            self._numbers[region] = number
            if self._token is None:
                self._token = trio.lowlevel.current_trio_token()
            region.on_close(self._closed)
        return number

    def _closed(self, region: Region) -> None:
        """Whoever held the memory closes it, in any thread; only the loop's own thread touches the connection."""
        try:
            if trio.lowlevel.current_trio_token() is self._token:
                self._forget(region)
                return
        except RuntimeError:
            pass  # a thread without a loop
        try:
            if self._token is not None:
                self._token.run_sync_soon(self._forget, region)
        except trio.RunFinishedError:
            pass  # and the connection with it

    def _forget(self, region: Region) -> None:
        number = self._numbers.pop(region, None)
        if number is not None and self._connection.dead is None:
            try:
                self._connection.send([encode(Kind.FORGET_REGION, number)])
            except ConnectionLost:
                pass  # the service forgets with the connection

    def give_back(self, span: Span) -> None:
        if span is not _NO_SPAN and self._staging is not None:
            self._staging.release(span)

    def close(self) -> None:
        numbers, self._numbers = self._numbers, {}
        for region in numbers:
            region.drop_on_close(self._closed)


def _view(part: Buffer) -> memoryview:
    if type(part) is Span:
        return part.view
    view = memoryview(part)  # type: ignore[arg-type]
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


_NO_SPAN: Final = Span(Region.private(1), 0, 0)
