"""Prefixes in a KV-cache space of kvfs, as an engine uses them.

Owns `KvStore`, which is the engine's PrefixStore (engine/prefix_store.py), how one is opened, and its space: one that was dropped is made anew.
Invariants: an answer never depends on what is here, only its cost does: trouble of any kind is a miss, a failed reading or a page that is not kept;
the engine's loop never waits for a write. Belongs to its client's trio thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Never

import trio

from kvfs.common.boundary.clock import Clock
from kvfs.common.errors import KvfsError
from kvfs.inference.cache.pool import PagePool
from kvfs.inference.config import EngineConfig
from kvfs.inference.store.cost import Cost
from kvfs.inference.store.groups import groups
from kvfs.inference.store.reading import Reading
from kvfs.inference.store.space import page_space, space_name
from kvfs.inference.store.stats import StoreStats
from kvfs.inference.store.writer import Writer
from kvfs.kvcache import AsyncKVCache, AsyncSpace, SpaceParams
from kvfs.kvcache.keys import unfinished

log = logging.getLogger("kvfs.inference.store")

PATIENCE_S = 2.0
"""A lookup and a reading have so long, or twice the time that computing takes, if that is more ..."""
LOOKUP_S = 5.0
"""... and a lookup never more than this."""
SAVE_PAGES = 64
"""At once: each write has a deadline of its own, however long the prompt."""
LOOK_S = 5.0
"""Between two looks at whether the space is still there."""


def _batched(places: Sequence[int], count: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(places), count):
        yield places[start : start + count]


class KvStore:
    def __init__(self, cache: AsyncKVCache, params: SpaceParams, space: AsyncSpace, pool: PagePool, config: EngineConfig, clock: Clock) -> None:
        self.stats = StoreStats()
        self.cost = Cost(pool.format.page_bytes)
        self._cache = cache
        self._params = params
        self._space = space
        self._pool = pool
        self._config = config
        self._clock = clock
        self._writer = Writer(space, pool, config.write_queue_bytes, self.stats)

    @classmethod
    async def open(cls, cache: AsyncKVCache, digest: bytes, rope: str, pool: PagePool, config: EngineConfig, clock: Clock) -> KvStore:
        """In the model's space, which is made if it is not there. SpaceDiffers: config.space names one of another model."""
        quota_bytes, ttl_s = config.space_quota_bytes or None, config.space_ttl_s or None
        params = page_space(digest, pool.format, rope, config.dtype, quota_bytes=quota_bytes, ttl_s=ttl_s)
        name = config.space or space_name(config.model, params)
        return cls(cache, params, await cache.create(name, params, exist_ok=True), pool, config, clock)

    @property
    def space(self) -> str:
        return self._space.name

    async def run(self) -> None:
        """Writes what is offered, until it is cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_space)
            nursery.start_soon(self._writer.run)

    async def idle(self) -> None:
        """Until nothing waits to be written."""
        await self._writer.idle()

    async def match(self, keys: Sequence[bytes], parent: bytes, tail: Sequence[int]) -> tuple[int, bool]:
        """One round trip to each storage service; what is found counts as used."""
        asked = [*keys, unfinished(parent, tail)] if tail else list(keys)
        found = await self._space.match_keys(asked, deadline_s=min(LOOKUP_S, self._limit_s(len(asked))))
        self.stats.lookups += len(asked)
        self.stats.found += found
        return min(found, len(keys)), found > len(keys)

    def worth(self, pages: int) -> int:
        chosen = self.cost.worth(pages)
        self.stats.declined += pages - chosen
        return chosen

    def read(self, keys: Sequence[bytes], pages: Sequence[int], parent: bytes, tail: Sequence[int]) -> Reading:
        asked = [*keys, unfinished(parent, tail)] if tail else keys
        self._pool.restore(pages)
        steps = groups(self._pool.format, self.cost.page_seconds)
        return Reading(self._space, self._pool, asked, pages, steps, self._clock, self._limit_s(len(pages)), self.stats, self.cost.read)

    def _limit_s(self, pages: int) -> float:
        """Storage that hangs holds a prompt up about as long as it saves at best."""
        computing_s = self.cost.compute_seconds(pages)
        return min(self._config.read_timeout_s, max(PATIENCE_S, 2 * computing_s)) if computing_s else self._config.read_timeout_s

    def offer(self, keys: Sequence[bytes], pages: Sequence[int], before: Sequence[bytes], done: Callable[[int], None]) -> None:
        self._writer.offer(keys, pages, before, done)

    async def save(self, keys: Sequence[bytes], pages: Sequence[int], parent: bytes, tail: Sequence[int]) -> None:
        """The pages of `keys` and, if there is a `tail`, the unfinished one, which is the last of `pages`. Most of them are there already, as they
        were offered when they became full."""
        if tail:
            self._pool.clear_tail(pages[-1], len(tail))
            keys = [*keys, unfinished(parent, tail)]
        there = await self._space.exists(keys)
        missing = [place for place, found in enumerate(there) if not found]
        for part in _batched(missing, SAVE_PAGES):
            own = [keys[place] for place in part]
            if await self._writer.write(own, [pages[place] for place in part], keys[: part[0]]) < len(own):
                return  # nobody could get to what is behind it

    def computed(self, tokens: int, seconds: float) -> None:
        self.cost.computed(tokens, seconds)

    async def _keep_space(self) -> Never:
        """A space may be dropped under an engine that runs, to empty its cache: it goes on with a new one. Metadata that is away is asked again
        later."""
        while True:
            await self._clock.sleep(LOOK_S)
            if self._space.dropped:
                try:
                    self._space = self._writer.space = await self._cache.create(self._space.name, self._params, exist_ok=True)
                    log.info("space %s was dropped: pages go to a new one", self._space.name)
                except KvfsError as error:
                    log.warning("space %s was dropped and cannot be made anew: %s", self._space.name, error.message)
