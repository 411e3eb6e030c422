"""The way into the client's thread and out again: any thread, any moment, and the end."""

from __future__ import annotations

import gc
import signal
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trio

from kvfs.client.portal import Portal
from kvfs.common.errors import BadHandle, Busy, Unreachable


class Fake:
    """Stands for a client: the portal only keeps it."""

    nursery: trio.Nursery
    closed = False


@asynccontextmanager
async def make() -> AsyncIterator[Any]:
    fake = Fake()
    async with trio.open_nursery() as fake.nursery:
        yield fake
        fake.closed = True


@pytest.fixture
def portal() -> Iterator[Portal]:
    made = Portal(make)
    yield made
    made.close()


async def sleep(seconds: float, value: int = 0) -> int:
    await trio.sleep(seconds)
    return value


async def same(value: int) -> int:
    return value


def in_threads(count: int, body: Any) -> list[threading.Thread]:
    threads = [threading.Thread(target=body, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    return threads


def test_calls_of_many_threads_get_their_own_answers(portal: Portal) -> None:
    wrong: list[Any] = []
    done: list[int] = []

    def caller(number: int) -> None:
        for turn in range(60):
            value = number * 1000 + turn
            got = portal.call(same, value) if turn % 3 else portal.call(sleep, 0.0005 * (turn % 4), value)
            if got != value:
                wrong.append((value, got))
        done.append(number)

    for thread in in_threads(100, caller):
        thread.join(30)
    assert not wrong and len(done) == 100
    assert portal.call(same, 5) == 5
    assert len(portal._idle) <= 64, "tasks that nobody needs end"


def test_a_long_call_does_not_keep_others(portal: Portal) -> None:
    threads = in_threads(3, lambda number: portal.call(sleep, 0.5))
    time.sleep(0.05)
    begun = time.monotonic()
    for number in range(200):
        assert portal.call(same, number) == number
    assert time.monotonic() - begun < 0.45
    for thread in threads:
        thread.join(10)


def test_errors_come_out_as_they_are(portal: Portal) -> None:
    async def fail() -> None:
        raise Unreachable("nobody there")

    for _ in range(3):
        with pytest.raises(Unreachable, match="nobody there"):
            portal.call(fail)
    assert portal.call(same, 1) == 1


def test_an_error_keeps_nothing_of_its_call_alive(portal: Portal) -> None:
    class Held:
        pass

    async def fail(held: Held) -> None:
        raise Unreachable("nobody there")

    gc.collect()
    gc.disable()
    try:
        held = Held()
        gone = weakref.ref(held)
        with suppress(Unreachable):
            portal.call(fail, held)
        portal.call(same, 1)
        del held
        assert gone() is None
    finally:
        gc.enable()


def test_an_interrupted_caller_has_its_call_cancelled_and_nobody_elses(portal: Portal) -> None:
    ended: list[str] = []

    async def long(name: str) -> str:
        try:
            await trio.sleep(0.6 if name == "other" else 30)
            return name
        except trio.Cancelled:
            ended.append(name)
            raise

    other = in_threads(1, lambda number: ended.append(portal.call(long, "other")))[0]
    time.sleep(0.05)
    for _ in range(2):
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            portal.call(long, "mine")
        assert portal.call(same, 2) == 2
    other.join(10)
    assert ended == ["mine", "mine", "other"]


def test_the_clients_own_thread_may_post_but_not_wait(portal: Portal) -> None:
    posted = threading.Event()

    async def note() -> None:
        posted.set()

    async def from_inside() -> None:
        assert portal.inside
        portal.post(note)
        portal.call(same, 1)

    with pytest.raises(Busy):
        portal.call(from_inside)
    assert posted.wait(5) and not portal.inside


def test_closing_lets_calls_end_and_refuses_new_ones() -> None:
    portal = Portal(make)
    client: Any = portal.client
    got: list[int] = []
    threads = in_threads(5, lambda number: got.append(portal.call(sleep, 0.2, number)))
    time.sleep(0.05)
    portal.close()
    for thread in threads:
        thread.join(10)
    assert sorted(got) == [0, 1, 2, 3, 4] and client.closed
    with pytest.raises(BadHandle, match="closed"):
        portal.call(same, 1)
    portal.post(same, 1)
    portal.close()


def test_closing_while_threads_call_leaves_nobody_waiting() -> None:
    for _ in range(20):
        portal = Portal(make)
        refused: list[int] = []

        def caller(number: int, portal: Portal = portal, refused: list[int] = refused) -> None:
            try:
                while True:
                    assert portal.call(same, number) == number
            except BadHandle:
                refused.append(number)

        threads = in_threads(4, caller)
        time.sleep(0.005)
        portal.close()
        for thread in threads:
            thread.join(10)
        assert len(refused) == 4


def test_a_client_that_fails_ends_the_calls_under_way() -> None:
    portal = Portal(make)
    client: Any = portal.client
    failures: list[str] = []

    def caller(number: int) -> None:
        try:
            portal.call(sleep, 30)
        except BadHandle as error:
            failures.append(error.message)

    async def crash() -> None:
        async def boom() -> None:
            raise ValueError("a defect")

        client.nursery.start_soon(boom)

    threads = in_threads(3, caller)
    time.sleep(0.05)
    with pytest.raises(BadHandle):
        portal.call(crash)
        portal.call(sleep, 30)
    for thread in threads:
        thread.join(10)
    assert failures == ["the client was closed while the call was under way"] * 3
    with pytest.raises(BadHandle):
        portal.call(same, 1)
    portal.close()


def test_what_keeps_the_client_from_opening_is_raised() -> None:
    @asynccontextmanager
    async def unable() -> AsyncIterator[Any]:
        raise Unreachable("no manager")
        yield

    with pytest.raises(Unreachable, match="no manager"):
        Portal(unable)
