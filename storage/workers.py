"""Threads for disk work, with a cheap way back into trio.

One hop is a queue.SimpleQueue put and a TrioToken.run_sync_soon: about a third of what trio.to_thread costs. A job always runs to its end, and who
waits for it cannot be cancelled: the job may be using memory that its owner would otherwise take back. Bounded by its callers, each of which
waits for what it submitted. Who makes the workers of a process is given to it (storage/server.py, `World`): a simulation has no threads.
"""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

import trio

T = TypeVar("T")


class Job(Generic[T]):
    __slots__ = ("_task", "_work", "done", "error", "value")

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._task: trio.lowlevel.Task | None = None
        self.value: T | None = None
        self.error: BaseException | None = None
        self.done = False

    def run(self) -> None:
        """In the worker thread."""
        try:
            self.value = self._work()
        except BaseException as error:  # handed to whoever waits
            self.error = error

    def finish(self) -> None:
        """Back in trio's thread."""
        self.done = True
        task, self._task = self._task, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    async def wait(self) -> T:
        if not self.done:
            self._task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
        error, self.error = self.error, None
        if error is not None:
            raise error
        return self.value  # type: ignore[return-value]


class Workers(ABC):
    """Who does the work that blocks."""

    @abstractmethod
    def submit(self, work: Callable[[], T]) -> Job[T]:
        """The caller must wait() for it."""

    async def run(self, work: Callable[[], T]) -> T:
        return await self.submit(work).wait()

    @property
    def backlog(self) -> int:
        """Jobs that wait for a thread."""
        return 0

    async def settle(self) -> None:
        """Until all work that was submitted before this call has ended."""
        await self.run(lambda: None)

    @abstractmethod
    def close(self) -> None:
        """No more work comes."""


class WorkerPool(Workers):
    def __init__(self, threads: int, name: str = "kvfs-disk") -> None:
        self._queue: queue.SimpleQueue[Job[object] | None] = queue.SimpleQueue()
        self._token = trio.lowlevel.current_trio_token()
        self._threads = [threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True) for number in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[], T]) -> Job[T]:
        job = Job(work)
        self._queue.put(job)  # type: ignore[arg-type]
        return job

    @property
    def backlog(self) -> int:
        return self._queue.qsize()

    async def settle(self) -> None:
        # When every thread has come to the barrier, each has ended what it took from the queue before.
        barrier = threading.Barrier(len(self._threads))
        for job in [self.submit(barrier.wait) for _ in self._threads]:
            await job.wait()

    def close(self) -> None:
        for _ in self._threads:
            self._queue.put(None)

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            job.run()
            try:
                self._token.run_sync_soon(job.finish)
            except trio.RunFinishedError:
                return
            del job  # an idle thread must keep no request's memory alive
