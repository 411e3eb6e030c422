"""What is asked of an engine and what it answers, in token ids: the nouns that the HTTP server, the router and the workers share.

Owns `Sampling`, `Request`, `TokenEvent`, `Finish`. Invariants: a request's id is its identity everywhere (a second submission of the same id joins
the first); the token at place i of an answer depends on the model, the prompt, the sampling and the tokens before i alone, never on the batch, the
worker or the moment, so that any worker can go on where another one stopped. This module knows neither torch nor the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import isfinite

from kvfs.common.errors import InvalidArgument

SEED_MAX = (1 << 63) - 1
PENALTY_MIN, PENALTY_MAX = 0.01, 100.0
"""Beyond them logits would leave what fp32 can tell apart."""


class Finish(StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    """The end-of-sequence token, a stop token or a stop string."""
    LENGTH = "length"
    """max_tokens, or the model's longest context."""
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy: the most likely token, of equals the one with the lower id."""

    max_tokens: int
    """Tokens to generate at most."""
    temperature: float = 1.0
    top_p: float = 1.0
    """The most likely tokens that have this probability together; 1: all."""
    top_k: int = 0
    """Of so many most likely tokens; 0: of all."""
    seed: int = 0
    """The random number for place i is a function of (seed, i)."""
    repetition_penalty: float = 1.0
    """Logits of tokens that the prompt or the answer has already are divided by it (multiplied where negative), as in CTRL (Keskar et al. 2019)."""
    ignore_eos: bool = False
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InvalidArgument(f"max_tokens is {self.max_tokens}: at least 1")
        if not (isfinite(self.temperature) and 0 <= self.temperature <= 2):
            raise InvalidArgument(f"temperature is {self.temperature}: 0 to 2")
        if not 0 < self.top_p <= 1:
            raise InvalidArgument(f"top_p is {self.top_p}: above 0, up to 1")
        if self.top_k < 0:
            raise InvalidArgument(f"top_k is {self.top_k}: at least 1, or 0 for all tokens")
        if not 0 <= self.seed <= SEED_MAX:
            raise InvalidArgument(f"seed is {self.seed}: 0 to {SEED_MAX}")
        if not PENALTY_MIN <= self.repetition_penalty <= PENALTY_MAX:
            raise InvalidArgument(f"repetition_penalty is {self.repetition_penalty}: {PENALTY_MIN:g} to {PENALTY_MAX:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    answered: tuple[int, ...] = ()
    """Tokens of the answer that are known already (another worker generated them): the engine goes on after them."""
    salt: bytes = b""
    """Tenants with different salts share no cached pages."""
    hand_over: bool = False
    """Prefill only: one token is generated, and all pages, the unfinished one too, are in the store before the answer says so."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InvalidArgument("the prompt is empty: at least one token is needed")
        if len(self.answered) >= self.sampling.max_tokens:
            raise InvalidArgument(
                f"request {self.id} has {len(self.answered)} tokens of an answer already, and max_tokens is {self.sampling.max_tokens}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """One step of one answer."""

    request: str
    index: int
    """Place of the token in the answer, `answered` included."""
    token: int | None
    """None: the answer ended without another token (cancelled, error)."""
    finish: Finish | None = None
    cached_tokens: int = 0
    """Of the prompt, not computed by this engine; true from the first event of a request on."""
    disk_tokens: int = 0
    """Those of cached_tokens that came from the store."""
    message: str = ""
    """For Finish.ERROR: what happened."""
