"""What goes wrong with a real cluster while clients use it: processes are killed, stopped for a while and cut off from each other, by a seed.

Owns the faults of a run. At most two at a time, each of another process; what ended by itself (a service that was declared dead ends) is started
again as a supervisor would. `heal` undoes everything.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import trio
from tests.network import OUTSIDE
from tests.process_cluster import ProcessCluster

FAULTS_MAX = 2


class Nemesis:
    def __init__(self, cluster: ProcessCluster, now: Callable[[], float], seed: str) -> None:
        self._cluster = cluster
        self._now = now
        self._chance = random.Random(seed)
        self._busy: set[str] = set()
        self.said: list[str] = []
        """What it did, and when."""
        self.counts = {"kill": 0, "pause": 0, "cut": 0}

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                await trio.sleep(self._chance.uniform(0.1, 1.5))
                await self._revive()
                if len(self._busy) < FAULTS_MAX:
                    nursery.start_soon(self._fault, self._draw())

    def _draw(self) -> tuple[str, list[str], float]:
        """What, to whom, for how long."""
        chance, cluster = self._chance, self._cluster
        idle = [name for name in cluster.running if name not in self._busy]
        stores = [name for name in idle if name.startswith("storage")]
        kinds = ["kill", "pause"] + (["cut"] * 2 if cluster.network is not None else [])
        kind = chance.choice(kinds)
        if kind == "kill" and chance.random() < 0.15:
            whom = stores  # all at once
        else:
            whom = [chance.choice(stores if stores and chance.random() < 0.6 else idle)]
        return kind, whom, chance.uniform(0.1, 1.0) if chance.random() < 0.3 else chance.uniform(1.0, 5.0)

    async def _fault(self, drawn: tuple[str, list[str], float]) -> None:
        kind, whom, seconds = drawn
        self._busy.update(whom)
        self.counts[kind] += 1
        try:
            if kind == "kill":
                await self._kill(whom, seconds)
            elif kind == "pause":
                await self._pause(whom[0], seconds)
            else:
                await self._cut(whom[0], seconds)
        finally:
            self._busy.difference_update(whom)

    async def _kill(self, whom: list[str], seconds: float) -> None:
        self._say(f"kill {', '.join(whom)}, start again after {seconds:.1f} s")
        for name in whom:
            self._cluster.kill(name)
        await trio.sleep(seconds)
        for name in whom:
            await self._start(name)

    async def _pause(self, name: str, seconds: float) -> None:
        self._say(f"stop {name} for {seconds:.1f} s")
        self._cluster.pause(name)
        try:
            await trio.sleep(seconds)
        finally:
            self._cluster.resume(name)
            self._say(f"{name} goes on")

    async def _cut(self, name: str, seconds: float) -> None:
        network = self._cluster.network
        assert network is not None
        others = [other for other in (OUTSIDE, *self._cluster.running) if other != name]
        if self._chance.random() < 0.4 and name != "manager":
            others = ["manager"]
        elif self._chance.random() < 0.7:
            others = self._chance.sample(others, self._chance.randint(1, 2))
        one_way = self._chance.random() < 0.3
        self._say(f"cut {name} off from {', '.join(others)}{', one way' if one_way else ''}, for {seconds:.1f} s")
        for other in others:
            network.cut(name, other, one_way=one_way)
        try:
            await trio.sleep(seconds)
        finally:
            network.mend()  # all: two cuts at a time end together
            self._say("cuts are mended")

    async def _revive(self) -> None:
        for name in self._cluster.running:
            if name not in self._busy and not self._cluster.alive(name):
                self._say(f"{name} ended by itself: start it again")
                await self._start(name)

    async def _start(self, name: str) -> None:
        self._cluster.launch(name)
        await trio.to_thread.run_sync(self._cluster.wait_ready, name)
        self._say(f"{name} is back")

    async def heal(self) -> None:
        """After `run` was cancelled: everything goes on and reaches everything. `keep_alive` sees to those that end by themselves still."""
        for name in list(self._cluster.paused):
            self._cluster.resume(name)
        if self._cluster.network is not None:
            self._cluster.network.mend()
        self._busy.clear()

    async def keep_alive(self) -> None:
        """Until cancelled."""
        while True:
            await self._revive()
            await trio.sleep(0.5)

    def _say(self, what: str) -> None:
        self.said.append(f"{self._now():.3f} {what}")
