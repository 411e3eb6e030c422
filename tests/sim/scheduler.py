"""One trio run as a function of its seed: virtual time, and an order of tasks that the seed decides.

trio shuffles the tasks that may run by a private generator and, outside of hypothesis, sorts nothing first; both are set here and put back. The
garbage collector is off meanwhile, since finalizers run at moments that nobody chose. trio is pinned exactly for this module and for
common/boundary/readiness.py.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio
import trio._core._run as trio_run
from trio.testing import MockClock

T = TypeVar("T")


class _NoEvents:
    """Stands for epoll: a simulation has no descriptors to wait for, and asking the kernel costs a tenth of the run."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get_events(self, timeout: float) -> list[Any]:
        return self._real.get_events(timeout) if timeout > 0 else []

    def process_events(self, events: list[Any]) -> None:
        if events:
            self._real.process_events(events)


def run(seed: int, main: Callable[[], Awaitable[T]]) -> T:
    """`main` in virtual time. An exception group of one comes out as that one."""
    module: Any = trio_run
    state, sorting = module._r.getstate(), module._ALLOW_DETERMINISTIC_SCHEDULING
    module._r.seed(seed)
    module._ALLOW_DETERMINISTIC_SCHEDULING = True
    collecting = gc.isenabled()
    gc.disable()

    async def inside() -> T:
        runner = module.GLOBAL_RUN_CONTEXT.runner
        real = runner.io_manager
        runner.io_manager = _NoEvents(real)
        try:
            return await main()
        finally:
            runner.io_manager = real  # trio ends the run by way of a real socket

    try:
        return trio.run(inside, clock=MockClock(autojump_threshold=0))
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        raise error from None
    finally:
        module._r.setstate(state)
        module._ALLOW_DETERMINISTIC_SCHEDULING = sorting
        if collecting:
            gc.enable()


def quiet() -> None:
    """The product's log goes into the trace, and nowhere else."""
    logging.getLogger("kvfs").propagate = False


def blocked_tasks() -> list[str]:
    """Where every task of the run waits: for a run that does not end."""
    module: Any = trio_run
    found = []
    for task in sorted(module.GLOBAL_RUN_CONTEXT.runner.tasks, key=lambda task: task._counter):
        frames = [f"{frame.f_code.co_filename.rpartition('/kvfs/')[2]}:{line} {frame.f_code.co_name}" for frame, line in task.iter_await_frames()]
        found.append(f"{task.name}: {' > '.join(frames[-4:])}")
    return found
