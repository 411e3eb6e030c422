"""The same code on a GPU: logits and tokens of the CPU, pages that go to kvfs and come back. Skipped where torch sees no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.inference import oracles
from tests.inference.serving import ask, serving
from tests.unit.client.fakes import run
from tests.unit.client.whole import whole

from kvfs.common.boundary.clock import SystemClock
from kvfs.inference.cache.pool import PagePool
from kvfs.inference.config import EngineConfig
from kvfs.inference.engine.engine import Engine
from kvfs.inference.model.batch import Piece
from kvfs.inference.model.config import ROPE_LAYOUT
from kvfs.inference.model.deepseek import DeepseekV3, batch_of
from kvfs.inference.model.digest import model_digest
from kvfs.inference.store.store import KvStore
from kvfs.kvcache import AsyncKVCache

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
NAMES = ["micro", "tiny", "latent576"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cache", ["fp32", "bf16", "fp8"])
def test_logits_are_those_of_the_cpu(name: str, cache: str) -> None:
    found = []
    for device in ("cpu", "cuda"):
        model = DeepseekV3.load(oracles.checkpoint(name), device=device)
        prompt = oracles.tokens(200, model.config.vocabulary)
        pool = PagePool(model.page_format(cache), 6, device=device)
        steps = [(0, 120), (120, 199), (199, 200)]
        rows = [model.forward(batch_of([Piece(prompt[start:end], start, [4, 1, 3, 0], True)], device), pool) for start, end in steps]
        found.append(torch.cat(rows).cpu())
    # Rounding a latent can fall to the other side of a step: a small cache is as near as its steps are small.
    assert (found[0] - found[1]).abs().max() < {"fp32": 1e-4, "bf16": 2e-2, "fp8": 2e-1}[cache]


@pytest.mark.parametrize("name", ["micro", "latent576"])
def test_pages_go_to_kvfs_and_come_back(name: str) -> None:
    path = oracles.checkpoint(name)

    async def main() -> None:
        async with whole(storage=1, replicas=1) as cluster, cluster.client() as client:
            cache = AsyncKVCache(client)
            prompt = oracles.tokens(300, DeepseekV3.load(path).config.vocabulary)
            expected = oracles.greedy(path, prompt, 12)
            for turn, disk in (("cold", 0), ("warm", 256)):
                config = EngineConfig(model=str(path), device="cuda")

                async def make(pool: PagePool, config: EngineConfig = config) -> KvStore:
                    return await KvStore.open(cache, model_digest(path), ROPE_LAYOUT, pool, config, SystemClock())

                async with serving(path, make_store=make, device="cuda") as served:
                    assert await served.answers([ask(turn, prompt, 12)]) == [expected]
                    assert served.events[turn][0].disk_tokens == disk
                    await _written(served.engine)

    run(main, 200)


async def _written(engine: Engine) -> None:
    store: Any = engine._store
    await store.idle()
