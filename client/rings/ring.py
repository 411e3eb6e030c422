"""A ring: prepare, submit, wait, from threads.

Owns the order of prepared I/O and who waits for it. Invariants:
  - results come in the order in which the I/O was prepared, so that a caller may pair them with his requests by position;
  - at most `entries` I/Os are between prepare and wait; more are refused (EAGAIN), nothing is queued beyond;
  - every submitted I/O comes to an end: by its result, by the client's deadline, by `retire`, or by the end of the client;
  - one thread may prepare while another waits. Two that prepare, or two that wait, must agree between them who is next.
A ring reads or writes, not both. It must never touch a buffer after the I/O that names it has its result.
"""

from __future__ import annotations

import errno
import threading
from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import trio

from kvfs.client.async_client import AsyncClient
from kvfs.client.file.memory import bytes_of
from kvfs.client.raw_io import RawFile
from kvfs.client.rings.transfer import Io, transfer
from kvfs.common.boundary.clock import SystemClock
from kvfs.common.errors import InvalidArgument

if TYPE_CHECKING:
    from kvfs.client.sync_client import Client

_CLOCK = SystemClock()
ENTRIES_MAX = 65_536
LOOK_S = 1.0
"""A waiting thread sees so often whether the client's thread is still there."""


@dataclass(frozen=True, slots=True)
class Completion:
    """The end of one I/O."""

    result: int
    """Bytes transferred (fewer than asked: the file ends there), or -errno."""
    userdata: Any
    buffer: Any
    """As it was given to prepare."""


class _Batch:
    """What is issued together. `scope` belongs to the client's thread."""

    __slots__ = ("ios", "scope")

    def __init__(self, ios: list[Io]) -> None:
        self.ios = ios
        self.scope: trio.CancelScope | None = None
        for io in ios:
            io.batch = self


