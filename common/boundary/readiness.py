"""Waiting until a socket has something to read, for sockets that are waited for all the time.

trio arms a socket anew for every wait (EPOLLONESHOT): a system call and as much Python again, 4 us. A `ReadWatch` arms its socket once, and who is
woken may change without the loop's doing: a task that needs the answer takes the reader's place (`take_over`) and is woken itself, which saves
the turn of the loop in which the reader would only wake it (8 us).

Owns the one place that knows trio's insides: the epoll object and the table of waiters of its run. trio is pinned exactly; the tests of this
module fail where a new one differs. Invariants: one reader a watch, one task in its place at most; no event is lost (level-triggered), and none
turns the loop idly: a socket that becomes ready while nobody waits is disarmed until somebody does. A watch belongs to the trio run that made it;
what waits for room to write uses another descriptor.
"""

from __future__ import annotations

import contextlib
import select
from collections import defaultdict
from typing import Any

import outcome
import trio
from trio._core._io_epoll import EpollWaiters
from trio._core._run import GLOBAL_RUN_CONTEXT


class _Waiters(defaultdict[int, Any]):
    """trio's table of who waits for which descriptor. trio asks it for a watched descriptor only when an event meets nobody."""

    def __init__(self, before: dict[int, Any]) -> None:
        super().__init__(EpollWaiters, before)
        self.watches: dict[int, ReadWatch] = {}

    def __missing__(self, fd: int) -> Any:
        watch = self.watches.get(fd)
        if watch is not None:
            watch.disarm()
        return super().__missing__(fd)


class ReadWatch:
    __slots__ = ("_armed", "_deputy", "_epoll", "_fd", "_reader", "_waiters", "current_flags", "read_task", "write_task")

    def __init__(self, fd: int) -> None:
        manager: Any = GLOBAL_RUN_CONTEXT.runner.io_manager
        if type(manager._registered) is not _Waiters:
            manager._registered = _Waiters(manager._registered)
        self._waiters: _Waiters = manager._registered
        self._epoll: select.epoll = manager._epoll
        self._fd = fd
        self._armed = False
        self._reader: trio.lowlevel.Task | None = None
        self._deputy: trio.lowlevel.Task | None = None
        """Stands in the reader's place: waits, or was woken and has yet to say what is next."""
        # What trio reads and writes when an event comes: it wakes `read_task`, forgets it, and drops this entry from its table.
        self.read_task: trio.lowlevel.Task | None = None
        self.write_task: trio.lowlevel.Task | None = None
        self.current_flags = 0
        self._waiters.watches[fd] = self

    async def wait(self) -> None:
        """Until there may be something to read, or `hand_back` says so. Raises trio.ClosedResourceError."""
        if self._reader is not None:
            raise trio.BusyResourceError("another task is already reading this")
        if self._fd < 0:
            raise trio.ClosedResourceError("closed here")
        if not self._armed:
            self._arm()
        self._reader = self.read_task = trio.lowlevel.current_task()
        self._waiters[self._fd] = self
        await trio.lowlevel.wait_task_rescheduled(self._abort)
        self._reader = None

    def take_over(self, task: trio.lowlevel.Task) -> bool:
        """`task`, which is about to wait, is woken (with None) in place of the reader, or of the one that had its place until now.
        Once woken it takes over again, gives back or hands back. False: no reader waits now, or its deputy is awake."""
        if self._reader is None or (self.read_task is None and self._deputy is not task):
            return False
        self._deputy = self.read_task = task
        self._waiters[self._fd] = self
        return True

    def give_back(self) -> bool:
        """The reader is the one to wake again. False: the task in its place was woken already (and need not have run yet)."""
        waiting = self.read_task is not None
        self._deputy = None
        self.read_task = self._reader
        if self._reader is not None:
            self._waiters[self._fd] = self
        else:
            self._waiters.pop(self._fd, None)
        return waiting

    def hand_back(self, error: BaseException | None = None) -> None:
        """Wakes the reader, with an error if there is one. Only by the task in its place, once woken."""
        reader, self._reader, self._deputy, self.read_task = self._reader, None, None, None
        if reader is not None:
            trio.lowlevel.reschedule(reader, outcome.Value(None) if error is None else outcome.Error(error))

    def _arm(self) -> None:
        try:
            self._epoll.register(self._fd, select.EPOLLIN)
        except FileExistsError:  # trio has waited for it before, as connecting does
            self._epoll.modify(self._fd, select.EPOLLIN)
        self._armed = True

    def disarm(self) -> None:
        if self._armed:
            self._armed = False
            with contextlib.suppress(OSError, ValueError):
                self._epoll.unregister(self._fd)

    def close(self) -> None:
        """Before the descriptor is closed: who waits here gets ClosedResourceError."""
        self.disarm()
        self._waiters.pop(self._fd, None)
        self._waiters.watches.pop(self._fd, None)
        waiting = {self.read_task}
        if self._deputy is not None:
            waiting.add(self._reader)
        self._fd, self._reader, self._deputy, self.read_task = -1, None, None, None
        for task in waiting:
            if task is not None:
                trio.lowlevel.reschedule(task, outcome.Error(trio.ClosedResourceError("closed here")))

    def _abort(self, _raise: object) -> trio.lowlevel.Abort:
        if self._deputy is None:
            self.read_task = None
            self._waiters.pop(self._fd, None)
        self._reader = None
        return trio.lowlevel.Abort.SUCCEEDED
