"""Faults of runs that stress: they hold open what usually lasts milliseconds. As in faults.py, each leaves everything mended."""

from __future__ import annotations

import trio
from tests.sim.faults import alone, fault, owner, say, scrub, until_missed, up
from tests.sim.world import World

from kvfs.common.boundary.random import Random
from kvfs.common.wire import cluster_pb2


@fault(0)
async def slow_return(world: World, random: Random, hold_s: float) -> None:
    """A storage service dies and comes back behind a slow network; while it is brought up to date its predecessor may lose the managers."""
    victims = up(world, "s")
    if not victims:
        return
    machine = random.choice(victims)
    world.fabric.lags_s |= dict.fromkeys((victim.name for victim in victims), 0.4)
    await trio.sleep(0.6)  # by then updates are under way everywhere
    machine.kill()
    for victim in victims:
        world.fabric.lags_s.pop(victim.name, None)
    await trio.sleep(random.uniform(0, 3))
    world.fabric.lags_s[machine.name] = random.uniform(0.1, 0.7)
    say(world, f"{machine.name} comes back, far away")
    if not machine.up:
        await machine.start()
    cut = random.randrange(2)
    with trio.move_on_after(hold_s):
        while cut:
            before = _predecessor_of_a_syncing(world, machine.name)
            if before:
                say(world, f"{before} cannot reach the managers")
                world.fabric.partition([before], [manager.name for manager in world.of_kind("m")], one_way=random.randrange(2) == 0)
                cut = 0
            await trio.sleep(0.05)
        await trio.sleep(hold_s)
    world.fabric.lags_s.pop(machine.name, None)
    world.fabric.heal()


def _predecessor_of_a_syncing(world: World, name: str) -> str:
    for chain in world.link.routing.chains:
        serving = [member.target_id for member in chain.targets if member.state == cluster_pb2.SERVING]
        syncing = [member.target_id for member in chain.targets if member.state == cluster_pb2.SYNCING]
        if syncing and len(serving) > 1 and owner(world, syncing[0]) == name:
            return owner(world, serving[-1])
    return ""


@fault(0)
async def left_behind(world: World, random: Random, hold_s: float) -> None:
    """Some clients lose the managers and live on with old routing; so does a storage service, or one dies and comes back slowly."""
    clients = [machine.name for machine in up(world, "c")]
    random.shuffle(clients)
    clients = clients[: 1 + random.randrange(2)]
    victims = up(world, "s")
    if not victims:
        return
    machine = random.choice(victims)
    dies = random.randrange(2)
    cut = clients if dies else [*clients, machine.name]
    if cut:
        say(world, f"{' '.join(cut)} cannot reach the managers")
        world.fabric.partition(cut, [manager.name for manager in world.of_kind("m")])
    if dies:
        machine.kill()
        await trio.sleep(random.uniform(0, hold_s / 2))
        world.fabric.lags_s[machine.name] = random.uniform(0.05, 0.4)
        if not machine.up:
            await machine.start()
    await trio.sleep(hold_s)
    world.fabric.lags_s.pop(machine.name, None)
    world.fabric.heal()


@fault(0)
async def bit_rot(world: World, random: Random, hold_s: float) -> None:
    """Many bits of one machine's data files turn at once."""
    async with alone(world) as well:
        machine = random.choice(world.of_kind("s"))
        if not well:
            return
        for path in machine.targets():
            _, top, inside = path.split("/", 2)
            for _ in range(40):
                machine.media[top].flip(f"{inside}/data", random)
        say(world, f"bits turn on {machine.name}")
        await trio.sleep(hold_s)
        await scrub(world, machine)


@fault(0)
async def late_forward(world: World, random: Random, hold_s: float) -> None:
    """What a storage service sends to the others is held up in the network. It dies, its chain goes on without it, and then what it sent arrives."""
    victims = [machine for machine in up(world, "s") if _forwards(world, machine.name)]
    if not victims:
        return
    machine = random.choice(victims)
    others = [other.name for other in world.of_kind("s") if other is not machine]
    say(world, f"what {machine.name} sends to {' '.join(others)} is held up")
    world.fabric.partition([machine.name], others)
    await trio.sleep(random.uniform(0.3, 1.0))  # by then updates are under way
    machine.kill()
    await until_missed(world, machine)
    await trio.sleep(random.uniform(0, hold_s / 2))
    say(world, f"what {machine.name} sent arrives")
    world.fabric.heal()
    await trio.sleep(0.2)
    if not machine.up:
        await machine.start()


def _forwards(world: World, name: str) -> bool:
    """Whether a target of this machine has others after it."""
    for chain in world.link.routing.chains:
        path = [member.target_id for member in chain.targets if member.state in (cluster_pb2.SERVING, cluster_pb2.SYNCING)]
        if any(owner(world, target_id) == name for target_id in path[:-1]):
            return True
    return False
