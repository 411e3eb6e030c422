"""Prompts for the requests of a trace, which has only the numbers of their blocks: tokens made up from those.

Owns the making and its scaling. Invariants: equal numbers give equal tokens, on every machine and Python, so prompts share exactly the blocks
that the trace says; other numbers give other tokens, in all likelihood; the scale changes how many tokens a block has, never which blocks a
prompt has. A prompt that would be longer than the model takes loses its end.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kvfs.common.errors import InvalidArgument
from kvfs.kvcache.replay import TRACE_BLOCK_TOKENS, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceScale:
    vocabulary: int
    """Tokens are 0 to this - 1."""
    lengths: float = 1.0
    """Times the trace's, prompts and answers."""
    time: float = 1.0
    """Times the trace's time: 0.5 is twice as fast."""
    context_tokens: int = 1 << 30
    """Prompt and answer together, after scaling."""

    def __post_init__(self) -> None:
        if self.vocabulary < 1 or self.lengths <= 0 or self.time < 0 or self.context_tokens < 2:
            raise InvalidArgument("a trace's vocabulary is at least 1, its scale of lengths above 0, of time from 0, its context at least 2 tokens")


@dataclass(frozen=True, slots=True)
class TracePrompt:
    arrival_ms: int
    tokens: array[int]
    answer_tokens: int
    cut: bool
    """It was longer than the context."""


def prompts_of(requests: Iterable[Request], scale: TraceScale, *, block_tokens: int = TRACE_BLOCK_TOKENS) -> Iterator[TracePrompt]:
    """In the order of the trace."""
    length = max(1, round(block_tokens * scale.lengths))
    blocks: dict[int, array[int]] = {}
    for request in requests:
        tokens: array[int] = array("I")
        for block in request.blocks:
            if block not in blocks:
                blocks[block] = array("I", random.Random(f"kvfs-trace {block}").choices(range(scale.vocabulary), k=length))
            tokens += blocks[block]
        answer = min(max(1, round(request.output_tokens * scale.lengths)), scale.context_tokens - 1)
        wanted = min(max(1, round(request.input_tokens * scale.lengths)), len(tokens))
        kept = min(wanted, scale.context_tokens - answer)
        yield TracePrompt(int(request.timestamp_ms * scale.time), tokens[:kept], answer, kept < wanted)
