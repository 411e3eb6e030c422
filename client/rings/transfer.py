"""A batch of a ring, in the client's thread: reads or writes of many files as few requests, one a storage node.

Owns the way from prepared I/O to results: bytes transferred, or -errno. Invariants:
  - an I/O has its result only when nothing will touch the caller's memory for it any more: services write directly only into registered memory
    that can be taken out of their reach (`RegisteredBuffer.direct`); all other memory is filled from, or copied to, a block of the client's own,
    for one copy. Where services on this machine tell places, this thread reads from there into any memory;
  - a read sees every write that was acknowledged before it began, by whatever client, and what this client wrote: nothing that was read ahead is
    used, and places are asked for anew each time;
  - a write has its result when every serving replica has the bytes; writes of one batch may be applied in any order, and adjacent ones together;
  - an error of one I/O is its own result; nothing is raised for it.
"""

from __future__ import annotations

import ctypes
import errno
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

import trio

from kvfs.client.async_client import AsyncClient
from kvfs.client.file.memory import Block, RegisteredBuffer, registered_at, zero
from kvfs.client.file.open_file import OpenFile
from kvfs.client.file.reading import INLINE_BYTES
from kvfs.client.place import Read
from kvfs.client.placement import Piece
from kvfs.client.storage_client import StorageClient
from kvfs.client.storage_places import ChunkRange
from kvfs.client.storage_reads import ChunkRead, ReadDone
from kvfs.client.storage_writes import ChunkWrite, WriteDone
from kvfs.common.checksum import CHECKSUM_UNIT_BYTES
from kvfs.common.errors import KvfsError
from kvfs.common.transport.region import Span

log = logging.getLogger("kvfs.client")

DIRECT_BYTES_MIN = 4096
"""Less is copied sooner than its address is looked up."""


class Io:
    """One prepared read or write. `result`: None until it is over."""

    __slots__ = ("batch", "buffer", "file", "offset", "result", "retired", "userdata", "view")

    def __init__(self, file: OpenFile, offset: int, view: memoryview, buffer: Any, userdata: Any) -> None:
        self.file = file
        self.offset = offset
        self.view = view
        self.buffer = buffer
        self.userdata = userdata
        self.result: int | None = None
        self.retired = False
        """Nobody wants it any more."""
        self.batch: Any = None

    def fail(self, error: BaseException) -> None:
        if not isinstance(error, KvfsError):
            log.error("a ring's I/O of inode %d failed", self.file.inode, exc_info=error)
        self.result = -(error.errno if isinstance(error, KvfsError) else errno.EIO)


async def transfer(client: AsyncClient, ios: Sequence[Io], *, read: bool, forbid_holes: bool) -> AsyncIterator[None]:
    """Give every I/O its result. What is under way at once is bounded: in steps of one request's bytes; yields after each."""
    step: list[Io] = []
    size = 0
    for io in ios:
        if step and size + len(io.view) > client.config.batch_max_bytes:
            await _step(client, step, read, forbid_holes)
            yield
            step, size = [], 0
        step.append(io)
        size += len(io.view)
    if step:
        await _step(client, step, read, forbid_holes)
        yield


async def _step(client: AsyncClient, ios: Sequence[Io], read: bool, forbid_holes: bool) -> None:
    if read:
        await _read(client, ios, forbid_holes)
        return
    together = _Together(client.storage)
    async with trio.open_nursery() as nursery:
        for run in _runs(ios):
            nursery.start_soon(run.write, client, together)


# --- reading -------------------------------------------------------------------------------------------------------------------------------


