"""Memory for file data: counted blocks of registered memory, lent out without a copy.

Owns the client's buffer pool and who holds which part of it. Invariants:
  - a block goes back to the pool when its count is zero, never while a lent view of it is alive or a service may still write into it (the
    pool sees to
    the latter);
  - nobody ever waits for registered memory, so nobody can wait for it in a circle: when the pool is empty, a block is made of private
    memory, which costs
    the channel one more copy. What is held at once is bounded by those who hold it (dirty bytes, read-ahead, reads under way).
Counting belongs to the trio thread. Lent views may die in any thread: they only put a note in `_returned`, which is safe.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from typing import Any

from kvfs.client.peers import Buffer, Counters
from kvfs.common.errors import InvalidArgument, Overloaded
from kvfs.common.transport.region import BufferPool, Region, Span

ZEROS = memoryview(bytes(1 << 20))
_EMPTY = memoryview(b"")


class Block:
    """Memory of `size` bytes with a count of its holders, one at first."""

    __slots__ = ("_memory", "refs", "size", "span", "view")

    def __init__(self, memory: Memory, view: memoryview, span: Span | None) -> None:
        self._memory = memory
        self.view = view
        self.size = len(view)
        self.span = span
        self.refs = 1

    def retain(self) -> None:
        assert self.refs > 0, "a block was retained after its end"
        self.refs += 1

    def release(self) -> None:
        assert self.refs > 0, "a block was released more often than retained"
        self.refs -= 1
        if self.refs == 0:
            self._memory._free(self)

    def part(self, start: int, length: int) -> Span | memoryview:
        """What a call may name: a part of the registered span, or of the private memory."""
        if self.span is not None:
            return self.span if start == 0 and length == self.size else self.span.part(start, length)
        return self.view[start : start + length]

    def lend(self, start: int, end: int) -> memoryview:
        """A read-only view that keeps the block for as long as it, or a view made from it, is alive. Any thread may drop it."""
        if end <= start:
            return _EMPTY
        if self.span is None:
            return self.view[start:end].toreadonly()
        anchor = (ctypes.c_ubyte * (end - start)).from_buffer(self.view, start)
        self.refs += 1
        loan = _Loan(anchor, self._memory._let_go)
        loan.block = self
        self._memory._lent[id(loan)] = loan
        return memoryview(anchor).cast("B").toreadonly()


class _Loan(weakref.ref[Any]):
    """Notices when the last view of lent memory is gone."""

    __slots__ = ("block",)
    block: Block


class Memory:
    def __init__(self, pool: BufferPool, counters: Counters) -> None:
        self.pool = pool
        self._counters = counters
        self._returned: deque[Block] = deque()
        self._lent: dict[int, _Loan] = {}

    def allocate(self, size: int) -> Block:
        """At once. Registered memory, unless there is none left."""
        self.reclaim()
        if 0 < size <= self.pool.largest_bytes:
            try:
                span = self.pool.allocate(size)
                return Block(self, span.view, span)
            except Overloaded:
                pass
        return self.private(size)

    def private(self, size: int) -> Block:
        """Memory that no service can touch."""
        self._counters.heap_blocks += 1
        return Block(self, memoryview(bytearray(size)), None)

    def _let_go(self, loan: _Loan) -> None:
        """The last view is gone, in whatever thread: single operations on a dict and a deque are safe there."""
        del self._lent[id(loan)]
        self._returned.append(loan.block)

    def reclaim(self) -> None:
        """Take back what lent views have let go."""
        returned = self._returned
        while returned:
            returned.popleft().release()

    def close(self) -> None:
        self.reclaim()
        self.pool.close()

    def _free(self, block: Block) -> None:
        if block.span is not None:
            self.pool.release(block.span)


class RegisteredBuffer:
    """Memory that services on this host read from and write into directly. `view` is all of it; `span(offset, length)` names a part in
    pread_into and pwrite."""

    def __init__(self, size_bytes: int) -> None:
        if size_bytes <= 0:
            raise InvalidArgument("a registered buffer has at least one byte")
        self.region = Region.create(size_bytes, "kvfs-registered")
        self.view = self.region.view

    def __len__(self) -> int:
        return self.region.size

    def span(self, offset: int = 0, length: int | None = None) -> Span:
        return self.region.span(offset, length)

    def close(self) -> None:
        """Unregister. Views still held stay readable."""
        self.region.close()

    def __enter__(self) -> RegisteredBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def size_of(buffer: Buffer) -> int:
    return buffer.length if isinstance(buffer, Span) else memoryview(buffer).nbytes


def bytes_of(buffer: Buffer) -> memoryview:
    """A flat view of unsigned bytes."""
    if isinstance(buffer, Span):
        return buffer.view
    view = memoryview(buffer)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def zero(view: memoryview) -> None:
    step = len(ZEROS)
    for start in range(0, len(view), step):
        part = view[start : start + step]
        part[:] = ZEROS[: len(part)]
