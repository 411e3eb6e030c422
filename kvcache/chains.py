"""Asking the chains of a space: those that do not answer are left out for a while, and what goes wrong is counted.

Owns which chains rest (rests.py) and what each kind of trouble counts as. Invariants: a resting chain is not asked; one that is tried again gets a
short deadline of its own, and does not hold up the others. Belongs to the client's trio thread.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

import trio

from kvfs.client.storage_client import StorageClient
from kvfs.common.boundary.clock import Clock
from kvfs.common.errors import DataError, DeadlineExceeded, KvfsError, NoSpace
from kvfs.kvcache.config import CacheConfig
from kvfs.kvcache.outcomes import SpaceCounters
from kvfs.kvcache.rests import Rests

Ask = Callable[[Sequence[int], float], Awaitable[None]]
"""Asks these chains, within so many seconds."""


class Chains:
    def __init__(self, storage: StorageClient, config: CacheConfig, clock: Clock, counters: SpaceCounters) -> None:
        self._storage = storage
        self._config = config
        self._clock = clock
        self.counters = counters
        self._rests = Rests(config.rest_s, config.rest_max_s)

    async def ask(self, groups: Mapping[int, Sequence[int]], ask: Ask, end_s: float, *, begun: Collection[int] = ()) -> None:
        """Ask for what lies on each chain, by `end_s`. `begun`: chains that the same operation has asked before, so they do not rest for it."""
        limit_s = max(0.0, end_s - self._clock.monotonic())
        if not self._rests:
            await ask(list(groups), limit_s)
            return
        well: list[int] = []
        trial: list[int] = []
        for chain, places in groups.items():
            state = self._rests.state(chain, self._version(chain), self._clock.monotonic())
            if state == "resting" and chain not in begun:
                self.counters.resting += len(places)
            else:
                (well if state == "well" else trial).append(chain)
        async with trio.open_nursery() as nursery:
            for chains, seconds in ((well, limit_s), (trial, min(limit_s, self._config.trial_s))):
                if chains:
                    nursery.start_soon(ask, chains, seconds)

    @property
    def resting(self) -> bool:
        """Whether some chain rests, or is on trial. Any thread may look."""
        return bool(self._rests)

    def _version(self, chain: int) -> int:
        try:
            return self._storage.routing.chain(chain).version
        except KvfsError:
            return 0

    def well(self, chain: int) -> None:
        """It answered."""
        if self._rests:
            self._rests.note(chain, 0, None, 0.0)

    def trouble(self, chain: int, error: KvfsError, count: int, limit_s: float) -> None:
        """Storage could not do it for so many blocks within `limit_s`: counted, and the chain may rest."""
        counters = self.counters
        if isinstance(error, DeadlineExceeded):
            counters.late += count
        elif isinstance(error, DataError):
            counters.corrupt += count
        elif isinstance(error, NoSpace):
            counters.full += count
        else:
            counters.failed += count
        self._rests.note(chain, self._version(chain), error, self._clock.monotonic(), limit_s)
