"""The watch on a socket that is read all the time: who is woken, when, and that trio's insides are what it takes them for."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import pytest
import trio
import trio.testing

from kvfs.common.boundary.readiness import ReadWatch


@contextmanager
def pair() -> Iterator[tuple[ReadWatch, socket.socket, socket.socket]]:
    here, there = socket.socketpair()
    here.setblocking(False)
    watch = ReadWatch(here.fileno())
    try:
        yield watch, here, there
    finally:
        watch.close()
        here.close()
        there.close()


Body = Callable[[ReadWatch, socket.socket, socket.socket, trio.Nursery, list[str]], Awaitable[None]]


def run(body: Body) -> list[str]:
    """`body` beside a reader that notes each time it is woken."""
    log: list[str] = []

    async def reader(watch: ReadWatch, here: socket.socket) -> None:
        while True:
            try:
                await watch.wait()
                log.append(f"reader {here.recv(100).decode()}")
            except BlockingIOError:
                log.append("reader woken")
            except ValueError as error:
                log.append(f"reader told {error}")
            except trio.ClosedResourceError:
                log.append("reader closed")
                return

    async def main() -> None:
        with trio.fail_after(10), pair() as (watch, here, there):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reader, watch, here)
                await trio.testing.wait_all_tasks_blocked()
                await body(watch, here, there, nursery, log)
                await trio.testing.wait_all_tasks_blocked(0.01)
                nursery.cancel_scope.cancel()

    trio.run(main)
    return log


async def sleep_until_woken() -> object:
    return await trio.lowlevel.wait_task_rescheduled(lambda _raise: trio.lowlevel.Abort.SUCCEEDED)


def test_a_reader_is_woken_for_every_arrival() -> None:
    async def body(watch: ReadWatch, here: socket.socket, there: socket.socket, nursery: trio.Nursery, log: list[str]) -> None:
        for text in (b"a", b"b", b"c"):
            there.send(text)
            await trio.testing.wait_all_tasks_blocked(0.005)
        with pytest.raises(trio.BusyResourceError):
            await watch.wait()

    assert run(body) == ["reader a", "reader b", "reader c"]


def test_what_arrives_while_nobody_waits_is_not_lost_and_does_not_turn_the_loop() -> None:
    async def main() -> None:
        turns = 0

        class Count(trio.abc.Instrument):
            def after_io_wait(self, timeout: float) -> None:
                nonlocal turns
                turns += 1

        with pair() as (watch, here, there), trio.fail_after(5):
            for _ in range(3):
                there.send(b"x")
                await watch.wait()
                here.recv(1)
                there.send(b"y")
                count = Count()
                trio.lowlevel.add_instrument(count)
                turns = 0
                await trio.sleep(0.05)
                trio.lowlevel.remove_instrument(count)
                assert turns < 5
                await watch.wait()
                assert here.recv(1) == b"y"
            there.close()
            await watch.wait()
            await trio.sleep(0.01)
            await watch.wait()
            assert here.recv(1) == b""

    trio.run(main)


def test_a_deputy_is_woken_in_the_readers_place_until_it_gives_back() -> None:
    async def body(watch: ReadWatch, here: socket.socket, there: socket.socket, nursery: trio.Nursery, log: list[str]) -> None:
        for text in (b"a", b"b"):
            assert watch.take_over(trio.lowlevel.current_task())
            there.send(text)
            assert await sleep_until_woken() is None
            log.append(f"deputy {here.recv(100).decode()}")
        assert not watch.give_back()
        there.send(b"c")
        await trio.testing.wait_all_tasks_blocked(0.005)
        assert watch.take_over(trio.lowlevel.current_task())
        assert watch.give_back()
        there.send(b"d")

    assert run(body) == ["deputy a", "deputy b", "reader c", "reader d"]


def test_a_later_deputy_replaces_one_that_waits_but_not_one_that_is_awake() -> None:
    async def body(watch: ReadWatch, here: socket.socket, there: socket.socket, nursery: trio.Nursery, log: list[str]) -> None:
        first: list[trio.lowlevel.Task] = []

        async def deputy() -> None:
            first.append(trio.lowlevel.current_task())
            assert watch.take_over(first[0])
            await sleep_until_woken()
            log.append("first woken")

        me = trio.lowlevel.current_task()
        nursery.start_soon(deputy)
        await trio.testing.wait_all_tasks_blocked()
        assert watch.take_over(me)
        there.send(b"a")
        await sleep_until_woken()
        assert not watch.take_over(first[0]), "this one is awake and has to say what is next"
        watch.hand_back()
        assert not watch.take_over(me), "the reader is awake too now"
        await trio.testing.wait_all_tasks_blocked(0.005)
        log.append("handed back")
        trio.lowlevel.reschedule(first[0])

    assert run(body) == ["reader a", "handed back", "first woken"]


def test_a_deputy_hands_back_with_an_error() -> None:
    async def body(watch: ReadWatch, here: socket.socket, there: socket.socket, nursery: trio.Nursery, log: list[str]) -> None:
        assert watch.take_over(trio.lowlevel.current_task())
        there.send(b"a")
        await sleep_until_woken()
        watch.hand_back(ValueError("bad"))

    assert run(body) == ["reader told bad", "reader a"]


def test_closing_wakes_the_reader_and_its_deputy() -> None:
    async def body(watch: ReadWatch, here: socket.socket, there: socket.socket, nursery: trio.Nursery, log: list[str]) -> None:
        async def deputy() -> None:
            watch.take_over(trio.lowlevel.current_task())
            with pytest.raises(trio.ClosedResourceError):
                await sleep_until_woken()
            log.append("deputy closed")

        nursery.start_soon(deputy)
        await trio.testing.wait_all_tasks_blocked()
        watch.close()
        with pytest.raises(trio.ClosedResourceError):
            await watch.wait()
        assert not watch.take_over(trio.lowlevel.current_task())

    assert sorted(run(body)) == ["deputy closed", "reader closed"]


def test_a_cancelled_reader_leaves_its_deputy_waiting() -> None:
    async def main() -> None:
        with pair() as (watch, here, there), trio.fail_after(5):
            me = trio.lowlevel.current_task()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch.wait)
                await trio.testing.wait_all_tasks_blocked()
                assert watch.take_over(me)
                nursery.cancel_scope.cancel()
            assert not watch.take_over(me)
            there.send(b"a")
            await sleep_until_woken()
            assert not watch.give_back()
            await watch.wait()
            assert here.recv(1) == b"a"

    trio.run(main)
