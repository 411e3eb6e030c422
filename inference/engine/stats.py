"""What an engine tells about itself: how full it is now, and what it has done since it started.

Owns `EngineLoad` and `EngineStats`. Invariants: counters only grow; every accepted request is in `finished` once when it has ended.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvfs.inference.request import Finish


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """Now: what a router compares workers by."""

    waiting: int
    """Requests without pages."""
    running: int
    """Requests with pages."""
    waiting_tokens: int
    """To be computed before the answers to all of them have begun."""
    pages: int
    pages_used: int
    """Held by requests, or being written to the store."""
    pages_cached: int
    """Found by their keys, in use or not."""


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """Since the start. Prompts count when their answer begins: queries and hits are tokens, as vLLM counts them."""

    prompt_tokens: int = 0
    memory_queries: int = 0
    memory_hits: int = 0
    disk_queries: int = 0
    """Tokens that memory did not have, while there is a store."""
    disk_hits: int = 0
    generated_tokens: int = 0
    computed_tokens: int = 0
    """By the model: prompts, answers, and again after a preemption."""
    preemptions: int = 0
    failed_fetches: int = 0
    """Prefixes that the store had and could not be read: computed instead."""
    steps: int = 0
    step_seconds: float = 0.0
    finished: dict[Finish, int] = field(default_factory=lambda: dict.fromkeys(Finish, 0))
    handed_over: int = 0
