"""Blocks on their way out: their checksums, and a copy in registered memory of those that lie elsewhere.

Owns what is done to a block before it is sent, off the client's thread where it is much. Invariants: what is hashed is what is sent, the copy where
there is one; copies are bounded in bytes, what is beyond goes as it lies (the channel has its own ways); a copy goes back to the client's pool when
no service can read it any more. Checksums that are not made here are made where the request is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from kvfs.client.file.memory import Block
from kvfs.client.file.memory import Memory as ClientMemory
from kvfs.common.checksum import checksums
from kvfs.common.helpers import helpers
from kvfs.common.transport.region import Span
from kvfs.kvcache.buffers import Memory

COPY_BYTES_MIN = 16 << 10
COPY_BYTES_MAX = 64 << 20
"""Of one put."""
INLINE_BYTES = 256 << 10
"""So much is hashed in the client's thread itself."""
PIECE_BYTES = 512 << 10
"""Copied and then hashed, while it is in the processor's cache. Whole checksum units."""


class Parcel:
    """One block of a put."""

    __slots__ = ("checksums", "copy", "memory")

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.checksums: bytes | None = None
        self.copy: Block | None = None

    @property
    def data(self) -> Span | memoryview:
        """What a request names."""
        length = len(self.memory.view)
        return self.memory.part(length) if self.copy is None else self.copy.part(0, length)

    def make(self) -> None:
        """Copy and hash. In any thread."""
        view = self.memory.view
        if self.copy is None:
            self.checksums = checksums(view)
            return
        target, sums = self.copy.view, []
        for at in range(0, len(view), PIECE_BYTES):
            piece = target[at : at + min(PIECE_BYTES, len(view) - at)]
            piece[:] = view[at : at + PIECE_BYTES]
            sums.append(checksums(piece))
        self.checksums = b"".join(sums)


def hash_registered(parcels: Sequence[Parcel]) -> None:
    """In the caller's thread: those that need no copy."""
    ready = [parcel for parcel in parcels if parcel.memory.span is not None]
    if _size(ready) > INLINE_BYTES:
        helpers().work(_pieces(ready))


async def make_ready(parcels: Sequence[Parcel], memory: ClientMemory) -> None:
    """In the client's thread, for services on this machine: the rest of the work, elsewhere if it is much."""
    left = [parcel for parcel in parcels if parcel.checksums is None]
    if _size(left) <= INLINE_BYTES:
        return
    room = COPY_BYTES_MAX
    for parcel in left:
        size = len(parcel.memory.view)
        if parcel.memory.span is None and COPY_BYTES_MIN <= size <= room and memory.pool.free_bytes // 2 >= size:
            parcel.copy = memory.allocate(size)
            room -= size
    await helpers().work_elsewhere(_pieces(left))


def give_back(parcels: Sequence[Parcel]) -> None:
    """In the client's thread."""
    for parcel in parcels:
        copy, parcel.copy = parcel.copy, None
        if copy is not None:
            copy.release()


def _size(parcels: Sequence[Parcel]) -> int:
    return sum([len(parcel.memory.view) for parcel in parcels])


def _pieces(parcels: Sequence[Parcel]) -> list[Callable[[], None]]:
    """Work of PIECE_BYTES at least."""
    pieces: list[Callable[[], None]] = []
    some: list[Parcel] = []
    size = 0
    for parcel in parcels:
        some.append(parcel)
        size += len(parcel.memory.view)
        if size >= PIECE_BYTES:
            pieces.append(partial(_make, some))
            some, size = [], 0
    if some:
        pieces.append(partial(_make, some))
    return pieces


def _make(parcels: Sequence[Parcel]) -> None:
    for parcel in parcels:
        parcel.make()
