"""From logits to the next token of each answer.

Owns `Draw`, `uniform` and `sample`. Invariants: a row's token is a function of its logits and its draw alone, never of the other rows; the random
number of place i of an answer is a function of (seed, i), so any worker draws the same; of equal logits the lower id comes first, in greedy choice,
top-k and top-p alike. The order is: repetition penalty, temperature, top-k, top-p over what top-k left, then the inverse of the cumulative
distribution.
This module must never keep state between steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import inf

import torch

from kvfs.inference.request import Sampling

NO_TOKEN = -1
"""In place of a token: the logits are not numbers, or none is above -infinity."""
_UNIT = 2.0**-53


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row's token is chosen."""

    sampling: Sampling
    place: int
    """Of the token in its answer."""
    tokens: list[int]
    """Prompt and answer up to there, for the repetition penalty; at least one."""


def uniform(seed: int, place: int) -> float:
    """From 0 to 1 (not 1 itself), 53 bits of BLAKE2b(seed, place)."""
    content = seed.to_bytes(8, "little") + place.to_bytes(8, "little")
    return (int.from_bytes(blake2b(content, digest_size=8, person=b"kvfs-sample-v1").digest(), "little") >> 11) * _UNIT


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """`logits`: [W, vocab] fp32, one row a draw. One token each, or NO_TOKEN."""
    penalised = [row for row, draw in enumerate(draws) if draw.sampling.repetition_penalty != 1.0]
    if penalised:
        logits[penalised] = _penalised(logits[penalised], [draws[row] for row in penalised])
    top, best = logits.max(dim=-1)
    tokens: list[int] = torch.where(top.isfinite(), best, NO_TOKEN).tolist()
    for filtered in (False, True):
        rows = [
            row
            for row, draw in enumerate(draws)
            if draw.sampling.temperature and tokens[row] != NO_TOKEN and (draw.sampling.top_k > 0 or draw.sampling.top_p < 1) == filtered
        ]
        if rows:
            chosen = [draws[row] for row in rows]
            drawn = _filtered(logits[rows], chosen) if filtered else _any(logits[rows], chosen)
            for row, token in zip(rows, drawn, strict=True):
                tokens[row] = token
    return tokens


def _penalised(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """A token that occurs more than once is written more than once, with the same value: so padding is a token that is there anyway."""
    longest = max(len(draw.tokens) for draw in draws)
    seen = torch.tensor([draw.tokens + draw.tokens[-1:] * (longest - len(draw.tokens)) for draw in draws], device=logits.device)
    penalty = torch.tensor([[draw.sampling.repetition_penalty] for draw in draws], device=logits.device)
    values = logits.gather(-1, seen)
    return logits.scatter(-1, seen, torch.where(values < 0, values * penalty, values / penalty))


def _scaled(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """[R, vocab] fp64, the largest of a row 0: however low the temperature, none becomes an infinity that hides which it was."""
    temperatures = torch.tensor([[draw.sampling.temperature] for draw in draws], dtype=torch.float64, device=logits.device)
    return (logits.double() - logits.amax(dim=-1, keepdim=True)) / temperatures


def _uniforms(draws: Sequence[Draw], device: torch.device) -> torch.Tensor:
    """[R, 1] fp64"""
    return torch.tensor([[uniform(draw.sampling.seed, draw.place)] for draw in draws], dtype=torch.float64, device=device)


def _any(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """Of all tokens, in the order of their ids: without a sort, which costs most for a large vocabulary."""
    cumulative = _scaled(logits, draws).softmax(dim=-1).cumsum(dim=-1)
    target = _uniforms(draws, logits.device) * cumulative[:, -1:]
    found: list[int] = torch.searchsorted(cumulative, target, right=True).clamp_(max=logits.shape[-1] - 1).flatten().tolist()
    return found


def _filtered(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """Of the top-k, and of these the smallest set with probability top-p, the most likely first."""
    vocabulary, device = logits.shape[-1], logits.device
    top_k = torch.tensor([[draw.sampling.top_k or vocabulary] for draw in draws], device=device)
    top_p = torch.tensor([[draw.sampling.top_p if draw.sampling.top_p < 1 else inf] for draw in draws], dtype=torch.float64, device=device)
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    ordered = _scaled(ordered, draws).masked_fill_(torch.arange(vocabulary, device=device) >= top_k, -inf)
    probabilities = ordered.softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    # What lies before a token decides: the first is always in, and so is the one that crosses top_p.
    last = ((cumulative - probabilities < top_p) & (probabilities > 0)).sum(dim=-1, keepdim=True) - 1
    target = _uniforms(draws, device) * cumulative.gather(-1, last)
    found = torch.minimum(torch.searchsorted(cumulative, target, right=True), last)
    tokens: list[int] = ids.gather(-1, found).flatten().tolist()
    return tokens
