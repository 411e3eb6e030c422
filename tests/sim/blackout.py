"""Power goes everywhere at once, at the end of some runs: what was synced is there afterwards, the rest is old or new, never torn.

The client that has no faults syncs some files, then writes on without syncing, and all storage machines lose power in the middle of that. Before that
they die one by one under files that it holds open (held_open.py).
"""

from __future__ import annotations

import os

import trio
from tests.histories.history import History, fill, name_of
from tests.sim.checks import QUIET_S, End, check_replicas, check_targets
from tests.sim.held_open import HeldOpen
from tests.sim.registers import REGISTERS
from tests.sim.work import CHUNK_BYTES, Record, shown

from kvfs.common.errors import KvfsError

FILES = 3
WRITING_S = 0.5
SERVE_AGAIN_S = 90.0


async def blackout(end: End) -> list[str]:
    """What is wrong after it."""
    world, random = end.world, end.world.fork()
    end.registers.record = Record(History(trio.current_time))  # what clients are promised from here on is less
    held = HeldOpen(end, world.fork())
    problems = await held.run(SERVE_AGAIN_S)
    synced = {f"/synced-{number}": fill(f"synced.{number}", 1 + random.randrange(2 * CHUNK_BYTES)) for number in range(FILES)}
    for path, content in synced.items():
        await _write(end, path, content, sync=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_write_on, end)
        await trio.sleep(random.uniform(0, WRITING_S))
        for machine in world.of_kind("s"):
            machine.kill(power=True)
        nursery.cancel_scope.cancel()
    await trio.sleep(random.uniform(0, 5))
    for machine in world.of_kind("s"):
        await machine.start()
    await world.settled(end.link, SERVE_AGAIN_S)
    await trio.sleep(QUIET_S)
    problems += await held.check()
    for path, content in synced.items():
        found = await end.client.read_bytes(path)
        if found != content:
            problems.append(f"{path} was synced as {shown(content)}, and is {shown(found)}")
    for index in range(end.registers.pace.keys):
        problems += await _torn(end, index)
    return problems + await check_replicas(end) + await check_targets(end)


async def _torn(end: End, index: int) -> list[str]:
    """Of a chunk with one value, or of the left of two."""
    file = await end.client.open_path(REGISTERS, os.O_RDONLY)
    try:
        data = bytes(await file.pread(index * CHUNK_BYTES, end.registers.size(index)))
    finally:
        await file.close()
    value = name_of(data) if any(data) else None
    return [f"chunk {index} is torn: {value}"] if value is not None and value.startswith("TORN") else []


async def _write(end: End, path: str, content: bytes, *, sync: bool) -> None:
    file = await end.client.open_path(path, os.O_RDWR | os.O_CREAT)
    try:
        await file.pwrite(0, [content])
        if sync:
            await file.fsync()
    finally:
        await file.close()


async def _write_on(end: End) -> None:
    """Without syncing, until cancelled."""
    try:
        while True:
            await end.registers.operate()
            await _write(end, "/unsynced", fill(end.registers.value(), CHUNK_BYTES), sync=False)
    except KvfsError:
        await trio.sleep_forever()
