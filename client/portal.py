"""A trio thread for callers that have none.

Owns one daemon thread that runs a client, and the way of calls into it and answers out of it. Invariants: any thread may call; a caller
that is interrupted
(KeyboardInterrupt) has its call cancelled; after `close`, and in a forked child, no call ever waits for a thread that is not there.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import trio

from kvfs.client.async_client import AsyncClient
from kvfs.common.errors import BadHandle, Busy, KvfsError

T = TypeVar("T")


class _Call:
    __slots__ = ("_waiter", "arguments", "error", "function", "result", "scope")

    def __init__(self, function: Callable[..., Awaitable[Any]], arguments: tuple[Any, ...]) -> None:
        self.function = function
        self.arguments = arguments
        self.result: Any = None
        self.error: BaseException | None = None
        self.scope: trio.CancelScope | None = None
        self._waiter = threading.Lock()
        self._waiter.acquire()

    def wait(self) -> None:
        self._waiter.acquire()

    def end(self) -> None:
        self._waiter.release()

    async def run(self) -> None:
        try:
            with trio.CancelScope() as self.scope:
                self.result = await self.function(*self.arguments)
            if self.scope.cancelled_caught:
                self.error = KvfsError("the call was interrupted")
        except Exception as error:
            self.error = error
        except BaseException:
            self.error = BadHandle("the client was closed while the call was under way")
            raise
        finally:
            self.end()


class Portal:
    def __init__(self, make: Callable[[], AbstractAsyncContextManager[AsyncClient]]) -> None:
        """Starts the thread; returns when the client is open, or raises what kept it from opening."""
        self.pid = os.getpid()
        self._make = make
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self._stop: trio.Event | None = None
        self._failure: BaseException | None = None
        self._ready = threading.Event()
        self._ended = False
        self._gate = threading.Lock()
        self.client: AsyncClient
        self._thread = threading.Thread(target=self._run, name="kvfs-client", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def _run(self) -> None:
        try:
            trio.run(self._main, restrict_keyboard_interrupt_to_checkpoints=True)
        except BaseException as error:
            self._failure = error
        finally:
            with self._gate:
                self._ended = True
            self._ready.set()

    async def _main(self) -> None:
        self._stop = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        async with self._make() as client:
            self.client = client
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._ready.set()
                await self._stop.wait()
                with self._gate:
                    self._ended = True  # from here on calls are refused
                # Calls under way finish: each has its deadline.

    def call(self, function: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """Run an async function in the client's thread and wait for it."""
        if self.inside:
            raise Busy("the client's own thread cannot wait for itself")
        call = _Call(function, arguments)
        with self._gate:
            if self._ended:
                raise BadHandle("the client is closed")
            assert self._token is not None
            self._token.run_sync_soon(self._begin, call)
        try:
            call.wait()
        except BaseException:
            self._cancel(call)
            raise
        if call.error is not None:
            raise call.error
        result: T = call.result
        return result

    def post(self, function: Callable[..., Awaitable[object]], *arguments: Any) -> None:
        """Run an async function in the client's thread, without waiting: for what may be called in that thread itself, as finalizers are."""
        call = _Call(function, arguments)
        with self._gate:
            if not self._ended:
                assert self._token is not None
                self._token.run_sync_soon(self._begin, call)

    @property
    def inside(self) -> bool:
        """Whether this is the client's own thread, which must not wait for itself."""
        return threading.current_thread() is self._thread

    def _begin(self, call: _Call) -> None:
        assert self._nursery is not None
        try:
            self._nursery.start_soon(call.run)
        except RuntimeError:  # the nursery has ended between the gate and here
            call.error = BadHandle("the client is closed")
            call.end()

    def _cancel(self, call: _Call) -> None:
        def cancel() -> None:
            if call.scope is not None:
                call.scope.cancel()

        try:
            assert self._token is not None
            self._token.run_sync_soon(cancel)
        except trio.RunFinishedError:
            pass  # then nothing of it is under way any more

    def close(self) -> None:
        """Close the client with what it holds, and end the thread. Raises what closing raised."""
        if self.pid != os.getpid():
            return
        with self._gate:
            running = not self._ended
            if running:
                assert self._token is not None and self._stop is not None
                self._token.run_sync_soon(self._stop.set)
        self._thread.join()
        if running and self._failure is not None:
            raise self._failure
