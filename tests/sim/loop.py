"""trio's loop at a fraction of its price, for runs in virtual time, and step for step the same: the same tasks run in the same batches.

What trio does for the sake of sockets, guests and instruments, none of which a simulation has, is left out here; a sleep is an entry in trio's heap
of deadlines instead of a scope that is cancelled; a scope that ends without an exception is taken apart directly. Owns what is put in trio's place
for the time of a run (`Loop.in_place`). Must never change which tasks run in a batch, nor their order: test_loop.py holds it against trio's own loop.
trio is pinned exactly for this module.
"""

from __future__ import annotations

import random
import types
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from heapq import heappop
from math import inf
from typing import Any, Final

import outcome
import trio
import trio._core._run as trio_run
from trio._core._traps import CancelShieldedCheckpoint, WaitTaskRescheduled
from trio.testing import MockClock

_RUN: Final[Any] = trio_run
_CONTEXT: Final[Any] = _RUN.GLOBAL_RUN_CONTEXT
_BY_DEADLINE: Final[Any] = _RUN.CancelReason(source="deadline")
_STALE: Final = 1000
_close, _recalculate = _RUN.CancelScope._close, _RUN.CancelStatus.recalculate


class _Nothing:
    """What a task that was woken receives, again and again: an `outcome.Value` may be unwrapped once."""

    def unwrap(self) -> None:
        return None


_NOTHING: Final = _Nothing()


class _Timer:
    """A sleep in the heap of deadlines, where trio has scopes."""

    __slots__ = ("_registered_deadline", "_task")

    def __init__(self, deadline: float, task: Any) -> None:
        self._registered_deadline = deadline
        self._task = task

    def _cancel(self, _reason: object) -> None:
        """The time has come."""
        self.drop()
        _reschedule(_CONTEXT.runner, self._task)

    def drop(self, _raise: object = None) -> trio.lowlevel.Abort:
        self._registered_deadline = inf
        _CONTEXT.runner.deadlines._active -= 1
        return trio.lowlevel.Abort.SUCCEEDED


@types.coroutine
def _give(message: object) -> Generator[object, Any, Any]:
    """To the loop: what the task waits for."""
    return (yield message)


async def _checkpoint() -> None:
    await _give(CancelShieldedCheckpoint)
    if _CONTEXT.task._cancel_status.effectively_cancelled:
        await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.SUCCEEDED)


async def _wait(event: Any) -> None:
    if event._flag:
        await _checkpoint()
    else:
        tasks, task = event._tasks, _CONTEXT.task
        tasks.add(task)

        def drop(_raise: object) -> trio.lowlevel.Abort:
            tasks.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        (await _give(WaitTaskRescheduled(drop))).unwrap()


def _reschedule(runner: Any, task: Any, next_send: Any = _RUN._NO_SEND) -> None:
    assert task._next_send_fn is None
    task._next_send_fn = task.coro.send
    task._next_send = _NOTHING if next_send is _RUN._NO_SEND else next_send
    task._abort_func = None
    task.custom_sleep_data = None
    runner.runq.append(task)


