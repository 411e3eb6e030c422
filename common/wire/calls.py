"""The calls under way on one channel: who waits for which answer, until when, and who of them reads.

Owns the table of calls, the memory that each names, and the waking of callers. Invariants: every caller is woken once, by an answer, its deadline,
its own cancellation or the loss of the connection; a call stays in the table until the service has answered, for until then its memory is not the
caller's again; nothing here keeps a call's memory alive once it has ended.

The latest caller reads in the place of the channel's reader task (its deputy) until it has its answer: what it takes is handled as the reader would,
for all callers. Alone, that saves a turn of the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import outcome
import trio

from kvfs.common.errors import ConnectionLost, DeadlineExceeded, KvfsError
from kvfs.common.wire.connection import Connection, Entry, Face
from kvfs.common.wire.outgoing import Named
from kvfs.common.wire.service import Method


class Arrivals(Protocol):
    """Who wants to know of a reply's bytes while they arrive (by payload: a service that reaches the memory by itself tells nothing)."""

    def begin(self, views: Sequence[memoryview]) -> None:
        """They will arrive here, in this order."""

    def arrived(self, count: int) -> None:
        """So many are here. Called now and then, last when all are."""


class Pending:
    """A call under way. `alive` until its caller has an outcome."""

    __slots__ = ("alive", "arrivals", "began", "deadline", "entry", "method", "named", "result", "task")

    def __init__(self, method: Method, deadline: float, began: int, arrivals: Arrivals | None = None) -> None:
        self.method = method
        self.deadline = deadline
        self.arrivals = arrivals
        self.began = began
        """What the connection had received by then."""
        self.task: trio.lowlevel.Task | None = None
        self.named: Named | None = None
        self.entry: Entry | None = None
        self.result: outcome.Outcome[Any] | None = None
        """Of a caller that stands in the reader's place and is awake."""
        self.alive = True


class Calls:
    def __init__(self, connection: Connection, most: int) -> None:
        self.table: dict[int, Pending] = {}
        """By request id."""
        self.live = 0
        """Callers that wait."""
        self.when_idle: Callable[[], None] | None = None
        """Called as soon as no caller waits."""
        self.ended: KvfsError | None = None
        """Why no call can be made any more."""
        self.suspect = False
        """A call ran out of time while nothing at all came: the peer or the network may hang."""
        self._connection = connection
        self._address = connection.stream.peer
        self._most = most
        self._deputy: Pending | None = None
        """The caller that stands in the reader's place."""
        self._room = trio.lowlevel.ParkingLot()

    async def wait_for_room(self, timeout_s: float) -> None:
        with trio.move_on_after(timeout_s):
            while len(self.table) >= self._most and self.ended is None:
                await self._room.park()
            return
        raise DeadlineExceeded(f"{self._most} calls to {self._address} are under way already, and none ended in {timeout_s:g} s")

    async def answer(self, request_id: int, pending: Pending, face: Face) -> Any:
        """Waits for the answer of a call that was sent just now. `face` gets what is read meanwhile."""
        self.table[request_id] = pending
        self.live += 1
        pending.task = task = trio.lowlevel.current_task()
        connection = self._connection

        def abandon(_raise: object) -> trio.lowlevel.Abort:
            self._abandon(request_id, pending)
            return trio.lowlevel.Abort.SUCCEEDED

        if connection.take_over(task):
            self._deputy = pending
        reply = await trio.lowlevel.wait_task_rescheduled(abandon)
        while reply is None:  # woken to read
            goes_on = pending.result is not None or connection.read_in_place(face)
            if pending.result is not None:
                if self._deputy is pending:
                    self._deputy = None
                    if goes_on:
                        connection.stream.give_back()
                result, pending.result = pending.result, None
                try:
                    return result.unwrap()
                finally:
                    del result  # an error's traceback leads here: no circle, or the caller's memory lives until the collector comes
            self._deputy = pending if goes_on and connection.take_over(task) else None
            reply = await trio.lowlevel.wait_task_rescheduled(abandon)
        return reply

    def finish(self, request_id: int, pending: Pending, result: outcome.Outcome[Any], *, held: bool = False) -> None:
        """The service has answered. `held`: it, or another, still uses the call's memory."""
        named = pending.named
        if named is not None:
            if pending.alive:
                named.arrived()
            if not held:
                named.done()
        if not held:
            self._strike(request_id)
        self._resolve(pending, result)

    def release(self, request_id: int, pending: Pending) -> None:
        """The memory of an answered call is the caller's again."""
        if pending.named is not None:
            pending.named.done()
        self._strike(request_id)

    def end_overdue(self, now: float) -> float:
        """When the next deadline is."""
        first = math.inf
        for request_id, pending in list(self.table.items()):
            if not pending.alive:
                continue
            if pending.deadline > now:
                first = min(first, pending.deadline)
                continue
            if pending.began == self._connection.received:
                self.suspect = True
            self._wake(pending, outcome.Error(DeadlineExceeded(f"{pending.method.full_name} at {self._address}: no answer in time")))
            self._abandon(request_id, pending)
        return first

    def fail(self, error: KvfsError) -> None:
        """No further call; those under way end."""
        if self.ended is None:
            self.ended = error
        for pending in list(self.table.values()):
            if pending.alive:
                self._resolve(pending, outcome.Error(ConnectionLost(f"{pending.method.full_name} at {self._address}: {error.message}")))
        self._room.unpark_all()

    @property
    def holds_memory(self) -> bool:
        """Whether the service may still touch memory of a call."""
        return any(pending.named is not None and pending.named.pins for pending in self.table.values())

    def let_go(self) -> None:
        """The service has ended the connection: nobody touches our memory any more."""
        table, self.table = self.table, {}
        for pending in table.values():
            if pending.named is not None:
                pending.named.done()

    # --- inside ---

    def _strike(self, request_id: int) -> None:
        del self.table[request_id]
        if self._room:
            self._room.unpark()

    def _resolve(self, pending: Pending, result: outcome.Outcome[Any]) -> None:
        """The caller gets its outcome, if it is still there."""
        if pending.alive:
            pending.alive = False
            self._wake(pending, result)
            self._left()

    def _left(self) -> None:
        self.live -= 1
        if self.live == 0 and self.when_idle is not None:
            self.when_idle()

    def _wake(self, pending: Pending, result: outcome.Outcome[Any]) -> None:
        task, pending.task = pending.task, None
        if pending is self._deputy:
            if task is trio.lowlevel.current_task() or not self._connection.stream.give_back():
                pending.result = result  # it is awake
                return
            self._deputy = None
        if task is not None:
            trio.lowlevel.reschedule(task, result)

    def _abandon(self, request_id: int, pending: Pending) -> None:
        """The caller gives up before an answer: frees what it lent, as far as that can be."""
        pending.alive = False
        pending.task = None
        if pending is self._deputy:
            self._deputy = None
            self._connection.stream.give_back()
        if pending.entry is not None and self._connection.withdraw(pending.entry):
            self.release(request_id, pending)
        self._left()
