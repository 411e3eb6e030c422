"""Pages written to a real cluster and read again: what comes back, what doesn't, and what the engine is told."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import trio
import trio.testing
from tests.unit.client.fakes import run
from tests.unit.client.whole import Whole, whole

from kvfs.common.boundary.clock import SystemClock
from kvfs.common.errors import SpaceDiffers
from kvfs.inference.cache.format import PAGE_TOKENS, PageFormat
from kvfs.inference.cache.pool import PagePool
from kvfs.inference.config import EngineConfig
from kvfs.inference.store.stats import StoreStats
from kvfs.inference.store.store import KvStore
from kvfs.inference.store.writer import Writer
from kvfs.kvcache import AsyncKVCache, Put
from kvfs.kvcache.keys import chain, seed, unfinished

FORMAT = PageFormat("fp32", 4, 256, 64)
CONFIG = EngineConfig(model="/models/Small Model")
DIGEST = bytes(range(16))
TOKENS = list(range(5, 5 + 5 * PAGE_TOKENS + 20))
KEYS = chain(TOKENS, PAGE_TOKENS)
TAIL = TOKENS[5 * PAGE_TOKENS :]


@asynccontextmanager
async def scene(config: EngineConfig = CONFIG, **cluster: Any) -> AsyncIterator[tuple[KvStore, PagePool, AsyncKVCache, Whole]]:
    async with whole(**{"storage": 1, "replicas": 1, **cluster}) as made, made.client() as client:
        cache = AsyncKVCache(client)
        pool = PagePool(FORMAT, 16)
        for page in range(16):
            pool.buffer(page)[:] = random.Random(page).randbytes(FORMAT.page_bytes)
        yield await KvStore.open(cache, DIGEST, "half", pool, config, SystemClock()), pool, cache, made


async def other(cache: AsyncKVCache, **changes: Any) -> tuple[KvStore, PagePool]:
    """Another worker's."""
    pool = PagePool(FORMAT, 16)
    return await KvStore.open(cache, DIGEST, "half", pool, replace(CONFIG, **changes), SystemClock()), pool


def test_saved_pages_and_the_unfinished_one_are_found_and_read_by_another_worker() -> None:
    async def test() -> None:
        async with scene() as (store, pool, cache, _):
            await store.save(KEYS, [3, 1, 4, 0, 5, 9], KEYS[-1], TAIL)
            assert store.stats.written_pages == 6
            mine, theirs = await other(cache)
            assert mine.space == store.space == f"Small-Model-fp32-{(await cache.list())[store.space].digest.hex()[:12]}"
            assert await mine.match(KEYS, KEYS[-1], TAIL) == (5, True)
            assert await mine.match(KEYS[:2], KEYS[1], TAIL) == (2, False)
            assert await mine.match(KEYS, KEYS[-1], [*TAIL, 7]) == (5, False)
            assert await mine.match([*KEYS[:3], b"x" * 16, KEYS[4]], b"", []) == (3, False)
            arrived: list[bool] = []
            reading = mine.read(KEYS, [10, 11, 12, 13, 14, 15], KEYS[-1], TAIL)
            assert await reading.run(lambda: arrived.append(True))
            for here, there in zip((3, 1, 4, 0, 5, 9), range(10, 16), strict=True):
                assert theirs.buffer(there) == pool.buffer(here)
            for layer in range(FORMAT.layers):
                assert reading.wait(layer)
                assert not theirs.gather(layer, torch.tensor([15]), PAGE_TOKENS)[len(TAIL) :].any(), "an earlier owner's rows were stored"
            assert (mine.stats.read_pages, mine.stats.read_bytes, mine.stats.failed_reads) == (6, 6 * FORMAT.page_bytes, 0)

    run(test, 60)


def test_a_prompt_shorter_than_a_page_is_its_salts_own() -> None:
    async def test() -> None:
        async with scene() as (store, _, _, _):
            await store.save([], [0], seed(b"tenant"), TAIL)
            assert await store.match([], seed(b"tenant"), TAIL) == (0, True)
            assert await store.match([], seed(), TAIL) == (0, False)

    run(test, 60)


