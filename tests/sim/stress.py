"""Runs that dwell on what seldom meets by chance: every third seed is one of these instead of a run of the general kind.

A small cluster with long chains and few chunks, and faults that hold open what usually lasts milliseconds: a target that returns slowly while its
predecessor is cut off, a service and clients that live on with old routing, bits that turn while everybody reads. Their works also cut files while
targets return, and open files that are being unlinked. test_planted.py says which mistakes of the product only these runs meet.
"""

from __future__ import annotations

import os

import trio
from tests.histories.history import fill
from tests.sim.clients import ANYTHING, CHUNK_BYTES, Blocks, Files, Pace, Registers, Work
from tests.sim.faults import _say, _scrub, _up, alone, fault, owner
from tests.sim.world import KIB, Shape, World

from kvfs.common.boundary.random import Random
from kvfs.common.errors import KvfsError, NotFound, StaleHandle
from kvfs.common.wire import cluster_pb2

EVERY = 3
_FAULTS = ("slow_return",) * 5 + ("left_behind",) * 5 + ("bit_rot",) * 2 + ("resets", "kill_at_a_disk_operation", "kill", "slow_store")


def is_stress(seed: int) -> bool:
    return seed % EVERY == 0


def faults_of(random: Random, busy_s: float) -> list[tuple[float, str, float]]:
    """(when, which, how long)"""
    return sorted((random.uniform(0, busy_s), random.choice(_FAULTS), random.uniform(2, 7)) for _ in range(2 + random.randrange(3)))


def shape_of(random: Random) -> Shape:
    return Shape(storages=3, replicas=3 if random.randrange(4) else 2, resync_at_once=1, resync_batch_bytes=64 * KIB)


def works_of(random: Random) -> tuple[tuple[type[Work], ...], ...]:
    others: list[type[Work]] = [Cuts, Opened, Recycled, Cuts]
    random.shuffle(others)
    return tuple((Churn, Watch, work) for work in others[:3])


def pace_of(random: Random) -> Pace:
    return Pace(operations=40 + random.randrange(20), pause_s=random.choice((0.2, 0.3)), keys=4)


# --- works ----------------------------------------------------------------------------------------------------------------------------


class Churn(Registers):
    """Chunks that are removed as often as they are written: their versions are always small ones, whatever their bytes are."""

    async def operate(self) -> None:
        index = self.random.randrange(self.pace.keys)
        size = self.size(index)
        if index % 2 == 0 and self.random.randrange(2):
            await self.remove(f"chunk {index}", index)
        elif index % 2 == 0:
            await self.write(f"chunk {index}", index, 0, size)
        else:
            await self.write(f"chunk {index} left", index, 0, size)


class Watch(Registers):
    """Only reads: so a client whose writes are held up, since it does not know the chain as it is, looks at what it can reach all the same."""

    async def operate(self) -> None:
        index = self.random.randrange(self.pace.keys)
        await self.read(f"chunk {index}" + (" left" if index % 2 else ""), index, 0, self.size(index))


class Cuts(Files):
    """Small files that are cut, written and read in turn."""

    async def operate(self) -> None:
        path = self._path()
        known = self.record.files.setdefault(path, {None})
        await self.read(path, known)
        if None in known or len(known) > 1:
            await self.replace(path, known)
        elif self.random.randrange(3):
            await self.cut(path, known)
        else:
            await self.overwrite(path, known)


class Recycled(Blocks):
    """Blocks that are put and removed in turn: their versions are always small ones, whatever their bytes are."""

    async def operate(self) -> None:
        number = self.random.randrange(2)
        what = self.random.randrange(5)
        await (self.put(number) if what < 2 else self.remove(number) if what < 4 else self.get(number))


class Opened(Work):
    """A file is unlinked while it is opened for writing. Who has it open keeps it, with what he writes, until he closes it."""

    LONGER_THAN_GARBAGE_S = 1.5

    async def operate(self) -> None:
        path = f"/{self.name}.{self.process.machine.lives}-{self.random.randrange(1 << 30)}"
        try:
            async with await self.client.open(path, "wb"):
                pass
        except KvfsError as error:
            self.record.unknown += 1
            self.say(f"{path}: {type(error).__name__}")
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._unlink, path)
            nursery.start_soon(self._use, path)

    async def _unlink(self, path: str) -> None:
        await trio.sleep(self.random.uniform(0, 0.02))
        self.record.files[path] = {None, b"", ANYTHING}
        try:
            await self.client.unlink(path)
        except KvfsError as error:
            self.record.unknown += 1
            self.say(f"{path} unlinked: {type(error).__name__}")
        else:
            self.say(f"{path} unlinked")
            self.record.files[path] = {None}

    async def _use(self, path: str) -> None:
        await trio.sleep(self.random.uniform(0, 0.02))
        data = fill(self.value(), 1 + self.random.randrange(2 * CHUNK_BYTES))
        try:
            file = await self.client.open_path(path, os.O_RDWR)
            try:
                await file.pwrite(0, [data])
                await file.fsync()
                await trio.sleep(self.random.uniform(0, self.LONGER_THAN_GARBAGE_S))
                found = bytes(await file.pread(0, len(data)))
                if found != data:
                    self.record.problems.append(
                        f"{path}, held open, has lost what was written and synced: {len(found)} bytes are left of {len(data)}"
                    )
                self.say(f"{path} used")
            finally:
                await file.close()
        except (NotFound, StaleHandle) as error:  # unlinked before it was opened, or the client was thought dead
            self.say(f"{path} used: {error.message}")
        except KvfsError as error:
            self.record.unknown += 1
            self.say(f"{path} used: {type(error).__name__}: {error.message}")


# --- faults ---------------------------------------------------------------------------------------------------------------------------


@fault(0)
async def slow_return(world: World, random: Random, hold_s: float) -> None:
    """A storage service dies and comes back behind a slow network; while it is brought up to date its predecessor may lose the managers."""
    victims = _up(world, "s")
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
    _say(world, f"{machine.name} comes back, far away")
    if not machine.up:
        await machine.start()
    cut = random.randrange(2)
    with trio.move_on_after(hold_s):
        while cut:
            before = _predecessor_of_a_syncing(world, machine.name)
            if before:
                _say(world, f"{before} cannot reach the managers")
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
    clients = [machine.name for machine in _up(world, "c")]
    random.shuffle(clients)
    clients = clients[: 1 + random.randrange(2)]
    victims = _up(world, "s")
    if not victims:
        return
    machine = random.choice(victims)
    dies = random.randrange(2)
    cut = clients if dies else [*clients, machine.name]
    if cut:
        _say(world, f"{' '.join(cut)} cannot reach the managers")
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
        _say(world, f"bits turn on {machine.name}")
        await trio.sleep(hold_s)
        await _scrub(world, machine)
