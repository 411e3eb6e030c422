"""One request inside an engine: its tokens, how far their latents are computed, and the pages they lie in.

Owns `Sequence` and `State`. Invariants: `tokens` are the prompt and the answer so far; the latents of the first `computed` of them are in `pages`, in
order; the pages before `known` are full and have their keys in the index (or another page with the same content has), nobody writes to them any more;
`computed` < len(tokens) always: the last token is computed to get the logits after it. Only the scheduler changes a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from kvfs.inference.cache.format import PAGE_TOKENS
from kvfs.inference.request import Finish, Request, TokenEvent
from kvfs.kvcache.keys import chain, seed


class State(Enum):
    WAITING = auto()
    """Without pages."""
    FETCHING = auto()
    """Has its pages; the store reads some of them."""
    RUNNING = auto()
    SAVING = auto()
    """Prefilled for another worker: its pages are being stored."""
    ENDED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    request: Request
    number: int
    """Order of arrival: the lower is the older."""
    tokens: list[int]
    keys: list[bytes]
    """Of full pages of tokens, the first ones; `key` goes on with them."""
    state: State = State.WAITING
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    known: int = 0
    stored: int | None = 0
    """Full pages that the store has, from the first on; None while it is asked."""
    tail_stored: bool = False
    """It has the unfinished page too."""
    fetch: Fetch | None = None
    """Pages that are still being read."""
    in_step: bool = False
    """A step is under way with it: its pages and tokens stay as they are until that is done."""
    fetch_ended: bool | None = None
    """During the step: whether all was read."""
    ending: Finish | None = None
    """How it ends when the step is done."""
    offered: bool = False
    """Pages of it were offered to the store."""
    memory_tokens: int = 0
    """Not computed because a page was found in memory; counted until the first event."""
    disk_tokens: int = 0
    """The same, from the store."""
    counted: bool = False

    @property
    def left(self) -> int:
        """Tokens to compute before the next one is known: 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def to_compute(self) -> int:
        """`left` without what is being read."""
        return self.left - (self.fetch.tokens if self.fetch is not None and self.state is State.FETCHING else 0)

    @property
    def reusable(self) -> int:
        """Full pages that may come from elsewhere: the last token is always computed."""
        return (len(self.tokens) - 1) // PAGE_TOKENS

    @property
    def tail(self) -> list[int]:
        """Tokens of the unfinished page that another worker may have left for this one: there is one only when an answer goes on here."""
        return self.tokens[self.reusable * PAGE_TOKENS : -1] if self.request.answered else []

    @property
    def pages_needed(self) -> int:
        return -(-len(self.tokens) // PAGE_TOKENS)

    def key(self, place: int) -> bytes:
        """Of the page at that place; all its tokens are there."""
        while len(self.keys) <= place:
            start = len(self.keys) * PAGE_TOKENS
            self.keys += chain(self.tokens[start : start + PAGE_TOKENS], PAGE_TOKENS, parent=self.parent(len(self.keys)))
        return self.keys[place]

    def reusable_keys(self) -> list[bytes]:
        if self.reusable:
            self.key(self.reusable - 1)
        return self.keys[: self.reusable]

    def parent(self, place: int) -> bytes:
        """The key of the page before that place; of the first, what stands for the salt."""
        return self.key(place - 1) if place else seed(self.request.salt)

    def event(self, token: int | None, finish: Finish | None, message: str = "") -> TokenEvent:
        """About the last of `tokens`, or, without a token, about the place after it."""
        cached = min(self.memory_tokens + self.disk_tokens, len(self.request.prompt))
        return TokenEvent(
            request=self.request.id,
            index=len(self.tokens) - len(self.request.prompt) - (token is not None),
            token=token,
            finish=finish,
            cached_tokens=cached,
            disk_tokens=min(self.disk_tokens, cached),
            message=message,
        )


@dataclass(slots=True, eq=False)
class Fetch:
    """Pages to be read from the store. They are held for it until the scheduler hears how it ended: nothing else comes into them meanwhile."""

    sequence: Sequence
    keys: list[bytes]
    """Of the full pages."""
    pages: list[int]
    """Of the keys, and then that of the tail, if there is one."""
    tail: list[int]
    parent: bytes
    """Of the tail."""

    @property
    def tokens(self) -> int:
        return len(self.keys) * PAGE_TOKENS + len(self.tail)


@dataclass(slots=True, eq=False)
class Save:
    """Pages that must be in the store before an answer goes on elsewhere; held like those of a fetch."""

    sequence: Sequence
    keys: list[bytes]
    pages: list[int]
    tail: list[int]
    parent: bytes
    event: TokenEvent
    """To be sent then."""


@dataclass(frozen=True, slots=True, eq=False)
class Write:
    """Pages that have just become full, to be stored in the background; held until they are, or are given up."""

    keys: list[bytes]
    pages: list[int]
    before: list[bytes]
    """Keys of the pages before them: what is used together."""


@dataclass(frozen=True, slots=True)
class Work:
    """Consecutive tokens of one sequence to compute in a step."""

    sequence: Sequence
    start: int
    tokens: list[int]
    sample: bool
    """They end with the sequence's last token: the next one is chosen after it."""
