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
import mmap
import os
import threading
import weakref
from bisect import bisect_left, bisect_right, insort
from collections import deque
from operator import itemgetter
from typing import Any

from kvfs.client.peers import Buffer, Counters
from kvfs.common.errors import InvalidArgument, Overloaded, from_os
from kvfs.common.transport.region import BufferPool, Region, Span

ZEROS = memoryview(bytes(1 << 20))
_EMPTY = memoryview(b"")
PAGE_BYTES = mmap.PAGESIZE
_MAP_FIXED = 0x10
_mmap = ctypes.CDLL(None, use_errno=True).mmap
_mmap.restype = ctypes.c_size_t
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)


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

    def __init__(self, size_bytes: int, *, exclusive_pages: bool = False) -> None:
        """`exclusive_pages`: nothing else lies on the pages of a span that is handed out, even where it ends within one."""
        if size_bytes <= 0:
            raise InvalidArgument("a registered buffer has at least one byte")
        self.region = Region.create(size_bytes, "kvfs-registered")
        self.view = self.region.view
        self.address = ctypes.addressof(ctypes.c_ubyte.from_buffer(self.view))
        """Where the memory lies in this process: what numpy and torch say of their views of it."""
        self._exclusive = exclusive_pages
        self._forsaken: list[tuple[int, int, Span]] = []
        """(start, stop, what a service may still write into), in order; none overlap."""
        _registered.note(self)

    def __len__(self) -> int:
        return self.region.size

    def span(self, offset: int = 0, length: int | None = None) -> Span:
        return self.region.span(offset, length)

    def direct(self, offset: int, length: int) -> Span | None:
        """The span of a range that services may touch and that could be forsaken: whole pages, none of them forsaken."""
        end = offset + length
        if offset % PAGE_BYTES or (end % PAGE_BYTES and end != len(self) and not self._exclusive) or self.forsaken(offset, length):
            return None
        return self.region.span(offset, length)

    def forsaken(self, offset: int, length: int) -> bool:
        """Whether some of the range is private memory now."""
        place = bisect_left(self._forsaken, (offset + length,))
        return place > 0 and self._forsaken[place - 1][1] > offset

    def forsake(self, span: Span) -> None:
        """Take the range (a `direct` one) out of every service's reach: one that hangs may still write into it. From now on it is private memory of
        this process, of unspecified content; views of it stay valid, and what the service writes is seen by nobody."""
        start, stop = span.offset, -(-(span.offset + span.length) // PAGE_BYTES) * PAGE_BYTES
        self._map(start, stop, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        insort(self._forsaken, (start, stop, span), key=itemgetter(0))

    def restore(self, offset: int, length: int) -> None:
        """What of the range was forsaken is registered memory again, of unspecified content, unless a service may still write into it. The range is
        its caller's alone, who keeps nothing in it now. Without this, memory that lives long would be private in the end, page by page."""
        if not self._forsaken or self.region.fd is None:
            return
        kept = []
        for start, stop, span in self._forsaken:
            if offset <= start < offset + length and not span.pinned:
                self._map(start, stop, mmap.MAP_SHARED, self.region.fd, start)
            else:
                kept.append((start, stop, span))
        self._forsaken = kept

    def _map(self, start: int, stop: int, flags: int, fd: int, offset: int) -> None:
        where = _mmap(self.address + start, stop - start, mmap.PROT_READ | mmap.PROT_WRITE, flags | _MAP_FIXED, fd, offset)
        if where != self.address + start:
            raise from_os(OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno())), "replace memory that a service may still write into")

    def close(self) -> None:
        """Unregister. Views still held stay readable."""
        _registered.forget(self)
        self.region.close()

    def __enter__(self) -> RegisteredBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Registered:
    """All registered buffers of this process, by address: a view of one is recognised whoever made it. Any thread; readers see one picture."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.picture: tuple[tuple[int, ...], tuple[weakref.ref[RegisteredBuffer], ...]] = ((), ())

    def note(self, buffer: RegisteredBuffer) -> None:
        with self._lock:
            self._paint([*self._living(), buffer])

    def forget(self, buffer: RegisteredBuffer) -> None:
        with self._lock:
            self._paint([each for each in self._living() if each is not buffer])

    def _living(self) -> list[RegisteredBuffer]:
        return [buffer for ref in self.picture[1] if (buffer := ref()) is not None]

    def _paint(self, buffers: list[RegisteredBuffer]) -> None:
        buffers.sort(key=lambda buffer: buffer.address)
        self.picture = (tuple(buffer.address for buffer in buffers), tuple(weakref.ref(buffer) for buffer in buffers))


_registered = _Registered()


def registered_at(address: int, length: int) -> tuple[RegisteredBuffer, int] | None:
    """The registered buffer that holds these bytes of this process's memory, and where in it they begin."""
    starts, buffers = _registered.picture
    place = bisect_right(starts, address) - 1
    if place < 0:
        return None
    buffer = buffers[place]()
    if buffer is None or address + length > buffer.address + len(buffer):
        return None
    return buffer, address - buffer.address


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
