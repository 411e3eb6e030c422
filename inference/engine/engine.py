"""The loop around one model: requests in, tokens out.

Owns `Engine`. Invariants: the scheduler and the pages belong to the trio thread; a step runs in a worker thread, one at a time, while requests come
and go; an error of one request, of the model or of the store never ends the loop; token events go out in batches, one after each step, in order.
It must never wait for the store: what it reads and writes runs beside the steps.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Never, TypeVar

import trio

from kvfs.common.boundary.clock import Clock
from kvfs.inference.cache.pages import Pages
from kvfs.inference.cache.pool import PagePool
from kvfs.inference.config import EngineConfig
from kvfs.inference.engine.prefix_store import PrefixStore, Reading
from kvfs.inference.engine.runner import Runner
from kvfs.inference.engine.scheduler import Limits, Scheduler
from kvfs.inference.engine.sequence import Fetch, Save, Sequence, Work
from kvfs.inference.engine.stats import EngineLoad, EngineStats
from kvfs.inference.model.deepseek import DeepseekV3
from kvfs.inference.request import Request, TokenEvent

log = logging.getLogger("kvfs.inference.engine")


T = TypeVar("T")


class Engine:
    def __init__(
        self,
        config: EngineConfig,
        model: DeepseekV3,
        pool: PagePool,
        clock: Clock,
        on_events: Callable[[list[TokenEvent]], None],
        store: PrefixStore | None = None,
    ) -> None:
        """`on_events` is called in the trio thread and must not wait."""
        self._clock = clock
        self._store = store
        self._on_events = on_events
        self._runner = Runner(model, pool, clock, config.threads)
        pages = Pages(pool.pages)
        pages.on_freed = lambda: self._woken.set()
        limits = Limits(
            context=model.config.context,
            vocabulary=model.config.vocabulary,
            stop_tokens=frozenset(model.config.eos),
            step_tokens=config.step_tokens,
            running=config.running_requests,
            waiting=config.waiting_requests,
            store=store is not None,
        )
        self._scheduler = Scheduler(limits, pages, store.worth if store is not None else int)
        self._readings: dict[Sequence, Reading] = {}
        """Of sequences that may take part in steps before all their layers are there."""
        self._woken = trio.Event()
        self._thread = trio.CapacityLimiter(1)
        self._nursery: trio.Nursery | None = None

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer at most: the model's or, if that is less, what fits into the pages."""
        return self._scheduler.context

    @property
    def stats(self) -> EngineStats:
        return self._scheduler.stats

    def load(self) -> EngineLoad:
        return self._scheduler.load()

    def submit(self, request: Request) -> None:
        """Its tokens come as events; one whose id is here already is joined. InvalidArgument: it can never be answered; Overloaded: not now."""
        self._scheduler.submit(request)
        self._changed()

    def cancel(self, request_id: str) -> None:
        """Its answer ends with Finish.CANCELLED: during this call, or after the step under way. Nothing if it has ended."""
        self._scheduler.cancel(request_id)
        self._changed()

    def flush(self) -> None:
        """Nothing computed so far is found in memory any more; what is in the store stays."""
        self._scheduler.flush()

    async def run(self) -> Never:
        """Until it is cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            if self._store is not None:
                nursery.start_soon(self._store.run)
            while True:
                self._woken = trio.Event()
                works = self._scheduler.step()
                self._act()
                if works:
                    await self._step(works)
                    self._act()
                else:
                    await self._woken.wait()

    def _changed(self) -> None:
        """Something happened: what follows from it begins at once, even during a step."""
        self._act()
        self._woken.set()

    async def _step(self, works: list[Work]) -> None:
        began = self._clock.monotonic()
        readings = {work.sequence: self._readings[work.sequence] for work in works if work.sequence.fetch is not None}
        try:
            outcome = await trio.to_thread.run_sync(self._runner.run, works, readings, limiter=self._thread)
        except Exception:  # torch and the model raise whatever they like
            log.exception("a step with %d requests failed", len(works))
            self._scheduler.failed(works, "the model failed to compute this request: its worker's log says why")
            return
        if outcome.postponed:
            self._scheduler.postponed(works)
            return
        self._scheduler.done(works, outcome.tokens, outcome.broken)
        seconds = self._clock.monotonic() - began
        self.stats.steps += 1
        self.stats.step_seconds += seconds
        if self._store is not None:
            self._store.computed(sum(len(work.tokens) for work in works), seconds - outcome.waited_s)

    def _act(self) -> None:
        """Does what the scheduler wants done."""
        if (nursery := self._nursery) is None:
            return  # the loop will, when it runs
        effects = self._scheduler.drain()
        if effects.events:
            self._on_events(effects.events)
        for sequence in effects.lookups:
            nursery.start_soon(self._look_up, sequence)
        for fetch in effects.fetches:
            assert self._store is not None
            reading = self._store.read(fetch.keys, fetch.pages, fetch.parent, fetch.tail)
            self._readings[fetch.sequence] = reading
            nursery.start_soon(self._fetch, fetch, reading)
        for write in effects.writes:
            assert self._store is not None
            self._store.offer(write.keys, write.pages, write.before, partial(self._scheduler.written, write))
        for save in effects.saves:
            nursery.start_soon(self._save, save)

    async def _look_up(self, sequence: Sequence) -> None:
        assert self._store is not None
        asked = partial(self._store.match, sequence.reusable_keys(), sequence.parent(sequence.reusable), sequence.tail)
        pages, tail = await _or("look up a prefix", asked, (0, False))
        self._scheduler.looked_up(sequence, pages, tail)
        self._changed()

    async def _fetch(self, fetch: Fetch, reading: Reading) -> None:
        def arriving() -> None:
            self._scheduler.arriving(fetch)
            self._changed()

        ok = await _or("read a prefix", partial(reading.run, arriving), False)
        if self._readings.get(fetch.sequence) is reading:
            del self._readings[fetch.sequence]
        self._scheduler.fetched(fetch, ok)
        self._changed()

    async def _save(self, save: Save) -> None:
        assert self._store is not None
        await _or("store a prefix", partial(self._store.save, save.keys, save.pages, save.parent, save.tail), None)
        self._scheduler.saved(save)
        self._changed()


async def _or(what: str, call: Callable[[], Awaitable[T]], otherwise: T) -> T:
    """A store doesn't raise. If it does all the same, its mistake costs some computing, and no answer."""
    try:
        return await call()
    except Exception:
        log.exception("the store could not %s", what)
        return otherwise
