"""Generated request traffic: conversations over shared system prompts, as prefix caches meet them.

Owns the generator and its presets. A request is a whole prompt in tokens: one of a few system prompts, chosen by Zipf's law, then the turns of its
conversation so far, with the answers. Requests arrive as a Poisson process; an arrival goes on with an open conversation (recent ones more likely, by
Zipf's law over how recently they were used) or begins a new one. Invariants: the same parameters give the same requests on every machine and Python;
prompts of one conversation begin with each other, those over one system prompt share exactly that; every other token is fresh. It must never read
clocks or the process's random state.
"""

from __future__ import annotations

import random
from array import array
from bisect import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

from kvfs.common.errors import InvalidArgument
from kvfs.kvcache import keys as hashing
from kvfs.kvcache.replay import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadParams:
    """Ranges are (least, most), each value as likely as any other."""

    seed: int = 1
    requests: int = 1000
    rate_per_s: float = 4.0
    """Mean arrivals a second."""
    systems: int = 20
    """System prompts ..."""
    system_zipf: float = 1.0
    """... the one of rank r with weight 1 / r ** this."""
    system_tokens: tuple[int, int] = (256, 2048)
    turn_tokens: tuple[int, int] = (16, 512)
    """What the user says in a turn."""
    answer_tokens: tuple[int, int] = (32, 512)
    turns_mean: float = 4.0
    """Of a conversation: an arrival begins a new one with a chance of 1 / this."""
    open_conversations: int = 64
    """At most so many go on at a time; beyond it the one that waited longest is over."""
    recency_zipf: float = 1.0
    context_tokens: int = 16_384
    """A conversation is over before its prompt would be longer."""
    vocabulary: int = 129_280
    """Tokens are 0 to this - 1; DeepSeek-V3's."""

    def __post_init__(self) -> None:
        for name in ("requests", "systems", "open_conversations", "vocabulary"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"a workload's {name} is {getattr(self, name)}: at least 1")
        for name in ("system_tokens", "turn_tokens", "answer_tokens"):
            least, most = getattr(self, name)
            if not 1 <= least <= most:
                raise InvalidArgument(f"a workload's {name} is ({least}, {most}): from at least 1 up")
        if self.rate_per_s <= 0 or self.turns_mean < 1 or self.system_zipf < 0 or self.recency_zipf < 0:
            raise InvalidArgument("a workload's rate_per_s is above 0, turns_mean at least 1, and no Zipf exponent negative")
        if self.context_tokens < self.system_tokens[1] + self.turn_tokens[1]:
            raise InvalidArgument(f"a workload's context_tokens is {self.context_tokens}: the longest system prompt and a turn must fit")


PRESETS: dict[str, WorkloadParams] = {
    "chat": WorkloadParams(),
    "agent": WorkloadParams(
        systems=8, system_tokens=(2048, 8192), turn_tokens=(64, 2048), answer_tokens=(16, 256), turns_mean=12.0, context_tokens=65_536
    ),
    "laptop": WorkloadParams(
        requests=250,
        systems=6,
        system_tokens=(192, 640),
        turn_tokens=(16, 160),
        answer_tokens=(32, 192),
        turns_mean=4.0,
        open_conversations=24,
        context_tokens=1536,
    ),
    "deepseek": WorkloadParams(
        requests=2000,
        rate_per_s=8.0,
        systems=40,
        system_tokens=(64, 1024),
        turn_tokens=(64, 1536),
        answer_tokens=(64, 1536),
        turns_mean=2.05,
        context_tokens=32_768,
    ),
}
"""chat: people and assistants; agent: long shared instructions, many turns, short answers; laptop: chat for a cache of a gigabyte; deepseek: tuned to
the day that DeepSeek published, 56.3 % of input tokens in the cache and 0.276 output tokens for each input token (reference/inference.md, 1)."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request."""

    arrival_ms: int
    conversation: int
    turn: int
    """0: the first of its conversation."""
    system: int
    """Rank of its system prompt, 0 the most frequent."""
    tokens: array[int]
    answer: array[int]
    """What the model would say: part of the conversation's next prompt."""


@dataclass(slots=True)
class _Conversation:
    number: int
    system: int
    tokens: array[int]
    turn: int = 0


class _Zipf:
    def __init__(self, count: int, exponent: float) -> None:
        self._sums = list(accumulate((rank + 1) ** -exponent for rank in range(count)))

    def draw(self, chance: random.Random, count: int) -> int:
        """A rank below `count`."""
        return bisect(self._sums, chance.random() * self._sums[count - 1], 0, count - 1)


def preset(name: str, **changes: object) -> WorkloadParams:
    """A preset, with some of its parameters changed."""
    if name not in PRESETS:
        raise InvalidArgument(f"there is no workload {name}; there are {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)  # type: ignore[arg-type]


def scaled(params: WorkloadParams, lengths: float) -> WorkloadParams:
    """All lengths times a factor, at least one token each: for models that compute slowly. What is shared stays shared, but for ends of blocks."""

    def times(length: tuple[int, int]) -> tuple[int, int]:
        return max(1, round(length[0] * lengths)), max(1, round(length[1] * lengths))

    return replace(
        params,
        system_tokens=times(params.system_tokens),
        turn_tokens=times(params.turn_tokens),
        answer_tokens=times(params.answer_tokens),
        context_tokens=max(2, round(params.context_tokens * lengths)),
    )


def generate(params: WorkloadParams) -> Iterator[Prompt]:
    """The requests, in the order of their arrival."""
    chance = random.Random(params.seed)
    systems = [_fresh(chance, params, params.system_tokens) for _ in range(params.systems)]
    by_rank, by_recency = _Zipf(params.systems, params.system_zipf), _Zipf(params.open_conversations, params.recency_zipf)
    going_on: list[_Conversation] = []
    """The most recently used first."""
    arrival_s, conversations = 0.0, 0
    for _ in range(params.requests):
        arrival_s += chance.expovariate(params.rate_per_s)
        said = _fresh(chance, params, params.turn_tokens)
        if going_on and chance.random() >= 1 / params.turns_mean:
            conversation = going_on.pop(by_recency.draw(chance, len(going_on)))
        else:
            system = by_rank.draw(chance, params.systems)
            conversation = _Conversation(conversations, system, systems[system])
            conversations += 1
        prompt = conversation.tokens + said
        answer = _fresh(chance, params, params.answer_tokens)
        yield Prompt(int(arrival_s * 1000), conversation.number, conversation.turn, conversation.system, prompt, answer)
        conversation.tokens = prompt + answer
        conversation.turn += 1
        if len(conversation.tokens) + params.turn_tokens[1] <= params.context_tokens:
            going_on.insert(0, conversation)
            del going_on[params.open_conversations :]


def _fresh(chance: random.Random, params: WorkloadParams, length: tuple[int, int]) -> array[int]:
    """Tokens that nobody used before, in all likelihood."""
    return array("I", chance.choices(range(params.vocabulary), k=chance.randint(*length)))


def as_requests(prompts: Iterable[Prompt], block_tokens: int) -> Iterator[Request]:
    """For replays: the full blocks of each prompt, numbered as they first appear (what is left over at the end has no block)."""
    numbers: dict[bytes, int] = {}
    for prompt in prompts:
        blocks = tuple(numbers.setdefault(key, len(numbers)) for key in hashing.chain(prompt.tokens, block_tokens))
        yield Request(prompt.arrival_ms, len(prompt.tokens), len(prompt.answer), blocks)
