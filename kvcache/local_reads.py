"""Reading blocks by their places: what lies side by side in a file with one call, and much of it with several threads.

Owns the plan of one batch's reads on this machine: what is asked of each block, which blocks form a run, and what could not be read. Invariants:
  - bytes count only when they have their checksums; of a run that is not right as a whole, each block is read and checked by itself, so a block is
    never lost for its neighbour's sake;
  - nothing here waits for a device, so deadlines hold; a block whose turn comes too late is not read;
  - when `read` or `read_elsewhere` is over, no thread touches the buffers.
It must never ask a service anything: what failed is told (`failed`), with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from kvfs.client.place import Place, Read
from kvfs.common.checksum import checksums_of
from kvfs.common.errors import KvfsError
from kvfs.common.helpers import helpers

PIECE_BYTES = 512 << 10
"""What one thread reads at a time, when others help it: it is still in the processor's cache when it is hashed ..."""
ALONE_BYTES = 1 << 20
"""... and one block up to this is read by one thread. A second one makes a 4 MiB get a quarter shorter (0.9 of a bare read of a file instead of 0.68)
and costs a tenth more of the processors' time."""
SHARED_BYTES = 128 << 10
"""Blocks smaller than this on average are not shared by threads: they would wait for the interpreter more than they gain (64 KiB blocks, in runs:
35 us of CPU each instead of 15, and not sooner)."""
INLINE_BYTES = 256 << 10
"""So much is read in the client's thread itself: about 50 us."""

_Operation = tuple[int, Place, int, memoryview]
"""Which block of the batch, where it lies, from which byte of it on, into what."""


class _Run:
    """Operations that one call can do: whole blocks, one behind the other in one file; or a single one of any kind."""

    __slots__ = ("behind", "operations", "size", "whole")

    def __init__(self, operation: _Operation, size: int, *, whole: bool) -> None:
        self.operations = [operation]
        self.size = size
        self.whole = whole
        self.behind = operation[1].file_offset + size
        """Where in the file its next block would lie."""


class LocalReads:
    def __init__(self, now: Callable[[], float], end_s: float, *, alone: bool) -> None:
        """`alone`: there is but one block."""
        self._now = now
        self._end_s = end_s
        self._most = ALONE_BYTES if alone else PIECE_BYTES
        self._runs: list[_Run] = []
        self._open: dict[int, _Run] = {}
        """By file, the last one begun."""
        self._blocks = 0
        self.total = 0
        """Bytes."""
        self.failed: dict[int, Read] = {}
        """Blocks of the batch that are not right, and why."""

    # --- the plan ----------------------------------------------------------------------------------------------------------------------------

    def add(self, index: int, place: Place, offset: int, view: memoryview) -> None:
        """All of `view` is to be filled from `offset` of the block on; it is not empty and does not reach beyond the block."""
        size = len(view)
        self.total += size
        self._blocks += 1
        if size == place.end == place.stored and size <= PIECE_BYTES:
            operation = (index, place, offset, view)
            run = self._open.get(place.file)
            if run is not None and run.behind == place.file_offset and run.size + size <= PIECE_BYTES and run.operations[0][1].files is place.files:
                run.operations.append(operation)
                run.size += size
                run.behind += size
            else:
                run = self._open[place.file] = _Run(operation, size, whole=True)
                self._runs.append(run)
            return
        if size <= self._most:
            self._runs.append(_Run((index, place, offset, view), size, whole=False))
            return
        at, end = offset, offset + size
        while at < end:
            stop = min((at // PIECE_BYTES + 1) * PIECE_BYTES, end)
            self._runs.append(_Run((index, place, at, view[at - offset : stop - offset]), stop - at, whole=False))
            at = stop

    def _pieces(self) -> list[Callable[[], None]]:
        """Work of about PIECE_BYTES each."""
        pieces: list[Callable[[], None]] = []
        some: list[_Run] = []
        size = 0
        for run in self._runs:
            some.append(run)
            size += run.size
            if size >= PIECE_BYTES:
                pieces.append(partial(self._read_all, some))
                some, size = [], 0
        if some:
            pieces.append(partial(self._read_all, some))
        return pieces

    # --- reading -----------------------------------------------------------------------------------------------------------------------------

    def read(self) -> None:
        """In this thread and those that help it."""
        if self.total <= PIECE_BYTES or self.total < self._blocks * SHARED_BYTES:
            self._read_all(self._runs)
        else:
            helpers().work(self._pieces())

    async def read_elsewhere(self) -> None:
        """For a task in the client's thread: in other threads, if it is much."""
        if self.total <= INLINE_BYTES:
            self._read_all(self._runs)
        else:
            await helpers().work_elsewhere(self._pieces())

    def _read_all(self, runs: Sequence[_Run]) -> None:
        failed = self.failed
        for run in runs:
            late = self._now() > self._end_s
            if not late and run.whole and _read_run(run):
                continue
            for index, place, at, view in run.operations:
                if index not in failed:
                    outcome = Read.WAITS if late else place.read(at, view, nowait=True)
                    if outcome is not Read.DONE:
                        failed[index] = outcome


def _read_run(run: _Run) -> bool:
    """Whether all of it is right."""
    operations = run.operations
    place = operations[0][1]
    file = place.files.get(place.file) if place.files is not None else None
    if file is None:
        return False
    views = [view for _, _, _, view in operations]
    try:
        if file.try_read_into(views, place.file_offset) != run.size:
            return False
    except KvfsError:
        return False
    return checksums_of(views) == b"".join([place.checksums for _, place, _, _ in operations])
