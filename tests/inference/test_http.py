"""OpenAI's client against the whole stack: HTTP, router, workers, engine, and kvfs below; texts are those of transformers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cache, partial
from typing import Any

import httpx
import openai
import pytest
import trio
from tests.inference import oracles
from tests.inference.routing import workers
from tests.unit.client.fakes import run
from tests.unit.client.whole import whole

from kvfs.common.boundary.world import Boundaries
from kvfs.inference.http.answers import ServedModel
from kvfs.inference.http.app import make_app
from kvfs.inference.http.config import HttpConfig
from kvfs.inference.http.server import serve
from kvfs.inference.http.tokenizer import Tokenizer
from kvfs.inference.workers.router import Router

micro = partial(oracles.checkpoint, "micro")
VOCABULARY = 512
STORY = "The chain has a head, a middle and a tail. " * 12
MESSAGES: list[Any] = [{"role": "system", "content": STORY}, {"role": "user", "content": "Who acknowledges?"}]


@cache
def theirs() -> Any:
    """transformers' own tokenizer of the checkpoint."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(micro())


def expected(prompt: Sequence[int], count: int) -> str:
    """What transformers says next."""
    return str(theirs().decode(oracles.greedy(micro(), list(prompt), count), skip_special_tokens=True))


def expected_chat(messages: list[Any], count: int) -> str:
    text = theirs().apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return expected(theirs()(text, add_special_tokens=False)["input_ids"], count)


class Api:
    """A server and a client of it; calls run in threads."""

    def __init__(self, url: str, router: Router) -> None:
        self.url, self.router = url, router
        self.client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=60)

    async def complete(self, **fields: Any) -> Any:
        return await self._call(self.client.completions.create, fields)

    async def chat(self, **fields: Any) -> Any:
        return await self._call(self.client.chat.completions.create, fields)

    @staticmethod
    async def _call(method: Callable[..., Any], fields: dict[str, Any]) -> Any:
        """Greedy; a stream comes as the list of its chunks."""
        greedy = {"model": "micro", "temperature": 0, "extra_body": {"ignore_eos": True}} | fields
        return await trio.to_thread.run_sync(lambda: list(method(**greedy)) if fields.get("stream") else method(**greedy))

    async def idle(self) -> None:
        with trio.fail_after(10):
            while any(worker.running or worker.waiting or worker.pages_used for worker in await self.router.status()):
                await trio.sleep(0.05)


@asynccontextmanager
async def serving(roles: Sequence[str], *, cluster: str = "", **settings: Any) -> AsyncIterator[Api]:
    async with workers(micro(), roles, cluster=cluster, **settings) as (router, _), trio.open_nursery() as nursery:
        model = ServedModel(
            name="micro", tokenizer=Tokenizer.load(micro()), context_tokens=router.context, vocabulary=VOCABULARY, created_s=1_700_000_000
        )
        config = HttpConfig(port=0, shutdown_s=0.1)
        url = await nursery.start(partial(serve, make_app(model, router, config, Boundaries()), config))
        yield Api(url, router)
        nursery.cancel_scope.cancel()


def served(test: Callable[[Api], Awaitable[None]], roles: Sequence[str] = ("both",), **settings: Any) -> None:
    async def main() -> None:
        async with serving(roles, **settings) as api:
            await test(api)

    run(main, 100)


