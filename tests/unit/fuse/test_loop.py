"""The loop without a kernel: a socket stands for /dev/fuse. Every request is answered once, every error becomes an errno, nothing ends the loop."""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from kvfs.common.errors import (
    BY_CODE,
    AccessDenied,
    ConnectionLost,
    DeadlineExceeded,
    KvfsError,
    NotFound,
    Overloaded,
)
from kvfs.fuse import protocol
from kvfs.fuse.loop import BURST, IDLE_TASKS_MAX, Loop, errno_of
from kvfs.fuse.protocol import Op
from kvfs.fuse.requests import Body, Request


class Answers:
    """Stands for Requests: LOOKUP is answered at once, the rest as the test says."""

    def __init__(self, waiting: dict[int, Callable[[Request], Awaitable[Body]]]) -> None:
        self.at_once = {Op.LOOKUP: self.lookup, Op.FORGET: lambda request: b""}
        self.waiting = waiting
        self.looked_up = 0

    def lookup(self, request: Request) -> bytes | None:
        self.looked_up += 1
        name = request.name()
        if name == b"fails":
            raise KeyError("x")
        if name == b"absent":
            raise NotFound("x")
        return protocol.reply(request.unique, name)


class Kernel:
    """The other end of the socket."""

    def __init__(self, end: socket.socket, answers: Answers) -> None:
        self.end = trio.socket.from_stdlib_socket(end)
        self.answers = answers

    async def ask(self, op: int, unique: int, body: bytes = b"", *, node: int = 7, pid: int = 0) -> None:
        await self.end.send(protocol.IN_HEADER.pack(protocol.HEADER_BYTES + len(body), op, unique, node, 1000, 1001, pid, 0, 0) + body)

    async def answer(self) -> tuple[int, int, bytes]:
        """(unique, errno, body)"""
        with trio.fail_after(5):
            text = await self.end.recv(1 << 17)
        length, error, unique = protocol.OUT_HEADER.unpack_from(text)
        assert length == len(text)
        return unique, -error, text[protocol.OUT_HEADER_BYTES :]


@asynccontextmanager
async def looping(waiting: dict[int, Callable[[Request], Awaitable[Body]]], *, deadline_s: float = 5.0, tasks_max: int = 8) -> AsyncIterator[Kernel]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        answers = Answers(waiting)
        loop = Loop(ours.fileno(), answers, buffer_bytes=1 << 16, deadline_s=deadline_s, tasks_max=tasks_max)  # type: ignore[arg-type]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(loop.run)
            yield Kernel(theirs, answers)
            loop.stop()


