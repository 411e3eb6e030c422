"""The pages of one prompt on their way from kvfs into the pool, some layers of all pages at a time.

Owns `Reading` (the engine's protocol, engine/prefix_store.py). Invariants: layers come in the order in which the model needs them, so a prompt may be
computed on while its later layers are still under way; one block that is a miss, or late, makes the whole reading worthless, and nobody waits for
it any longer; when `run` has ended, however, no service writes into the pages any more (that is kvcache's promise). Storage trouble is never an
exception.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import trio

from kvfs.common.boundary.clock import Clock
from kvfs.inference.cache.pool import PagePool
from kvfs.inference.store.groups import Group
from kvfs.inference.store.stats import StoreStats
from kvfs.kvcache import AsyncSpace


class Reading:
    def __init__(
        self,
        space: AsyncSpace,
        pool: PagePool,
        keys: Sequence[bytes],
        pages: Sequence[int],
        groups: Sequence[Group],
        clock: Clock,
        timeout_s: float,
        stats: StoreStats,
        measured: Callable[[int, float], None],
    ) -> None:
        self._space = space
        self._pool = pool
        self._keys = list(keys)
        self._pages = list(pages)
        self._clock = clock
        self._timeout_s = timeout_s
        self._stats = stats
        self._measured = measured
        self._groups = groups
        self._there = [threading.Event() for _ in self._groups]
        self._failed = False

    async def run(self, arriving: Callable[[], None]) -> bool:
        """False: the pages are worth nothing."""
        began_s = self._clock.monotonic()
        whole = False
        try:
            for number, group in enumerate(self._groups):
                left_s = self._timeout_s - (self._clock.monotonic() - began_s)
                if left_s <= 0 or not await self._read(group, left_s):
                    return False
                self._there[number].set()
                if number == 0 and len(self._groups) > 1:
                    arriving()
            whole = True
            return True
        finally:
            if whole:
                self._stats.read_pages += len(self._pages)
                self._stats.read_bytes += len(self._pages) * self._pool.format.page_bytes
            else:
                self._failed = True
                self._stats.failed_reads += 1
            seconds = self._clock.monotonic() - began_s
            self._stats.read_seconds += seconds
            self._measured(len(self._pages), seconds)
            for event in self._there:
                event.set()

    async def _read(self, group: Group, left_s: float) -> bool:
        end = group.offset + group.length
        if self._pool.device.type == "cpu":
            into: list[Any] = [self._pool.buffer(page)[group.offset : end] for page in self._pages]
            host = None
        else:
            host = torch.empty(len(self._pages), group.length, dtype=torch.uint8, pin_memory=True)
            into = list(host)
        sizes = await self._space.get_range(self._keys, group.offset, group.length, into, deadline_s=left_s)
        if any(size != group.length for size in sizes):
            return False
        if host is not None:
            await trio.to_thread.run_sync(self._pool.from_host, self._pages, host, group.offset)  # it waits for what the GPU is doing
        return True

    def wait(self, layer: int, timeout_s: float | None = None) -> bool | None:
        """In any thread but trio's. None: not in this time. Bounded without it, too: `run` ends by its timeout, and with it every wait."""
        if not self._failed:
            number = max(place for place, group in enumerate(self._groups) if group.first_layer <= layer)
            if not self._there[number].wait(timeout_s):
                return None
        return not self._failed
