"""What every kind of client work shares: one operation after the other, and the promises that it leaves behind.

Owns the base of all works and the `Record`: everything that was acknowledged goes into it, and everything whose outcome is unknown is written there
as such. A work must never raise what a user would not meet.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

import trio
from tests.histories.history import History, name_of
from tests.sim.machine import Process
from tests.sim.world import KIB

from kvfs.client.async_client import AsyncClient
from kvfs.client.storage_writes import WriteDone
from kvfs.common.boundary.random import Random
from kvfs.common.errors import KvfsError

CHUNK_BYTES: Final = 64 * KIB
ANYTHING: Final = b"(anything)"
"""Of a file whose last change was acknowledged only in part."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Of all clients."""

    operations: int
    """Of each work."""
    pause_s: float
    """Between two operations of a work, at most."""
    keys: int
    """How many chunks the registers are."""


@dataclass(slots=True)
class Record:
    """What clients were promised. `history`: of registers, log and blocks. `files`: what each file may hold now; None: that it is not there."""

    history: History
    files: dict[str, set[bytes | None]] = field(default_factory=dict)
    operations: int = 0
    unknown: int = 0
    done: Counter[str] = field(default_factory=Counter)
    """By kind, how many did what they were to do: a run in which next to nothing did proves nothing."""
    problems: list[str] = field(default_factory=list)
    """What a client saw that can never be right."""


class Work(ABC):
    """One operation after the other. Must never raise what a user would not meet."""

    def __init__(self, name: str, process: Process, client: AsyncClient, record: Record, pace: Pace) -> None:
        self.name = name
        self.pace = pace
        self.client = client
        self.record = record
        self.random: Random = process.random
        self.trace = process.machine.trace
        self.process = process
        self._count = 0

    async def begin(self) -> None:  # noqa: B027
        """What has to be there before the first operation."""

    @abstractmethod
    async def operate(self) -> None: ...

    async def run(self) -> None:
        for _ in range(self.pace.operations):
            await trio.sleep(self.random.uniform(0, self.pace.pause_s))
            self.record.operations += 1
            await self.operate()

    def value(self) -> str:
        """One that no other operation writes."""
        self._count += 1
        return f"{self.name}.{self.process.machine.lives}.{self._count}"

    def say(self, what: str) -> None:
        self.trace.event(self.process.machine.name, what)


def outcome(done: WriteDone | KvfsError) -> str:
    return f"{type(done).__name__}: {done.message}" if isinstance(done, KvfsError) else f"version {done.version}"


def shown(content: bytes | None) -> str:
    if content is None:
        return "not there"
    return "anything" if content is ANYTHING else f"{len(content)} bytes of {name_of(content)}"