def test_layers_come_in_order_and_are_waited_for_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt may be computed on when the first group is there, and the later ones are waited for."""
    monkeypatch.setattr("kvfs.inference.store.groups.GROUP_S", 1e-9)

    async def test() -> None:
        async with scene() as (store, _, cache, _):
            await store.save(KEYS, [0, 1, 2, 3, 4], b"", [])
            mine, _ = await other(cache)
            gate, arrived, waited = trio.Event(), trio.Event(), list[bool]()
            real = mine._space.get_range

            async def slow(keys: Any, offset: int, *args: Any, **named: Any) -> Any:
                if offset == 2 * FORMAT.layer_bytes:
                    await gate.wait()
                return await real(keys, offset, *args, **named)

            monkeypatch.setattr(mine._space, "get_range", slow)
            reading = mine.read(KEYS, [0, 1, 2, 3, 4], b"", [])
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reading.run, arrived.set)
                await arrived.wait()
                assert await trio.to_thread.run_sync(reading.wait, 0)
                assert await trio.to_thread.run_sync(reading.wait, 1)

                async def wait() -> None:
                    waited.append(await trio.to_thread.run_sync(reading.wait, 2))

                nursery.start_soon(wait)
                await trio.sleep(0.1)
                assert not waited
                gate.set()
            assert waited == [True]

    run(test, 60)


def test_one_missing_block_makes_a_reading_worthless_and_nobody_waits() -> None:
    async def test() -> None:
        async with scene() as (store, _, _, _):
            await store.save(KEYS[:4], [0, 1, 2, 3], b"", [])
            reading = store.read(KEYS, [10, 11, 12, 13, 14], b"", [])
            assert not await reading.run(lambda: None)
            assert not reading.wait(3)
            assert store.stats.failed_reads == 1 and store.stats.read_pages == 0

    run(test, 60)


@pytest.mark.parametrize(("timeout_s", "computed"), [(1.5, False), (60, True)])
def test_storage_that_is_gone_is_a_failed_reading_in_time(timeout_s: float, computed: bool) -> None:
    """Within the timeout, and, where that is known, not much longer than computing would have taken."""

    async def test() -> None:
        async with scene(replace(CONFIG, read_timeout_s=timeout_s)) as (store, _, cache, made):
            await store.save(KEYS, [0, 1, 2, 3, 4], b"", [])
            mine, _ = await other(cache, read_timeout_s=timeout_s)
            if computed:
                mine.computed(1000, 0.1)
            made.stop_storage(0)
            await made.over[0].wait()
            reading = mine.read(KEYS, [10, 11, 12, 13, 14], b"", [])
            with trio.fail_after(15):
                assert not await reading.run(lambda: None)
                assert (await mine.match(KEYS, b"", []))[0] == 0
                await mine.save(KEYS, [0, 1, 2, 3, 4], b"", [])

    run(test, 60)


def test_a_cancelled_reading_lets_its_waiters_go() -> None:
    async def test() -> None:
        async with scene() as (store, _, _, _):
            await store.save(KEYS, [0, 1, 2, 3, 4], b"", [])
            reading = store.read(KEYS, [10, 11, 12, 13, 14], b"", [])
            with trio.CancelScope() as scope:
                scope.cancel()
                await reading.run(lambda: None)
            assert not reading.wait(3)

    run(test, 60)


def test_offers_are_written_in_the_background_and_told_once() -> None:
    async def test() -> None:
        async with scene() as (store, _, _, _), trio.open_nursery() as nursery:
            told: list[tuple[str, int]] = []
            nursery.start_soon(store.run)
            store.offer(KEYS[:2], [0, 1], [], lambda stored: told.append(("a", stored)))
            store.offer(KEYS[2:], [2, 3, 4], KEYS[:2], lambda stored: told.append(("b", stored)))
            assert not told and store.stats.waiting_bytes == 5 * FORMAT.page_bytes
            await store.idle()
            assert told == [("a", 2), ("b", 3)] and store.stats.waiting_bytes == 0
            assert (await store.match(KEYS, b"", []))[0] == 5
            store.offer(KEYS[:1], [7], [], lambda stored: told.append(("c", stored)))
            await store.idle()
            assert (store.stats.written_pages, store.stats.present_pages) == (5, 1) and told[2:] == [("c", 1)]
            nursery.cancel_scope.cancel()

    run(test, 60)


def test_what_is_too_much_to_write_is_dropped_from_the_end_and_counted() -> None:
    async def test() -> None:
        async with scene(replace(CONFIG, write_queue_bytes=4 * FORMAT.page_bytes - 1)) as (store, _, _, _):
            told: list[tuple[str, int]] = []
            store.offer(KEYS[:2], [0, 1], [], lambda stored: told.append(("a", stored)))
            store.offer(KEYS[2:], [2, 3, 4], KEYS[:2], lambda stored: told.append(("b", stored)))
            assert store.stats.dropped_pages == 2 and store.stats.waiting_bytes == 3 * FORMAT.page_bytes
            store.offer([b"x" * 16], [5], KEYS, lambda stored: told.append(("c", stored)))
            assert told == [("c", 0)] and store.stats.dropped_pages == 3
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.run)
                await store.idle()
                nursery.cancel_scope.cancel()
            assert told[1:] == [("a", 2), ("b", 1)]
            store.offer(KEYS[3:], [3, 4], KEYS[:3], lambda stored: told.append(("d", stored)))
            with trio.CancelScope() as scope:
                scope.cancel()
                await store.run()
            assert told[3:] == [("d", 0)], "pages of an offer that was given up must come back to the engine"
            assert store.stats.dropped_pages == 5 and store.stats.waiting_bytes == 0

    run(test, 60)


class Gated:
    """A space whose puts wait for the test."""

    def __init__(self) -> None:
        self.begun: list[bytes] = []
        self.gates: dict[bytes, trio.Event] = defaultdict(trio.Event)

    async def put(self, keys: list[bytes], *_: Any) -> list[Put]:
        self.begun.append(keys[0])
        await self.gates[keys[0]].wait()
        return [Put.STORED] * len(keys)


def test_a_prefix_is_written_before_what_hangs_on_it_and_others_beside_it() -> None:
    async def test() -> None:
        space, pool, told = Gated(), PagePool(FORMAT, 8), list[int]()
        writer = Writer(space, pool, 1 << 30, StoreStats())  # type: ignore[arg-type]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            for place in range(3):
                writer.offer([KEYS[place]], [place], KEYS[:place], told.append)
            writer.offer([b"x" * 16], [5], [b"y" * 16], told.append)
            await trio.testing.wait_all_tasks_blocked()
            assert space.begun == [KEYS[0], b"x" * 16]
            for place in range(3):
                space.gates[KEYS[place]].set()
                await trio.testing.wait_all_tasks_blocked()
            assert space.begun == [KEYS[0], b"x" * 16, KEYS[1], KEYS[2]] and told == [1, 1, 1]
            nursery.cancel_scope.cancel()
        assert told == [1, 1, 1, 0], "stopped while it was written: its page comes back"
        pool.close()

    run(test, 60)


@pytest.mark.parametrize("at_once", [2, 64])
def test_only_what_is_not_there_is_saved(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr("kvfs.inference.store.store.SAVE_PAGES", at_once)

    async def test() -> None:
        async with scene() as (store, _, _, _):
            await store.save(KEYS[:3], [0, 1, 2], b"", [])
            await store.save(KEYS, [0, 1, 2, 3, 4, 5], KEYS[-1], TAIL)
            assert (store.stats.written_pages, store.stats.present_pages) == (6, 0)
            assert await store.match(KEYS, KEYS[-1], TAIL) == (5, True)

    run(test, 60)


def test_a_space_that_is_dropped_under_a_worker_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs.inference.store.store.LOOK_S", 0.05)

    async def test() -> None:
        async with scene() as (store, _, cache, _), trio.open_nursery() as nursery:
            nursery.start_soon(store.run)
            await store.save(KEYS[:1], [0], b"", [])
            await cache.drop(store.space)
            assert (await store.match(KEYS, b"", []))[0] == 0
            with trio.fail_after(20):
                while not (await store.match(KEYS, b"", []))[0]:
                    await store.save(KEYS[:1], [0], b"", [])
                    await trio.sleep(0.05)
            nursery.cancel_scope.cancel()

    run(test, 60)


def test_a_space_has_the_retention_that_its_first_worker_was_told() -> None:
    async def test() -> None:
        async with scene(replace(CONFIG, space_quota_bytes=1 << 30, space_ttl_s=3600.0)) as (store, _, cache, _):
            params = (await cache.list())[store.space]
            assert (params.quota_bytes, params.ttl_s) == (1 << 30, 3600.0)
            same, _ = await other(cache)
            assert same.space == store.space, "it is no part of the format"

    run(test, 60)


def test_two_models_never_share_a_space() -> None:
    async def test() -> None:
        async with scene() as (store, pool, cache, _):
            await store.save(KEYS, [0, 1, 2, 3, 4], b"", [])
            another = await KvStore.open(cache, bytes(16), "half", pool, CONFIG, SystemClock())
            assert another.space != store.space
            assert (await another.match(KEYS, b"", []))[0] == 0
            with pytest.raises(SpaceDiffers):
                await KvStore.open(cache, bytes(16), "half", pool, replace(CONFIG, space=store.space), SystemClock())
            with pytest.raises(SpaceDiffers):
                await KvStore.open(cache, DIGEST, "half", pool, replace(CONFIG, space=store.space, dtype="bf16"), SystemClock())
            with pytest.raises(SpaceDiffers):
                await KvStore.open(cache, DIGEST, "interleaved", pool, replace(CONFIG, space=store.space), SystemClock())

    run(test, 60)


def test_workers_that_start_together_make_one_space_and_find_each_others_pages() -> None:
    async def test() -> None:
        async with whole(storage=2, replicas=1) as made, made.client() as one, made.client() as two:
            stores: list[tuple[KvStore, PagePool]] = []

            async def start(cache: AsyncKVCache) -> None:
                stores.append(await other(cache))

            async with trio.open_nursery() as nursery:
                for client in (one, two) * 4:
                    nursery.start_soon(start, AsyncKVCache(client))
            assert len({store.space for store, _ in stores}) == 1 and len(await AsyncKVCache(one).list()) == 1
            await stores[0][0].save(KEYS, [0, 1, 2, 3, 4], b"", [])
            for store, _ in stores:
                assert (await store.match(KEYS, b"", []))[0] == 5

    run(test, 60)


def test_an_unfinished_page_has_a_key_of_its_own() -> None:
    full = TOKENS[:PAGE_TOKENS]
    keys = {
        unfinished(seed(), full),
        chain(full, PAGE_TOKENS)[0],
        unfinished(seed(), full[:-1]),
        unfinished(seed(b"x"), full),
        unfinished(KEYS[0], full),
    }
    assert len(keys) == 5
