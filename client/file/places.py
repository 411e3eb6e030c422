"""Where the bytes of open files lie on this machine's disks, for a short time: reading without asking the service for each read.

`Places` (one a file) holds what the storage told, a slot for each piece of at most 1 MiB; `PlaceTable` (one a client) keeps their number bounded;
`Reach` (one a handle) says how much to ask for at a time. Invariants:
  - a slot is used for at most `STALE_S` from before it was asked for, and only while nothing was heard of, or made, that changes the file
    (`FileState.token`), and while the attribute lease runs: when it is over nobody tells us of changes any more. The same rule under which a reader
    may use bytes that were read ahead;
  - a slot never covers bytes that this client has written and the storage has not acknowledged;
  - no byte is given whose checksum was not verified; a slot whose bytes were replaced is dropped, and the caller asks the service.
Slots are made in the client's thread; any thread may read through them.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import NamedTuple

import trio

from kvfs.client.file.dirty import DirtyChunks
from kvfs.client.peers import Counters
from kvfs.client.place import Place, Read
from kvfs.client.placement import Placement
from kvfs.client.storage_client import StorageClient
from kvfs.client.storage_places import ChunkRange
from kvfs.common.boundary.clock import Clock

MIB = 1 << 20
STALE_S = 0.2
"""What is borrowed, bytes or places, is asked for anew after so long."""
SLOT_BYTES = MIB
SLOTS_MAX = 16_384
"""All files together: about 10 MB."""
REST_S = 1.0
"""Where no places are told, none are asked for so long."""
AHEAD_FIRST_BYTES = 4 * MIB
AHEAD_GROWTH = 4
AHEAD_MAX_BYTES = 64 * MIB
AROUND_MAX = 64
"""Slots asked for at once for a reader who jumps about ..."""
AROUND_DOUBTED = 32
"""... and from so many on only if it found something in those it had."""


class _Slot(NamedTuple):
    place: Place
    chunk_start: int
    """File offset of the chunk's first byte."""
    stop: int
    """The slot is good for file offsets below this: its end, or the file's end when it was made."""
    token: int
    until: float


