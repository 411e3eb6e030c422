"""What goes wrong: each fault a coroutine that breaks something, waits, and mends it.

A fault is `async def name(world, random, hold_s)`, registered with a weight by `@fault(weight)`. It strikes machines of its own choice, drawn from
`random` alone, says in the trace what it did, and leaves everything mended when it returns (a process that it killed runs again). Several are at work
at once, so it must cope with a machine that is down already. Must never make the cluster lose what it does not promise to keep: power goes, and disks
are emptied, only where every chain has another serving replica, and while nothing else is struck (`alone`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio
from tests.sim.machine import Machine, Process
from tests.sim.world import World

from kvfs.common.boundary.random import Random
from kvfs.common.errors import InputOutput, KvfsError
from kvfs.common.wire import base_pb2, cluster_pb2, storage_pb2
from kvfs.common.wire.service import method

Fault = Callable[[World, Random, float], Awaitable[None]]
STATUS, SCRUB, SYNC = method("Storage", "Status"), method("Storage", "Scrub"), method("Storage", "Sync")
AFTERMATH_S = 3.0
"""After a fault: a service whose heartbeats were held up is declared dead a lease later."""
FAULTS: dict[str, tuple[Fault, int]] = {}


def fault(weight: int) -> Callable[[Fault], Fault]:
    def register(function: Fault) -> Fault:
        FAULTS[function.__name__] = (function, weight)
        return function

    return register


@asynccontextmanager
async def alone(world: World) -> AsyncIterator[bool]:
    """With every target serving and no other fault at work; others wait. False: it does not come to that."""

    def well() -> bool:
        settled = trio.current_time() >= world.mended_s + AFTERMATH_S
        return world.striking == 1 and not world.fragile and settled and _all_serve(world)

    with trio.move_on_after(20):
        while not well():
            await trio.sleep(0.2)
    if not well():
        yield False
        return
    world.fragile = True
    try:
        yield True
    finally:
        world.fragile = False


def _all_serve(world: World) -> bool:
    routing = world.link.routing
    return all(machine.up for machine in world.of_kind("s")) and all(
        member.state == cluster_pb2.SERVING for chain in routing.chains for member in chain.targets
    )


async def until_missed(world: World, machine: Machine) -> None:
    """Until the cluster knows that this storage service is gone."""
    with trio.move_on_after(15):
        while True:
            routing = world.link.routing
            own = {target.target_id for target in routing.targets if routing.node(target.node_id).hostname == machine.name}
            if not any(member.target_id in own and member.state == cluster_pb2.SERVING for chain in routing.chains for member in chain.targets):
                return
            await trio.sleep(0.2)


def owner(world: World, target_id: int) -> str:
    """The machine of a target."""
    routing = world.link.routing
    return next(routing.node(target.node_id).hostname for target in routing.targets if target.target_id == target_id)


def up(world: World, kinds: str) -> list[Machine]:
    return [machine for kind in kinds for machine in world.of_kind(kind) if machine.up]


def say(world: World, what: str) -> None:
    world.trace.event("--", what)


async def _restart(machine: Machine) -> None:
    if not machine.up:
        await machine.start()


@fault(6)
async def kill(world: World, random: Random, hold_s: float) -> None:
    """A service's process dies and is started again."""
    victims = up(world, "sssnm")
    if victims:
        machine = random.choice(victims)
        machine.kill()
        await trio.sleep(hold_s if random.randrange(2) else random.uniform(0, 0.5))
        await _restart(machine)


@fault(3)
async def kill_storages(world: World, random: Random, hold_s: float) -> None:
    """Several storage services die one soon after another and come back in any order."""
    victims = up(world, "s")
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
    say(world, f"{' '.join(sorted(names[:cut]))} | {' '.join(sorted(names[cut:]))}: no byte passes" + (" to the right" if one_way else ""))
    world.fabric.partition(names[:cut], names[cut:], one_way=one_way)
    await trio.sleep(hold_s)
    say(world, "no partition")
    world.fabric.heal()


