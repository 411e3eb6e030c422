"""Prefixes in a KV-cache space of kvfs, as an engine uses them.

Owns `KvStore`, which is the engine's PrefixStore (engine/prefix_store.py), and how one is opened. Invariants: an answer never depends on what is
here, only its cost does: trouble of any kind is a miss, a failed reading or a page that is not kept; the engine's loop never waits for a write.
Belongs to its client's trio thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvfs.common.boundary.clock import Clock
from kvfs.inference.cache.pool import PagePool
from kvfs.inference.config import EngineConfig
from kvfs.inference.store.cost import Cost
from kvfs.inference.store.reading import Reading
from kvfs.inference.store.space import page_space, space_name
from kvfs.inference.store.stats import StoreStats
from kvfs.inference.store.writer import Writer
from kvfs.kvcache import AsyncKVCache, AsyncSpace
from kvfs.kvcache.keys import unfinished


class KvStore:
    def __init__(self, space: AsyncSpace, pool: PagePool, config: EngineConfig, clock: Clock) -> None:
        self.stats = StoreStats()
        self.cost = Cost(pool.format.page_bytes)
        self._space = space
        self._pool = pool
        self._config = config
        self._clock = clock
        self._writer = Writer(space, pool, config.write_queue_bytes, self.stats)

    @classmethod
    async def open(cls, cache: AsyncKVCache, digest: bytes, rope: str, pool: PagePool, config: EngineConfig, clock: Clock) -> KvStore:
        """In the model's space, which is made if it is not there. SpaceDiffers: config.space names one of another model."""
        params = page_space(digest, pool.format, rope)
        name = config.space or space_name(config.model, digest, pool.format)
        return cls(await cache.create(name, params, exist_ok=True), pool, config, clock)

    @property
    def space(self) -> str:
        return self._space.name

    async def run(self) -> None:
        """Writes what is offered, until it is cancelled."""
        await self._writer.run()

    async def idle(self) -> None:
        """Until nothing waits to be written."""
        await self._writer.idle()

    async def match(self, keys: Sequence[bytes], parent: bytes, tail: Sequence[int]) -> tuple[int, bool]:
        """One round trip to each storage service; what is found counts as used."""
        asked = [*keys, unfinished(parent, tail)] if tail else list(keys)
        found = await self._space.match_keys(asked)
        self.stats.lookups += len(asked)
        self.stats.found += found
        return min(found, len(keys)), found > len(keys)

    def worth(self, pages: int) -> int:
        chosen = self.cost.worth(pages)
        self.stats.declined += pages - chosen
        return chosen

    def read(self, keys: Sequence[bytes], pages: Sequence[int], parent: bytes, tail: Sequence[int]) -> Reading:
        asked = [*keys, unfinished(parent, tail)] if tail else keys
        return Reading(self._space, self._pool, asked, pages, self._clock, self._config.read_timeout_s, self.stats, self.cost.read)

    def offer(self, keys: Sequence[bytes], pages: Sequence[int], before: Sequence[bytes], done: Callable[[], None]) -> None:
        self._writer.offer(keys, pages, before, done)

    async def save(self, keys: Sequence[bytes], pages: Sequence[int], parent: bytes, tail: Sequence[int]) -> None:
        """The pages of `keys` and, if there is a `tail`, the unfinished one, which is the last of `pages`."""
        if tail:
            self._pool.clear_tail(pages[-1], len(tail))
            keys = [*keys, unfinished(parent, tail)]
        await self._writer.write(keys, pages, ())

    def computed(self, tokens: int, seconds: float) -> None:
        self.cost.computed(tokens, seconds)