def test_texts_are_those_of_transformers_and_a_second_time_the_prompt_is_cached() -> None:
    async def test(api: Api) -> None:
        prompt = list(theirs()(STORY, add_special_tokens=False)["input_ids"])
        for hits in (0, (len(prompt) - 1) // 64 * 64):
            made = await api.complete(prompt=STORY, max_tokens=24)
            assert (made.choices[0].text, made.choices[0].finish_reason) == (expected(prompt, 24), "length")
            assert made.usage.prompt_tokens_details.cached_tokens == made.usage.prompt_cache_hit_tokens == hits
            assert made.usage.prompt_cache_miss_tokens == len(prompt) - hits and made.usage.completion_tokens == 24
        same = await api.complete(prompt=[prompt] * 2, max_tokens=24)
        assert [choice.text for choice in same.choices] == [expected(prompt, 24)] * 2

    served(test)


def test_conversations_stream_and_their_turns_find_the_one_before() -> None:
    async def test(api: Api) -> None:
        whole_answer = await api.chat(messages=MESSAGES, max_tokens=20)
        answer = whole_answer.choices[0].message.content
        assert answer == expected_chat(MESSAGES, 20)
        chunks = await api.chat(messages=MESSAGES, max_tokens=20, stream=True, stream_options={"include_usage": True})
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == answer
        assert chunks[-1].usage.completion_tokens == 20
        following = [*MESSAGES, {"role": "assistant", "content": answer}, {"role": "user", "content": "And then?"}]
        second = await api.chat(messages=following, max_tokens=20)
        assert second.choices[0].message.content == expected_chat(following, 20)
        assert second.usage.prompt_cache_hit_tokens >= chunks[-1].usage.prompt_tokens // 64 * 64

    served(test)


def test_a_seed_says_what_is_drawn_whatever_else_is_computed() -> None:
    async def test(api: Api) -> None:
        async def drawn(seed: int | None) -> str:
            made = await api.complete(prompt="Once", max_tokens=12, temperature=1.0, top_p=0.95, seed=seed)
            return str(made.choices[0].text)

        alone = await drawn(5)
        together: list[str] = []
        async with trio.open_nursery() as nursery:

            async def one() -> None:
                together.append(await drawn(5))

            for _ in range(4):
                nursery.start_soon(one)
        assert together == [alone] * 4 and await drawn(6) != alone
        assert await drawn(None) != await drawn(None)
        pair = await api.complete(prompt="Once", max_tokens=12, temperature=1.0, top_p=0.95, seed=5, n=2)
        assert [choice.text for choice in pair.choices] == [alone, await drawn(6)]

    served(test)


def test_what_nobody_waits_for_is_not_computed() -> None:
    """A stop string, and a client that hangs up."""

    async def test(api: Api) -> None:
        text = expected(theirs()("Once", add_special_tokens=False)["input_ids"], 40)
        stop = text[10:14]
        made = await api.complete(prompt="Once", max_tokens=3000, stop=[stop])
        assert (made.choices[0].text, made.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
        await api.idle()
        assert made.usage.completion_tokens <= 40

        def hang_up() -> None:
            request = {"prompt": "Once", "max_tokens": 3000, "stream": True, "ignore_eos": True}
            with httpx.stream("POST", api.url + "/v1/completions", json=request) as response:
                next(response.iter_text())

        await trio.to_thread.run_sync(hang_up)
        await api.idle()

    served(test)


def test_more_than_the_workers_take_is_refused() -> None:
    async def test(api: Api) -> None:
        refused: list[int] = []
        async with trio.open_nursery() as nursery:

            async def one(number: int) -> None:
                try:
                    await api.complete(prompt=f"{number} {STORY}", max_tokens=60)
                except openai.RateLimitError as error:
                    refused.append(error.status_code)

            for number in range(8):
                nursery.start_soon(one, number)
        assert set(refused) == {429} and len(refused) < 8
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            await api.complete(prompt=[5] * 2000, max_tokens=1)

    served(test, cache_pages=16, waiting_requests=1, running_requests=1)


def test_a_prompt_is_handed_from_worker_to_worker_and_is_there_after_a_restart() -> None:
    async def main() -> None:
        async with whole(storage=1, replicas=1) as cluster:
            spec = ",".join(cluster.address.managers)
            tokens = (await cold(spec)).usage.prompt_tokens
            async with serving(("prefill", "decode"), cluster=spec) as api:  # new workers
                made = await api.chat(messages=MESSAGES, max_tokens=20)
                assert made.choices[0].message.content == expected_chat(MESSAGES, 20)
                assert made.usage.prompt_cache_hit_tokens == (tokens - 1) // 64 * 64
                await api.idle()
                await trio.sleep(0.5)  # statuses are fetched three times a second
                page = (await trio.to_thread.run_sync(httpx.get, api.url + "/metrics")).text
                assert f'kvfs:prompt_tokens_cached_by_source_total{{model_name="micro",source="disk"}} {tokens // 64 * 64:.1f}' in page
                read = [line for line in page.splitlines() if line.startswith("kvfs:kv_bytes_read_total")]
                assert len(read) == 2 and all(float(line.split()[-1]) > 0 for line in read), "the decode worker reads what it was handed over"

    async def cold(spec: str) -> Any:
        async with serving(("prefill", "decode"), cluster=spec) as api:
            made = await api.chat(messages=MESSAGES, max_tokens=20)
            assert made.choices[0].message.content == expected_chat(MESSAGES, 20)
            assert made.usage.prompt_cache_hit_tokens == 0
            return made

    run(main, 100)
