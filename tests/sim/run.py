"""One seed from start to verdict.

A run: draw a cluster and a plan of faults from the seed, start everything, let clients work while faults strike, mend everything, wait until every
target serves, check. A run that does not end, or that a wait of a minute of virtual time does not bring to rest, is a failure too.
"""

from __future__ import annotations

import logging
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import FrameType

import trio
from tests.histories.history import History
from tests.sim import scheduler, stress
from tests.sim.append_log import LOG
from tests.sim.blackout import blackout
from tests.sim.blocks import SPACE, SPACE_PARAMS, Blocks
from tests.sim.checks import CHECKS, QUIET_S, End
from tests.sim.clients import WORKS, client_main, connected
from tests.sim.faults import FAULTS
from tests.sim.machine import Process
from tests.sim.registers import REGISTERS, Registers
from tests.sim.trace import Frames, Trace
from tests.sim.work import CHUNK_BYTES, Pace, Record, Work
from tests.sim.world import Shape, World

from kvfs.client.async_client import AsyncClient
from kvfs.common.boundary.random import SeededRandom
from kvfs.kvcache.cache import AsyncKVCache
from kvfs.meta.cluster import tables

CPU_S = 40
TEST_SEEDS = 200
"""`make test` runs the seeds from 1 to this, each without a mistake."""
SERVE_AGAIN_S = 90.0


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a seed decides before anything runs."""

    shape: Shape
    clients: tuple[tuple[type[Work], ...], ...]
    pace: Pace
    latency_s: float
    """Of a message, at most."""
    faults: tuple[tuple[float, str, float], ...]
    """(when, which, how long)"""
    blackout: bool
    """Power goes everywhere at the end."""


@dataclass(slots=True)
class Verdict:
    seed: int
    problems: list[str] = field(default_factory=list)
    digest: str = ""
    virtual_s: float = 0.0
    cpu_s: float = 0.0
    operations: int = 0
    unknown: int = 0
    done: Counter[str] = field(default_factory=Counter)
    """By kind, how many operations did what they were to do."""
    faults: tuple[str, ...] = ()


def plan_of(seed: int) -> Plan:
    random = SeededRandom(seed)
    storages = 3 + random.randrange(4)
    shape = Shape(storages=storages, replicas=3 if random.randrange(4) else 2, targets_per_disk=1 + random.randrange(2))
    clients = []
    for _ in range(2 + random.randrange(2)):
        works = [*WORKS, WORKS[0]]
        random.shuffle(works)
        clients.append(tuple(works[: 2 + random.randrange(2)]))
    pause_s, latency_s = random.choice((0.02, 0.1, 0.4)), random.choice((0.002, 0.02, 0.06))
    pace = Pace(operations=round(14 + random.randrange(14) + 0.8 / pause_s), pause_s=pause_s, keys=2 + 2 * random.randrange(3))
    busy_s = pace.operations * (pause_s / 2 + 3 * latency_s)
    if stress.is_stress(seed):
        shape, clients, pace = stress.shape_of(random), list(stress.works_of(random)), stress.pace_of(random)
        busy_s = pace.operations * (pace.pause_s / 2 + 3 * latency_s)
    names = [name for name, (_, weight) in FAULTS.items() for _ in range(weight)]
    faults = [(random.uniform(0, busy_s), random.choice(names), random.uniform(0.5, 5)) for _ in range(1 + random.randrange(6))]
    if stress.is_stress(seed):
        faults = stress.faults_of(random, busy_s)
    return Plan(shape, tuple(clients), pace, latency_s, tuple(sorted(faults)), random.randrange(3) == 0)


async def simulate(seed: int, trace: Trace, frames: Frames | None = None) -> Verdict:
    plan = plan_of(seed)
    verdict = Verdict(seed, faults=(*(name for _, name, _ in plan.faults), *(["blackout"] if plan.blackout else [])))
    async with trio.open_nursery() as nursery:
        world = World(seed, trace, nursery, plan.shape)
        world.fabric.latency_s = (0.0002, plan.latency_s)
        if frames is not None:
            world.fabric.on_send = frames.on_send
        record = Record(History(trio.current_time))
        await world.start()
        async with world.admin() as link:
            world.link = link
            async with _looker(world) as (client, process):
                await _prepare(client)
                await _trouble(world, plan, record)
                end = End(
                    world,
                    record,
                    client,
                    link,
                    Registers("look", process, client, record, plan.pace),
                    Blocks("look", process, client, record, plan.pace),
                    trouble_until_s=trio.current_time(),
                    evicts="full_disk" in verdict.faults,
                )
                await _judge(end, verdict)
        verdict.virtual_s = trio.current_time()
        verdict.operations, verdict.unknown = record.operations, record.unknown
        verdict.done = record.done
        nursery.cancel_scope.cancel()
    return verdict


@asynccontextmanager
async def _looker(world: World) -> AsyncIterator[tuple[AsyncClient, Process]]:
    """A client on a machine that nothing happens to but partitions."""
    done = trio.Event()
    found: list[tuple[AsyncClient, Process]] = []

    async def main(process: Process, started: Callable[[], None]) -> None:
        async with connected(world, process) as client:
            found.append((client, process))
            started()
            await done.wait()

    machine = world.add("look", main)
    await machine.start()
    try:
        yield found[0]
    finally:
        done.set()
        with trio.CancelScope(shield=True), trio.move_on_after(10):
            await machine.over.wait()


async def _prepare(client: AsyncClient) -> None:
    """What the clients work on."""
    async with await client.open(REGISTERS, "wb"):
        pass
    await client.truncate(REGISTERS, 6 * CHUNK_BYTES)
    async with await client.open(LOG, "wb"):
        pass
    await AsyncKVCache(client).create(SPACE, SPACE_PARAMS)


async def _trouble(world: World, plan: Plan, record: Record) -> None:
    """Clients work, faults strike; returns when both are done and everything runs again."""
    began_s = trio.current_time()
    left = len(plan.clients)
    all_over = trio.Event()

    def over() -> None:
        nonlocal left
        left -= 1
        if not left:
            all_over.set()

    async with trio.open_nursery() as nursery:
        for number, works in enumerate(plan.clients, 1):
            nursery.start_soon(world.add(f"c{number}", client_main(world, record, works, plan.pace, over)).start)
        for when_s, name, hold_s in plan.faults:
            nursery.start_soon(_strike, world, world.fork(), began_s + when_s, name, hold_s)
    for machine in world.machines.values():
        if machine.name[0] in "mns" and not machine.up:
            await machine.start()
    world.trace.event("--", "everything is mended")
    with trio.move_on_after(120) as scope:
        await all_over.wait()
    if scope.cancelled_caught:
        record.problems.append("clients do not come to an end within two minutes after everything was mended")


async def _strike(world: World, random: SeededRandom, at_s: float, name: str, hold_s: float) -> None:
    await trio.sleep_until(at_s)
    while world.fragile:
        await trio.sleep(0.1)
    world.trace.event("--", f"fault: {name}, {hold_s:.1f} s")
    world.striking += 1
    try:
        await FAULTS[name][0](world, random, hold_s)
    finally:
        world.striking -= 1
        world.mended_s = trio.current_time()
        world.trace.event("--", f"over: {name}")


async def _judge(end: End, verdict: Verdict) -> None:
    trace = end.world.trace
    try:
        await end.world.settled(end.link, SERVE_AGAIN_S)
    except AssertionError as error:
        verdict.problems.append(str(error))
        return
    trace.event("--", "every target serves")
    end.trouble_until_s = trio.current_time()
    await trio.sleep(QUIET_S)
    await end.registers.begin()
    await end.blocks.begin()
    for check in (*CHECKS, blackout) if "blackout" in verdict.faults else CHECKS:
        trace.event("--", check.__name__)
        try:
            with trio.fail_after(180):
                verdict.problems += [f"{check.__name__}: {problem}" for problem in await check(end)]
        except Exception as error:
            verdict.problems.append(f"{check.__name__}: it ended with {type(error).__name__}: {error}")


class TooLong(BaseException):
    """Nothing that is simulated may take it for an error of its own, and go on."""


def run_seed(seed: int, show: Callable[[str], None] | None = None, *, frames: bool = False) -> Verdict:
    """In this process."""
    trace = Trace(show)
    log = logging.getLogger("kvfs")
    before = log.handlers[:], log.propagate, log.level
    log.handlers[:], log.propagate = [trace], False
    log.setLevel(logging.INFO)
    began_s = time.process_time()

    def too_long(_number: int, _frame: FrameType | None) -> None:
        if scheduler.in_a_task():  # else in a moment again: trio itself must not be interrupted
            raise TooLong(f"the run takes more than {CPU_S} s of processor time; tasks wait at:\n" + "\n".join(scheduler.blocked_tasks()))

    search, tables.MAX_STEPS = tables.MAX_STEPS, 2000  # a third of the run would go into the balance of its chain table
    signal.signal(signal.SIGVTALRM, too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S, 5)
    try:
        verdict = scheduler.run(seed, lambda: simulate(seed, trace, Frames(show) if frames and show else None))
    except (Exception, TooLong) as error:
        verdict = Verdict(seed, [f"the run ended with {type(error).__name__}: {error}"])
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        tables.MAX_STEPS = search
        log.handlers[:], log.propagate = before[0], before[1]
        log.setLevel(before[2])
    verdict.digest, verdict.cpu_s = trace.digest, time.process_time() - began_s
    return verdict
