"""One trio run as a function of its seed: virtual time, and an order of tasks that the seed decides.

trio shuffles the tasks that may run by a private generator and, outside of hypothesis, sorts nothing first; both are set here and put back. The
garbage collector is off meanwhile, since finalizers run at moments that nobody chose. trio is pinned exactly for this module and for
common/boundary/readiness.py.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any, TypeVar

import trio
import trio._core._run as trio_run
from tests.sim.loop import Loop
from trio.testing import MockClock

T = TypeVar("T")


def run(seed: int, main: Callable[[], Awaitable[T]]) -> T:
    """`main` in virtual time. An exception group of one comes out as that one."""
    module: Any = trio_run
    state, sorting = module._r.getstate(), module._ALLOW_DETERMINISTIC_SCHEDULING
    module._r.seed(seed)
    module._ALLOW_DETERMINISTIC_SCHEDULING = True
    collecting = gc.isenabled()
    gc.disable()

    clock = MockClock(autojump_threshold=0)
    # Its own: trio's is every thread's, and a client that another test left open would draw from it in the middle of a run.
    source = Random(seed)
    source.shuffle([0, 1])  # as trio has by the time that `inside` runs, so that a seed is the run that it was
    loop = Loop(clock, source)

    async def inside() -> T:
        loop.begin()
        try:
            return await main()
        finally:
            loop.end()

    try:
        with loop.in_place():
            return trio.run(inside, clock=clock)
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


def in_a_task() -> bool:
    """Whether code of the run is running, rather than its loop."""
    return hasattr(trio_run.GLOBAL_RUN_CONTEXT, "task")


def blocked_tasks() -> list[str]:
    """Where every task of the run waits: for a run that does not end."""
    module: Any = trio_run
    found = []
    for task in sorted(module.GLOBAL_RUN_CONTEXT.runner.tasks, key=lambda task: task._counter):
        frames = [f"{frame.f_code.co_filename.rpartition('/kvfs/')[2]}:{line} {frame.f_code.co_name}" for frame, line in task.iter_await_frames()]
        found.append(f"{task.name}: {' > '.join(frames[-4:])}")
    return found