def looped(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        async def main() -> None:
            with trio.fail_after(30):
                await test()

        trio.run(main)

    run.__name__ = test.__name__
    return run


def outcome(serve: Callable[[], Awaitable[Any]], deadline_s: float = 5.0) -> tuple[int, bytes]:
    """(errno, body) of a GETATTR that is served so; afterwards another request must still be answered."""

    async def served(request: Request) -> Body:
        body: Body = await serve()
        return body

    async def main() -> tuple[int, bytes]:
        async with looping({Op.GETATTR: served}, deadline_s=deadline_s) as kernel:
            await kernel.ask(Op.GETATTR, 5)
            unique, number, body = await kernel.answer()
            assert unique == 5
            await kernel.ask(Op.LOOKUP, 6, b"name\0")
            assert await kernel.answer() == (6, 0, b"name")
            return number, body

    return trio.run(main)


@pytest.mark.parametrize("error,number", [
    (NotFound("x"), errno.ENOENT), (AccessDenied("x"), errno.EACCES), (DeadlineExceeded("x"), errno.ETIMEDOUT), (ConnectionLost("x"),
    errno.ECONNRESET),
    (Overloaded("x"), errno.EIO), (ValueError("x"), errno.EIO), (KeyError("x"), errno.EIO), (OSError(errno.ENOENT, "x"), errno.EIO),
    (ExceptionGroup("g", [ValueError("x"), NotFound("y")]), errno.ENOENT), (ExceptionGroup("g", [ExceptionGroup("h", [KeyError("x")])]), errno.EIO),
])  # fmt: skip
def test_errors_become_errno(error: Exception, number: int) -> None:
    async def fails() -> bytes:
        raise error

    assert outcome(fails) == (number, b"")


def test_every_class_of_the_tree_has_an_errno_and_none_says_try_again() -> None:
    for cls in BY_CODE.values():
        assert errno_of(cls("x")) > 0
        assert errno_of(cls("x")) != errno.EAGAIN
    assert errno_of(KvfsError("x")) == errno.EIO


def test_operation_that_does_not_end_times_out() -> None:
    assert outcome(trio.sleep_forever, deadline_s=0.05) == (errno.ETIMEDOUT, b"")


def test_deadline_counts_also_where_an_operation_fails_while_it_is_given_up() -> None:
    async def fails() -> bytes:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await trio.sleep_forever()
            finally:
                raise NotFound("on the way out")

    assert outcome(fails, deadline_s=0.05) in ((errno.ETIMEDOUT, b""), (errno.ENOENT, b""))


def test_late_success_is_a_success_and_the_next_operation_has_all_of_its_time() -> None:
    async def main() -> None:
        async def late(request: Request) -> Body:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.3)
            return b"done"

        async def short(request: Request) -> Body:
            await trio.sleep(0.01)
            return b"short"

        async with looping({Op.GETATTR: late, Op.OPEN: short}, deadline_s=0.1, tasks_max=1) as kernel:
            await kernel.ask(Op.GETATTR, 1)
            assert await kernel.answer() == (1, 0, b"done")
            for unique in range(2, 5):
                await kernel.ask(Op.OPEN, unique)
                assert await kernel.answer() == (unique, 0, b"short")

    trio.run(main)


def test_success_passes_through() -> None:
    async def works() -> memoryview:
        return memoryview(b"abc")

    assert outcome(works) == (0, b"abc")


@looped
async def test_errors_of_what_is_answered_at_once() -> None:
    async with looping({}) as kernel:
        for name, number in ((b"fails", errno.EIO), (b"absent", errno.ENOENT)):
            await kernel.ask(Op.LOOKUP, 3, name + b"\0")
            assert await kernel.answer() == (3, number, b"")


@looped
async def test_unknown_requests_are_not_offered_and_forgets_are_not_answered() -> None:
    async with looping({}) as kernel:
        await kernel.ask(Op.FORGET, 1, struct.pack("=Q", 1))
        await kernel.ask(999, 2)
        assert await kernel.answer() == (2, errno.ENOSYS, b"")
        await kernel.ask(Op.DESTROY, 3)
        assert await kernel.answer() == (3, 0, b"")


@looped
async def test_others_are_answered_while_some_wait_and_no_more_than_the_limit_are_served() -> None:
    under_way = 0
    go = trio.Event()

    async def waits(request: Request) -> Body:
        nonlocal under_way
        under_way += 1
        number = request.node
        await go.wait()
        under_way -= 1
        return b"%d" % number

    async with looping({Op.GETATTR: waits}, tasks_max=4) as kernel:
        for unique in range(3):
            await kernel.ask(Op.GETATTR, unique, node=100 + unique)
        await kernel.ask(Op.LOOKUP, 50, b"name\0")
        assert await kernel.answer() == (50, 0, b"name")
        for unique in range(3, 20):
            await kernel.ask(Op.GETATTR, unique, node=100 + unique)
        while under_way < 4:
            await trio.sleep(0.01)
        await trio.sleep(0.05)
        assert under_way == 4
        go.set()
        assert sorted([await kernel.answer() for _ in range(20)]) == sorted((unique, 0, b"%d" % (100 + unique)) for unique in range(20))


