"""Token for token what transformers says, however the engine comes to it: in chunks, from pages in memory, preempted, beside others, cancelled."""

from __future__ import annotations

from functools import partial

import pytest
import trio
from tests.inference import oracles
from tests.inference.serving import ask, serving

from kvfs.inference.request import Finish

micro = partial(oracles.checkpoint, "micro")


def conversation(number: int, own: int) -> list[int]:
    """Prompts with 150 tokens in common."""
    return oracles.tokens(150, seed=99) + oracles.tokens(own, seed=number)


def test_one_request_without_any_cache() -> None:
    async def main() -> None:
        prompt = oracles.tokens(200)
        async with serving(micro()) as served:
            assert await served.answers([ask("a", prompt, 32)]) == [oracles.greedy(micro(), prompt, 32)]
            last = served.events["a"][-1]
            assert (last.finish, last.index, last.cached_tokens) == (Finish.LENGTH, 31, 0)

    trio.run(main)


def test_prefixes_in_memory_change_no_token() -> None:
    async def main() -> None:
        async with serving(micro()) as served:
            for name, prompt, cached in (
                ("cold", conversation(1, 50), 0),
                ("again", conversation(1, 50), 192),
                ("other end", conversation(2, 30), 128),
                ("next turn", conversation(1, 50) + oracles.greedy(micro(), conversation(1, 50), 20) + oracles.tokens(9), 192),
            ):
                assert await served.answers([ask(name, prompt, 20)]) == [oracles.greedy(micro(), prompt, 20)]
                assert served.events[name][0].cached_tokens == cached
            served.engine.flush()
            await served.answers([ask("flushed", conversation(1, 50), 2)])
            assert served.events["flushed"][0].cached_tokens == 0

    trio.run(main)


@pytest.mark.parametrize(("step_tokens", "pages"), [(512, 64), (9, 64), (64, 9)])
def test_many_requests_with_shared_prefixes_in_chunks_and_short_of_pages(step_tokens: int, pages: int) -> None:
    prompts = [conversation(number, 5 + 11 * number) for number in range(8)]

    async def main() -> None:
        async with serving(micro(), step_tokens=step_tokens, cache_pages=pages, running_requests=8) as served:
            found = await served.answers(ask(str(number), prompt, 20) for number, prompt in enumerate(prompts))
            assert found == [oracles.greedy(micro(), prompt, 20) for prompt in prompts]
            stats = served.engine.stats
            assert stats.computed_tokens < sum(map(len, prompts)) + 8 * 20, "something was shared"
            assert served.engine.load().pages_used == 0

    trio.run(main)


def test_preempted_and_computed_anew() -> None:
    prompts = [oracles.tokens(60, seed=seed) for seed in (1, 2)]

    async def main() -> None:
        async with serving(micro(), cache_pages=4) as served:
            found = await served.answers(ask(str(number), prompt, 80) for number, prompt in enumerate(prompts))
            assert found == [oracles.greedy(micro(), prompt, 80) for prompt in prompts]
            assert served.engine.stats.preemptions >= 1

    trio.run(main)


@pytest.mark.parametrize(("dtype", "cache_dtype"), [("fp32", "bf16"), ("fp32", "fp8"), ("bf16", "bf16")])
def test_smaller_types_answer_the_same_with_and_without_reuse(dtype: str, cache_dtype: str) -> None:
    """Against their own run, one request after another without reuse: rounding makes other tokens than transformers' fp32."""
    prompts = [conversation(number, 20) for number in range(3)]

    async def main() -> None:
        alone = []
        for prompt in prompts:
            async with serving(micro(), dtype=dtype, cache_dtype=cache_dtype) as served:
                alone += await served.answers([ask("a", prompt, 24)])
        async with serving(micro(), dtype=dtype, cache_dtype=cache_dtype) as served:
            for number, prompt in enumerate(prompts):
                assert await served.answers([ask(str(number), prompt, 24)]) == [alone[number]]
            assert served.engine.stats.memory_hits == 2 * 128

    trio.run(main)


def test_an_answer_goes_on_where_another_engine_stopped() -> None:
    prompt = oracles.tokens(100)
    sampled = {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 11, "repetition_penalty": 1.1}

    async def main() -> None:
        for sampling in ({}, sampled):
            async with serving(micro()) as served:
                whole = (await served.answers([ask("a", prompt, 40, **sampling)]))[0]
                seen = served.engine.stats.generated_tokens
            assert seen == 40
            async with serving(micro(), step_tokens=33) as served:
                rest = await served.answers([ask("a", prompt, 40, answered=whole[:17], **sampling), ask("b", oracles.tokens(30), 9)])
                assert rest[0] == whole[17:] and served.events["a"][0].index == 17

    trio.run(main)


def test_sampling_does_not_depend_on_the_others_in_the_batch() -> None:
    requests = [ask(str(number), conversation(number, 10), 20, temperature=1.0, seed=number, top_p=0.95) for number in range(5)]

    async def main() -> None:
        alone = []
        for request in requests:
            async with serving(micro()) as served:
                alone += await served.answers([request])
        async with serving(micro()) as served:
            assert await served.answers(requests) == alone
        assert len(set(map(tuple, alone))) == 5

    trio.run(main)


def test_one_that_is_cancelled_leaves_the_others_alone() -> None:
    prompts = [conversation(number, 20) for number in range(3)]

    async def main() -> None:
        async with serving(micro()) as served:
            for number, prompt in enumerate(prompts):
                served.engine.submit(ask(str(number), prompt, 30))
            await served.until(lambda: len(served.tokens("1")) >= 5)
            served.engine.cancel("1")
            await served.until(lambda: all(served.ended(name) for name in "012"))
            for name in "02":
                assert served.tokens(name) == oracles.greedy(micro(), prompts[int(name)], 30)
            assert served.events["1"][-1].finish is Finish.CANCELLED and len(served.tokens("1")) < 30
            assert served.tokens("1") == oracles.greedy(micro(), prompts[1], 30)[: len(served.tokens("1"))]
            assert served.engine.load().pages_used == 0

    trio.run(main)


def test_the_end_of_sequence_ends_an_answer() -> None:
    """With a stop token that greedy decoding comes to, and the model's own where it is not ignored."""
    prompt = oracles.tokens(64)
    expected = oracles.greedy(micro(), prompt, 32)
    stop = expected[7]

    async def main() -> None:
        async with serving(micro()) as served:
            assert await served.answers([ask("a", prompt, 32, stop_tokens=(stop,))]) == [expected[: expected.index(stop) + 1]]
            assert served.events["a"][-1].finish is Finish.STOP

    trio.run(main)
