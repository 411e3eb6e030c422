"""The process of a client machine: several works at once over one AsyncClient, each one operation at a time.

The works of a run of the general kind are here (`WORKS`); those of runs that stress are in stress_works.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import trio
from tests.sim.append_log import Log
from tests.sim.blocks import Blocks
from tests.sim.files import Files
from tests.sim.machine import Main, Process
from tests.sim.registers import Registers
from tests.sim.work import Pace, Record, Work
from tests.sim.world import MIB, World

from kvfs.client.async_client import AsyncClient, open_client
from kvfs.client.config import ClientConfig
from kvfs.client.user import User
from kvfs.common.errors import KvfsError

ROOT = User(0, 0)
CONFIG = ClientConfig(
    deadline_s=8.0,
    shared_memory=False,
    buffer_pool_bytes=16 * MIB,
    dirty_max_bytes=2 * MIB,
    write_batch_bytes=MIB,
    read_attempt_s=1.0,
    write_attempt_s=3.0,
    length_hint_s=1.0,
)
WORKS: tuple[type[Work], ...] = (Registers, Log, Files, Blocks)


def client_main(world: World, record: Record, works: tuple[type[Work], ...], pace: Pace, over: Callable[[], None]) -> Main:
    """The process of one client machine."""

    async def main(process: Process, started: Callable[[], None]) -> None:
        started()
        async with connected(world, process) as client, trio.open_nursery() as nursery:
            for number, work in enumerate(works):
                name = f"{process.machine.name}{work.__name__[0].lower()}{number}"
                made = work(name, process, client, record, pace)
                nursery.start_soon(_work, made)
        over()

    return main


async def _work(work: Work) -> None:
    while True:
        try:
            await work.begin()
            break
        except KvfsError:
            await trio.sleep(0.5)
    await work.run()


def connected(world: World, process: Process) -> AbstractAsyncContextManager[AsyncClient]:
    return open_client(world.address, user=ROOT, config=CONFIG, net=process.net, clock=process.clock, random=process.random)
