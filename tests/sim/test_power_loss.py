"""What a loss of power at every storage machine must not undo, one case at a time: the runs by seed have it too, but rarely at the right moment."""

from __future__ import annotations

import os

import pytest
import trio
from tests.sim import scheduler
from tests.sim.clients import connected
from tests.sim.machine import Process
from tests.sim.trace import Trace
from tests.sim.work import CHUNK_BYTES
from tests.sim.world import Shape, World

from kvfs.common.errors import KvfsError

OLD, END = b"o" * (3 * CHUNK_BYTES), 1000
TRUNCATE_S = 0.02
"""It takes about as long."""


async def lose_power(world: World, away_s: float) -> None:
    for machine in world.of_kind("s"):
        machine.kill(power=True)
    await trio.sleep(away_s)
    for machine in world.of_kind("s"):
        await machine.start()
    async with world.admin() as link:
        await world.settled(link)


@pytest.mark.parametrize("away_s", [0.0, 5.0], ids=["back at once", "away for longer than a lease"])
@pytest.mark.parametrize("length", [0, END], ids=["to nothing", "within a chunk"])
@pytest.mark.parametrize(("seed", "during"), [(2, False), (3, False), (3, True)], ids=["after it", "after it again", "during it"])
def test_what_was_cut_off_does_not_come_back_when_the_file_grows(seed: int, length: int, away_s: float, during: bool) -> None:
    """The length that the metadata service has survives: so must what the truncate did to the chunks."""

    async def main() -> bytes:
        read = b""
        async with trio.open_nursery() as nursery:
            world = World(seed, Trace(), nursery, Shape(managers=1, metas=1))
            await world.start()

            async def user(process: Process, started: object) -> None:
                nonlocal read
                async with connected(world, process) as client:
                    file = await client.open_path("/f", os.O_RDWR | os.O_CREAT)
                    await file.pwrite(0, [OLD])
                    await file.fsync()
                    await file.close()
                    if during:
                        nursery.start_soon(strike)
                    try:
                        await client.truncate("/f", length)
                    except KvfsError:
                        await restored.wait()
                        await client.truncate("/f", length)
                    if not during:
                        nursery.start_soon(strike)
                    await restored.wait()
                    await client.truncate("/f", len(OLD))
                    read = await client.read_bytes("/f")
                    found.set()

            async def strike() -> None:
                if during:
                    await trio.sleep(world.random.uniform(0, TRUNCATE_S))
                await lose_power(world, away_s)
                restored.set()

            found, restored = trio.Event(), trio.Event()
            await world.add("c1", user).start()
            await found.wait()
            nursery.cancel_scope.cancel()
        return read

    assert scheduler.run(seed, main) == OLD[:length] + bytes(len(OLD) - length)
