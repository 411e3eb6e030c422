"""The loop on /dev/fuse: it receives requests, has them answered, and guards. What they mean is `requests.py`'s.

A few tasks take turns as the reader. The reader answers at once what needs no wait; when a request must wait it lets another task read on
and serves it
itself, so that serving costs no task switch, and none at all when it turns out not to wait.
Invariants: nothing but a cancel from outside ever ends the loop before the kernel does: a KvfsError becomes its errno, everything else is logged and
becomes EIO; every request is answered once; every operation ends within the deadline (ETIMEDOUT), and one that changes nothing when its
program is killed
(EINTR); at most `tasks_max` operations are under way, the rest waits in the kernel; other tasks of the process get their turn between requests.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable

import trio

from kvfs.common.boundary.readiness import ReadWatch
from kvfs.common.errors import KvfsError
from kvfs.fuse import protocol
from kvfs.fuse.protocol import IN_HEADER, INTERRUPT_IN, OUT_HEADER, OUT_HEADER_BYTES, Op
from kvfs.fuse.requests import Body, Request, Requests

log = logging.getLogger("kvfs.fuse")

BURST = 32
"""Requests answered at once, one after another, before other tasks get their turn."""
IDLE_TASKS_MAX = 16
"""Tasks kept for later; each has a request buffer."""
WATCH_S = 1.0
SIGKILL_PENDING = 1 << 8


def errno_of(error: BaseException) -> int:
    """The errno a system call answers. EAGAIN means "try again" to programs that asked for non-blocking calls, which a file never is: EIO."""
    while isinstance(error, BaseExceptionGroup):
        kvfs, _ = error.split(KvfsError)
        error = (kvfs or error).exceptions[0]
    if isinstance(error, KvfsError):
        return errno.EIO if error.errno == errno.EAGAIN else error.errno
    return errno.EIO


class _Worker:
    """A task with the request that it serves."""

    __slots__ = ("buffers", "deadline", "given_up", "request", "scope", "task")

    def __init__(self, buffer_bytes: int) -> None:
        self.request = Request(memoryview(bytearray(buffer_bytes)))
        self.buffers = [self.request.data]
        self.scope = trio.CancelScope()
        self.deadline = float("inf")
        """When the operation under way is out of time; infinite: none is."""
        self.given_up = 0
        """The errno to answer when the operation is cancelled by us."""
        self.task: trio.lowlevel.Task | None = None
        """While it sleeps."""


class Loop:
    """`fd`: a mounted and negotiated /dev/fuse, non-blocking."""

    def __init__(self, fd: int, requests: Requests, *, buffer_bytes: int, deadline_s: float, tasks_max: int) -> None:
        self._fd = fd
        self._requests = requests
        self._buffer_bytes = buffer_bytes
        self._deadline_s = deadline_s
        self._tasks_max = tasks_max
        self._reader: _Worker | None = None
        self._woken: _Worker | None = None
        """It has been woken to read, and has not run yet."""
        self._idle: list[_Worker] = []
        self._serving: dict[int, _Worker] = {}
        """Who serves which request."""
        self._tasks = 0
        self._ended = trio.Event()

    async def run(self) -> None:
        """Until the kernel ends the connection, or a cancel."""
        self._readable = ReadWatch(self._fd)
        try:
            await self._run()
        finally:
            self._readable.close()

    async def _run(self) -> None:
        async with trio.open_nursery() as watching:
            watching.start_soon(self._watch_deadlines)
            async with trio.open_nursery() as self._nursery:
                self._wake_reader()
                await self._ended.wait()
                for worker in self._idle:
                    assert worker.task is not None
                    trio.lowlevel.reschedule(worker.task)
                self._idle.clear()
                # What is being served is served to its end: nothing may be lost of a file that is just being closed.
            watching.cancel_scope.cancel()

    def stop(self) -> None:
        """End without the kernel: nothing more is read."""
        self._ended.set()
        if self._reader is not None:
            self._reader.scope.cancel()

    # --- whose turn it is ---

    def _wake_reader(self) -> None:
        """Nobody reads: let an idle task, or a new one."""
        if self._woken is not None or self._ended.is_set():
            return
        if self._idle:
            self._woken = worker = self._idle.pop()
            assert worker.task is not None
            trio.lowlevel.reschedule(worker.task)
        elif self._tasks < self._tasks_max:
            self._tasks += 1
            self._woken = _Worker(self._buffer_bytes)
            self._nursery.start_soon(self._work, self._woken)

    async def _work(self, worker: _Worker) -> None:
        try:
            needed = True
            while needed:
                # The scope stays through many operations: entering one for each would cost as much as a lookup.
                with trio.CancelScope() as worker.scope:
                    needed = await self._turns(worker)
                if worker.scope.cancelled_caught:
                    self._finish(worker, worker.given_up or errno.EINTR)
        finally:
            # Cancelled from outside: whoever waits in the kernel must not be left waiting, also with a lock that telling the kernel something needs.
            self._finish(worker, errno.ENOTCONN)
            self._tasks -= 1

    async def _turns(self, worker: _Worker) -> bool:
        """Read and serve. True when the scope is used up; False when this task is not needed any more, or all is over."""
        served = 0
        while not self._ended.is_set():
            if worker.scope.cancel_called:
                return True  # too late to stop an operation: it must not stop the next
            if self._woken is worker:
                self._woken = None
            if self._reader is not None and self._reader is not worker:
                if len(self._idle) >= IDLE_TASKS_MAX:
                    return False
                await self._sleep(worker)
                continue
            self._reader = worker
            call = self._receive(worker)
            if call is not None:
                self._reader = None
                self._wake_reader()
                await self._serve(worker, call)
                served += 1
            elif worker.request.op == 0:
                await self._readable.wait()
            if (call is None and worker.request.op) or served == BURST:
                served = 0
                await trio.lowlevel.checkpoint()  # the others' turn
        return False

    async def _sleep(self, worker: _Worker) -> None:
        worker.task = trio.lowlevel.current_task()
        self._idle.append(worker)

        def abort(_: object) -> trio.lowlevel.Abort:
            self._idle.remove(worker)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    # --- requests ---

    def _receive(self, worker: _Worker) -> Awaitable[Body] | None:
        """Answer requests until one must wait (that one's call is returned), or there is none (request.op is 0 then), or others must have their
        turn."""
        request = worker.request
        at_once, waiting = self._requests.at_once, self._requests.waiting
        for _ in range(BURST):
            try:
                request.end = os.readv(self._fd, worker.buffers)
            except BlockingIOError:
                request.op = 0
                return None
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):  # the request was taken back while it was read
                    continue
                if error.errno not in (errno.ENODEV, errno.ECONNABORTED):
                    log.error("reading from /dev/fuse failed: %s", error.strerror)
                self._ended.set()
                request.op = 1
                return None
            _, request.op, request.unique, request.node, request.uid, request.gid, request.pid, _, _ = IN_HEADER.unpack_from(request.data)
            quick = at_once.get(request.op)
            if quick is not None:
                try:
                    answer = quick(request)
                except Exception as error:
                    answer = protocol.error_reply(request.unique, self._failed(request, error))
                if answer is not None:
                    if answer:
                        self._send(request.unique, [answer])
                    continue
            slow = waiting.get(request.op)
            if slow is not None:
                return slow(request)
            if request.op == Op.INTERRUPT:
                self._interrupt(INTERRUPT_IN.unpack_from(request.data, protocol.HEADER_BYTES)[0])
            elif request.op == Op.DESTROY:
                self._send(request.unique, [protocol.reply(request.unique, b"")])
            elif request.op not in protocol.ANSWERLESS:
                self._send(request.unique, [protocol.error_reply(request.unique, protocol.NOT_OFFERED)])
        return None

    async def _serve(self, worker: _Worker, call: Awaitable[Body]) -> None:
        """The one place where what happens in an operation becomes an answer. A cancel by us is answered by `_work`."""
        request = worker.request
        worker.deadline = trio.current_time() + self._deadline_s
        self._serving[request.unique] = worker
        try:
            body = await call
        except trio.Cancelled:
            raise
        except BaseExceptionGroup as group:
            cancelled, rest = group.split(trio.Cancelled)
            if cancelled is not None:
                raise cancelled from rest  # what else went wrong in an operation that is given up is of no interest, and must not end the loop
            if not isinstance(group, ExceptionGroup):
                raise
            self._finish(worker, self._failed(request, group))
        except Exception as error:
            self._finish(worker, self._failed(request, error))
        else:
            self._finish(worker, 0, body)

    def _finish(self, worker: _Worker, number: int, body: Body = b"") -> None:
        """Answer, unless that has been done."""
        unique = worker.request.unique
        worker.given_up = 0
        worker.deadline = float("inf")
        if self._serving.pop(unique, None) is None:
            return
        header = OUT_HEADER.pack(OUT_HEADER_BYTES + len(body), -number, unique)
        if not self._send(unique, [header, body] if body else [header]) and not number:
            self._send(unique, [protocol.error_reply(unique, errno.EIO)])

    def _send(self, unique: int, parts: list[Body]) -> bool:
        try:
            os.writev(self._fd, parts)
        except OSError as error:
            # ENOENT: nobody waits any more (the program was killed); ENODEV and the like: the connection is over, which the reader will notice.
            if error.errno == errno.EINVAL:
                log.error("the kernel refused the answer to request %d", unique)
                return False
        return True

    @staticmethod
    def _failed(request: Request, error: BaseException) -> int:
        number = errno_of(error)
        if not isinstance(error, KvfsError):
            log.error("%s failed", _name(request), exc_info=error)
        elif number == errno.EIO:
            log.warning("%s: %s: %s", _name(request), type(error).__name__, error)
        return number

    # --- giving up ---

    def _interrupt(self, unique: int) -> None:
        """The program that waits for the request got a signal. Files do not end calls with EINTR for signals that a program handles: only one that
        is being killed stops waiting."""
        worker = self._serving.get(unique)
        if worker is not None and worker.request.op in protocol.CAN_BE_GIVEN_UP and _dying(worker.request.pid):
            self._give_up(worker, errno.EINTR)

    def _give_up(self, worker: _Worker, number: int) -> None:
        worker.given_up = number
        worker.deadline = float("inf")
        worker.scope.cancel()

    async def _watch_deadlines(self) -> None:
        while True:
            await trio.sleep(min(WATCH_S, self._deadline_s))
            now = trio.current_time()
            for worker in list(self._serving.values()):
                if worker.deadline <= now:
                    log.error("%s did not end within %.0f s", _name(worker.request), self._deadline_s)
                    self._give_up(worker, errno.ETIMEDOUT)


def _name(request: Request) -> str:
    try:
        return Op(request.op).name.lower()
    except ValueError:
        return f"request {request.op}"


def _dying(pid: int) -> bool:
    """Has the thread a SIGKILL pending? That is how the kernel ends a process, whatever signal it died of."""
    try:
        with open(f"/proc/{pid}/status", "rb") as status:
            for line in status:
                if line.startswith((b"SigPnd:", b"ShdPnd:")) and int(line.split()[1], 16) & SIGKILL_PENDING:
                    return True
    except (OSError, ValueError):
        pass  # in another pid namespace: nobody knows
    return False