class Loop:
    """Stands for trio's table of descriptors, which is asked whenever no task runs: it then does what trio's loop would do, until `over`."""

    def __init__(self, clock: MockClock, source: random.Random) -> None:
        self.over = False
        self._clock: Any = clock
        self._source = source
        self._failed: BaseException | None = None
        self._real: Any = None

    def begin(self) -> None:
        """From within the run."""
        self._real, _CONTEXT.runner.io_manager = _CONTEXT.runner.io_manager, self

    def end(self) -> None:
        """trio ends the run itself, by way of a real socket."""
        self.over = True
        _CONTEXT.runner.io_manager = self._real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get_events(self, _timeout: float) -> list[Any]:
        try:
            self._run(_CONTEXT.runner)
        except BaseException as error:
            self._failed = error
        return []

    def process_events(self, _events: list[Any]) -> None:
        if self._failed is not None:
            raise self._failed

    def _run(self, runner: Any) -> None:
        clock, runq, deadlines, shuffle = self._clock, runner.runq, runner.deadlines, self._source.shuffle
        while not self.over:
            if not runq:
                jump = deadlines.next_deadline() - clock._virtual_base
                if 0 < jump < inf:
                    clock._virtual_base += jump
            heap, now = deadlines._heap, clock._virtual_base
            while heap and heap[0][0] <= now:
                deadline, _, sleeper = heappop(heap)
                if deadline == sleeper._registered_deadline:
                    sleeper._cancel(_BY_DEADLINE)
            if len(heap) > 2 * deadlines._active + _STALE:
                deadlines._prune()
            batch = list(runq)
            runq.clear()
            if len(batch) > 1:
                batch.sort(key=_counter)
                shuffle(batch)
            while batch:
                self._step(runner, batch.pop())

    @trio.lowlevel.enable_ki_protection
    def _step(self, runner: Any, task: Any) -> None:
        """As in trio's `unrolled_run`."""
        _CONTEXT.task = task
        send, value = task._next_send_fn, task._next_send
        task._next_send_fn = task._next_send = None
        ended: Any = None
        try:
            message = task.context.run(send, value)
        except StopIteration as stop:
            ended = outcome.Value(stop.value)
        except BaseException as error:
            trace = error.__traceback__
            ended = outcome.Error(error.with_traceback(trace.tb_next if trace is not None else None))
            del trace
        if ended is not None:
            runner.task_exited(task, ended)
        elif message is CancelShieldedCheckpoint:
            _reschedule(runner, task)
        else:
            assert type(message) is WaitTaskRescheduled, f"trio does not know {message!r}"
            task._abort_func = message.abort_func
            if task._cancel_status.effectively_cancelled:
                task._attempt_delivery_of_any_pending_cancel()
        del _CONTEXT.task

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """For the time of a run, in trio's place: all that must know this clock."""
        clock = self._clock

        def current_time() -> float:
            return clock._virtual_base

        async def sleep_until(deadline: float) -> None:
            task = _CONTEXT.task
            if deadline <= clock._virtual_base:
                await _give(CancelShieldedCheckpoint)
            else:
                timer = _Timer(deadline, task)
                _CONTEXT.runner.deadlines.add(deadline, timer)
                (await _give(WaitTaskRescheduled(timer.drop))).unwrap()
            if task._cancel_status.effectively_cancelled:  # it came together with the end of the sleep
                reason = task._cancel_status._scope._cancel_reason
                raise trio.Cancelled._create(source=reason.source, reason=reason.reason, source_task=reason.source_task)

        async def sleep(seconds: float) -> None:
            if seconds < 0:
                raise ValueError("`seconds` must be non-negative")
            await (_checkpoint() if seconds == 0 else sleep_until(clock._virtual_base + seconds))

        def enter(scope: Any) -> Any:
            assert not scope._has_been_entered, "each CancelScope may only be used for a single 'with' block"
            scope._has_been_entered = True
            if scope._relative_deadline != inf:
                scope._deadline, scope._relative_deadline = clock._virtual_base + scope._relative_deadline, inf
            deadline, task = scope._deadline, _CONTEXT.task
            if deadline <= clock._virtual_base:
                scope._cancel(_BY_DEADLINE)
            scope._cancel_status = _RUN.CancelStatus(scope=scope, parent=task._cancel_status)
            task._activate_cancel_status(scope._cancel_status)
            if deadline != inf and not scope._cancel_called:
                scope._registered_deadline = deadline
                _CONTEXT.runner.deadlines.add(deadline, scope)
            return scope

        def recalculate(status: Any) -> None:
            scope, parent = status._scope, status._parent
            new = parent is not None and not status._children and not status.effectively_cancelled
            if not new or scope._cancel_called or parent.effectively_cancelled or scope._deadline <= clock._virtual_base:
                _recalculate(status)

        patches = (
            (trio, "current_time", current_time),
            (_RUN, "current_time", current_time),
            (trio, "sleep", sleep),
            (trio.lowlevel, "checkpoint", _checkpoint),
            (trio.Event, "wait", _wait),
            (trio, "sleep_until", sleep_until),
            (_RUN.Runner, "reschedule", _reschedule),
            (_RUN.CancelScope, "__enter__", enter),
            (_RUN.CancelScope, "_close", _close_scope),
            (_RUN.CancelStatus, "recalculate", recalculate),
        )
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
        for owner, name, ours in patches:
            setattr(owner, name, ours)
        try:
            yield
        finally:
            for owner, name, trios in before:
                setattr(owner, name, trios)


def _counter(task: Any) -> int:
    number: int = task._counter
    return number


def _close_scope(scope: Any, error: BaseException | None) -> BaseException | None:
    """The usual end of a scope: of the innermost one of its task, without an exception."""
    status, task = scope._cancel_status, _CONTEXT.task
    if error is not None or task._cancel_status is not status or status._parent is None or status._children or len(status._tasks) != 1:
        left: BaseException | None = _close(scope, error)
        return left
    task._activate_cancel_status(status._parent)
    status._parent._children.remove(status)
    status._parent = scope._cancel_status = None
    if scope._registered_deadline != inf:
        scope._registered_deadline = inf
        _CONTEXT.runner.deadlines._active -= 1
    return None
