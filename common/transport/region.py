"""Registered memory: regions, spans of them, and the pool that hands spans out.

A region is a memfd mapped here; its descriptor can be passed to a service on the same machine, which then moves bytes in and out of it without a
copy. It is sealed against shrinking and growing, so that nobody who maps it can be made to fault.

Who may touch a span: its holder, until it is named in a call; from then on also the other side, until the call is answered or the connection has
ended on that side. The channel marks that time with `pin` and `unpin`. A caller that gives up early (cancelled, out of time) gets its exception at
once, but the span stays pinned: `BufferPool.release` of a pinned span keeps it out of the pool until the last pin goes, so memory is never handed
out while a service may still write into it. A holder of a span that is not from a pool asks `span.pinned` before it uses the bytes again.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections import deque
from collections.abc import Callable
from typing import Final

import trio

from kvfs.common.errors import InvalidArgument, Overloaded, UnknownRegion, from_os

_ADD_SEALS: Final = 1033
_GET_SEALS: Final = 1034
_SEAL_SHRINK: Final = 0x0002
_SEAL_GROW: Final = 0x0004
MAX_REGION_BYTES: Final = 1 << 40


class Region:
    """Memory of `size` bytes. `fd` is None for memory that no other process can map (simulation)."""

    __slots__ = ("__weakref__", "_map", "_on_close", "fd", "size", "view")

    def __init__(self, memory: mmap.mmap | bytearray, fd: int | None) -> None:
        self._map = memory
        self.view = memoryview(memory)
        self.size = len(self.view)
        self.fd = fd
        self._on_close: list[Callable[[Region], None]] = []

    @classmethod
    def create(cls, size_bytes: int, name: str = "kvfs") -> Region:
        try:
            fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise from_os(error, "make shared memory") from error
        try:
            os.ftruncate(fd, size_bytes)
            fcntl.fcntl(fd, _ADD_SEALS, _SEAL_SHRINK | _SEAL_GROW)
            return cls(mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE), fd)
        except OSError as error:
            os.close(fd)
            raise from_os(error, f"make shared memory of {size_bytes} bytes") from error

    @classmethod
    def adopt(cls, fd: int, size_bytes: int) -> Region:
        """Maps memory that another process made. Takes the descriptor over, also on failure. Refuses what could fault later: a file that is
        not sealed against shrinking, or is shorter than it claims."""
        try:
            if not 0 < size_bytes <= MAX_REGION_BYTES or os.fstat(fd).st_size < size_bytes:
                raise UnknownRegion(f"a region of {size_bytes} bytes does not fit the memory that came with it")
            if not fcntl.fcntl(fd, _GET_SEALS) & _SEAL_SHRINK:
                raise UnknownRegion("the region's memory is not sealed against shrinking")
            return cls(mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE), fd)
        except OSError as error:
            os.close(fd)
            raise UnknownRegion(f"the region's memory cannot be mapped: {error.strerror or error}") from None
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def private(cls, size_bytes: int) -> Region:
        """Memory of this process alone: what the simulated transport uses."""
        return cls(bytearray(size_bytes), None)

    def span(self, offset: int = 0, length: int | None = None) -> Span:
        if length is None:
            length = self.size - offset
        if offset < 0 or length < 0 or offset + length > self.size:
            raise UnknownRegion(f"bytes {offset} to {offset + length} lie outside a region of {self.size} bytes")
        return Span(self, offset, length)

    def on_close(self, callback: Callable[[Region], None]) -> None:
        self._on_close.append(callback)

    def drop_on_close(self, callback: Callable[[Region], None]) -> None:
        if callback in self._on_close:
            self._on_close.remove(callback)

    def close(self) -> None:
        """Unmaps, unless views of it are still held: then the memory goes with the last of them."""
        callbacks, self._on_close = self._on_close, []
        for callback in callbacks:
            callback(self)
        fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)
        try:
            self.view.release()
            if isinstance(self._map, mmap.mmap):
                self._map.close()
        except BufferError:
            pass  # someone holds a view: the garbage collector unmaps when it goes


class Span:
    """`length` bytes of a region from `offset`. Parts of a span share its pins."""

    __slots__ = ("_root", "_when_unpinned", "length", "offset", "pins", "region")

    def __init__(self, region: Region, offset: int, length: int, root: Span | None = None) -> None:
        self.region = region
        self.offset = offset
        self.length = length
        self._root = root
        self.pins = 0
        self._when_unpinned: list[Callable[[], None]] | None = None

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return f"Span(offset={self.offset}, length={self.length}, pins={(self._root or self).pins})"

    @property
    def view(self) -> memoryview:
        return self.region.view[self.offset : self.offset + self.length]

    def part(self, offset: int, length: int) -> Span:
        if offset < 0 or length < 0 or offset + length > self.length:
            raise InvalidArgument(f"bytes {offset} to {offset + length} lie outside a span of {self.length} bytes")
        return Span(self.region, self.offset + offset, length, self._root or self)

    @property
    def pinned(self) -> bool:
        """Whether another process may still touch the bytes."""
        return (self._root or self).pins > 0

    def pin(self) -> None:
        (self._root or self).pins += 1

    def unpin(self) -> None:
        root = self._root or self
        assert root.pins > 0, f"{root!r} unpinned more often than pinned"
        root.pins -= 1
        if root.pins == 0 and root._when_unpinned:
            callbacks, root._when_unpinned = root._when_unpinned, None
            for callback in callbacks:
                callback()

    def when_unpinned(self, callback: Callable[[], None]) -> None:
        """Calls back once no other process may touch the bytes: at once, if that is so now."""
        root = self._root or self
        if root.pins == 0:
            callback()
        elif root._when_unpinned is None:
            root._when_unpinned = [callback]
        else:
            root._when_unpinned.append(callback)


class BufferPool:
    """Spans of one region by a buddy scheme: sizes are rounded up to a power of two, at least 4 KiB. Bounded: never more than `total_bytes`.

    The span has the length asked for. Not thread-safe: it belongs to one trio thread.
    """

    def __init__(self, total_bytes: int, *, region: Region | None = None, max_waiting: int = 4096, name: str = "kvfs-pool") -> None:
        self._order_max = max(0, (total_bytes // _UNIT).bit_length() - 1)
        top = _UNIT << self._order_max
        self.total_bytes = max(top, total_bytes // top * top)
        self.region = region if region is not None else Region.create(self.total_bytes, name)
        # Dictionaries as ordered sets: what was freed last is taken first. Memory that was never touched costs a millisecond a MiB.
        self._free: list[dict[int, None]] = [{} for _ in range(self._order_max + 1)]
        self._free[self._order_max] = dict.fromkeys(range(0, self.total_bytes, top))
        self._held: dict[int, tuple[int, Span]] = {}
        self._waiting: deque[trio.Event] = deque()
        self._max_waiting = max_waiting
        self.free_bytes = self.total_bytes
        self._closed = False

    @property
    def largest_bytes(self) -> int:
        """The largest span that can ever be had."""
        return _UNIT << self._order_max

    def allocate(self, length: int) -> Span:
        """At once, or Overloaded."""
        span = self._take(length)
        if span is None:
            raise Overloaded(f"no {length} bytes free in a buffer pool of {self.total_bytes} bytes")
        return span

    async def acquire(self, length: int) -> Span:
        """Waits its turn (first come, first served). Bound the wait with a trio scope."""
        await trio.lowlevel.checkpoint_if_cancelled()
        span = self._take(length) if not self._waiting else None
        if span is not None:
            return span
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(f"{self._max_waiting} others wait for buffers already")
        event = trio.Event()
        self._waiting.append(event)
        try:
            while span is None:
                await event.wait()
                if self._closed:
                    raise Overloaded("the buffer pool was closed")
                span = self._take(length)
                if span is None:
                    self._waiting[0] = event = trio.Event()
            return span
        finally:
            self._waiting.remove(event)
            self._wake()

    def release(self, span: Span) -> None:
        """Gives a span (as it was allocated, not a part) back. A pinned one comes free when its last pin goes."""
        held = self._held.get(span.offset)
        if held is None or held[1] is not span:
            raise InvalidArgument(f"{span!r} is not held from this pool")
        if span.pins:
            span.when_unpinned(lambda: self._give(span))
        else:
            self._give(span)

    def close(self) -> None:
        self._closed = True
        for event in self._waiting:
            event.set()
        self.region.close()

    def _take(self, length: int) -> Span | None:
        if self._closed:
            raise Overloaded("the buffer pool was closed")
        order = max(0, (max(length, 1) - 1).bit_length() - _UNIT_BITS)
        if order > self._order_max:
            raise InvalidArgument(f"a buffer of {length} bytes is more than this pool can ever give ({self.largest_bytes})")
        have = order
        while not self._free[have]:
            have += 1
            if have > self._order_max:
                return None
        offset, _ = self._free[have].popitem()
        while have > order:
            have -= 1
            self._free[have][offset + (_UNIT << have)] = None
        span = Span(self.region, offset, length)
        self._held[offset] = (order, span)
        self.free_bytes -= _UNIT << order
        return span

    def _give(self, span: Span) -> None:
        offset = span.offset
        order, _ = self._held.pop(offset)
        self.free_bytes += _UNIT << order
        while order < self._order_max:
            buddy = offset ^ (_UNIT << order)
            if buddy not in self._free[order]:
                break
            del self._free[order][buddy]
            offset = min(offset, buddy)
            order += 1
        self._free[order][offset] = None
        self._wake()

    def _wake(self) -> None:
        if self._waiting:
            self._waiting[0].set()


_UNIT: Final = 4096
_UNIT_BITS: Final = 12
