"""The workers of a simulated storage process: no threads. A job runs at once or a moment later, as its disk is slow, and its caller hears of it a
moment after that, so that everything else of the machine goes on between."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio

from kvfs.common.boundary.random import Random
from kvfs.storage.workers import Job, Workers

T = TypeVar("T")


class SimWorkers(Workers):
    def __init__(self, nursery: trio.Nursery, random: Random, slow_s: Callable[[], float]) -> None:
        self._nursery = nursery
        self._random = random
        self._slow_s = slow_s

    def submit(self, work: Callable[[], T]) -> Job[T]:
        job = Job(work)
        self._nursery.start_soon(self._do, job)
        return job

    async def _do(self, job: Job[T]) -> None:
        with trio.CancelScope(shield=True):  # a thread is not cancelled
            slow_s = self._slow_s()
            await trio.sleep(self._random.uniform(0, slow_s))
            job.run()
            await trio.sleep(self._random.uniform(0, slow_s))
            job.finish()

    def close(self) -> None:
        """Nothing to end."""
