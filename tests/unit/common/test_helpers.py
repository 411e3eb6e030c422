"""Threads that help: all pieces are done once, nobody waits for a thread that has not begun, and the memory is left alone at the end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest
import trio

from kvfs.common.helpers import Helpers, helpers


def noting(done: list[int], number: int, pause_s: float = 0.0) -> Callable[[], None]:
    def piece() -> None:
        time.sleep(pause_s)
        done.append(number)

    return piece


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_every_piece_is_done_once(count: int) -> None:
    made = Helpers(2)
    done: list[int] = []
    made.work(noting(done, number, 0.001) for number in range(count))
    assert sorted(done) == list(range(count))


def test_helpers_help() -> None:
    names: set[str] = set()

    def piece() -> None:
        names.add(threading.current_thread().name)
        time.sleep(0.02)

    Helpers(2).work([piece] * 12)
    assert len(names) == 3


def test_nobody_waits_for_helpers_that_are_busy() -> None:
    made = Helpers(1)
    release = threading.Event()
    other = threading.Thread(target=made.work, args=([release.wait, release.wait],))  # takes the one helper
    other.start()
    time.sleep(0.05)
    done: list[int] = []
    made.work(noting(done, number) for number in range(5))
    assert done == list(range(5))
    release.set()
    other.join(10)
    assert not other.is_alive()


def test_after_an_error_no_helper_is_at_work() -> None:
    made = Helpers(2)
    running = threading.Semaphore(0)
    finished: list[int] = []

    def slow() -> None:
        running.release()
        time.sleep(0.1)
        finished.append(1)

    def fails() -> None:
        assert running.acquire(timeout=5) and running.acquire(timeout=5)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        made.work([fails, slow, slow, *[slow] * 10])
    assert len(finished) in (2, 3), "those that had begun are over, the others were dropped"
    count = len(finished)
    time.sleep(0.15)
    assert len(finished) == count


@pytest.mark.parametrize("busy", [False, True])
def test_pieces_are_done_beside_the_callers_own_work(busy: bool) -> None:
    made, release, done, own = Helpers(1), threading.Event(), list[int](), list[list[int]]()
    if busy:
        made._queue.put(release.wait)

    def work() -> None:
        time.sleep(0.1)
        own.append(sorted(done))

    made.beside(work, [noting(done, number) for number in range(5)])
    assert own == [[] if busy else [0, 1, 2, 3, 4]] and sorted(done) == [0, 1, 2, 3, 4]
    release.set()
    with pytest.raises(ZeroDivisionError):
        made.beside(lambda: 1 // 0, [noting(done, 9, 0.05)] * 20)
    count = len(done)
    time.sleep(0.1)
    assert len(done) == count <= 7


def test_a_task_does_not_hold_up_the_loop_and_gets_the_error() -> None:
    async def main() -> None:
        made = Helpers(1)
        here, threads = threading.current_thread(), set()

        def piece() -> None:
            time.sleep(0.05)
            threads.add(threading.current_thread())

        ticks = 0
        async with trio.open_nursery() as nursery:

            async def tick() -> None:
                nonlocal ticks
                while True:
                    await trio.sleep(0.005)
                    ticks += 1

            nursery.start_soon(tick)
            with trio.move_on_after(0.01):  # it is not cut short: the memory is in use
                await made.work_elsewhere([piece] * 3)
            assert len(threads) >= 1 and here not in threads and ticks >= 10
            with pytest.raises(ZeroDivisionError):
                await made.work_elsewhere([lambda: 1 // 0])
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_child_has_threads_of_its_own() -> None:
    mine = helpers()
    assert helpers() is mine
    pid = os.fork()
    if pid == 0:
        done: list[int] = []
        helpers().work(noting(done, number, 0.01) for number in range(10))
        os._exit(0 if sorted(done) == list(range(10)) and helpers() is not mine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
