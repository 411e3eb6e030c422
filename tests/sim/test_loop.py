"""The cheaper loop runs what trio's own would: programs by seed, of everything that the product does with tasks, leave the same lines under both."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio._core._run as trio_run
from tests.sim import scheduler
from trio.testing import MockClock

TASKS, STEPS = 12, 30
Main = Callable[[], Awaitable[list[str]]]


def by_trio(seed: int, main: Main) -> list[str]:
    before = trio_run._r.getstate(), trio_run._ALLOW_DETERMINISTIC_SCHEDULING
    trio_run._r.seed(seed)
    trio_run._ALLOW_DETERMINISTIC_SCHEDULING = True
    try:
        return trio.run(main, clock=MockClock(autojump_threshold=0))
    finally:
        trio_run._r.setstate(before[0])
        trio_run._ALLOW_DETERMINISTIC_SCHEDULING = before[1]


class Program:
    """Tasks that do one thing after another, chosen by a source of chance of their own."""

    def __init__(self, seed: int) -> None:
        self.chances = [random.Random(seed * 1000 + task) for task in range(TASKS)]
        self.lines: list[str] = []
        self.events = [trio.Event() for _ in range(4)]
        self.scopes: list[trio.CancelScope] = []
        self.lock = trio.Lock()

    def say(self, name: str, what: object) -> None:
        self.lines.append(f"{trio.current_time()!r} {name} {what}")

    async def __call__(self) -> list[str]:
        with trio.move_on_after(40):
            async with trio.open_nursery() as nursery:
                for task, chance in enumerate(self.chances):
                    nursery.start_soon(self.task, str(task), chance)
        self.say("main", "ends")
        return self.lines

    async def task(self, name: str, chance: random.Random) -> None:
        for step in range(STEPS):
            try:
                with trio.CancelScope() as scope:
                    self.scopes.append(scope)
                    scope.shield = chance.randrange(5) == 0
                    self.say(name, f"{step}: {await self.step(name, chance, 2)}")
            except (trio.TooSlowError, ExceptionGroup, KeyError) as error:
                self.say(name, f"{step}: {type(error).__name__}")
            if scope.cancelled_caught:
                self.say(name, f"{step}: cancelled")

    async def step(self, name: str, chance: random.Random, depth: int) -> str:
        what = chance.randrange(12)
        wait_s = chance.choice((0, 0.25, 0.5, 1.0, chance.uniform(0, 2)))
        if what == 0:
            await trio.sleep(wait_s)
        elif what == 1:
            await trio.sleep_until(trio.current_time() + wait_s - 0.5)
        elif what == 2:
            with trio.move_on_after(0.5) as scope:
                await trio.sleep(wait_s)
            return f"slept, or not: {scope.cancelled_caught}"
        elif what == 3:
            with trio.fail_after(wait_s):
                await self.events[chance.randrange(4)].wait()
        elif what == 4:
            at = chance.randrange(4)
            self.events[at].set()
            self.events[at] = trio.Event()
        elif what == 5:
            self.scopes[chance.randrange(len(self.scopes))].cancel()
            await trio.lowlevel.checkpoint()
        elif what == 6:
            with trio.move_on_after(0.5):
                async with self.lock:
                    await trio.sleep(wait_s)
        elif what == 7:
            scope = self.scopes[chance.randrange(len(self.scopes))]
            scope.deadline = trio.current_time() + wait_s
        elif what == 8:
            with trio.CancelScope(shield=True), trio.move_on_after(wait_s):
                await trio.sleep(1.0)
        elif what == 9:
            raise KeyError(name)
        elif what == 10 and depth:
            async with trio.open_nursery() as nursery:
                for child in range(1 + chance.randrange(3)):
                    nursery.start_soon(self.step, f"{name}.{child}", random.Random(chance.random()), depth - 1)
                await trio.sleep(wait_s)
                if chance.randrange(2):
                    nursery.cancel_scope.cancel()
        else:
            await trio.lowlevel.checkpoint()
        return str(what)


@pytest.mark.parametrize("seed", range(25))
def test_a_program_runs_as_under_trios_own_loop(seed: int) -> None:
    lines = by_trio(seed, Program(seed))
    assert scheduler.run(seed, Program(seed)) == lines
    assert len(lines) > TASKS * STEPS / 2


def test_what_ends_a_run_comes_out_and_the_next_runs() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(trio.sleep, 5)
            await trio.sleep(1)
            raise KeyError("x")

    for _ in range(2):
        with pytest.raises(KeyError):
            scheduler.run(1, main)
