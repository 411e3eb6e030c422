"""Which worker a request goes to: a core without I/O.

Owns `Candidate`, `Prefixes`, `Sent`, `choose_prefill` and `choose_decode`. A prompt goes where its answer begins soonest (Mooncake, FAST '25,
algorithm 1): what waits there already, and what is left to compute of it there. Costs are in tokens of linear layers; attention to a context of
KEYS_PER_TOKEN keys costs as much as the linear layers of one token (reference/inference.md 10.2: 73.2 GFLOP against 5.0 MFLOP a pair). An answer
goes where the fewest pages are used, then where the fewest requests are. Invariants: a worker that is full or drains is never chosen; equal
candidates are chosen in turn by their names' order and load, so that the same state gives the same choice.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf

from kvfs.inference.cache.format import PAGE_TOKENS

KEYS_PER_TOKEN = 14_600
ELSEWHERE_COST = 0.1
"""Of a token that another worker computed: it is read from the store instead, if it is still there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    name: str
    waiting_tokens: int = 0
    requests: int = 0
    """Waiting and running."""
    pages: int = 1
    pages_used: int = 0
    here: int = 0
    """Tokens of the prompt that are in its memory, as far as the router knows."""


def prefill_cost(new: int, before: int) -> float:
    """Of computing `new` tokens behind `before` others."""
    return new * (1 + (before + new / 2) / KEYS_PER_TOKEN)


def choose_prefill(candidates: Iterable[Candidate], prompt: int, anywhere: int) -> Candidate | None:
    """For a prompt of so many tokens, `anywhere` of which some worker has computed before."""

    def cost(candidate: Candidate) -> tuple[float, int, str]:
        here = min(candidate.here, prompt - 1)
        read = max(0, min(anywhere, prompt - 1) - here)
        own = prefill_cost(prompt - here - read, here + read) + read * ELSEWHERE_COST
        return candidate.waiting_tokens + own, candidate.requests, candidate.name

    return min(candidates, key=cost, default=None)


def choose_decode(candidates: Iterable[Candidate]) -> Candidate | None:
    return min(candidates, key=lambda candidate: (candidate.pages_used / candidate.pages, candidate.requests, candidate.name), default=None)


class Prefixes:
    """What a worker has in memory, as far as can be told from what it was asked: keys of pages, least recently used first."""

    def __init__(self) -> None:
        self._keys: OrderedDict[bytes, None] = OrderedDict()

    def note(self, keys: Sequence[bytes], pages: int) -> None:
        """It computed or read these; it has room for so many."""
        for key in reversed(keys):  # the first page is used last: it goes last
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > pages:
            self._keys.popitem(last=False)

    def tokens(self, keys: Sequence[bytes]) -> int:
        """Of the prompt with these keys, from the start."""
        count = 0
        for key in keys:
            if key not in self._keys:
                break
            count += 1
        return count * PAGE_TOKENS

    def clear(self) -> None:
        self._keys.clear()


@dataclass(slots=True)
class _Load:
    tokens: int
    pages: int
    taken_s: float = inf
    """When the worker said that it had the request."""


class Sent:
    """What a worker was sent and has not told of yet: its status is some tenths of a second old, and a burst is over by then."""

    def __init__(self) -> None:
        self._loads: dict[str, _Load] = {}

    def add(self, request: str, tokens: int, pages: int) -> None:
        """`tokens`: of its prompt that are not in the worker's memory."""
        self._loads[request] = _Load(tokens, pages)

    def taken(self, request: str, now_s: float) -> None:
        if request in self._loads:
            self._loads[request].taken_s = now_s

    def begun(self, request: str) -> None:
        """Its first token is there: nothing of its prompt waits."""
        if request in self._loads:
            self._loads[request].tokens = 0

    def forget(self, request: str) -> None:
        self._loads.pop(request, None)

    def told(self, asked_s: float) -> None:
        """A status, asked for then, has told of what was taken before."""
        self._loads = {request: load for request, load in self._loads.items() if load.taken_s >= asked_s}

    def clear(self) -> None:
        self._loads.clear()

    @property
    def tokens(self) -> int:
        return sum(load.tokens for load in self._loads.values())

    @property
    def pages(self) -> int:
        return sum(load.pages for load in self._loads.values())
