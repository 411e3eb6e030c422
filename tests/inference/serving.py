"""An engine that runs while a test asks it: `async with serving(path, ...) as served: await served.answers(requests)`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path

import trio

from kvfs.common.boundary.clock import SystemClock
from kvfs.inference.cache.pool import PagePool
from kvfs.inference.config import EngineConfig
from kvfs.inference.engine.engine import Engine
from kvfs.inference.engine.prefix_store import PrefixStore
from kvfs.inference.model.deepseek import DeepseekV3
from kvfs.inference.request import Request, Sampling, TokenEvent


@cache
def model(path: Path, dtype: str = "fp32", device: str = "cpu") -> DeepseekV3:
    return DeepseekV3.load(path, dtype=dtype, device=device)


def ask(name: str, prompt: Sequence[int], max_tokens: int = 16, *, answered: Sequence[int] = (), salt: bytes = b"", **sampling: object) -> Request:
    """Greedy, and not ended by the end of sequence, unless `sampling` says otherwise."""
    fields = {"temperature": 0.0, "ignore_eos": True, **sampling}
    return Request(id=name, prompt=tuple(prompt), answered=tuple(answered), salt=salt, sampling=Sampling(max_tokens=max_tokens, **fields))  # type: ignore[arg-type]


class Served:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.events: dict[str, list[TokenEvent]] = defaultdict(list)
        self._news = trio.Event()

    def heard(self, events: list[TokenEvent]) -> None:
        for event in events:
            self.events[event.request].append(event)
        self._news.set()
        self._news = trio.Event()

    def tokens(self, name: str) -> list[int]:
        return [event.token for event in self.events[name] if event.token is not None]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Looked at after every batch of events."""
        with trio.fail_after(60):
            while not condition():
                await self._news.wait()

    def ended(self, name: str) -> bool:
        return bool(self.events[name]) and self.events[name][-1].finish is not None

    async def answers(self, requests: Iterable[Request]) -> list[list[int]]:
        """All at once; the tokens of each."""
        asked = list(requests)
        for request in asked:
            self.engine.submit(request)
        await self.until(lambda: all(self.ended(request.id) for request in asked))
        return [self.tokens(request.id) for request in asked]


@asynccontextmanager
async def serving(
    path: Path, *, make_store: Callable[[PagePool], Awaitable[PrefixStore]] | None = None, the_model: DeepseekV3 | None = None, **config: object
) -> AsyncIterator[Served]:
    settings = EngineConfig(**{"cache_pages": 64, **config})  # type: ignore[arg-type]
    computes = the_model or model(path, settings.dtype, settings.device)
    pool = PagePool(computes.page_format(settings.cache_dtype), settings.cache_pages, device=settings.device, compute=computes.dtype)
    served: Served
    engine = Engine(settings, computes, pool, SystemClock(), lambda events: served.heard(events), await make_store(pool) if make_store else None)
    served = Served(engine)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.run)
            yield served
            nursery.cancel_scope.cancel()
    finally:
        pool.close()
