"""Files that stay open for writing while storage machines die, with or without their power: an fsync that succeeds has saved the bytes, one that says
they are lost has a loss of power to show for it, and what is written again can be synced."""

from __future__ import annotations

import os
from typing import Final

import trio
from tests.histories.history import fill
from tests.sim.checks import End
from tests.sim.work import CHUNK_BYTES, shown

from kvfs.client.file.open_file import OpenFile
from kvfs.common.boundary.random import Random
from kvfs.common.errors import KvfsError, UnsyncedLost

FILES: Final = 3
STRIKE_S: Final = 2.0
AWAY_S: Final = 4.0
TRIES: Final = 20
"""Once everything is mended."""


class HeldOpen:
    """Must be run while nothing else is wrong."""

    def __init__(self, end: End, random: Random) -> None:
        self._end = end
        self._random = random
        self._over = trio.Event()
        self._power = False
        """Some machine has lost it."""
        self._problems: list[str] = []
        self._synced: dict[str, bytes] = {}
        """What each file holds at the end."""

    async def run(self, serve_again_s: float) -> list[str]:
        """What is wrong after all storage machines were struck, some time in a few seconds."""
        world, random = self._end.world, self._random
        way = random.choice(("power", "killed", "either"))
        async with trio.open_nursery() as nursery:
            for number in range(FILES):
                nursery.start_soon(self._use, f"/held-{number}")
            async with trio.open_nursery() as strikes:
                for machine in world.of_kind("s"):
                    power = way == "power" or (way == "either" and random.randrange(2) == 0)
                    strikes.start_soon(self._strike, machine.name, power, random.uniform(0, STRIKE_S), random.uniform(0, AWAY_S))
            await world.settled(self._end.link, serve_again_s)
            self._over.set()
        return self._problems

    async def _strike(self, name: str, power: bool, after_s: float, away_s: float) -> None:
        machine = self._end.world.machines[name]
        await trio.sleep(after_s)
        self._power = self._power or power
        machine.kill(power=power)
        await trio.sleep(away_s)
        if not machine.up:
            await machine.start()

    async def _use(self, path: str) -> None:
        """Write, wait, sync, until that has been done with everything mended; what was written before the strike may be synced after it."""
        random, left, number = self._random, TRIES, 0
        file: OpenFile = await self._end.client.open_path(path, os.O_RDWR | os.O_CREAT)
        try:
            while left:
                number += 1
                content = fill(f"{path}.{number}", 2 * CHUNK_BYTES)
                left -= self._over.is_set()
                try:
                    await file.pwrite(0, [content])
                    await file.flush()
                    await trio.sleep(random.uniform(0, 0.5))
                    if random.randrange(2):
                        await self._over.wait()
                    await file.fsync()
                except KvfsError as error:
                    self._say(f"{path} = {number}: {type(error).__name__}: {error.message}")
                    if isinstance(error, UnsyncedLost) and not self._power:
                        self._problems.append(f"{path}: no machine had lost power: {error.message}")
                    await trio.sleep(0.1)
                    continue
                self._say(f"{path} = {number}, synced")
                self._synced[path] = content
                self._compare(path, bytes(await file.pread(0, len(content))))
                if self._over.is_set():
                    return
            self._problems.append(f"{path} could not be synced though everything was mended")
        finally:
            await file.close()

    async def check(self) -> list[str]:
        """What is wrong now: whatever has happened since, what was synced is there."""
        self._problems = []
        for path in self._synced:
            self._compare(path, await self._end.client.read_bytes(path))
        return self._problems

    def _compare(self, path: str, found: bytes) -> None:
        if found != self._synced[path]:
            self._problems.append(f"{path} was synced as {shown(self._synced[path])}, and is {shown(found)}")

    def _say(self, what: str) -> None:
        self._end.world.trace.event("look", what)
