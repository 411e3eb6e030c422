"""Which worker a request goes to: a core without I/O.

Owns `Candidate`, `Prefixes` and `choose`. A prompt goes where its answer begins soonest (Mooncake, FAST '25, algorithm 1): what waits there already,
and what is left to compute of it there. Costs are in tokens of linear layers; attention to a context of KEYS_PER_TOKEN keys costs as much as the
linear layers of one token (reference/inference.md 10.2: 73.2 GFLOP against 5.0 MFLOP a pair). An answer goes where the fewest pages are used, then
where the fewest requests are. Invariants: a worker that is full or drains is never chosen; equal candidates are chosen in turn by their names' order
and load, so that the same state gives the same choice.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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
