"""What must be true once everything is mended: the promises of the system, each a function that says what is wrong.

A check is `async def check_x(end: End) -> list[str]`, in `CHECKS`; it runs on a quiet cluster in which every target serves again. `End` has what it
may look at: the world, the record of what clients were promised, a client of its own, and the routing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio
from tests.histories.checker import check
from tests.histories.explain import explain
from tests.histories.history import Operation
from tests.histories.models import CreateOnce, FileLength, Model, Register
from tests.sim.append_log import LOG
from tests.sim.blocks import Blocks
from tests.sim.registers import Registers
from tests.sim.work import ANYTHING, Record, shown
from tests.sim.world import World

from kvfs.cli.fsck import Checker, ask_target
from kvfs.client.async_client import AsyncClient
from kvfs.common.errors import ConnectionLost, NotFound
from kvfs.common.membership import ManagerLink
from kvfs.common.routing import Routing

QUIET_S = 2.0
"""Garbage is collected."""
FSCK_S = 60.0


@dataclass(slots=True)
class End:
    world: World
    record: Record
    client: AsyncClient
    link: ManagerLink
    registers: Registers
    blocks: Blocks
    trouble_until_s: float
    """No fault was at work after that."""
    evicts: bool
    """A disk was full: then blocks may go."""

    @property
    def routing(self) -> Routing:
        return self.link.routing


async def check_histories(end: End) -> list[str]:
    """Reads are linearizable: per chunk, per block, per file length; so is the last look at everything."""
    await end.registers.read_all()
    for number in range(8):
        await end.blocks.get(number)

    def model(key: str) -> Model:
        if key.startswith("block"):
            return CreateOnce(free_misses_until_s=end.trouble_until_s, evicts=end.evicts)
        return FileLength() if key.startswith("length") else Register()

    return [explain(bad) for bad in check(end.record.history.operations(), model)]


async def check_files(end: End) -> list[str]:
    """Every acknowledged file, and every acknowledged append, is there and exact."""
    problems = list(end.record.problems)
    log = await end.client.read_bytes(LOG)
    for path, contents in sorted(end.record.files.items()):
        name, at, offset = path.partition("@")
        if at:
            found: bytes | None = log[int(offset) : int(offset) + 100]
        else:
            try:
                found = await end.client.read_bytes(name)
            except NotFound:
                found = None
        if found not in contents and not (ANYTHING in contents and (found is not None or None in contents)):
            problems.append(f"{path} is {shown(found)}, and may be {', '.join(map(shown, contents))}")
    return problems


async def check_replicas(end: End) -> list[str]:
    """What `kvfs fsck` looks for: replicas are identical, no chunk is an orphan, lengths fit, the namespace is consistent."""
    problems: list[str] = []
    with trio.move_on_after(FSCK_S):
        while True:
            try:
                problems = (await Checker(end.world.pool, await end.link.refresh()).run()).problems
            except ConnectionLost as error:  # one that a machine which died has left
                problems = [error.message]
            if not problems:
                return []
            await trio.sleep(1.0)
    return problems


async def check_targets(end: End) -> list[str]:
    """Every stored byte has its checksum, every target's structure is sound."""
    problems = []
    for chain in end.routing.chains:
        for target in end.routing.serving(chain.chain_id):
            report = await ask_target(end.world.pool, end.routing, target, read_data=True)
            problems += report.problems
    return problems


CHECKS: tuple[Callable[[End], Awaitable[list[str]]], ...] = (check_histories, check_files, check_replicas, check_targets)


def brief(operations: list[Operation]) -> str:
    return "\n".join(str(operation) for operation in operations)
