"""What an engine asks of a store of prefixes. `inference/store` has the one over kvfs.

Owns the protocols `PrefixStore` and `Reading`. Invariants: nothing here raises because of storage: trouble is a miss, a failed reading, a page that
is not kept. Keys are those of full pages (kvcache/keys.py, 64 tokens); the unfinished page of a prompt is named by the key of the page before it
(or what stands for the salt, `keys.seed`) and its tokens. Pages that were given stay the engine's: they are held until the call has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol


class Reading(Protocol):
    """Pages on their way from the store into the pool, layer by layer."""

    async def run(self, arriving: Callable[[], None]) -> bool:
        """Reads. `arriving` is called when the prompt may be computed on while the other layers come. False: the pages are worth nothing. However it
        ends, cancelled too, whoever waits goes on, and nothing writes into the pages any more."""

    def wait(self, layer: int, timeout_s: float) -> bool | None:
        """In the step's thread: until that layer is there. False: it won't be; None: not in this time."""


class PrefixStore(Protocol):
    async def run(self) -> None:
        """The background work: writing. Runs as long as the engine does."""

    async def match(self, keys: Sequence[bytes], parent: bytes, tail: Sequence[int]) -> tuple[int, bool]:
        """How many full pages it has, from the first one on, and whether it has the unfinished page (`tail` empty: there is none)."""

    def worth(self, pages: int) -> int:
        """Of so many pages that it has, how many are read sooner than computed, by what both have cost so far."""

    def read(self, keys: Sequence[bytes], pages: Sequence[int], parent: bytes, tail: Sequence[int]) -> Reading:
        """Into `pages`: those of the keys and, if `tail` isn't empty, the unfinished one."""

    def offer(self, keys: Sequence[bytes], pages: Sequence[int], before: Sequence[bytes], done: Callable[[int], None]) -> None:
        """Full pages to be written in the background, or not, if there is too much to write. `before`: keys of the prefix that they go on from.
        `done` is called once, when the pages are not read any more, with how many of them, from the first on, are stored."""

    async def save(self, keys: Sequence[bytes], pages: Sequence[int], parent: bytes, tail: Sequence[int]) -> None:
        """Written when it returns, as far as that was possible."""

    def computed(self, tokens: int, seconds: float) -> None:
        """What a step cost: tokens of prompts mostly."""
