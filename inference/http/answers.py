"""Requests through the backend, and their tokens as text: what both kinds of completion are made of.

Owns `ServedModel`, `Answers`, `Piece` and `Usage`. Invariants: one engine request for each choice, under an id of ours that nobody can guess; a
choice's pieces come in order, the last one with its finish; whoever stops listening cancels all choices; a stop string ends its choice and cancels
what would still be generated. It must never let the backend's events pile up: a reader that waits makes the backend wait.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial

import trio

from kvfs.common.boundary.clock import Clock
from kvfs.common.boundary.random import Random
from kvfs.common.errors import KvfsError
from kvfs.inference.http.backend import Backend
from kvfs.inference.http.calls import Call
from kvfs.inference.http.metrics import Metrics
from kvfs.inference.http.refusals import Refusal
from kvfs.inference.http.stops import StopStrings
from kvfs.inference.http.tokenizer import Tokenizer
from kvfs.inference.request import SEED_MAX, Finish, Request, TokenEvent

ENCODE_HERE_CHARACTERS = 4096
"""A longer text is encoded in a thread: it would hold up everyone's stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    name: str
    tokenizer: Tokenizer
    context_tokens: int
    """Prompt and answer together."""
    vocabulary: int
    """Token ids are below it."""
    created_s: int
    """Since 1970."""


@dataclass(slots=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def describe(self) -> dict[str, object]:
        """OpenAI's fields, and DeepSeek's for the cache."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": 0},
            "prompt_cache_hit_tokens": self.cached_tokens,
            "prompt_cache_miss_tokens": self.prompt_tokens - self.cached_tokens,
        }


@dataclass(frozen=True, slots=True)
class Piece:
    choice: int
    text: str
    finish: str | None = None


class Answers:
    """All choices of one call."""

    def __init__(self, model: ServedModel, backend: Backend, metrics: Metrics, clock: Clock) -> None:
        self.usage = Usage()
        self._model, self._backend, self._metrics, self._clock = model, backend, metrics, clock
        self._began_s = clock.monotonic()

    @asynccontextmanager
    async def pieces(self, requests: Sequence[Request], call: Call) -> AsyncIterator[trio.MemoryReceiveChannel[Piece | KvfsError | Refusal]]:
        """Pieces of all choices as they come, the k-th request's under number k; an error is the last thing that comes. The prompt counts once for
        all n choices of it."""
        self.usage.prompt_tokens = sum(len(request.prompt) for request in requests[:: call.n])
        send, receive = trio.open_memory_channel[Piece | KvfsError | Refusal](0)
        async with trio.open_nursery() as nursery:
            with send:
                for choice, request in enumerate(requests):
                    nursery.start_soon(self._one, choice, request, call, send.clone())
            with receive:
                yield receive
            nursery.cancel_scope.cancel()

    async def _one(self, choice: int, request: Request, call: Call, out: trio.MemorySendChannel[Piece | KvfsError | Refusal]) -> None:
        with out:  # closed without a checkpoint, where the end of what a reader sees could cancel an exception on its way
            try:
                await self._generate(choice, request, call, out)
            except (KvfsError, Refusal) as error:
                await out.send(error)

    async def _generate(self, choice: int, request: Request, call: Call, out: trio.MemorySendChannel[Piece | KvfsError | Refusal]) -> None:
        detokenizer = self._model.tokenizer.detokenizer(skip_special_tokens=call.skip_special_tokens)
        stops = StopStrings(call.stops)
        last_s = None
        async with aclosing(self._backend.generate(request)) as events:
            async for event in events:
                now_s = self._clock.monotonic()
                text = ""
                if last_s is None:
                    self._begins(choice, request, call, event, now_s)
                elif event.token is not None:
                    self._metrics.between_tokens_s.observe(now_s - last_s)
                if event.token is not None:
                    self.usage.completion_tokens += 1
                    self._metrics.generated_tokens.inc()
                    if event.finish is not Finish.STOP:  # what ended the answer is no part of it
                        text = stops.feed(detokenizer.feed(event.token))
                finish = event.finish
                if finish in (Finish.STOP, Finish.LENGTH):
                    text += stops.feed(detokenizer.finish()) + stops.finish()
                if stops.found:
                    finish = Finish.STOP
                if finish in (Finish.CANCELLED, Finish.ERROR):
                    raise _broken(event)
                if text or finish or last_s is None:  # the first one always: that the answer has begun is news
                    await out.send(Piece(choice, text, finish))
                if finish:
                    self._metrics.answer_ends(finish, now_s - self._began_s)
                    return
                last_s = now_s
        raise Refusal(500, "the answer ended without saying why: a fault of the server")

    def _begins(self, choice: int, request: Request, call: Call, event: TokenEvent, now_s: float) -> None:
        if event.finish not in (Finish.CANCELLED, Finish.ERROR):
            self._metrics.answer_begins(len(request.prompt), event.cached_tokens, event.disk_tokens, now_s - self._began_s)
        if choice % call.n == 0:
            self.usage.cached_tokens += event.cached_tokens


def _broken(event: TokenEvent) -> Refusal:
    if event.finish is Finish.CANCELLED:
        return Refusal(503, event.message or "the request was cancelled by the server, which may be stopping")
    return Refusal(500, event.message or "the answer could not be computed")


async def encode(model: ServedModel, text: str, *, add_special_tokens: bool) -> list[int]:
    run = partial(model.tokenizer.encode, text, add_special_tokens=add_special_tokens)
    return await trio.to_thread.run_sync(run) if len(text) > ENCODE_HERE_CHARACTERS else run()


def answer_tokens(model: ServedModel, prompt_tokens: int, call: Call, default: int | None, param: str) -> int:
    """How many tokens an answer may have. A `Refusal` where prompt and answer are longer than the model's context. `default`: without max_tokens;
    None: what there is room for."""
    room = model.context_tokens - prompt_tokens
    if (call.max_tokens is not None and call.max_tokens > room) or room < 1:
        asked = f", and max_tokens asks for {call.max_tokens} more" if call.max_tokens is not None else ", and no token of an answer fits after it"
        message = f"This model's maximum context length is {model.context_tokens} tokens. The {param} has {prompt_tokens}{asked}."
        raise Refusal(400, message, param=param, code="context_length_exceeded")
    return call.max_tokens or min(room, default or room)


def engine_requests(prompt: Sequence[int], call: Call, max_tokens: int, identity: str, random: Random) -> list[Request]:
    """One for each of the n choices; with a seed, choice i has the seed + i."""
    seed = random.randrange(SEED_MAX) if call.seed is None else call.seed
    return [
        Request(id=f"{identity}-{choice}", prompt=tuple(prompt), sampling=call.sampling(max_tokens, (seed + choice) & SEED_MAX), salt=call.salt)
        for choice in range(call.n)
    ]
