"""Requests sent to an OpenAI-compatible server, and when their tokens came: the client's side of `kvfs bench serve` and `kvfs demo-inference`.

Owns `Ask`, `Answered`, the driver and the reading of /metrics. Invariants: at most so many requests are under way; a turn of a conversation is
never sent before the one before it was answered; in an open loop times count from when a request was due, so that a slow server cannot hide what
it made others wait; a request that fails is counted and never repeated.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import trio
from prometheus_client.parser import text_string_to_metric_families

from kvfs.common.errors import ConnectionLost, Unreachable

ANSWER_TIMEOUT_S = 600.0
"""Without a token."""
CONNECT_TIMEOUT_S = 10.0
SETTLE_S = 10.0
SETTLE_POLL_S = 0.5
ERROR_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Ask:
    arrival_s: float
    tokens: Sequence[int]
    answer_tokens: int
    after: int | None = None
    """Place of the request that must have been answered before: the conversation's last turn."""


@dataclass(slots=True)
class Answered:
    due_s: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    error: str = ""

    @property
    def to_first_s(self) -> float:
        return self.first_s - self.due_s

    @property
    def per_token_s(self) -> float | None:
        """Of those after the first; None where there are none."""
        return (self.last_s - self.first_s) / (self.answer_tokens - 1) if self.answer_tokens > 1 else None


Progress = Callable[[Answered], None]


class Server:
    """An HTTP server that speaks OpenAI's API, by the URL under which its /v1 lies."""

    def __init__(self, url: str, api_key: str = "") -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        self._http = httpx.AsyncClient(base_url=self.url, headers=headers, timeout=timeout, limits=httpx.Limits(max_connections=None))

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(self, *_: object) -> None:
        with trio.CancelScope(shield=True):
            await self._http.aclose()

    async def get(self, path: str) -> httpx.Response:
        try:
            return await self._http.get(path)
        except httpx.HTTPError as error:
            raise Unreachable(f"no server answers at {self.url}: {error or type(error).__name__}") from None

    async def model(self) -> dict[str, Any]:
        """The one that it serves: `id`, and `max_model_len` where it says so."""
        answer = await self.get("/v1/models")
        try:
            listed: dict[str, Any] = answer.json()["data"][0]
        except (ValueError, KeyError, IndexError, TypeError):
            raise Unreachable(f"{self.url} does not speak OpenAI's API: GET /v1/models gave {answer.status_code} {answer.text[:200]}") from None
        return listed

    async def vocabulary(self) -> int | None:
        """Where the server tells it."""
        answer = await self.get("/server_info")
        try:
            return int(answer.json()["vocabulary"])
        except (ValueError, KeyError, TypeError):
            return None

    async def counters(self) -> dict[str, float]:
        """All counters of kvfs's, each summed over its labels but for `source`, which is behind a dot; none of another server."""
        answer = await self.get("/metrics")
        found: dict[str, float] = {}
        if answer.status_code == 200 and "kvfs:" in answer.text:
            for family in text_string_to_metric_families(answer.text):
                for sample in family.samples:
                    if sample.name.startswith("kvfs:") and sample.name.endswith("_total"):
                        source = sample.labels.get("source")
                        name = sample.name.removeprefix("kvfs:").removesuffix("_total") + (f".{source}" if source else "")
                        found[name] = found.get(name, 0.0) + sample.value
        return found

    async def settled_counters(self) -> dict[str, float]:
        """Once nothing is written back any more."""
        before = await self.counters()
        with trio.move_on_after(SETTLE_S):
            while True:
                await trio.sleep(SETTLE_POLL_S)
                now = await self.counters()
                if now.get("kv_bytes_written") == before.get("kv_bytes_written"):
                    return now
                before = now
        return before

    async def complete(self, request: Mapping[str, Any], answered: Answered) -> None:
        """Send it to /v1/completions as a stream, and note in `answered` what comes when."""
        body = dict(request) | {"stream": True, "stream_options": {"include_usage": True}}
        try:
            async with self._http.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    answered.error = f"{response.status_code} {(await response.aread()).decode(errors='replace')[:ERROR_CHARACTERS]}"
                    return
                async for line in response.aiter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        self._note(json.loads(line[6:]), answered)
        except (httpx.HTTPError, ValueError) as error:
            answered.error = f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS]

    @staticmethod
    def _note(chunk: dict[str, Any], answered: Answered) -> None:
        if "error" in chunk:
            answered.error = str(chunk["error"])[:ERROR_CHARACTERS]
        if chunk.get("choices"):
            answered.last_s = time.perf_counter()
            answered.first_s = answered.first_s or answered.last_s
        usage = chunk.get("usage")
        if usage:
            answered.prompt_tokens = usage["prompt_tokens"]
            answered.answer_tokens = usage["completion_tokens"]
            answered.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


async def drive(
    server: Server, model: str, asks: Sequence[Ask], *, at_once: int, closed_loop: bool, progress: Progress | None = None
) -> list[Answered]:
    """All of them: as they are due, or (closed loop) each as soon as another has ended. ConnectionLost if not one was answered."""
    results = [Answered() for _ in asks]
    ended = [trio.Event() for _ in asks]
    slots = trio.CapacityLimiter(at_once)
    began_s = time.perf_counter()

    async def one(place: int, ask: Ask) -> None:
        answered = results[place]
        if not closed_loop:
            await trio.sleep(max(0.0, began_s + ask.arrival_s - time.perf_counter()))
        if ask.after is not None:
            await ended[ask.after].wait()
        answered.due_s = time.perf_counter()
        async with slots:
            if closed_loop:
                answered.due_s = time.perf_counter()
            request = {"model": model, "prompt": list(ask.tokens), "max_tokens": ask.answer_tokens, "temperature": 0.0, "ignore_eos": True}
            await server.complete(request, answered)
        ended[place].set()
        if progress is not None:
            progress(answered)

    async with trio.open_nursery() as nursery:
        for place, ask in enumerate(asks):
            nursery.start_soon(one, place, ask)
    failed = [answered for answered in results if answered.error]
    if failed and len(failed) == len(results):
        raise ConnectionLost(f"not one of {len(results)} requests was answered; the first said: {failed[0].error}")
    return results