class Places:
    def __init__(self, table: PlaceTable, placement: Placement, dirty: DirtyChunks, lease_end: Callable[[], float]) -> None:
        self._table = table
        self._lease_end = lease_end
        self._placement = placement
        self._dirty = dirty
        size = placement.chunk_size
        self.slot_bytes = SLOT_BYTES if size > SLOT_BYTES and size % SLOT_BYTES == 0 else size
        self._slots: dict[int, _Slot] = {}
        self._asking: dict[int, trio.Event] = {}
        """Keys that are being asked for, so that reads side by side ask once."""
        self._rests_until = -inf
        self.hits = 0
        """Reads that found a place; counted without a lock."""

    @property
    def resting(self) -> bool:
        """Whether it is not worth asking: none were told a moment ago."""
        return self._table.now() < self._rests_until

    def read(self, offset: int, into: memoryview, token: int, *, nowait: bool = False) -> int:
        """Bytes filled in from `offset` of the file on. Fewer than there is room for: the rest is for others to read, here is no place to be had (or
        `nowait` and it would wait, or the file ends)."""
        size = len(into)
        now = self._table.now()
        if now >= self._lease_end():
            return 0
        done = 0
        while done < size:
            at = offset + done
            key = at // self.slot_bytes
            slot = self._slots.get(key)
            if slot is None or slot.token != token or now >= slot.until or at >= slot.stop:
                break
            count = min(size - done, slot.stop - at)
            outcome = slot.place.read(at - slot.chunk_start, into if count == size else into[done : done + count], nowait=nowait)
            if outcome is not Read.DONE:
                if outcome is Read.STALE:
                    self._table.counters.places_stale += 1
                    self._slots.pop(key, None)
                break
            done += count
        if done:
            self.hits += 1
            self._table.counters.direct_bytes += done
        return done

    def covers(self, offset: int, token: int) -> bool:
        return self._good(self._slots.get(offset // self.slot_bytes), offset, token)

    def until(self, offset: int, end: int) -> float:
        """Until when what was read of [offset, end) just now may be used."""
        keys = range(offset // self.slot_bytes, -(-end // self.slot_bytes))
        until = min((slot.until if (slot := self._slots.get(key)) is not None else -inf for key in keys), default=-inf)
        return min(until, self._lease_end())

    def _good(self, slot: _Slot | None, offset: int, token: int) -> bool:
        return slot is not None and slot.token == token and offset < slot.stop and self._table.now() < slot.until

    async def fetch(self, start: int, stop: int, length: int, token: Callable[[], int]) -> None:
        """Ask where [start, stop) of a file of that length lies, as far as that is not known."""
        size = self.slot_bytes
        chunk_size = self._placement.chunk_size
        told_for = token()  # before the question: what changes meanwhile makes the answer stale
        until = self._table.now() + STALE_S
        keys, ranges = [], []
        others: set[trio.Event] = set()
        for key in range(start // size, -(-min(stop, length) // size)):
            first = key * size
            if key in self._asking:
                others.add(self._asking[key])
                continue
            if self._good(self._slots.get(key), first, told_for) or self._dirty.any(first, first + size):
                continue
            index, offset = divmod(first, chunk_size)
            keys.append(key)
            ranges.append(ChunkRange(self._placement.chain(index), self._placement.chunk(index), offset, min(size, chunk_size - offset)))
        if keys:
            told = trio.Event()
            self._asking.update(dict.fromkeys(keys, told))
            try:
                found = await self._table.storage.places(ranges)
            finally:
                told.set()
                for key in keys:
                    del self._asking[key]
            if token() == told_for:
                self._table.make_room(self, len(keys))
                for key, wanted, place in zip(keys, ranges, found, strict=True):
                    if place is not None:
                        first = key * size
                        self._slots[key] = _Slot(place, first - wanted.offset, min(first + size, length), told_for, until)
            if all(place is None for place in found):
                self._rests_until = self._table.now() + REST_S
        for event in others:
            await event.wait()

    def clear(self) -> None:
        self._slots = {}
        self._table.left(self)

    def __len__(self) -> int:
        return len(self._slots)


class PlaceTable:
    def __init__(self, storage: StorageClient, clock: Clock, counters: Counters) -> None:
        self.storage = storage
        self.counters = counters
        self.now = clock.monotonic
        self._files: dict[Places, None] = {}

    def make_room(self, places: Places, count: int) -> None:
        """That many slots are about to be added: when they would be too many, all others go (they live for STALE_S anyway)."""
        if sum(map(len, self._files)) + count > SLOTS_MAX:
            for other in list(self._files):
                other.clear()
        self._files[places] = None

    def left(self, places: Places) -> None:
        self._files.pop(places, None)


class Reach:
    """How much a handle asks for: further and further ahead while it goes on reading, larger and larger neighbourhoods while it jumps about."""

    __slots__ = ("_ahead", "_around", "_end", "_hits", "_start", "_token", "more_at")

    def __init__(self) -> None:
        self._start = 0
        self._end = 0
        self._ahead = 0
        self._around = 1
        self._hits = 0
        self._token: int | None = None
        self.more_at = inf
        """A reader who gets so far may have `more` asked for, before it has to wait for it."""

    def next(self, places: Places, offset: int, end: int, token: int) -> tuple[int, int]:
        """What to ask for when [offset, end) is read and not known: the range, of whole slots. `token`: while it changes from one question to the
        next, because the file is being written, no more is asked for than is read."""
        slot = places.slot_bytes
        changed = self._token not in (None, token)
        self._token = token
        if changed:
            self._around, self._ahead = 1, 0
            start, stop = offset - offset % slot, end
            self.more_at = inf
        elif self._start < offset <= self._end or offset == 0:
            # By what was used of the last range: that one ran out, or it grew old.
            self._ahead = max(AHEAD_FIRST_BYTES, min(AHEAD_GROWTH * (offset - self._start), AHEAD_MAX_BYTES))
            start = offset - offset % slot
            stop = max(end, start + self._ahead)
            self.more_at = stop - self._ahead // 2
        else:
            useless = places.hits == self._hits and self._around >= AROUND_DOUBTED
            self._around = self._around // 4 if useless else min(2 * self._around, AROUND_MAX)
            around = self._around * slot
            start = offset - offset % around
            stop = max(end, start + around)
            self.more_at = inf
        self._hits = places.hits
        self._start, self._end = start, -(-stop // slot) * slot
        return self._start, self._end

    def more(self, places: Places, offset: int) -> tuple[int, int]:
        """What to ask for when a reader who goes on has got to `offset`."""
        start = self._end
        self._ahead = min(AHEAD_GROWTH * self._ahead, AHEAD_MAX_BYTES)
        self._start, self._end = offset, start + -(-self._ahead // places.slot_bytes) * places.slot_bytes
        self.more_at = self._end - self._ahead // 2
        return start, self._end
