"""Threads that help with bulk work on memory: reading from the page cache, checksums.

Owns a few threads for the whole process, started when they are first needed, anew after a fork. Invariants: work is cut into pieces, and whoever
wants it done takes pieces itself; helpers take what is left, so nobody ever waits for a thread that has not begun; when `work`, `beside` or
`work_elsewhere` returns or raises, no helper touches the memory of that work any more. A piece must not wait for anything but the processor, and
must not raise.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

import trio

THREADS_MAX: Final = 3
"""And no more than make use of all processors together with the caller: on two, three helpers cost half as much processor time again as one, since
they take turns at the interpreter."""


class _Work:
    """Pieces, and who is at them."""

    __slots__ = ("_busy", "_closed", "_gate", "_idle", "pieces")

    def __init__(self, pieces: Iterable[Callable[[], None]]) -> None:
        self.pieces = deque(pieces)
        self._gate = threading.Lock()
        self._busy = 0
        self._closed = False
        self._idle: threading.Lock | None = None
        """Released when the last helper has left."""

    def take(self) -> None:
        """Pieces until there are none."""
        pieces = self.pieces
        with suppress(IndexError):
            while True:
                pieces.popleft()()

    def help(self) -> None:
        with self._gate:
            if self._closed:
                return
            self._busy += 1
        try:
            self.take()
        finally:
            with self._gate:
                self._busy -= 1
                if self._idle is not None and not self._busy:
                    self._idle.release()

    def finish(self) -> None:
        """Nobody is at a piece afterwards, and nobody takes another."""
        self.pieces.clear()
        with self._gate:
            self._closed = True
            if not self._busy:
                return
            self._idle = threading.Lock()
            self._idle.acquire()
        while True:
            try:
                self._idle.acquire()
                return
            except KeyboardInterrupt:  # not before the memory is left alone: a piece takes a millisecond
                interrupted = KeyboardInterrupt()
                self._idle.acquire()
                raise interrupted from None


class Helpers:
    def __init__(self, threads: int = 0) -> None:
        """0: what suits this machine."""
        threads = threads or max(1, min(THREADS_MAX, len(os.sched_getaffinity(0)) - 1))
        self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._count = threads
        for number in range(threads):
            threading.Thread(target=self._serve, name=f"kvfs-helper-{number}", daemon=True).start()

    def work(self, pieces: Iterable[Callable[[], None]]) -> None:
        """In a thread that may take its time; it does its share."""
        work = _Work(pieces)
        try:
            for _ in range(min(self._count, len(work.pieces) - 1)):
                self._queue.put(work.help)
            work.take()
        finally:
            work.finish()

    def beside(self, own: Callable[[], None], pieces: Iterable[Callable[[], None]]) -> None:
        """`own` in this thread, a helper at the pieces meanwhile; what it leaves comes after. For `own` that gives the interpreter away."""
        work = _Work(pieces)
        try:
            self._queue.put(work.help)
            own()
            work.take()
        finally:
            work.finish()

    async def work_elsewhere(self, pieces: Iterable[Callable[[], None]]) -> None:
        """For a trio task, whose thread is not used. It cannot be cancelled meanwhile."""
        task, token = trio.lowlevel.current_task(), trio.lowlevel.current_trio_token()
        errors: list[BaseException] = []

        def lead() -> None:
            try:
                self.work(pieces)
            except BaseException as error:
                errors.append(error)
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(trio.lowlevel.reschedule, task)

        self._queue.put(lead)
        await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
        if errors:
            raise errors[0]

    def _serve(self) -> None:
        while True:
            job = self._queue.get()
            job()
            del job  # an idle thread keeps no memory alive


_made: tuple[int, Helpers] | None = None
_making = threading.Lock()


def helpers() -> Helpers:
    """Of this process."""
    global _made
    made, pid = _made, os.getpid()
    if made is None or made[0] != pid:
        with _making:
            if _made is None or _made[0] != pid:
                _made = (pid, Helpers())
            made = _made
    return made[1]