@looped
async def test_many_at_once_leave_few_tasks_behind_and_all_work_again() -> None:
    gate = trio.Event()
    under_way = 0

    async def waits(request: Request) -> Body:
        nonlocal under_way
        under_way += 1
        await gate.wait()
        under_way -= 1
        return b"x"

    async with looping({Op.GETATTR: waits}, tasks_max=64) as kernel:
        for _ in range(2):
            gate = trio.Event()
            for unique in range(60):
                await kernel.ask(Op.GETATTR, unique)
            while under_way < 60:
                await trio.sleep(0.01)
            gate.set()
            assert sorted([(await kernel.answer())[0] for _ in range(60)]) == list(range(60))
        await trio.sleep(0.05)
        assert trio.lowlevel.current_statistics().tasks_living < IDLE_TASKS_MAX + 12


@looped
async def test_other_tasks_get_their_turn_in_a_stream_of_requests() -> None:
    async def ready(request: Request) -> Body:
        return b""

    for op in (Op.LOOKUP, Op.GETATTR):
        async with looping({Op.GETATTR: ready}) as kernel:
            kernel.end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            for unique in range(4 * BURST):
                await kernel.ask(op, unique, b"name\0")
            turns = 0

            async def other() -> None:
                nonlocal turns
                while True:
                    await trio.lowlevel.checkpoint()
                    turns += 1

            async with trio.open_nursery() as nursery:
                nursery.start_soon(other)
                for _ in range(4 * BURST):
                    await kernel.answer()
                nursery.cancel_scope.cancel()
            assert turns >= 3


@looped
async def test_signal_ends_a_reading_call_of_a_killed_program_only() -> None:
    async def waits(request: Request) -> Body:
        await trio.sleep_forever()
        return b""

    async with looping({Op.GETATTR: waits, Op.SETATTR: waits}) as kernel:
        program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        try:
            for unique, op in ((10, Op.GETATTR), (20, Op.SETATTR)):
                await kernel.ask(op, unique, pid=program.pid)
                await kernel.ask(Op.INTERRUPT, unique | 1, protocol.INTERRUPT_IN.pack(unique))
            await kernel.ask(Op.LOOKUP, 30, b"alive\0")
            assert await kernel.answer() == (30, 0, b"alive")  # nothing was given up for a signal that a program lives through
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("kvfs.fuse.loop._dying", lambda pid: pid == program.pid)
                for unique in (10, 20, 77):  # 77: nobody knows it
                    await kernel.ask(Op.INTERRUPT, unique | 1, protocol.INTERRUPT_IN.pack(unique))
                assert await kernel.answer() == (10, errno.EINTR, b"")
                await kernel.ask(Op.LOOKUP, 31, b"alive\0")
                assert await kernel.answer() == (31, 0, b"alive")
        finally:
            program.kill()
            program.wait()


@looped
async def test_cancel_of_the_mount_is_not_swallowed() -> None:
    async def waits(request: Request) -> Body:
        await trio.sleep_forever()
        return b""

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        loop = Loop(ours.fileno(), Answers({Op.GETATTR: waits}), buffer_bytes=1 << 16, deadline_s=5.0, tasks_max=4)  # type: ignore[arg-type]
        kernel = Kernel(theirs, Answers({}))
        with trio.move_on_after(0.2) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(loop.run)
                await kernel.ask(Op.GETATTR, 1)
        assert scope.cancelled_caught
        assert await kernel.answer() == (1, errno.ENOTCONN, b""), "and nobody is left waiting"


@looped
async def test_end_of_the_connection_lets_operations_finish() -> None:
    finished = False
    started = trio.Event()

    async def closes(request: Request) -> Body:
        nonlocal finished
        started.set()
        await trio.sleep(0.1)
        finished = True
        return b""

    async with looping({Op.RELEASE: closes}) as kernel:
        await kernel.ask(Op.RELEASE, 1)
        await started.wait()
    assert finished


def test_a_descriptor_that_fails_ends_the_loop() -> None:
    async def main() -> None:
        directory = os.open("/", os.O_RDONLY)
        try:
            with trio.fail_after(5):
                await Loop(directory, Answers({}), buffer_bytes=1 << 16, deadline_s=5.0, tasks_max=4).run()  # type: ignore[arg-type]
        finally:
            os.close(directory)

    trio.run(main)
