"""Token for token the same with pages that come from kvfs: cold, warm, handed over, with storage that is gone, damaged or full. A real cluster."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.inference import oracles
from tests.inference.serving import Served, ask, model, serving
from tests.unit.client.fakes import run
from tests.unit.client.whole import Whole, whole

from kvfs.common.boundary.clock import SystemClock
from kvfs.inference.cache.pool import PagePool
from kvfs.inference.config import EngineConfig
from kvfs.inference.model import sample
from kvfs.inference.model.config import ROPE_LAYOUT
from kvfs.inference.model.digest import model_digest
from kvfs.inference.request import Request
from kvfs.inference.store.store import KvStore
from kvfs.kvcache import AsyncKVCache

micro = partial(oracles.checkpoint, "micro")
digest = cache(model_digest)


@dataclass
class Disk:
    """A cluster, and engines over it, one after another or side by side."""

    cluster: Whole
    kvcache: AsyncKVCache
    stores: list[KvStore] = field(default_factory=list)

    @asynccontextmanager
    async def serving(self, path: Path | None = None, *, space: str = "pages", **config: Any) -> AsyncIterator[Served]:
        path = path or micro()
        settings = EngineConfig(model=str(path), space=space, read_timeout_s=3, **config)

        async def make(pool: PagePool) -> KvStore:
            self.stores.append(await KvStore.open(self.kvcache, digest(path), ROPE_LAYOUT, pool, settings, SystemClock()))
            return self.stores[-1]

        async with serving(path, make_store=make, **config) as served:
            yield served
            await self.stores[-1].idle()

    @property
    def stats(self) -> Any:
        return self.stores[-1].stats


def on_disk(test: Callable[[Disk], Any], **cluster: Any) -> None:
    async def main() -> None:
        async with whole(**{"storage": 1, "replicas": 1, "lease_ms": 10_000, **cluster}) as made, made.client() as client:
            await test(Disk(made, AsyncKVCache(client)))

    run(main, 100)


def conversation(number: int, own: int) -> list[int]:
    return oracles.tokens(150, seed=99) + oracles.tokens(own, seed=number)


PROMPTS = [conversation(number, 20 + 30 * number) for number in range(4)]


def asked(tokens: int = 20) -> list[Request]:
    return [ask(str(number), prompt, tokens) for number, prompt in enumerate(PROMPTS)]


def expected(tokens: int = 20) -> list[list[int]]:
    return [oracles.greedy(micro(), prompt, tokens) for prompt in PROMPTS]


def test_cold_warm_and_the_next_turn() -> None:
    async def test(disk: Disk) -> None:
        async with disk.serving() as served:
            assert await served.answers(asked(30)) == expected(30)
            assert served.engine.stats.disk_hits == 0
        assert disk.stats.written_pages and not disk.stats.dropped_pages
        async with disk.serving() as served:
            assert await served.answers(asked(30)) == expected(30)
            assert [served.events[str(number)][0].cached_tokens for number in range(4)] == [128, 192, 192, 256]
            assert served.engine.stats.disk_hits and disk.stats.read_pages == disk.stats.read_bytes // model(micro()).page_format("fp32").page_bytes
            stored = disk.stats.written_pages
        assert stored == 0, "all was there"
        turn = PROMPTS[0] + expected(30)[0] + oracles.tokens(11)
        async with disk.serving() as served:
            assert await served.answers([ask("turn", turn, 20)]) == [oracles.greedy(micro(), turn, 20)]
            assert served.events["turn"][0].disk_tokens == 192, "a page of the answer, too"

    on_disk(test)


def test_other_tenants_and_other_models_read_nothing_of_it(tmp_path: Path) -> None:
    async def test(disk: Disk) -> None:
        sample.make("micro", tmp_path, seed=5)
        async with disk.serving() as served:
            await served.answers(asked())
        async with disk.serving() as served:
            salted = [replace(request, salt=b"tenant") for request in asked()]
            assert await served.answers(salted) == expected()
            assert served.engine.stats.disk_hits == 0
        async with disk.serving(tmp_path, space="") as served, disk.serving(space="") as beside:
            assert await served.answers(asked()) == [oracles.greedy(tmp_path, prompt, 20) for prompt in PROMPTS]
            assert await beside.answers(asked()) == expected()
            assert served.engine.stats.disk_hits == beside.engine.stats.disk_hits == 0
        async with disk.serving(tmp_path, space="") as served, disk.serving(space="") as beside:
            first = asked()[:1]
            assert await served.answers(first) == [oracles.greedy(tmp_path, PROMPTS[0], 20)]
            assert await beside.answers(first) == expected()[:1]
            assert served.events["0"][0].disk_tokens == beside.events["0"][0].disk_tokens == 128, "each its own"

    on_disk(test)


def test_an_answer_handed_over_from_one_engine_to_another() -> None:
    async def test(disk: Disk) -> None:
        for prompt in (oracles.tokens(30), oracles.tokens(128), PROMPTS[1]):
            want = oracles.greedy(micro(), prompt, 20)
            request = ask("a", prompt, 20)
            async with disk.serving(step_tokens=50) as prefill:
                prefill.engine.submit(replace(request, hand_over=True))
                await prefill.until(lambda prefill=prefill: bool(prefill.events["a"]))
                assert prefill.tokens("a") == want[:1]
            async with disk.serving() as decode:
                assert await decode.answers([replace(request, answered=tuple(want[:1]))]) == [want[1:]]
                assert decode.events["a"][0].disk_tokens == len(prompt)
                assert decode.engine.stats.computed_tokens == 19, "none of the prompt"

    on_disk(test)


@pytest.mark.parametrize("cache_dtype", ["bf16", "fp8"])
def test_smaller_pages_give_what_the_same_engine_gives_without_disk(cache_dtype: str) -> None:
    """Rounded latents make tokens of their own; they are read as they were computed."""

    async def test(disk: Disk) -> None:
        alone = []
        for request in asked():
            async with serving(micro(), cache_dtype=cache_dtype) as served:
                alone += await served.answers([request])
        for hits in (False, True):
            async with disk.serving(cache_dtype=cache_dtype) as served:
                assert await served.answers(asked()) == alone
                assert bool(served.engine.stats.disk_hits) == hits

    on_disk(test)


def test_storage_that_goes_away_between_lookup_and_reading_costs_no_answer() -> None:
    async def test(disk: Disk) -> None:
        async with disk.serving() as served:
            await served.answers(asked())
        async with disk.serving() as served:
            assert await served.answers(asked()[:1]) == expected()[:1]
            assert served.events["0"][0].disk_tokens == 128
            store = disk.stores[-1]
            match = store.match

            async def then_gone(*args: Any) -> tuple[int, bool]:
                found = await match(*args)
                disk.cluster.stop_storage(0)
                await disk.cluster.over[0].wait()
                return found

            store.match = then_gone  # type: ignore[method-assign]
            assert await served.answers(asked()[1:]) == expected()[1:]
            assert disk.stats.found > 2 and disk.stats.read_pages == 2, "the storage had them, and nobody could read them"
            assert disk.stats.failed_reads == served.engine.stats.failed_fetches > 0
            assert [served.events[str(number)][0].disk_tokens for number in (1, 2, 3)] == [0, 0, 0]
            assert served.engine.load().running == 0

    on_disk(test)


def test_damaged_blocks_are_computed_again() -> None:
    async def test(disk: Disk) -> None:
        async with disk.serving() as served:
            await served.answers(asked())
            await disk.stores[-1].idle()
        flipped = 0
        for path in disk.cluster.folder.glob("storage-0/targets/*/data/*"):
            content = bytearray(path.read_bytes())
            for place in range(0, len(content), 4096):
                if any(content[place : place + 64]):
                    content[place + 20] ^= 1
                    flipped += 1
            path.write_bytes(content)
        assert flipped
        async with disk.serving() as served:
            assert await served.answers(asked()) == expected()
            assert served.engine.stats.disk_hits == 0 and served.engine.stats.failed_fetches

    on_disk(test)


def test_a_space_that_is_full_evicts_and_answers_the_same() -> None:
    async def test(disk: Disk) -> None:
        quota = 4 * model(micro()).page_format("fp32").page_bytes
        for _ in range(2):
            async with disk.serving(space_quota_bytes=quota) as served:
                assert await served.answers(asked(30)) == expected(30)
        with trio.move_on_after(20):
            while not (await disk.kvcache.stats("pages")).evicted:
                await trio.sleep(0.05)
        stats = await disk.kvcache.stats("pages")
        assert stats.evicted or disk.stats.refused_pages, stats

    on_disk(test)


def test_many_with_one_prefix_while_pages_are_short() -> None:
    async def test(disk: Disk) -> None:
        requests: Sequence[Request] = asked(20)
        async with disk.serving(cache_pages=8, step_tokens=40) as served:
            assert await served.answers(requests) == expected(20)
        async with disk.serving(cache_pages=8, step_tokens=40) as served:
            assert await served.answers(requests) == expected(20)
            assert served.engine.stats.disk_hits
            assert served.engine.load().pages_used == 0

    on_disk(test)
