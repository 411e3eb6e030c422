"""The router over real workers in this process: tokens, refusals, cancellation, drain."""

from __future__ import annotations

from contextlib import aclosing
from functools import partial

import pytest
import trio
from tests.inference import oracles
from tests.inference.routing import answer, tokens, workers
from tests.inference.serving import ask

from kvfs.common.errors import InvalidArgument, KvfsError, Overloaded, Unreachable
from kvfs.inference.request import Finish, TokenEvent
from kvfs.inference.workers.router import RouterConfig

micro = partial(oracles.checkpoint, "micro")
PROMPT = oracles.tokens(150)


def test_answers_of_two_workers_are_those_of_transformers() -> None:
    async def main() -> None:
        prompts = [oracles.tokens(60 + 20 * number, seed=number) for number in range(6)]
        found: dict[int, list[TokenEvent]] = {}
        async with workers(micro(), ["both", "both"]) as (router, _):
            async with trio.open_nursery() as nursery:

                async def one(number: int) -> None:
                    found[number] = await answer(router, ask(f"r{number}", prompts[number], 12))

                for number in range(6):
                    nursery.start_soon(one, number)
            for number, prompt in enumerate(prompts):
                assert tokens(found[number]) == oracles.greedy(micro(), prompt, 12)
                assert found[number][-1].finish is Finish.LENGTH
            assert all(worker.requests == 0 for worker in router.workers.values())
            again = await answer(router, ask("again", prompts[5], 3))
            assert again[0].cached_tokens == 128, "the same prompt goes where it is in memory"
            await router.flush()
            assert (await answer(router, ask("flushed", prompts[5], 3)))[0].cached_tokens == 0

    trio.run(main)


def test_a_prompt_handed_over_without_a_store_is_computed_again() -> None:
    async def main() -> None:
        async with workers(micro(), ["prefill", "decode"]) as (router, _):
            assert tokens(await answer(router, ask("r", PROMPT, 12))) == oracles.greedy(micro(), PROMPT, 12)
            status = {worker.name: worker for worker in await router.status()}
            assert (status["w1"].role, status["w2"].role) == ("prefill", "decode")
            assert tokens(await answer(router, ask("one", PROMPT, 1))) == oracles.greedy(micro(), PROMPT, 1)

    trio.run(main)


def test_what_the_workers_refuse_is_told() -> None:
    async def main() -> None:
        async with workers(micro(), ["both"], cache_pages=8, waiting_requests=1, running_requests=1) as (router, _):
            with pytest.raises(InvalidArgument):
                await answer(router, ask("long", oracles.tokens(9 * 64), 5))
            assert router.context == 8 * 64
            outcomes: list[str] = []
            async with trio.open_nursery() as nursery:

                async def one(number: int) -> None:
                    try:
                        await answer(router, ask(f"r{number}", oracles.tokens(100, seed=number), 100))
                        outcomes.append("ok")
                    except KvfsError as error:
                        outcomes.append(type(error).__name__)

                for number in range(8):
                    nursery.start_soon(one, number)
            assert set(outcomes) == {"ok", Overloaded.__name__}

    trio.run(main)


def test_an_answer_that_nobody_reads_on_is_cancelled_at_its_worker() -> None:
    async def main() -> None:
        async with workers(micro(), ["both"]) as (router, _):
            async with aclosing(router.generate(ask("r", PROMPT, 3000))) as events:
                async for event in events:
                    if event.index == 3:
                        break
            with trio.fail_after(10):
                while (await router.status())[0].pages_used or (await router.status())[0].running:
                    await trio.sleep(0.05)

    trio.run(main)


def test_a_drained_worker_ends_what_it_has_and_takes_nothing_new() -> None:
    async def main() -> None:
        async with workers(micro(), ["both", "both"], router=RouterConfig(patience_s=1.0)) as (router, _), trio.open_nursery() as nursery:
            found: list[TokenEvent] = []
            begun = trio.Event()

            async def long() -> None:
                async with aclosing(router.generate(ask("r", PROMPT, 200))) as events:
                    async for event in events:
                        found.append(event)
                        begun.set()

            nursery.start_soon(long)
            await begun.wait()
            (busy,) = [name for name, worker in router.workers.items() if worker.requests]
            await router.drain(busy)
            with trio.fail_after(5):
                while router.workers[busy].serving:
                    await trio.sleep(0.05)
            assert (await answer(router, ask("other", PROMPT, 3)))[0].cached_tokens == 0, "it went to the other one, whatever the first has in memory"
            for name in router.workers:
                await router.drain(name)
            with trio.fail_after(5):
                while any(worker.serving for worker in router.workers.values()):
                    await trio.sleep(0.05)
            with pytest.raises(Unreachable):
                await answer(router, ask("none", PROMPT, 3))
            await router.drain(busy, False)
            with trio.fail_after(5):
                while not router.workers[busy].serving:
                    await trio.sleep(0.05)
            assert tokens(await answer(router, ask("back", PROMPT, 3))) == oracles.greedy(micro(), PROMPT, 3)
            with pytest.raises(InvalidArgument):
                await router.drain("nobody")
        assert tokens(found) == oracles.greedy(micro(), PROMPT, 200)

    trio.run(main)


def test_a_worker_that_stops_mid_answer_loses_nothing() -> None:
    async def main() -> None:
        async with workers(micro(), ["both", "both"]) as (router, scopes):
            found: list[TokenEvent] = []
            async with aclosing(router.generate(ask("r", PROMPT, 150))) as events:
                async for event in events:
                    found.append(event)
                    if event.index == 10:
                        (busy,) = [name for name, worker in router.workers.items() if worker.requests]
                        scopes[int(busy[1:]) - 1].cancel()
            assert tokens(found) == oracles.greedy(micro(), PROMPT, 150)

    trio.run(main)
