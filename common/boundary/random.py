"""Random boundary: every random choice and identifier in kvfs comes from here, so that a simulated run is a function of its seed.

`SystemRandom` draws from the operating system and is what real processes use: identifiers made by it are unguessable. `SeededRandom` is for
simulation and tests only, never for identifiers in a real cluster.
"""

from __future__ import annotations

import random
from abc import ABC
from collections.abc import MutableSequence, Sequence
from typing import TypeVar

T = TypeVar("T")


class Random(ABC):
    _source: random.Random

    def bytes(self, count: int) -> bytes:
        return self._source.randbytes(count)

    def uniform(self, low: float, high: float) -> float:
        return self._source.uniform(low, high)

    def randrange(self, stop: int) -> int:
        """A whole number from 0 to stop - 1."""
        return self._source.randrange(stop)

    def shuffle(self, items: MutableSequence[T]) -> None:
        """In place."""
        self._source.shuffle(items)

    def choice(self, items: Sequence[T]) -> T:
        return self._source.choice(items)


class SystemRandom(Random):
    def __init__(self) -> None:
        self._source = random.SystemRandom()


class SeededRandom(Random):
    def __init__(self, seed: int) -> None:
        self._source = random.Random(seed)
