"""Chains that do not answer: left alone for a while, so that an engine does not wait out a deadline at every step.

Owns which chain rests until when. Invariants: a chain rests only after an operation met its deadline or found no service there, and after a deadline
no longer than WAITED_TIMES what was waited for it: a caller without time says nothing about the chain; when the rest is over one operation tries it
with a short deadline, and its outcome ends the rest or doubles it; a chain whose members changed is tried at once.
Pure: time and chain versions come from the caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from kvfs.common.errors import ChainError, DeadlineExceeded, KvfsError, TransportError

WAITED_TIMES = 4


@dataclass(slots=True)
class _Rest:
    until_s: float
    length_s: float
    version: int
    """Of the chain, when it began."""


class Rests:
    def __init__(self, first_s: float, longest_s: float) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._resting: dict[int, _Rest] = {}

    def __bool__(self) -> bool:
        return bool(self._resting)

    def state(self, chain_id: int, version: int, now_s: float) -> str:
        """ "well", "resting", or "trial": to be tried, with a short deadline."""
        rest = self._resting.get(chain_id)
        if rest is None:
            return "well"
        if rest.version != version:
            del self._resting[chain_id]
            return "well"
        if now_s < rest.until_s:
            return "resting"
        rest.until_s = now_s + rest.length_s  # until the trial's outcome is known, for everyone else
        return "trial"

    def note(self, chain_id: int, version: int, error: KvfsError | None, now_s: float, waited_s: float = inf) -> None:
        """The outcome of an operation on the chain, which had `waited_s` for it."""
        if error is None:
            self._resting.pop(chain_id, None)
        elif self._first_s and isinstance(error, TransportError | ChainError):
            rest = self._resting.get(chain_id)
            first_s = min(self._first_s, WAITED_TIMES * waited_s) if isinstance(error, DeadlineExceeded) else self._first_s
            if rest is not None:
                length_s = min(2 * rest.length_s, self._longest_s) if first_s == self._first_s else rest.length_s
            elif first_s > 0:
                length_s = first_s
            else:
                return
            self._resting[chain_id] = _Rest(now_s + length_s, length_s, version)
