"""The answering side's view of a request's bulk bytes, the same whether they lie in the caller's shared memory or came as payload.

Owns the payload memory of one request until the reply has been sent. Spans of the caller's memory are only lent: once the handler has answered they
are the caller's again, except those passed on to another service that has not answered yet; for these the reply says that the memory is
still held, and a RELEASE frame follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kvfs.common.errors import BadRequest, UnknownRegion
from kvfs.common.transport.region import BufferPool, Region, Span
from kvfs.common.wire.frame import Limits, encode_table


class ServerBulk:
    """What a handler sees: `await source()` to read what the caller sends, or `sink()` and `placed()` to answer with bytes."""

    __slots__ = ("_payload", "_placed", "_pool", "_remote", "_spans", "count", "lengths")

    def __init__(
        self, lengths: list[int], spans: list[Span], pool: Callable[[], BufferPool], payload: Span | None = None, remote: bool = False
    ) -> None:
        self.lengths = lengths
        self.count = len(lengths)
        self._spans = spans
        self._pool = pool
        self._payload = payload
        self._remote = remote
        self._placed: list[int] | None = None

    async def source(self) -> list[memoryview]:
        """The bytes that the caller sends, one readable view per span. In shared memory the caller can still change them: what is checked must be
        what is used, so take a copy where that matters."""
        return [span.view for span in self._spans]

    def sink(self) -> list[memoryview]:
        """Writable views, one per span, full length. Raises Overloaded when there is no memory for the payload."""
        if not self._spans and self.count:
            self._payload = payload = self._pool().allocate(sum(self.lengths))
            self._spans = _parts(payload, self.lengths)
        if self._placed is None:
            self._placed = self.lengths
        return [span.view for span in self._spans]

    def placed(self, lengths: Sequence[int]) -> None:
        """How many bytes of each sink are valid. Without this call: all."""
        if len(lengths) != self.count or any(not 0 <= placed <= whole for placed, whole in zip(lengths, self.lengths, strict=True)):
            raise BadRequest(f"{list(lengths)} bytes cannot have been placed in spans of {self.lengths}")
        self._placed = list(lengths)

    def spans(self, indices: Iterable[int] | None = None) -> list[Span]:
        """The same bytes for passing on (`send=`, or `receive=` after `sink()`)."""
        return list(self._spans) if indices is None else [self._spans[index] for index in indices]

    # --- for the server ---

    def reply_payload(self) -> list[bytes | memoryview]:
        """What follows the reply's message: the table of lengths, and the bytes if they do not already lie in the caller's memory."""
        if self._remote:
            if self._placed is None or self._placed is self.lengths:
                return []
            return [encode_table(self._placed)]
        if self._placed is None:
            return []
        parts: list[bytes | memoryview] = [encode_table(self._placed)]
        parts += [span.view[:size] for span, size in zip(self._spans, self._placed, strict=True) if size]
        return parts

    def held(self) -> list[Span]:
        """Spans of the caller's memory that another service may still touch."""
        return [span for span in self._spans if span.pins] if self._remote else []

    def release(self) -> None:
        """Gives the payload memory back (once no other service may touch it)."""
        payload, self._payload = self._payload, None
        if payload is not None:
            self._pool().release(payload)


def _parts(payload: Span, lengths: list[int]) -> list[Span]:
    spans = []
    offset = 0
    for length in lengths:
        spans.append(payload.part(offset, length))
        offset += length
    return spans


def build(
    message: Any, payload: Span | None, payload_bytes: int, regions: dict[int, Region], limits: Limits, pool: Callable[[], BufferPool]
) -> ServerBulk:
    """The bulk of a request that names `message` (a Bulk). Everything in it is checked here: it comes from outside."""
    lengths: list[int] = list(message.length)
    named: list[int] = list(message.region)
    offsets: list[int] = list(message.offset)
    count = len(lengths)
    if count > limits.spans or len(named) not in (0, count) or len(offsets) not in (0, count):
        raise BadRequest(f"a request names {count} spans with {len(named)} regions and {len(offsets)} offsets (limit {limits.spans})")
    total = sum(lengths)
    if total > limits.payload_bytes:
        raise BadRequest(f"a request names {total} bytes of memory: the limit is {limits.payload_bytes}")
    if any(named):
        if payload_bytes:
            raise BadRequest("a request has both a payload and regions")
        spans = []
        for number, offset, length in zip(named, offsets or [0] * count, lengths, strict=True):
            region = regions.get(number)
            if region is None:
                raise UnknownRegion(f"region {number} was not registered on this connection")
            spans.append(region.span(offset, length))
        return ServerBulk(lengths, spans, pool, remote=True)
    if payload is not None:
        if total != payload_bytes:
            raise BadRequest(f"a payload of {payload_bytes} bytes came with a request that names {total}")
        return ServerBulk(lengths, _parts(payload, lengths), pool, payload)
    return ServerBulk(lengths, [], pool)
