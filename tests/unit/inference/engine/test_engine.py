"""The engine's loop where things go wrong, and its side of a store: a dictionary of pages whose reads a test holds back, layer by layer, or fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import trio
from tests.inference.serving import Served, ask, model, serving

from kvfs.common.errors import InvalidArgument, Overloaded
from kvfs.inference.cache.pool import PagePool
from kvfs.inference.model import sample
from kvfs.inference.model.batch import Batch
from kvfs.inference.request import Finish, Request

_DIRECTORY = TemporaryDirectory(prefix="kvfs-engine-")
LAYERS = 3


@cache
def micro() -> Path:
    path = Path(_DIRECTORY.name)
    sample.make("micro", path)
    return path


def prompt(length: int, seed: int = 1) -> list[int]:
    return torch.randint(2, 512, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


async def alone(request: Request) -> list[int]:
    """What it is answered without any store."""
    async with serving(micro()) as served:
        return (await served.answers([Request(id="alone", prompt=request.prompt, sampling=request.sampling)]))[0]


# --- errors -----------------------------------------------------------------------------------------------------------------------------


class Faulty:
    """The model, but some steps fail: an exception, or logits that are not numbers."""

    def __init__(self) -> None:
        self._model = model(micro())
        self.config, self.device, self.dtype, self.page_format = self._model.config, self._model.device, self._model.dtype, self._model.page_format
        self.failing: str = ""

    def forward(self, batch: Batch, pool: PagePool, before_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        failing, self.failing = self.failing, ""
        if failing == "raise":
            raise RuntimeError("CUDA out of memory")
        logits = self._model.forward(batch, pool, before_layer)
        if failing == "nan":
            logits[0] = torch.nan
        return logits


def test_an_exception_of_the_model_ends_the_requests_of_its_step_and_nothing_else() -> None:
    async def main() -> None:
        faulty = Faulty()
        async with serving(micro(), the_model=faulty, running_requests=2) as served:  # type: ignore[arg-type]
            faulty.failing = "raise"
            await served.answers([ask(name, prompt(20, seed)) for seed, name in enumerate("abc")])
            for name in "ab":
                (event,) = served.events[name]
                assert event.finish is Finish.ERROR and event.message.startswith("the model failed")
                assert "CUDA" not in event.message, "it goes out to clients, who are told nothing of our insides"
            assert served.tokens("c") == await alone(ask("c", prompt(20, 2)))
            faulty.failing = "nan"
            await served.answers([ask(name, prompt(20, seed)) for seed, name in enumerate("de")])
            assert served.events["d"][-1].finish is Finish.ERROR and "not numbers" in served.events["d"][-1].message
            assert served.tokens("e") == await alone(ask("e", prompt(20, 1)))
            assert served.engine.load().pages_used == 0

    trio.run(main)


def test_what_cannot_be_answered_is_refused_and_what_is_too_much_too() -> None:
    async def main() -> None:
        async with serving(micro(), cache_pages=2, waiting_requests=1) as served:
            with pytest.raises(InvalidArgument, match="at most 127"):
                served.engine.submit(ask("long", prompt(128)))
            served.engine.submit(ask("a", prompt(100)))
            with pytest.raises(Overloaded, match="1 requests wait already"):
                served.engine.submit(ask("b", prompt(100)))
            served.engine.submit(ask("a", prompt(100)))
            await served.until(lambda: served.ended("a"))
            assert served.tokens("a") == await alone(ask("a", prompt(100)))

    trio.run(main)


# --- the store --------------------------------------------------------------------------------------------------------------------------


class Shelf:
    """What is stored, for any number of engines."""

    def __init__(self) -> None:
        self.pages: dict[bytes, bytes] = {}
        self.tails: dict[tuple[bytes, tuple[int, ...]], bytes] = {}
        self.readings: list[HeldReading] = []
        self.offered: list[bytes] = []
        self.steps = 0
        self.raising = False
        self.hold = False
        """Readings wait for the test."""

    async def store(self, pool: PagePool) -> ShelfStore:
        return ShelfStore(self, pool)


class HeldReading:
    def __init__(self, pool: PagePool, pages: Sequence[int], content: list[bytes], hold: bool) -> None:
        self._pool, self._pages, self._content = pool, pages, content
        self._layers = [threading.Event() for _ in range(LAYERS)]
        self._ok = True
        self._arrived = [trio.Event() for _ in range(LAYERS)]
        self.waited = 0
        self.raising = False
        if not hold:
            for layer in range(LAYERS):
                self.give(layer)

    def give(self, layer: int, *, ok: bool = True) -> None:
        """From the test: a layer is there, or never will be."""
        size = self._pool.format.layer_bytes
        self._ok = self._ok and ok
        for page, content in zip(self._pages, self._content, strict=True):
            part = slice(layer * size, (layer + 1) * size)
            self._pool.buffer(page)[part] = content[part] if ok else b"\xff" * size
        self._arrived[layer].set()
        self._layers[layer].set()

    async def run(self, arriving: Callable[[], None]) -> bool:
        try:
            for layer, event in enumerate(self._arrived):
                await event.wait()
                if layer == 0 and self._ok:
                    arriving()
            if self.raising:
                raise RuntimeError("planted")
            return self._ok
        finally:
            for layer in self._layers:
                layer.set()

    def wait(self, layer: int, timeout_s: float) -> bool | None:
        self.waited += 1
        return self._ok if self._layers[layer].wait(timeout_s) else None


class ShelfStore:
    def __init__(self, shelf: Shelf, pool: PagePool) -> None:
        self._shelf, self._pool = shelf, pool

    async def run(self) -> None:
        await trio.sleep_forever()

    async def match(self, keys: Sequence[bytes], parent: bytes, tail: Sequence[int]) -> tuple[int, bool]:
        await trio.lowlevel.checkpoint()
        if self._shelf.raising:
            raise RuntimeError("planted")
        found = 0
        while found < len(keys) and keys[found] in self._shelf.pages:
            found += 1
        return found, (parent, tuple(tail)) in self._shelf.tails

    def worth(self, pages: int) -> int:
        return pages

    def read(self, keys: Sequence[bytes], pages: Sequence[int], parent: bytes, tail: Sequence[int]) -> HeldReading:
        content = [self._shelf.pages[key] for key in keys] + ([self._shelf.tails[parent, tuple(tail)]] if tail else [])
        reading = HeldReading(self._pool, pages, content, self._shelf.hold)
        self._shelf.readings.append(reading)
        return reading

    def offer(self, keys: Sequence[bytes], pages: Sequence[int], before: Sequence[bytes], done: Callable[[int], None]) -> None:
        self._shelf.offered += keys
        self._shelf.pages.update((key, bytes(self._pool.buffer(page))) for key, page in zip(keys, pages, strict=True))
        done(len(keys))

    async def save(self, keys: Sequence[bytes], pages: Sequence[int], parent: bytes, tail: Sequence[int]) -> None:
        await trio.lowlevel.checkpoint()
        if self._shelf.raising:
            raise RuntimeError("planted")
        self._shelf.pages.update((key, bytes(self._pool.buffer(page))) for key, page in zip(keys, pages, strict=False))
        if tail:
            self._shelf.tails[parent, tuple(tail)] = bytes(self._pool.buffer(pages[-1]))

    def computed(self, tokens: int, seconds: float) -> None:
        assert tokens > 0 and seconds > 0
        self._shelf.steps += 1


def test_pages_are_offered_when_they_fill_and_read_by_another_engine() -> None:
    shelf, first = Shelf(), ask("a", prompt(150), 60)

    async def main() -> None:
        async with serving(micro(), make_store=shelf.store) as served:
            answer = (await served.answers([first]))[0]
            assert answer == await alone(first)
            assert len(shelf.offered) == len(set(shelf.offered)) == 3, "two of the prompt, and one that was generated"
        second = ask("b", [*first.prompt, *answer, 7, 8, 9], 10)
        async with serving(micro(), make_store=shelf.store) as served:
            assert await served.answers([second]) == [await alone(second)]
            assert (served.events["b"][0].cached_tokens, served.events["b"][0].disk_tokens) == (192, 192)
            stats = served.engine.stats
            assert (stats.disk_queries, stats.disk_hits, stats.memory_hits) == (213, 192, 0)
        assert shelf.steps

    trio.run(main)


async def reading(served: Served, shelf: Shelf) -> HeldReading:
    with trio.fail_after(20):
        while not shelf.readings:
            await trio.sleep(0.001)
    return shelf.readings.pop()


async def filled(request: Request) -> Shelf:
    shelf = Shelf()
    async with serving(micro(), make_store=shelf.store) as served:
        await served.answers([request])
    shelf.hold = True
    return shelf


@pytest.mark.parametrize("failing_layer", [None, 0, 1, 2])
def test_a_prompt_is_computed_while_its_layers_come_and_anew_when_one_does_not(failing_layer: int | None) -> None:
    request = ask("a", prompt(200), 12)

    async def main() -> None:
        shelf = await filled(request)
        async with serving(micro(), make_store=shelf.store) as served:
            served.engine.submit(request)
            held = await reading(served, shelf)
            other = ask("o", prompt(10, 5), 8)
            assert await served.answers([other]) == [await alone(other)], "nobody waits for another one's pages"
            for layer in range(LAYERS):
                assert not served.events["a"]
                held.give(layer, ok=layer != failing_layer)
                await trio.sleep(0.02)
            await served.until(lambda: served.ended("a"))
            assert served.tokens("a") == await alone(request)
            assert served.events["a"][0].disk_tokens == (192 if failing_layer is None else 0)
            assert held.waited or failing_layer == 0
            assert served.engine.stats.failed_fetches == (failing_layer is not None)
            assert served.engine.load().pages_used == 0

    trio.run(main)


def test_layers_that_are_long_in_coming_hold_up_nobody_else() -> None:
    request, other = ask("a", prompt(200), 12), ask("o", prompt(10, 5), 8)

    async def main() -> None:
        shelf = await filled(request)
        async with serving(micro(), make_store=shelf.store) as served:
            served.engine.submit(request)
            held = await reading(served, shelf)
            held.give(0)
            while held.waited < 2:
                await trio.sleep(0.001)
            assert await served.answers([other]) == [await alone(other)]
            assert not served.events["a"]
            for layer in range(1, LAYERS):
                held.give(layer)
            await served.until(lambda: served.ended("a"))
            assert served.tokens("a") == await alone(request) and served.events["a"][0].disk_tokens == 192

    trio.run(main)


def test_a_store_that_raises_costs_no_answer() -> None:
    request = ask("a", prompt(200), 12)

    async def main() -> None:
        shelf = Shelf()
        shelf.raising = True
        async with serving(micro(), make_store=shelf.store) as served:
            assert await served.answers([request]) == [await alone(request)]
            served.engine.submit(Request(id="b", prompt=request.prompt, sampling=request.sampling, hand_over=True))
            await served.until(lambda: bool(served.events["b"]))
            assert served.tokens("b") == served.tokens("a")[:1]
        shelf.raising, shelf.hold = False, True
        async with serving(micro(), make_store=shelf.store) as served:
            served.engine.submit(request)
            held = await reading(served, shelf)
            held.raising = True
            for layer in range(LAYERS):
                held.give(layer)
            await served.until(lambda: served.ended("a"))
            assert served.tokens("a") == await alone(request) and served.events["a"][0].disk_tokens == 0

    trio.run(main)


def test_an_engine_that_is_cancelled_ends_although_a_step_waits_for_layers() -> None:
    request = ask("a", prompt(200), 12)

    async def main() -> None:
        shelf = await filled(request)
        with trio.fail_after(20):
            async with serving(micro(), make_store=shelf.store) as served:
                served.engine.submit(request)
                held = await reading(served, shelf)
                held.give(0)
                while held.waited < 2:
                    await trio.sleep(0.001)

    trio.run(main)


@pytest.mark.parametrize("length", [30, 128, 150])
def test_an_answer_that_is_handed_over_goes_on_elsewhere_with_one_token_to_compute(length: int) -> None:
    whole = ask("a", prompt(length), 12)
    first = Request(id="a", prompt=whole.prompt, sampling=whole.sampling, hand_over=True)

    async def main() -> None:
        shelf = Shelf()
        expected = await alone(whole)
        async with serving(micro(), make_store=shelf.store) as served:
            served.engine.submit(first)
            await served.until(lambda: bool(served.events["a"]))
            (event,) = served.events["a"]
            assert (event.token, event.finish, event.index) == (expected[0], None, 0)
            assert served.engine.load().running == 0 and served.engine.stats.handed_over == 1
        async with serving(micro(), make_store=shelf.store) as served:
            assert await served.answers([ask("a", whole.prompt, 12, answered=expected[:1])]) == [expected[1:]]
            assert served.events["a"][0].disk_tokens == length
            assert served.engine.stats.computed_tokens == 11, "none of the prompt"

    trio.run(main)
