"""Shared memory for I/O, and its parts.

Owns `iovec`: bytes of a mapping of its own over a multiprocessing SharedMemory, which lives for as long as a part of it does, whatever happens to
the SharedMemory's name or to the caller's own mapping. A part has the buffer protocol; those that `ioring.wait` returns carry `result`.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from multiprocessing.shared_memory import SharedMemory
from typing import Any


class iovec:
    """A range of shared memory. `iov[a:b]` is a part of it; `memoryview(iov)` are its bytes."""

    _mapping: mmap.mmap
    base_off: int
    """Where it begins in the memory that `make_iovec` was given."""
    result: int = 0
    """After an I/O: bytes transferred, or -errno."""
    userdata: Any = None
    view: memoryview

    def __getitem__(self, part: slice) -> iovec:
        if not isinstance(part, slice):
            raise TypeError("an iovec is cut by slices")
        start, stop, step = part.indices(len(self.view))
        if step != 1:
            raise ValueError("step not 1 when slicing iovec")
        return _part(self._mapping, self.base_off + start, max(0, stop - start))

    def __len__(self) -> int:
        return len(self.view)


@functools.lru_cache(maxsize=256)
def _kind(length: int) -> Any:
    """Python 3.11 has no buffer protocol for classes of its own: ctypes arrays have it, one type for each length."""
    return type("iovec", (iovec, ctypes.c_ubyte * length), {})


def _part(mapping: mmap.mmap, start: int, length: int) -> iovec:
    made: iovec = _kind(length).from_buffer(mapping, start)
    made._mapping = mapping
    made.base_off = start
    made.view = mapping_view(mapping, start, length)
    return made


def mapping_view(mapping: mmap.mmap, start: int, length: int) -> memoryview:
    return memoryview(mapping)[start : start + length]


def over(shm: SharedMemory) -> iovec:
    """All of a SharedMemory, mapped once more."""
    try:
        fd = os.open(f"/dev/shm/{shm.name.lstrip('/')}", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        fd = os.dup(shm._fd)  # type: ignore[attr-defined]  # unlinked already
    try:
        size = os.fstat(fd).st_size
        return _part(mmap.mmap(fd, size), 0, size)
    finally:
        os.close(fd)
