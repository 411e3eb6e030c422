"""Checksums of bytes that a service sends, made while they arrive: each unit is hashed as soon as it is whole, in the processor's cache still.

Owns what has been hashed of one request's memory. Invariants: a unit is hashed once, after its last byte came, from the memory that its caller will
look at; `of` answers only for what was hashed so, and None sends the caller to hash for himself. It must never decide what is right: storage_reads
compares.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvfs.common.checksum import CHECKSUM_UNIT_BYTES, checksums_of


class ArrivingSums:
    def __init__(self, offsets: Sequence[int]) -> None:
        """Where in its chunk each of the request's reads begins. Those that begin inside a unit are left to the caller."""
        self._offsets = offsets
        self._views: Sequence[memoryview] = ()
        self._sums: list[list[bytes]] = []
        self._at = 0
        """The view that is arriving ..."""
        self._before = 0
        """... the bytes of those before it ..."""
        self._hashed = 0
        """... and how much of it is hashed."""

    def begin(self, views: Sequence[memoryview]) -> None:
        """Bytes will arrive here, in this order: one view for each read, as long as what is sent of it."""
        self._views = views
        self._sums = [[] for _ in views]

    def arrived(self, count: int) -> None:
        """So many bytes of all are here."""
        views = self._views
        while self._at < len(views):
            view = views[self._at]
            here = min(len(view), count - self._before)
            whole = here if here == len(view) else here - here % CHECKSUM_UNIT_BYTES
            if whole > self._hashed and self._offsets[self._at] % CHECKSUM_UNIT_BYTES == 0:
                self._sums[self._at].append(checksums_of((view[self._hashed : whole],)))
                self._hashed = whole
            if here < len(view):
                return
            self._before += here
            self._hashed = 0
            self._at += 1

    def of(self, place: int, length: int) -> bytes | None:
        """The checksum list of the first `length` bytes of a read, if they arrived here and were hashed."""
        if place >= self._at or len(self._views[place]) != length or self._offsets[place] % CHECKSUM_UNIT_BYTES:
            return None
        return b"".join(self._sums[place])
