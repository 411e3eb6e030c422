"""A trio thread for callers that have none.

Owns one daemon thread that runs a client, and the way of calls into it and answers out of it. Invariants: any thread may call; a caller that
is interrupted (KeyboardInterrupt) has its call cancelled; after `close`, and in a forked child, no call ever waits for a thread that is not
there.

A call crosses threads twice, which is most of what it costs here, so each crossing is one wake-up and no more: a call is put into a queue, and an
eventfd wakes the worker task that will run it; the caller waits for a lock, which is released when the loop is about to sleep, for a thread that
is woken earlier only waits for the interpreter. Worker tasks are reused; as many are made as calls are under way at once, one a caller.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any, Final, TypeVar

import trio

from kvfs.client.async_client import AsyncClient
from kvfs.common.boundary.readiness import ReadWatch
from kvfs.common.errors import BadHandle, Busy, KvfsError

T = TypeVar("T")
_IDLE_WORKERS: Final = 64


class _Call:
    __slots__ = ("_waiter", "arguments", "error", "function", "interrupted", "result", "scope")

    def __init__(self, function: Callable[..., Awaitable[Any]], arguments: tuple[Any, ...]) -> None:
        self.function = function
        self.arguments = arguments
        self.result: Any = None
        self.error: BaseException | None = None
        self.scope: trio.CancelScope | None = None
        """Of the worker that runs it, while it does."""
        self.interrupted = False
        self._waiter = threading.Lock()
        self._waiter.acquire()

    def wait(self) -> None:
        self._waiter.acquire()

    def end(self) -> None:
        self._waiter.release()

    async def run(self, scope: trio.CancelScope) -> None:
        """Raises what ends the worker, and nothing else."""
        if self.interrupted:
            return
        self.scope = scope
        try:
            self.result = await self.function(*self.arguments)
        except Exception as error:
            self.error = error
        except BaseException:
            closing = not scope.cancel_called
            self.error = BadHandle("the client was closed while the call was under way") if closing else KvfsError("the call was interrupted")
            raise
        finally:
            self.scope = None


class _Worker:
    """A task that runs calls, one after the other."""

    __slots__ = ("call", "scope", "task")

    task: trio.lowlevel.Task

    def __init__(self, call: _Call) -> None:
        self.call: _Call | None = call
        self.scope = trio.CancelScope()


class _Answers(trio.abc.Instrument):
    """Ends calls when the loop is about to sleep, and so about to give up the interpreter."""

    def __init__(self) -> None:
        self.ready: deque[_Call] = deque()

    def before_io_wait(self, timeout: float) -> None:
        while self.ready:
            self.ready.popleft().end()


class Portal:
    def __init__(self, make: Callable[[], AbstractAsyncContextManager[AsyncClient]]) -> None:
        """Starts the thread; returns when the client is open, or raises what kept it from opening."""
        self.pid = os.getpid()
        self._make = make
        self._failure: BaseException | None = None
        self._ready = threading.Event()
        self._gate = threading.Lock()
        """Of the next four: no call is queued once `_ended` is set."""
        self._ended = False
        self._calls: deque[_Call] = deque()
        self._rung = False
        """The bell was rung and not heard yet: no need to ring it again."""
        self._bell = -1
        self._token: trio.lowlevel.TrioToken
        self._watch: ReadWatch
        self._nursery: trio.Nursery
        self._idle: list[_Worker] = []
        self._listening: _Worker | None = None
        """Waits for the bell in the dispatcher's place."""
        self._answers = _Answers()
        self.client: AsyncClient
        self._thread = threading.Thread(target=self._run, name="kvfs-client", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    # --- in any thread ---

    def call(self, function: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """Run an async function in the client's thread and wait for it."""
        if self.inside:
            raise Busy("the client's own thread cannot wait for itself")
        call = _Call(function, arguments)
        if not self._queue(call):
            raise BadHandle("the client is closed")
        try:
            call.wait()
        except BaseException:
            self._interrupt(call)
            raise
        if call.error is not None:
            error, call.error = call.error, None
            try:
                raise error
            finally:
                del error  # its traceback leads here: no circle, or what the call held lives until the collector comes
        result: T = call.result
        return result

    def post(self, function: Callable[..., Awaitable[object]], *arguments: Any) -> None:
        """Run an async function in the client's thread, without waiting: for what may be called in that thread itself, as finalizers are."""
        self._queue(_Call(function, arguments))

    @property
    def alive(self) -> bool:
        """Whether the thread is there, in this process."""
        return self.pid == os.getpid() and self._thread.is_alive()

    @property
    def inside(self) -> bool:
        """Whether this is the client's own thread, which must not wait for itself."""
        return threading.current_thread() is self._thread

    def _queue(self, call: _Call) -> bool:
        with self._gate:
            if self._ended:
                return False
            self._calls.append(call)
            self._ring()
        return True

    def _ring(self) -> None:
        if not self._rung:
            self._rung = True
            os.eventfd_write(self._bell, 1)

    def _interrupt(self, call: _Call) -> None:
        def cancel() -> None:
            if call.scope is not None:
                call.scope.cancel()

        call.interrupted = True
        with suppress(trio.RunFinishedError):  # then nothing of it is under way any more
            self._token.run_sync_soon(cancel)

    def close(self) -> None:
        """Close the client with what it holds, and end the thread. Raises what closing raised."""
        if self.pid != os.getpid():
            return
        with self._gate:
            running = not self._ended
            self._ended = True  # from here on calls are refused
            if running:
                self._ring()
        self._thread.join()
        if running and self._failure is not None:
            raise self._failure

    # --- in the client's thread ---

    def _run(self) -> None:
        try:
            trio.run(self._main, instruments=[self._answers], restrict_keyboard_interrupt_to_checkpoints=True)
        except BaseException as error:
            self._failure = error
        finally:
            with self._gate:
                self._ended = True
                if self._bell >= 0:
                    os.close(self._bell)
            for call in self._calls:
                call.error = BadHandle("the client is closed")
                call.end()
            self._answers.before_io_wait(0)
            self._ready.set()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._watch = ReadWatch(self._bell)
        try:
            async with self._make() as client:
                self.client = client
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    self._ready.set()
                    await self._dispatch()
                    # Calls under way finish: each has its deadline.
        finally:
            self._watch.close()

    async def _dispatch(self) -> None:
        """Until told to end. Most of the time a worker listens in this task's place."""
        while True:
            await self._watch.wait()
            self._hear()
            while self._calls:
                self._hand_out()
            if self._ended:
                break
        for worker in self._idle:
            trio.lowlevel.reschedule(worker.task)
        self._idle.clear()

    def _hear(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        self._rung = False  # before the queue is looked at: whoever queues a call after that rings again

    def _hand_out(self) -> None:
        call = self._calls.popleft()
        if self._idle:
            worker = self._idle.pop()
            worker.call = call
            trio.lowlevel.reschedule(worker.task)
        else:
            self._nursery.start_soon(self._work, _Worker(call))

    async def _work(self, worker: _Worker) -> None:
        worker.task = trio.lowlevel.current_task()
        with worker.scope:
            while (call := worker.call) is not None:
                try:
                    await call.run(worker.scope)
                finally:
                    self._answers.ready.append(call)
                    worker.call = call = None
                if not worker.scope.cancel_called:
                    await self._next_call(worker)

    async def _next_call(self, worker: _Worker) -> None:
        """Gives the worker a call, or none when it is to end."""
        while worker.call is None and not self._ended:
            if self._listening is None and self._watch.take_over(worker.task):
                self._listening = worker
            elif len(self._idle) < _IDLE_WORKERS:
                self._idle.append(worker)
            else:
                return
            await trio.lowlevel.wait_task_rescheduled(lambda _raise: self._leave(worker))
            if self._listening is worker:
                self._listening = None
                self._hear()
                if self._calls:
                    worker.call = self._calls.popleft()
                if self._calls or self._ended:
                    self._watch.hand_back()  # the dispatcher sees to the rest
                else:
                    self._watch.give_back()

    def _leave(self, worker: _Worker) -> trio.lowlevel.Abort:
        if self._listening is worker:
            self._listening = None
            self._watch.give_back()
        elif worker in self._idle:
            self._idle.remove(worker)
        return trio.lowlevel.Abort.SUCCEEDED
