"""What goes wrong: each fault a coroutine that breaks something, waits, and mends it.

A fault is `async def name(world, random, hold_s)`, registered with a weight by `@fault(weight)`. It strikes machines of its own choice, drawn from
`random` alone, says in the trace what it did, and leaves everything mended when it returns (a process that it killed runs again). Several are at work
at once, so it must cope with a machine that is down already. Must never make the cluster lose what it does not promise to keep: power goes only
where every chain has another serving replica.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio
from tests.sim.machine import Machine
from tests.sim.world import World

from kvfs.common.boundary.random import Random

Fault = Callable[[World, Random, float], Awaitable[None]]
FAULTS: dict[str, tuple[Fault, int]] = {}


def fault(weight: int) -> Callable[[Fault], Fault]:
    def register(function: Fault) -> Fault:
        FAULTS[function.__name__] = (function, weight)
        return function

    return register


def _up(world: World, kinds: str) -> list[Machine]:
    return [machine for kind in kinds for machine in world.of_kind(kind) if machine.up]


def _say(world: World, what: str) -> None:
    world.trace.event("--", what)


async def _restart(machine: Machine) -> None:
    if not machine.up:
        await machine.start()


@fault(6)
async def kill(world: World, random: Random, hold_s: float) -> None:
    """A service's process dies and is started again."""
    victims = _up(world, "sssnm")
    if victims:
        machine = random.choice(victims)
        machine.kill()
        await trio.sleep(hold_s if random.randrange(2) else random.uniform(0, 0.5))
        await _restart(machine)


@fault(3)
async def kill_storages(world: World, random: Random, hold_s: float) -> None:
    """Several storage services die one soon after another and come back in any order."""
    victims = _up(world, "s")
    random.shuffle(victims)
    async with trio.open_nursery() as nursery:
        for machine in victims[: 1 + random.randrange(max(1, len(victims)))]:

            async def one(machine: Machine, after_s: float, back_s: float) -> None:
                await trio.sleep(after_s)
                machine.kill()
                await trio.sleep(back_s)
                await _restart(machine)

            nursery.start_soon(one, machine, random.uniform(0, 3), random.uniform(0, hold_s))


@fault(4)
async def partition(world: World, random: Random, hold_s: float) -> None:
    """The network splits in two, both ways or one."""
    names = list(world.machines)
    random.shuffle(names)
    cut = 1 + random.randrange(max(1, len(names) - 1))
    one_way = random.randrange(3) == 0
    _say(world, f"{' '.join(sorted(names[:cut]))} | {' '.join(sorted(names[cut:]))}: no byte passes" + (" to the right" if one_way else ""))
    world.fabric.partition(names[:cut], names[cut:], one_way=one_way)
    await trio.sleep(hold_s)
    _say(world, "no partition")
    world.fabric.heal()