@fault(2)
async def cut_off(world: World, random: Random, hold_s: float) -> None:
    """Machines lose the managers, and nothing else: they live on with old routing."""
    names = [machine.name for machine in up(world, "snc") if random.randrange(3) == 0]
    one_way = random.randrange(3) == 0
    if names:
        say(world, f"{' '.join(names)} cannot reach the managers" + (" but hear them" if one_way else ""))
        world.fabric.partition(names, [machine.name for machine in world.of_kind("m")], one_way=one_way)
        await trio.sleep(hold_s)
        world.fabric.heal()


@fault(2)
async def resets(world: World, random: Random, hold_s: float) -> None:
    """Connections break at any moment: requests are lost, or carried out and not answered, and come again on another connection."""
    world.fabric.break_probability = random.uniform(0.005, 0.05)
    await trio.sleep(hold_s)
    world.fabric.break_probability = 0.0


@fault(2)
async def slow_network(world: World, random: Random, hold_s: float) -> None:
    """Every message is late, some machines' most of all: what goes by different connections arrives in another order."""
    names = [name for name in world.machines if random.randrange(2)]
    for name in names:
        world.fabric.lags_s[name] = random.uniform(0.01, 0.8)
    say(world, f"late: {' '.join(names)}")
    await trio.sleep(hold_s)
    for name in names:
        world.fabric.lags_s.pop(name, None)


@fault(2)
async def slow_disk(world: World, random: Random, hold_s: float) -> None:
    machine = random.choice(world.of_kind("s"))
    machine.slow_s = random.uniform(0.01, 0.6)
    say(world, f"the disks of {machine.name} are slow")
    await trio.sleep(hold_s)
    machine.slow_s = 0.0


@fault(2)
async def full_disk(world: World, random: Random, hold_s: float) -> None:
    """No room is left for a while."""
    machine = random.choice(world.of_kind("s"))
    media = list(machine.media.values())
    for medium in media:
        medium.capacity_bytes = medium.used_bytes() + random.randrange(64 << 10)
    say(world, f"the disks of {machine.name} are full")
    await trio.sleep(hold_s)
    for medium in media:  # as it was made: it may have been full before this began, too
        medium.capacity_bytes = machine.capacity_bytes


@fault(2)
async def io_errors(world: World, random: Random, hold_s: float) -> None:
    """A disk fails at some operation and goes on failing; then it is mended and the service started anew."""
    machine = random.choice(world.of_kind("s"))
    paths = machine.targets()
    if not paths or machine.disk_hook is not None:
        return
    failing, left = random.choice(paths), random.randrange(30)

    def hook(process: Process, path: str, operation: str, name: str) -> None:
        nonlocal left
        if path == failing and operation in ("read", "write", "sync", "map_commit", "allocate", "sync_directory"):
            left -= 1
            if left < 0:
                raise InputOutput(f"{operation} {name}: the disk failed")

    machine.disk_hook = hook
    say(world, f"disk {failing} of {machine.name} fails after {left} operations")
    await trio.sleep(hold_s)
    machine.disk_hook = None
    await machine.stop()
    await _restart(machine)


@fault(4)
async def kill_at_a_disk_operation(world: World, random: Random, hold_s: float) -> None:
    """A storage service dies between two steps of its disk."""
    machine = random.choice(world.of_kind("s"))
    if machine.disk_hook is not None:
        return
    left = random.randrange(60)

    def hook(process: Process, path: str, operation: str, name: str) -> None:
        nonlocal left
        if operation in ("write", "sync", "map_commit", "allocate", "unlink", "sync_directory", "open") and not process.dead:
            left -= 1
            if left < 0:
                machine.disk_hook = None
                say(world, f"before {operation} {path}/{name}:")
                machine.kill()
                raise InputOutput("the process is dead")

    machine.disk_hook = hook
    await trio.sleep(hold_s)
    machine.disk_hook = None
    await _restart(machine)


@fault(3)
async def power(world: World, random: Random, hold_s: float) -> None:
    """A storage machine loses power: what was not synced is gone, and nobody is told."""
    async with alone(world) as well:
        machine = random.choice(world.of_kind("s"))
        if well:
            machine.kill(power=True)
            await until_missed(world, machine)
    await trio.sleep(hold_s)
    await _restart(machine)


