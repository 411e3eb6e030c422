"""One step's work as the model sees it: tokens of several requests in a row, and where each one's cache lies.

Owns `Piece` and `Batch`. Invariants: rows of one request are side by side and in the order of their positions; the pages of a piece hold everything
before it (positions 0 to start - 1, in order) and have room for it; the model writes row r's latent to slot[r] = page * PAGE_TOKENS + place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of one request: a chunk of a prompt, or the one token to decode."""

    tokens: list[int]
    start: int
    """Position of the first."""
    pages: list[int]
    """Of the request, from position 0 on."""
    logits: bool
    """Whether the logits after its last token are wanted."""


@dataclass(frozen=True, slots=True)
class Batch:
    pieces: list[Piece]
    tokens: torch.Tensor
    """[T] int64"""
    positions: torch.Tensor
    """[T] int64"""
    slots: torch.Tensor
    """[T] int64"""
    wanted: torch.Tensor
    """[W] int64: rows whose logits are wanted, in the order of the pieces that want them."""