class _Target:
    """Where the bytes of one read go first: into the caller's registered memory, or into a block of the client's."""

    def __init__(self, client: AsyncClient, io: Io, length: int) -> None:
        self.io = io
        self.length = length
        self._owner, self._span = _direct(io.view, length)
        self._block: Block | None = None if self._span is not None else client.memory.allocate(length)
        self.reads: list[ChunkRead] = []
        placement = io.file.placement
        for piece in placement.pieces(io.offset, length):
            into = self._span.part(piece.start, piece.length) if self._span is not None else self._part(piece.start, piece.length)
            self.reads.append(ChunkRead(placement.chain(piece.index), placement.chunk(piece.index), piece.offset, piece.length, into))

    def _part(self, start: int, length: int) -> Span | memoryview:
        assert self._block is not None
        return self._block.part(start, length)

    def take(self, outcomes: Sequence[ReadDone | KvfsError], forbid_holes: bool) -> None:
        """Puts the bytes where the caller wants them; sets the result."""
        view = self.io.view
        self.settle()
        for outcome in outcomes:
            if isinstance(outcome, KvfsError):
                self.io.fail(outcome)
                return
        hole = False
        start = 0
        for read, outcome in zip(self.reads, outcomes, strict=True):
            assert isinstance(outcome, ReadDone)
            if self._block is not None or outcome.moved:
                view[start : start + outcome.length] = outcome.view[: outcome.length]
            if outcome.length < read.length:
                hole = True
                zero(view[start + outcome.length : start + read.length])
            start += read.length
        self.io.result = -errno.ENODATA if hole and forbid_holes else self.length

    def settle(self) -> None:
        """No service writes into the caller's memory from now on: one that hangs loses it, and what else was read stays."""
        if self._span is not None and self._span.pinned:
            assert self._owner is not None
            saved = bytes(self._span.view)
            self._owner.forsake(self._span)
            self.io.view[: self.length] = saved

    def release(self) -> None:
        if self._block is not None:
            self._block.release()
        else:
            self.settle()


def _direct(view: memoryview, length: int) -> tuple[RegisteredBuffer | None, Span | None]:
    """The registered memory that services may write these bytes into."""
    if length < DIRECT_BYTES_MIN:
        return None, None
    owner, offset = _registered(view[:length])
    return owner, None if owner is None else owner.direct(offset, length)


async def _due(ios: Sequence[Io]) -> list[tuple[Io, int]]:
    """How many bytes there are for each; those without any are over."""
    lengths: dict[OpenFile, int | KvfsError] = {}
    due: list[tuple[Io, int]] = []
    for io in ios:
        if io.file not in lengths:
            try:
                lengths[io.file] = await io.file.settled_length()
            except KvfsError as error:
                lengths[io.file] = error
        length = lengths[io.file]
        if isinstance(length, KvfsError):
            io.fail(length)
        elif io.offset >= length:
            io.result = 0
        else:
            due.append((io, min(len(io.view), length - io.offset)))
    return due


async def _read_places(client: AsyncClient, due: Sequence[tuple[Io, int]], forbid_holes: bool) -> None:
    """Those whose places this machine's services tell, asked for now, and whose bytes are in memory: read from there. The others are left."""
    pieces = [(io, piece) for io, length in due for piece in io.file.placement.pieces(io.offset, length)]
    places = await client.storage.places([_range(io, piece) for io, piece in pieces])
    whole = dict.fromkeys((io for io, _ in due), True)
    holes: set[Io] = set()
    for (io, piece), place in zip(pieces, places, strict=True):
        if place is None or not whole[io]:
            whole[io] = False
            continue
        for start in range(0, piece.length, INLINE_BYTES):
            into = io.view[piece.start + start : piece.start + min(piece.length, start + INLINE_BYTES)]
            if place.read(piece.offset + start, into, nowait=True) is not Read.DONE:
                whole[io] = False
                break
            client.counters.direct_bytes += len(into)
            await trio.lowlevel.checkpoint()
        if piece.offset + piece.length > place.end:
            holes.add(io)
    for io, length in due:
        if whole[io]:
            io.result = -errno.ENODATA if forbid_holes and io in holes else length


def _range(io: Io, piece: Piece) -> ChunkRange:
    placement = io.file.placement
    start = piece.offset - piece.offset % CHECKSUM_UNIT_BYTES
    return ChunkRange(placement.chain(piece.index), placement.chunk(piece.index), start, piece.offset + piece.length - start)