@fault(2)
async def empty_disks(world: World, random: Random, hold_s: float) -> None:
    """A storage machine comes back with new, empty disks, under its old node id."""
    async with alone(world) as well:
        machine = random.choice(world.of_kind("s"))
        if well:
            machine.kill()
            await until_missed(world, machine)
            machine.wipe()
    await trio.sleep(hold_s)
    await _restart(machine)


@fault(2)
async def bit_flip(world: World, random: Random, hold_s: float) -> None:
    """Bits of one machine's data files turn, and of its indexes, journals, superblocks and logs; reads must not show it, and the scrubber mends them,
    or the chain fills the target anew."""
    async with alone(world) as well:
        machine = random.choice(world.of_kind("s"))
        if not well:
            return
        for path in machine.targets():
            _, top, inside = path.split("/", 2)
            for _ in range(random.randrange(6)):
                if where := machine.media[top].flip(f"{inside}/data", random):
                    say(world, f"a bit turns on {machine.name}: {where}")
            for folder in ("", "/index", "/journal"):  # the first: superblock, log of touches, state of the scrub
                if random.randrange(4) == 0 and (where := machine.media[top].flip(inside + folder, random)):
                    say(world, f"a bit turns on {machine.name}: {where}")
        await trio.sleep(hold_s)
        await scrub(world, machine)


async def scrub(world: World, machine: Machine) -> None:
    """Ask for a pass over every target of the machine, and wait for its end. Then sync: the scrubber does not look at older bytes of a chunk, which a
    loss of power would bring back, and when power goes from all replicas nobody else has them."""
    addresses = (f"tcp://{machine.name}:7003",)
    passes: dict[int, int] = {}
    with trio.move_on_after(60):
        while True:
            try:
                status = await world.pool.call(addresses, STATUS, base_pb2.Empty(), timeout_s=5)
                for target in status.targets:
                    if target.target_id not in passes:
                        reply = await world.pool.call(
                            addresses, SCRUB, storage_pb2.ScrubRequest(target_id=target.target_id, at_once=True), timeout_s=5
                        )
                        passes[target.target_id] = reply.number
                if all(target.scrub.passes >= passes[target.target_id] for target in status.targets):
                    await world.pool.call(addresses, SYNC, storage_pb2.SyncRequest(target_ids=list(passes)), timeout_s=5)
                    return
            except KvfsError:
                pass  # its connection is of an earlier life, say
            await trio.sleep(0.3)
    say(world, f"{machine.name} was not scrubbed within a minute")


@fault(2)
async def restart(world: World, random: Random, hold_s: float) -> None:
    """A service is stopped in order and started again."""
    victims = up(world, "ssnm")
    if victims:
        machine = random.choice(victims)
        await machine.stop()
        await trio.sleep(random.uniform(0, hold_s))
        await _restart(machine)


@fault(2)
async def no_manager(world: World, random: Random, hold_s: float) -> None:
    """All managers die."""
    victims = up(world, "m")
    for machine in victims:
        machine.kill()
    await trio.sleep(hold_s)
    for machine in victims:
        await _restart(machine)


@fault(2)
async def clock_jump(world: World, random: Random, hold_s: float) -> None:
    """Wall clocks step, forward or back, for good."""
    for machine in world.machines.values():
        if random.randrange(3) == 0:
            step_s = random.uniform(-3600, 3600)
            machine.clock.wall_offset_ns += round(step_s * 1e9)
            say(world, f"the clock of {machine.name} steps by {step_s:.0f} s")
    await trio.sleep(0)


@fault(2)
async def kill_client(world: World, random: Random, hold_s: float) -> None:
    """A client dies with whatever it had under way, and another starts in its place."""
    victims = [machine for machine in up(world, "c") if machine.name != "look"]
    if victims:
        machine = random.choice(victims)
        machine.kill()
        await trio.sleep(random.uniform(0, hold_s))
        await _restart(machine)


@fault(2)
async def slow_store(world: World, random: Random, hold_s: float) -> None:
    """The store of managers and metadata services takes its time, and does not always tell what became of a commit."""
    faults = world.store_faults
    faults.latency_s, faults.unknown = random.uniform(0.01, 0.5), random.uniform(0, 0.2)
    await trio.sleep(hold_s)
    faults.latency_s, faults.unknown = 0.002, 0.0