class IoRing:
    """Made by Client.make_ring."""

    def __init__(
        self, client: Client, entries: int, *, for_read: bool = True, io_depth: int = 0, timeout_s: float | None = None, forbid_holes: bool = False
    ) -> None:
        if not 1 <= entries <= ENTRIES_MAX:
            raise client.translate(InvalidArgument(f"a ring of {entries} entries: 1 to {ENTRIES_MAX}"))
        if timeout_s is not None and timeout_s < 0:
            raise client.translate(InvalidArgument(f"a ring that waits {timeout_s} s for a full batch"))
        if io_depth > entries:
            raise client.translate(InvalidArgument(f"batches of {io_depth} do not fit a ring of {entries} entries"))
        self.entries = entries
        self.for_read = for_read
        self._client = client
        self._io_depth = io_depth
        self._timeout_s = timeout_s
        self._forbid_holes = forbid_holes
        self.reset()

    def reset(self) -> None:
        """Empty: at first, and in a forked child, where the lock may be held by a thread that is not there, and what is under way is the parent's."""
        self._changed = threading.Condition(threading.Lock())
        self._order: deque[Io] = deque()
        """Prepared and not yet waited for, oldest first."""
        self._prepared: deque[Io] = deque()
        self._submitted: deque[Io] = deque()
        """Submitted, and held back until a batch is full."""
        self._issued = 0

    # --- for threads -----------------------------------------------------------------------------------------------------------------

    def prepare(self, buffer: Any, file: RawFile, offset: int, userdata: Any = None) -> IoRing:
        """Read into, or write from, all of `buffer`: a view or Span of a RegisteredBuffer that is still held (without a copy; reads from a service
        only where the part is whole pages), or any other contiguous bytes (with one copy, but for reads from this machine's page cache).
        It must stay as it is until the result is there. OSError: EAGAIN when `entries` are waited for already, EINVAL, EBADF."""
        view = bytes_of(buffer)
        if not len(view) or not view.c_contiguous:
            raise OSError(errno.EINVAL, "an I/O is of at least one byte, in one piece")
        if offset < 0:
            raise OSError(errno.EINVAL, f"an I/O at {offset}")
        if self.for_read and view.readonly:
            raise OSError(errno.EINVAL, "the buffer is read-only: nothing can be read into it")
        opened = file.opened(reading=self.for_read)
        io = Io(opened, offset, view, buffer, userdata)
        with self._changed:
            if len(self._order) >= self.entries:
                raise OSError(errno.EAGAIN, f"all {self.entries} entries of the ring are in use: wait for results first")
            self._order.append(io)
            self._prepared.append(io)
        return self

    def submit(self) -> IoRing:
        """What was prepared may begin."""
        with self._changed:
            self._submitted += self._prepared
            self._prepared.clear()
            batches = self._full_batches()
            late = self._issued if self._submitted and self._timeout_s is not None else None
        portal = self._client.portal
        for batch in batches:
            portal.post(self._run, portal.client, batch)
        if late is not None:
            portal.post(self._issue_late, portal.client, late)
        return self

    def wait(self, *, max_results: int = 0, min_results: int = 0, timeout: float | None = None) -> list[Completion]:
        """Results in prepare order: at least `min_results`, unless `timeout` (seconds) passes first, and at most `max_results` (or `min_results`, or
        one, whichever is most). An I/O that is not over holds back those prepared after it."""
        limit = max(max_results, min_results, 1)
        until = None if timeout is None else _CLOCK.monotonic() + timeout
        with self._changed:
            while (ready := self._ready(limit)) < min_results:
                left = LOOK_S if until is None else min(LOOK_S, until - _CLOCK.monotonic())
                if left <= 0:
                    break
                if not self._changed.wait(left):
                    self._look()
            return [_completion(self._order.popleft()) for _ in range(ready)]

    def retire(self, count: int) -> list[Completion]:
        """The oldest `count` are over: those that have no result yet get -ETIMEDOUT, and when this returns nothing touches their memory any
        more. A write among them may have been done."""
        with self._changed:
            ios = list(islice(self._order, count))
            batches: dict[_Batch, None] = {}
            for io in ios:
                if io.result is not None:
                    continue
                io.retired = True
                if io.batch is not None:
                    batches[io.batch] = None
                else:
                    io.result = -errno.ETIMEDOUT
            self._prepared = deque(io for io in self._prepared if not io.retired)
            self._submitted = deque(io for io in self._submitted if not io.retired)
        for batch in batches:
            self._client.portal.post(self._stop, batch)
        with self._changed:
            while any(io.result is None for io in ios):
                if not self._changed.wait(LOOK_S):
                    self._look()
            return [_completion(self._order.popleft()) for _ in ios]

    @property
    def outstanding(self) -> int:
        """How many are prepared and not waited for."""
        return len(self._order)

    def _ready(self, limit: int) -> int:
        ready = 0
        for io in islice(self._order, limit):
            if io.result is None:
                break
            ready += 1
        return ready

    def _look(self) -> None:
        """With the lock held: when the client's thread is gone, nothing more will come."""
        if not self._client.alive:
            self._end_all()

    def abandon(self) -> None:
        """The client has ended."""
        with self._changed:
            self._end_all()

    def _end_all(self) -> None:
        for io in self._order:
            if io.result is None:
                io.result = -errno.EBADF
        self._prepared.clear()
        self._submitted.clear()
        self._changed.notify_all()

    def _full_batches(self) -> list[_Batch]:
        """With the lock held."""
        depth = self._io_depth
        batches = []
        while self._submitted and len(self._submitted) >= depth:
            size = min(abs(depth) or len(self._submitted), len(self._submitted))
            batches.append(self._take(size))
        return batches

    def _take(self, size: int) -> _Batch:
        self._issued += size
        return _Batch([self._submitted.popleft() for _ in range(size)])

    # --- in the client's thread ------------------------------------------------------------------------------------------------------

    async def _run(self, client: AsyncClient, batch: _Batch) -> None:
        try:
            while live := self._live(batch):
                with trio.CancelScope() as batch.scope:
                    async for _ in transfer(client, live, read=self.for_read, forbid_holes=self._forbid_holes):
                        self._tell()
        except Exception as error:
            for io in self._live(batch):
                io.fail(error)
        finally:
            batch.scope = None
            for io in self._live(batch):
                io.result = -errno.EBADF
            self._tell()

    def _live(self, batch: _Batch) -> list[Io]:
        """What of it is to be done, now that nothing of it is under way; those that were retired are over."""
        over = [io for io in batch.ios if io.result is None and io.retired]
        for io in over:
            io.result = -errno.ETIMEDOUT
        if over:
            self._tell()
        return [io for io in batch.ios if io.result is None]

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()

    async def _stop(self, batch: _Batch) -> None:
        """Those of a batch that are still wanted begin again; the same bytes may be written twice."""
        if batch.scope is not None:
            batch.scope.cancel()

    async def _issue_late(self, client: AsyncClient, issued: int) -> None:
        """The rest of a batch that did not become full in time."""
        assert self._timeout_s is not None
        await trio.sleep(self._timeout_s)
        with self._changed:
            if self._issued != issued or not self._submitted:
                return
            batch = self._take(len(self._submitted))
        await self._run(client, batch)


def _completion(io: Io) -> Completion:
    assert io.result is not None
    return Completion(io.result, io.userdata, io.buffer)
