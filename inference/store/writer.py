"""New pages on their way to kvfs, in the background.

Owns `Writer`. Invariants: what waits is bounded in bytes, and more is dropped and counted, never waited for: a lost page costs a later request some
computing, a waiting engine costs all of them; of an offer that does not fit the first pages are taken; a page is its engine's until `done` was
called, exactly once for every offer, also when the writer ends; a prefix is written before what hangs on it, and touched after it, so that it
outlives it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from kvfs.inference.cache.pool import PagePool
from kvfs.inference.store.stats import StoreStats
from kvfs.kvcache import AsyncSpace, Put

AT_ONCE = 4
"""Offers under way together."""
PREFIX_MAX = 1024
"""Keys before an offer that are touched with it: the last ones."""


@dataclass(frozen=True, slots=True, eq=False)
class _Offer:
    keys: Sequence[bytes]
    pages: Sequence[int]
    before: Sequence[bytes]
    done: Callable[[int], None]
    size: int


class Writer:
    def __init__(self, space: AsyncSpace, pool: PagePool, queue_bytes: int, stats: StoreStats) -> None:
        self.space = space
        """Where offers go from now on."""
        self._pool = pool
        self._queue_bytes = queue_bytes
        self._stats = stats
        self._waiting: list[_Offer] = []
        self._under_way: set[_Offer] = set()
        self._changed = trio.Event()
        self._idle = trio.Event()
        self._idle.set()

    def offer(self, keys: Sequence[bytes], pages: Sequence[int], before: Sequence[bytes], done: Callable[[int], None]) -> None:
        """`done` hears how many of the pages, from the first on, are stored."""
        page_bytes = self._pool.format.page_bytes
        taken = min(len(pages), (self._queue_bytes - self._stats.waiting_bytes) // page_bytes)
        self._stats.dropped_pages += len(pages) - taken
        if not taken:
            done(0)
            return
        self._stats.waiting_bytes += taken * page_bytes
        self._waiting.append(_Offer(keys[:taken], pages[:taken], before, done, taken * page_bytes))
        if self._idle.is_set():
            self._idle = trio.Event()
        self._wake()

    async def run(self) -> None:
        """Until it is cancelled; what waits then is dropped."""
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(AT_ONCE):
                    nursery.start_soon(self._write_all)
        finally:
            while self._waiting:
                offer = self._waiting.pop(0)
                self._stats.dropped_pages += len(offer.pages)
                self._over(offer, 0)

    async def idle(self) -> None:
        """Until everything offered so far, and meanwhile, was written or given up."""
        await self._idle.wait()

    async def _write_all(self) -> None:
        while True:
            while (offer := self._next()) is None:
                await self._changed.wait()
            self._waiting.remove(offer)
            self._under_way.add(offer)
            stored: int | None = None
            try:
                stored = await self.write(offer.keys, offer.pages, offer.before)
            finally:
                self._under_way.discard(offer)
                self._stats.dropped_pages += len(offer.pages) if stored is None else 0
                self._over(offer, stored or 0)

    def _next(self) -> _Offer | None:
        """The oldest one that goes on from nothing that is still to be written."""
        coming = {offer.keys[-1] for offer in self._under_way}
        for offer in self._waiting:
            if not offer.before or offer.before[-1] not in coming:
                return offer
            coming.add(offer.keys[-1])
        return None

    def _over(self, offer: _Offer, stored: int) -> None:
        self._stats.waiting_bytes -= offer.size
        offer.done(stored)
        if not self._waiting and not self._under_way:
            self._idle.set()
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def write(self, keys: Sequence[bytes], pages: Sequence[int], before: Sequence[bytes]) -> int:
        """At once: how many, from the first on, are there now. What storage does not take is counted."""
        if self._pool.device.type == "cpu":
            blocks: list[object] = [self._pool.buffer(page) for page in pages]
        else:
            blocks = list(await trio.to_thread.run_sync(self._pool.to_host, list(pages)))  # it waits for what the GPU is doing
        results = await self.space.put(list(keys), blocks, list(before[-PREFIX_MAX:]))
        stored = results.count(Put.STORED)
        self._stats.written_pages += stored
        self._stats.written_bytes += stored * self._pool.format.page_bytes
        self._stats.present_pages += results.count(Put.PRESENT)
        self._stats.refused_pages += results.count(Put.REFUSED)
        return results.index(Put.REFUSED) if Put.REFUSED in results else len(results)
