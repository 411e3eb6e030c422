"""Multi-head latent attention over the paged cache.

Owns `Attention`, one layer's. What is cached of a token is its normed latent and its rotated key part, one for all heads. Two ways compute the same
(reference/inference.md 2.3, 2.7):
  - absorbed: kv_b's key half is folded into the query and its value half applied after the sum, so every head reads the latent itself;
  - expanded: keys and values of all heads are made from the latents of the context, which costs context * latent * heads * (nope + value) once,
    and saves 2 * latent + rope - (nope + rope + value) for each pair of a query and a key.
A piece is expanded where its count of queries makes that cheaper. Invariants: a row's result depends on its own request's pages alone; softmax is
fp32; scores in memory are bounded by SCORES_MAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kvfs.inference.cache.pool import PagePool
from kvfs.inference.model.batch import Batch, Piece
from kvfs.inference.model.config import ModelConfig
from kvfs.inference.model.norm import rms_norm
from kvfs.inference.model.rope import rotate

SCORES_MAX = 1 << 24
"""Scores at a time: 64 MiB in fp32."""


@dataclass(slots=True)
class Attention:
    config: ModelConfig
    layer: int
    scale: float
    q_a: torch.Tensor | None
    """[q_latent, hidden]; None without q_lora."""
    q_a_norm: torch.Tensor | None
    q_b: torch.Tensor
    """[heads * (nope + rope), q_latent or hidden]"""
    kv_a: torch.Tensor
    """[latent + rope, hidden]"""
    kv_a_norm: torch.Tensor
    up_k: torch.Tensor
    """[heads, nope, latent]: kv_b's key half"""
    up_v: torch.Tensor
    """[heads, value, latent]"""
    out: torch.Tensor
    """[hidden, heads * value]"""

    def __call__(self, x: torch.Tensor, batch: Batch, angles: tuple[torch.Tensor, torch.Tensor], pool: PagePool) -> torch.Tensor:
        """[T, hidden] -> [T, hidden]. Writes the rows' latents into their slots first."""
        config = self.config
        cos, sin = angles
        latent, key = F.linear(x, self.kv_a).split([config.latent, config.rope_dim], dim=-1)
        pool.write(self.layer, batch.slots, rms_norm(latent, self.kv_a_norm, 1e-6), rotate(key, cos, sin))
        low = x if self.q_a is None or self.q_a_norm is None else rms_norm(F.linear(x, self.q_a), self.q_a_norm, 1e-6)
        q = F.linear(low, self.q_b).view(len(x), config.heads, config.nope + config.rope_dim)
        q_nope, q_rope = q.split([config.nope, config.rope_dim], dim=-1)
        q_rope = rotate(q_rope, cos[:, None], sin[:, None])
        result = x.new_empty(len(x), config.heads, config.value)
        decoding: list[tuple[int, Piece]] = []
        row = 0
        for piece in batch.pieces:
            count = len(piece.tokens)
            if count == 1:
                decoding.append((row, piece))
            else:
                attend = self._expanded if self._expansion_pays(count) else self._absorbed
                result[row : row + count] = attend(q_nope[row : row + count], q_rope[row : row + count], piece, pool)
            row += count
        if decoding:
            rows = torch.tensor([row for row, _ in decoding], device=x.device)
            result[rows] = self._decode(q_nope[rows], q_rope[rows], [piece for _, piece in decoding], pool)
        return F.linear(result.flatten(1), self.out)

    def _expansion_pays(self, queries: int) -> bool:
        config = self.config
        saved = 2 * config.latent + config.rope_dim - (config.nope + config.rope_dim + config.value)
        return queries * saved > config.latent * (config.nope + config.value)

    def _queries(self, q_nope: torch.Tensor, q_rope: torch.Tensor) -> torch.Tensor:
        """[T, heads, nope], [T, heads, rope] -> [T, heads, latent + rope], against cached rows as they are."""
        return torch.cat([torch.einsum("thn,hnl->thl", q_nope, self.up_k), q_rope], dim=-1)

    def _absorbed(self, q_nope: torch.Tensor, q_rope: torch.Tensor, piece: Piece, pool: PagePool) -> torch.Tensor:
        """A chunk of a prompt -> [queries, heads, value]"""
        length = piece.start + len(piece.tokens)
        cached = pool.gather(self.layer, piece.pages, length)
        queries = self._queries(q_nope, q_rope)
        parts = []
        for start, end in _steps(len(piece.tokens), self.config.heads * length):
            scores = torch.einsum("thd,sd->hts", queries[start:end], cached)
            weights = _causal(scores.float() * self.scale, piece.start + start).softmax(-1).to(cached.dtype)
            parts.append(torch.einsum("hts,sl->thl", weights, cached[:, : self.config.latent]))
        return torch.einsum("thl,hvl->thv", torch.cat(parts), self.up_v)

    def _expanded(self, q_nope: torch.Tensor, q_rope: torch.Tensor, piece: Piece, pool: PagePool) -> torch.Tensor:
        """The same, by heads' own keys and values."""
        length = piece.start + len(piece.tokens)
        latent, key = pool.gather(self.layer, piece.pages, length).split([self.config.latent, self.config.rope_dim], dim=-1)
        keys = torch.einsum("sl,hnl->hsn", latent, self.up_k)
        values = torch.einsum("sl,hvl->hsv", latent, self.up_v)
        parts = []
        for start, end in _steps(len(piece.tokens), self.config.heads * length):
            scores = torch.einsum("thn,hsn->hts", q_nope[start:end], keys) + torch.einsum("thr,sr->hts", q_rope[start:end], key)
            weights = _causal(scores.float() * self.scale, piece.start + start).softmax(-1).to(values.dtype)
            parts.append(torch.einsum("hts,hsv->thv", weights, values))
        return torch.cat(parts)

    def _decode(self, q_nope: torch.Tensor, q_rope: torch.Tensor, pieces: Sequence[Piece], pool: PagePool) -> torch.Tensor:
        """One row of each request -> [requests, heads, value]. Requests of about the same length are computed together, padded to the longest."""
        queries = self._queries(q_nope, q_rope)
        found = queries.new_empty(len(pieces), self.config.heads, self.config.latent)
        for members in _alike([piece.start + 1 for piece in pieces], self.config.heads):
            lengths = torch.tensor([pieces[member].start + 1 for member in members], device=queries.device)
            cached = pool.gather_padded(self.layer, [pieces[member].pages for member in members], [pieces[member].start + 1 for member in members])
            index = torch.tensor(members, device=queries.device)
            scores = (queries[index] @ cached.transpose(1, 2)).float() * self.scale
            beyond = torch.arange(cached.shape[1], device=queries.device)[None] >= lengths[:, None]
            weights = scores.masked_fill(beyond[:, None], float("-inf")).softmax(-1).to(cached.dtype)
            found[index] = weights @ cached[..., : self.config.latent]
        return torch.einsum("bhl,hvl->bhv", found, self.up_v)


def _causal(scores: torch.Tensor, first: int) -> torch.Tensor:
    """[heads, queries, keys]: query i stands at position first + i and sees the keys up to there."""
    _, queries, keys = scores.shape
    position = torch.arange(first, first + queries, device=scores.device)
    return scores.masked_fill(torch.arange(keys, device=scores.device)[None] > position[:, None], float("-inf"))


def _steps(queries: int, scores_each: int) -> list[tuple[int, int]]:
    step = max(1, SCORES_MAX // max(1, scores_each))
    return [(start, min(start + step, queries)) for start in range(0, queries, step)]


def _alike(lengths: Sequence[int], heads: int) -> list[list[int]]:
    """Groups of requests, the longest first, none padded to more than twice its length, and none with more scores than SCORES_MAX."""
    groups: list[list[int]] = []
    longest = 0
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if groups and 2 * lengths[place] >= longest and (len(groups[-1]) + 1) * longest * heads <= SCORES_MAX:
            groups[-1].append(place)
        else:
            groups.append([place])
            longest = lengths[place]
    return groups
