"""The router over real workers in this process: tokens, refusals, cancellation, drain."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

import pytest
import trio
from tests.inference import oracles
from tests.inference.routing import answer, tokens, workers
from tests.inference.serving import ask

from kvfs.common.errors import InternalError, InvalidArgument, KvfsError, Overloaded, Unreachable
from kvfs.inference.request import Finish, Request, TokenEvent
from kvfs.inference.workers import sessions
from kvfs.inference.workers.remote import RemoteWorker
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


def test_a_burst_is_spread_although_one_worker_has_the_prefix() -> None:
    """All of it comes before the worker can tell how much waits."""

    async def main() -> None:
        shared = oracles.tokens(256, seed=3)
        async with workers(micro(), ["both", "both"], cache_pages=200) as (router, _):
            await answer(router, ask("first", shared, 1))
            places: list[str] = []
            choose = router._choose

            def noted(*arguments: Any) -> Any:
                choice = choose(*arguments)
                places.append(choice[0].name if choice else "")
                return choice

            router._choose = noted  # type: ignore[method-assign]
            async with trio.open_nursery() as nursery:
                for number in range(20):
                    nursery.start_soon(answer, router, ask(f"r{number}", shared + oracles.tokens(150, seed=number + 10), 2))
            assert 6 <= places.count("w1") <= 14 and len(places) == 20, places

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


def test_an_idle_router_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "SILENT_S", 1.5)

    async def main() -> None:
        async with workers(micro(), ["both"]) as (router, _):
            await answer(router, ask("first", PROMPT, 5))
            session = router.workers["w1"]._session
            await trio.sleep(4)
            assert tokens(await answer(router, ask("second", PROMPT, 12))) == oracles.greedy(micro(), PROMPT, 12)
            assert router.workers["w1"]._session == session

    trio.run(main)


@pytest.mark.parametrize("under_way", [False, True])
def test_an_answer_is_whole_although_the_worker_forgot_the_session(under_way: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with workers(micro(), ["both"]) as (router, _):
            await answer(router, ask("first", PROMPT, 5))
            found: list[TokenEvent] = []
            if under_way:
                async with aclosing(router.generate(ask("r", PROMPT, 300))) as events:
                    async for event in events:
                        found.append(event)
                        if event.index == 5:
                            monkeypatch.setattr(sessions, "SILENT_S", -1.0)
                        if event.index == 60:
                            monkeypatch.setattr(sessions, "SILENT_S", 30.0)
            else:
                monkeypatch.setattr(sessions, "SILENT_S", -1.0)
                await trio.sleep(1.5)
                monkeypatch.setattr(sessions, "SILENT_S", 30.0)
                found += await answer(router, ask("r", PROMPT, 300))
            assert tokens(found) == oracles.greedy(micro(), PROMPT, 300)
            with trio.fail_after(10):  # what the worker still computes for the forgotten session ends
                while any(status.running for status in await router.status()):
                    await trio.sleep(0.1)

    trio.run(main)


def test_a_request_is_given_up_after_three_losses_without_a_token_between(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Request] = []

    def losing(tokens_first: int) -> Callable[[RemoteWorker, Request, int], Awaitable[trio.MemoryReceiveChannel[tuple[TokenEvent, bool]]]]:
        async def submit(worker: RemoteWorker, request: Request, new_tokens: int) -> trio.MemoryReceiveChannel[tuple[TokenEvent, bool]]:
            asked.append(request)
            send, receive = trio.open_memory_channel[tuple[TokenEvent, bool]](10)
            for index in range(len(request.answered), len(request.answered) + tokens_first):
                finish = Finish.LENGTH if index + 1 == request.sampling.max_tokens else None
                send.send_nowait((TokenEvent(request=request.id, index=index, token=7, finish=finish), finish is not None))
            send.close()  # the worker is lost
            return receive

        return submit

    async def main() -> None:
        async with workers(micro(), ["both"]) as (router, _):
            monkeypatch.setattr(RemoteWorker, "submit", losing(0))
            with pytest.raises(InternalError, match="3 workers were lost"):
                await answer(router, ask("deadly", PROMPT, 5))
            assert len(asked) == 3
            monkeypatch.setattr(RemoteWorker, "submit", losing(1))
            assert tokens(await answer(router, ask("unlucky", PROMPT, 8))) == [7] * 8, "it gets on: it is not what kills them"

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