async def _read(client: AsyncClient, ios: Sequence[Io], forbid_holes: bool) -> None:
    due = await _due(ios)
    await _read_places(client, due, forbid_holes)
    targets: list[_Target] = []
    try:
        for io, length in due:
            if io.result is None:
                targets.append(_Target(client, io, length))
        if not targets:
            return
        outcomes = await client.storage.read_each([read for target in targets for read in target.reads])
        first = 0
        for target in targets:
            target.take(outcomes[first : first + len(target.reads)], forbid_holes)
            first += len(target.reads)
    finally:
        for target in targets:
            target.release()


# --- writing -------------------------------------------------------------------------------------------------------------------------------


class _Run:
    """Writes that follow each other in a file and meet within a chunk: sent as one, or the chunk would be copied on disk for each of them. They must
    not need copying for that: they meet in memory too, or are to be copied anyway."""

    def __init__(self, io: Io) -> None:
        self.ios = [io]
        self.file = io.file
        self.offset = io.offset
        self.end = io.offset + len(io.view)
        self._owner, self._place = _registered(io.view)

    def takes(self, io: Io) -> bool:
        if io.file is not self.file or io.offset != self.end or io.offset % self.file.placement.chunk_size == 0:
            return False
        owner, place = _registered(io.view)
        if owner is not self._owner or (owner is not None and place != self._place + self.end - self.offset):
            return False
        self.ios.append(io)
        self.end += len(io.view)
        return True

    async def write(self, client: AsyncClient, together: _Together) -> None:
        length = self.end - self.offset
        block: Block | None = None
        try:
            if self._owner is not None:
                data: Span | memoryview = self._owner.span(self._place, length)  # a service only reads it
            else:
                block = client.memory.allocate(length)
                start = 0
                for io in self.ios:
                    block.view[start : start + len(io.view)] = io.view
                    start += len(io.view)
                data = block.part(0, length)
            await self.file.write_through(self.offset, data, together.write)
            for io in self.ios:
                io.result = len(io.view)
        except KvfsError as error:
            for io in self.ios:
                io.fail(error)
        finally:
            if block is not None:
                block.release()


def _runs(ios: Sequence[Io]) -> list[_Run]:
    runs: list[_Run] = []
    for io in sorted(ios, key=lambda io: (io.file.inode, io.offset)):
        if not runs or not runs[-1].takes(io):
            runs.append(_Run(io))
    return runs


def _registered(view: memoryview) -> tuple[RegisteredBuffer | None, int]:
    """The registered memory that these bytes are, and where in it."""
    if view.readonly:
        return None, 0
    found = registered_at(ctypes.addressof(ctypes.c_ubyte.from_buffer(view)), len(view))
    return (None, 0) if found is None or found[0].forsaken(found[1], len(view)) else found


class _Together:
    """Chunk updates of tasks that run side by side, in one call: those that come in one turn of the loop. Who comes later, having waited for
    something, goes with the next: nobody waits for a task that may wait for him."""

    def __init__(self, storage: StorageClient) -> None:
        self._storage = storage
        self._gathered: list[ChunkWrite] = []
        self._told: _Answer | None = None

    async def write(self, writes: Sequence[ChunkWrite]) -> list[WriteDone]:
        first = len(self._gathered)
        self._gathered += writes
        answer = self._told
        if answer is not None:
            await answer.ready.wait()
        else:
            self._told = answer = _Answer()
            try:
                await trio.lowlevel.checkpoint()
                gathered, self._gathered, self._told = self._gathered, [], None
                answer.outcomes = await self._storage.write_each(gathered)
            finally:
                answer.ready.set()
        done: list[WriteDone] = []
        for outcome in answer.outcomes[first : first + len(writes)]:
            if isinstance(outcome, KvfsError):
                raise outcome
            done.append(outcome)
        return done


class _Answer:
    def __init__(self) -> None:
        self.ready = trio.Event()
        self.outcomes: list[WriteDone | KvfsError] = []
