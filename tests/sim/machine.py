"""One simulated machine: its clock, its disks, its place on the network, and the one process that runs on it.

A process ends in three ways: it is stopped (as SIGTERM does), it is killed (its memory is gone, what it wrote is in the page cache), or the machine
loses power (what was not synced is gone, and nobody is told). A dead process unwinds in the simulation, but nothing that it does then is seen by
anyone: its network, its disks and its store are cut off first. A process that ends by itself with a typed error is started again, as a supervisor
does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio
from tests.sim.store import SharedStore
from tests.sim.trace import WHO, Speaker, Trace

from kvfs.common.boundary.random import SeededRandom
from kvfs.common.errors import KvfsError
from kvfs.common.sim.clock import SimClock
from kvfs.common.sim.disk import SimDisk
from kvfs.common.sim.medium import Medium
from kvfs.common.sim.net import SimFabric, SimNet

RESTART_S = 0.5


class Process:
    """What one life of the process is given."""

    def __init__(self, machine: Machine, net: SimNet, nursery: trio.Nursery, speaker: Speaker, random: SeededRandom) -> None:
        self.machine = machine
        self.speaker = speaker
        self.net = net
        self.nursery = nursery
        """Ends with the process."""
        self.random = random
        self.stores: list[SharedStore] = []
        self.dead = False

    @property
    def clock(self) -> SimClock:
        return self.machine.clock

    def open_disk(self, path: str) -> SimDisk:
        return self.machine.open_disk(path, self)


Main = Callable[[Process, Callable[[], None]], Awaitable[None]]
"""A process: it calls back when it has started."""


class Machine:
    def __init__(self, name: str, main: Main, fabric: SimFabric, trace: Trace, random: SeededRandom, nursery: trio.Nursery) -> None:
        self.name = name
        self.trace = trace
        self.clock = SimClock(start_s=random.uniform(0, 1000), wall_offset_ns=random.randrange(1_000_000_000))
        self.media: dict[str, Medium] = {}
        self.capacity_bytes = 1 << 40
        self.slow_s = 0.0
        """How slow its disks are."""
        self.disk_hook: Callable[[Process, str, str, str], None] | None = None
        """Called with (process, path, operation, name) before every disk operation."""
        self.process: Process | None = None
        self.started = trio.Event()
        self.over = trio.Event()
        self.over.set()
        self.lives = 0
        self.node_id = 0
        """In the cluster, once it has joined."""
        self._main = main
        self._fabric = fabric
        self._random = random
        self._nursery = nursery

    @property
    def up(self) -> bool:
        return self.process is not None

    def open_disk(self, path: str, process: Process) -> SimDisk:
        _, top, inside = (path + "/").split("/", 2)
        medium = self.media.get(top)
        if medium is None:
            medium = self.media[top] = Medium(self.capacity_bytes)

        def hook(operation: str, name: str) -> None:
            if self.disk_hook is not None:
                self.disk_hook(process, path, operation, name)

        return SimDisk(medium=medium, hook=hook, inside=inside.rstrip("/"))

    async def start(self) -> None:
        """Returns when the process says that it has started, or has ended."""
        if self.process is None:
            self.lives += 1
            self.started = trio.Event()
            self._nursery.start_soon(self._run, self.lives)
        await self.started.wait()

    async def _run(self, life: int) -> None:
        speaker = Speaker(self.name)
        WHO.set(speaker)
        self.trace.event(self.name, f"starts, life {life}")
        started, over = self.started, trio.Event()
        self.over = over
        again = False
        try:
            async with trio.open_nursery() as nursery:
                process = Process(self, self._fabric.host(self.name), nursery, speaker, SeededRandom(self._random.randrange(1 << 62)))
                self.process = process
                try:
                    await self._main(process, started.set)
                except KvfsError as error:
                    if not process.dead:
                        again = True
                        self.trace.event(self.name, f"ends: {type(error).__name__}: {error.message}")
                except BaseExceptionGroup as group:
                    cancelled, others = group.split(trio.Cancelled)
                    if others is not None and not process.dead:
                        raise
                    if cancelled is not None:  # what a dead one raises while it unwinds, nobody sees
                        raise cancelled from None
                nursery.cancel_scope.cancel()
        finally:
            over.set()
            started.set()
        if not process.dead:
            self._cut(process, silent=False)
            for medium in self.media.values():
                SimDisk(medium=medium).kill()
            if again:
                await trio.sleep(RESTART_S)
                if self.lives == life:
                    await self.start()

    def _cut(self, process: Process, *, silent: bool) -> None:
        process.dead = process.speaker.dead = True
        self.process = None
        for store in process.stores:
            store.dead = True
        self._fabric.crash_host(self.name, silent=silent)

    def kill(self, *, power: bool = False) -> None:
        """At once; the process notices nothing before it is dead."""
        process = self.process
        if process is None:
            return
        self.trace.event(self.name, "loses power" if power else "is killed")
        self._cut(process, silent=power)
        for _, medium in sorted(self.media.items()):
            disk = SimDisk(medium=medium)
            disk.crash(self._random) if power else disk.kill()
        process.nursery.cancel_scope.cancel()

    async def stop(self) -> None:
        """In order, as SIGTERM does."""
        if self.process is not None:
            self.trace.event(self.name, "is stopped")
            self.process.nursery.cancel_scope.cancel()
        await self.over.wait()

    def targets(self) -> list[str]:
        """The directories of a storage machine's targets."""
        found = []
        for top, medium in sorted(self.media.items()):
            folder = medium.root.names.get("targets")
            if folder is not None:
                found += [f"/{top}/targets/{name}" for name in sorted(folder.names)]
        return found

    def wipe(self) -> None:
        """Its disks are replaced by empty ones."""
        assert self.process is None, f"{self.name} runs"
        self.trace.event(self.name, "gets empty disks")
        self.media.clear()
