"""New pages on their way to kvfs, in the background.

Owns `Writer`. Invariants: what waits is bounded in bytes, and more is dropped and counted, never waited for: a lost page costs a later request some
computing, a waiting engine costs all of them; a page is its engine's until `done` was called, exactly once for every offer, also when the writer
ends; pages of one offer are stored in the order of the prompt, with their prefix touched after them, so that a prefix outlives what hangs on it.
"""

from __future__ import annotations

from collections import deque
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


@dataclass(frozen=True, slots=True)
class _Offer:
    keys: Sequence[bytes]
    pages: Sequence[int]
    before: Sequence[bytes]
    done: Callable[[], None]
    size: int


class Writer:
    def __init__(self, space: AsyncSpace, pool: PagePool, queue_bytes: int, stats: StoreStats) -> None:
        self._space = space
        self._pool = pool
        self._queue_bytes = queue_bytes
        self._stats = stats
        self._waiting: deque[_Offer] = deque()
        self._woken = trio.Event()
        self._under_way = 0
        self._idle = trio.Event()
        self._idle.set()

    def offer(self, keys: Sequence[bytes], pages: Sequence[int], before: Sequence[bytes], done: Callable[[], None]) -> None:
        size = len(pages) * self._pool.format.page_bytes
        if self._stats.waiting_bytes + size > self._queue_bytes:
            self._stats.dropped_pages += len(pages)
            done()
            return
        self._stats.waiting_bytes += size
        self._waiting.append(_Offer(keys, pages, before, done, size))
        self._idle = trio.Event() if self._idle.is_set() else self._idle
        self._woken.set()

    async def run(self) -> None:
        """Until it is cancelled; what waits then is dropped."""
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(AT_ONCE):
                    nursery.start_soon(self._write_all)
        finally:
            while self._waiting:
                offer = self._waiting.popleft()
                self._stats.dropped_pages += len(offer.pages)
                self._over(offer)

    async def idle(self) -> None:
        """Until everything offered so far, and meanwhile, was written or given up."""
        await self._idle.wait()

    async def _write_all(self) -> None:
        while True:
            while not self._waiting:
                self._woken = trio.Event() if self._woken.is_set() else self._woken
                await self._woken.wait()
            offer = self._waiting.popleft()
            self._under_way += 1
            given_up = len(offer.pages)
            try:
                await self.write(offer.keys, offer.pages, offer.before)
                given_up = 0
            finally:
                self._stats.dropped_pages += given_up
                self._under_way -= 1
                self._over(offer)

    def _over(self, offer: _Offer) -> None:
        self._stats.waiting_bytes -= offer.size
        offer.done()
        if not self._waiting and not self._under_way:
            self._idle.set()

    async def write(self, keys: Sequence[bytes], pages: Sequence[int], before: Sequence[bytes]) -> None:
        """At once. What storage does not take is counted."""
        if not keys:
            return
        if self._pool.device.type == "cpu":
            blocks: list[object] = [self._pool.buffer(page) for page in pages]
        else:
            blocks = list(self._pool.to_host(pages))
        results = await self._space.put(list(keys), blocks, list(before[-PREFIX_MAX:]))
        stored = results.count(Put.STORED)
        self._stats.written_pages += stored
        self._stats.written_bytes += stored * self._pool.format.page_bytes
        self._stats.present_pages += results.count(Put.PRESENT)
        self._stats.refused_pages += results.count(Put.REFUSED)
