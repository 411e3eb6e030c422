"""What of a batch is computed together: the same for every layer, so it is worked out once a step.

Owns `Plan`, its `Chunk`s and `Together`s, and `plan`. Invariants: every row of the batch is in exactly one of them; requests that are computed
together are padded to at most twice their length, and have at most SCORES_MAX scores (a single request has as many as it has).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvfs.inference.cache.format import PAGE_TOKENS
from kvfs.inference.model.batch import Batch, Piece

SCORES_MAX = 1 << 24
"""Scores at a time: 64 MiB in fp32."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Several tokens of one request: rows `row` to `end` of the batch, at positions from `start` on."""

    row: int
    end: int
    start: int
    pages: torch.Tensor
    """[pages] int64: of its context, itself included."""

    @property
    def length(self) -> int:
        """Of its context."""
        return self.start + self.end - self.row


@dataclass(frozen=True, slots=True)
class Together:
    """One token each of several requests."""

    rows: torch.Tensor
    """[requests] int64: rows of the batch"""
    pages: torch.Tensor
    """[requests, pages of the longest] int64: those of a shorter one are filled up with its first."""
    longest: int
    beyond: torch.Tensor | None
    """[requests, longest] bool: places behind a request's end. None: all are as long."""
    padding: torch.Tensor | None
    """[places] int64: the same places, counted through all the pages."""


@dataclass(frozen=True, slots=True)
class Plan:
    slots: tuple[torch.Tensor, torch.Tensor]
    """Of the rows: pages and places in them, [T] int64 each."""
    chunks: list[Chunk]
    decoding: list[Together]

    @property
    def one_group(self) -> bool:
        """It is the whole batch, in its order."""
        return not self.chunks and len(self.decoding) == 1


def plan(batch: Batch, heads: int) -> Plan:
    device = batch.tokens.device
    chunks: list[Chunk] = []
    decoding: list[tuple[int, Piece]] = []
    row = 0
    for piece in batch.pieces:
        end = row + len(piece.tokens)
        if len(piece.tokens) == 1:
            decoding.append((row, piece))
        else:
            count = -(-(piece.start + len(piece.tokens)) // PAGE_TOKENS)
            chunks.append(Chunk(row, end, piece.start, torch.tensor(piece.pages[:count], device=device)))
        row = end
    groups = alike([piece.start + 1 for _, piece in decoding], heads)
    together = [_together([decoding[member] for member in members], device) for members in groups]
    return Plan((batch.slots // PAGE_TOKENS, batch.slots % PAGE_TOKENS), chunks, together)


def _together(members: Sequence[tuple[int, Piece]], device: torch.device) -> Together:
    lengths = [piece.start + 1 for _, piece in members]
    longest = max(lengths)
    width = -(-longest // PAGE_TOKENS)
    pages = [[*piece.pages[: piece.start // PAGE_TOKENS + 1], *[piece.pages[0]] * width][:width] for _, piece in members]
    beyond = padding = None
    if min(lengths) < longest:  # on the host: how many places these are is not known to a GPU without a wait
        behind = torch.arange(longest)[None] >= torch.tensor(lengths)[:, None]
        request, place = behind.nonzero().unbind(1)
        beyond, padding = behind.to(device), (request * width * PAGE_TOKENS + place).to(device)
    return Together(torch.tensor([row for row, _ in members], device=device), torch.tensor(pages, device=device), longest, beyond, padding)


def alike(lengths: Sequence[int], heads: int) -> list[list[int]]:
    """Groups of requests of about the same length, each in the order of the batch."""
    groups: list[list[int]] = []
    longest = 0
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if groups and 2 * lengths[place] >= longest and (len(groups[-1]) + 1) * longest * heads <= SCORES_MAX:
            groups[-1].append(place)
        else:
            groups.append([place])
            longest = lengths[place]
    return [sorted(group) for group in groups]
