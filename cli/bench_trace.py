"""Replays of request traces on a cluster, each capacity in a space of its own, beside exact LRU of the same size and beside unlimited capacity.

Owns the run and its figures; what counts as a hit is kvcache/replay.py's.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import trio

from kvfs.client.async_client import open_client
from kvfs.common.errors import DataError, NotFound
from kvfs.kvcache import AsyncKVCache, SpaceParams, SpaceStats
from kvfs.kvcache.replay import Request, Tally, oracle, replay

Progress = Callable[[Request, Tally], None]


@dataclass(frozen=True, slots=True)
class Replayed:
    """One replay and what stands beside it."""

    capacity_blocks: int | None
    """None: unlimited."""
    tally: Tally
    lru: Tally
    """Exact, of the same size."""
    unlimited: Tally
    stats: SpaceStats
    seconds: float
    blocks: int
    """Asked for, over all requests."""
    block_bytes: int

    @property
    def stored(self) -> int:
        return self.blocks - self.tally.blocks_found - self.tally.blocks_refused

    def describe(self) -> dict[str, object]:
        tally = self.tally
        return {
            "capacity_blocks": self.capacity_blocks,
            "requests": tally.requests,
            "input_tokens": tally.input_tokens,
            "hit_tokens": tally.hit_tokens,
            "hit_rate": tally.hit_rate,
            "lru_hit_rate": self.lru.hit_rate,
            "unlimited_hit_rate": self.unlimited.hit_rate,
            "points_under_lru": 100 * (self.lru.hit_rate - tally.hit_rate),
            "evicted": self.stats.evicted,
            "blocks_stored": self.stored,
            "blocks_refused": tally.blocks_refused,
            "blocks_read": tally.blocks_read,
            "wrong_blocks": tally.wrong_bytes,
            "blocks_left": self.stats.blocks,
            "seconds": self.seconds,
            "requests_per_s": tally.requests / self.seconds,
            "blocks_per_s": self.blocks / self.seconds,
            "bytes_per_s": (self.stored + tally.blocks_read) * self.block_bytes / self.seconds,
        }


async def run(
    cluster: str,
    name: str,
    requests: Sequence[Request],
    capacity_blocks: int | None,
    params: SpaceParams,
    *,
    read: bool = False,
    drop: bool = True,
    progress: Progress | None = None,
) -> Replayed:
    """Replay in a new space `name` of so many blocks (`params` without its quota). Raises DataError if a block held other bytes than were put."""
    quota = None if capacity_blocks is None else capacity_blocks * params.block_bytes
    async with open_client(cluster, description="kvfs bench trace") as client:
        cache = AsyncKVCache(client)
        try:  # an interrupted create may have made it
            space = await cache.create(name, replace(params, quota_bytes=quota))
            began_s = time.perf_counter()
            tally = await replay(space, requests, read=read, block_tokens=params.block_tokens, progress=progress)
            seconds = time.perf_counter() - began_s
            stats = await _settled(cache, name, quota)
        finally:
            if drop:
                with trio.CancelScope(shield=True), trio.move_on_after(SETTLE_S), suppress(NotFound):
                    await cache.drop(name)
    if tally.wrong_bytes:
        raise DataError(f"{tally.wrong_bytes} of {tally.blocks_read} blocks did not hold the bytes that were put")
    lru = oracle(requests, capacity_blocks, block_tokens=params.block_tokens)
    unlimited = oracle(requests, block_tokens=params.block_tokens)
    blocks = sum(len(request.blocks) for request in requests)
    return Replayed(capacity_blocks, tally, lru, unlimited, stats, seconds, blocks, params.block_bytes)


SETTLE_S = 5.0


async def _settled(cache: AsyncKVCache, name: str, quota_bytes: int | None) -> SpaceStats:
    """Statistics once the last evictions are over: heads look once a second."""
    until_s = trio.current_time() + SETTLE_S
    while True:
        stats = await cache.stats(name)
        if stats.bytes <= (math.inf if quota_bytes is None else quota_bytes) or trio.current_time() > until_s:
            return stats
        await trio.sleep(0.1)


def space_name(purpose: str, number: int) -> str:
    """Of no other run."""
    return f"{purpose}-{os.getpid()}-{number}"
