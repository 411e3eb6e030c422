"""Multi-head latent attention over the paged cache.

Owns `Attention`, one layer's. What is cached of a token is its normed latent and its rotated key part, one for all heads. Two ways compute the same
(reference/inference.md 2.3, 2.7):
  - absorbed: kv_b's key half is folded into the query and its value half applied after the sum, so every head reads the latent itself;
  - expanded: keys and values of all heads are made from the latents of the context, which costs context * latent * heads * (nope + value) once,
    and saves 2 * latent + rope - (nope + rope + value) for each pair of a query and a key.
A chunk is expanded where its count of queries makes that cheaper. Expanded attention is torch's fused one, which keeps no scores and passes over
blocks that nobody may see; at the width of a latent the fused one was no faster, so absorbed attention is written out. Invariants: a row's result
depends on its own request's pages alone; softmax is fp32; scores in memory are bounded by SCORES_MAX, expanded keys by EXPANDED_MAX.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kvfs.inference.cache.pool import PagePool
from kvfs.inference.model.config import ModelConfig
from kvfs.inference.model.norm import rms_norm
from kvfs.inference.model.plan import SCORES_MAX, Chunk, Plan, Together
from kvfs.inference.model.rope import rotate

EXPANDED_MAX = 1 << 25
"""Values of expanded keys (and at most as many of expanded values) at a time: 128 MiB in fp32. A head at the least."""
QUERIES = 256
"""Behind a prefix, so many queries at a time: none reads much further than it may see."""


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

    def __call__(self, x: torch.Tensor, plan: Plan, angles: tuple[torch.Tensor, torch.Tensor], pool: PagePool) -> torch.Tensor:
        """[T, hidden] -> [T, hidden]. Writes the rows' latents into their slots first."""
        config = self.config
        cos, sin = angles
        latent, key = F.linear(x, self.kv_a).split([config.latent, config.rope_dim], dim=-1)
        pool.write(self.layer, plan.slots, rms_norm(latent, self.kv_a_norm, 1e-6), rotate(key, cos, sin))
        low = x if self.q_a is None or self.q_a_norm is None else rms_norm(F.linear(x, self.q_a), self.q_a_norm, 1e-6)
        q = F.linear(low, self.q_b).view(len(x), config.heads, config.nope + config.rope_dim)
        q_nope, q_rope = q.split([config.nope, config.rope_dim], dim=-1)
        q_rope = rotate(q_rope, cos[:, None], sin[:, None])
        if plan.one_group:
            return F.linear(self._decode(q_nope, q_rope, plan.decoding[0], pool).flatten(1), self.out)
        result = x.new_empty(len(x), config.heads, config.value)
        for chunk in plan.chunks:
            attend = self._expanded if self._expansion_pays(chunk.end - chunk.row) else self._absorbed
            result[chunk.row : chunk.end] = attend(q_nope[chunk.row : chunk.end], q_rope[chunk.row : chunk.end], chunk, pool)
        for group in plan.decoding:
            result[group.rows] = self._decode(q_nope[group.rows], q_rope[group.rows], group, pool)
        return F.linear(result.flatten(1), self.out)

    def _expansion_pays(self, queries: int) -> bool:
        config = self.config
        saved = 2 * config.latent + config.rope_dim - (config.nope + config.rope_dim + config.value)
        return queries * saved > config.latent * (config.nope + config.value)

    def _queries(self, q_nope: torch.Tensor, q_rope: torch.Tensor) -> torch.Tensor:
        """[T, heads, nope], [T, heads, rope] -> [T, heads, latent + rope], against cached rows as they are."""
        return torch.cat([torch.bmm(q_nope.transpose(0, 1), self.up_k).transpose(0, 1), q_rope], dim=-1)

    def _values(self, found: torch.Tensor) -> torch.Tensor:
        """Sums of latents [T, heads, latent] -> [T, heads, value]"""
        return torch.bmm(found.transpose(0, 1), self.up_v.transpose(1, 2)).transpose(0, 1)

    def _absorbed(self, q_nope: torch.Tensor, q_rope: torch.Tensor, chunk: Chunk, pool: PagePool) -> torch.Tensor:
        """A chunk of a prompt -> [queries, heads, value]"""
        cached = pool.gather(self.layer, chunk.pages, chunk.length)
        queries = self._queries(q_nope, q_rope)
        parts = []
        for start, end in _steps(len(queries), self.config.heads * chunk.length, SCORES_MAX):
            scores = torch.einsum("thd,sd->hts", queries[start:end], cached).float().mul_(self.scale)
            hidden = ~_visible(chunk.start + start, chunk.start + end, chunk.length, cached.device)
            weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1).to(cached.dtype)
            parts.append(torch.einsum("hts,sl->thl", weights, cached[:, : self.config.latent]))
        return self._values(torch.cat(parts))

    def _expanded(self, q_nope: torch.Tensor, q_rope: torch.Tensor, chunk: Chunk, pool: PagePool) -> torch.Tensor:
        """The same, by heads' own keys and values."""
        config = self.config
        width = config.nope + config.rope_dim
        latent, key = pool.gather(self.layer, chunk.pages, chunk.length).split([config.latent, config.rope_dim], dim=-1)
        queries = torch.cat([q_nope, q_rope], dim=-1)
        parts = []
        for first, last in _steps(config.heads, chunk.length * width, EXPANDED_MAX):
            heads = last - first
            own = F.linear(latent, self.up_k[first:last].flatten(0, 1)).view(-1, heads, config.nope)
            keys = torch.cat([own, key[:, None].expand(-1, heads, -1)], dim=-1)
            values = F.linear(latent, self.up_v[first:last].flatten(0, 1)).view(-1, heads, config.value)
            parts.append(self._fused(queries[:, first:last], keys, values, chunk.start))
        return torch.cat(parts, dim=1)

    def _fused(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int) -> torch.Tensor:
        """[T, heads, width], [S, heads, width], [S, heads, value] -> [T, heads, value]. Values as wide as keys: else torch computes all scores."""
        width = values.shape[-1]
        values = F.pad(values, (0, max(0, keys.shape[-1] - width)))
        q, k, v = (each.transpose(0, 1)[None] for each in (queries, keys, values))
        if not first:
            found = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
            return found[0, :, :, :width].transpose(0, 1)
        parts = []
        for start in range(0, len(queries), QUERIES):
            end = min(start + QUERIES, len(queries))
            seen = first + end
            mask = _visible(first + start, seen, seen, q.device)
            parts.append(F.scaled_dot_product_attention(q[:, :, start:end], k[:, :, :seen], v[:, :, :seen], attn_mask=mask, scale=self.scale))
        return torch.cat(parts, dim=2)[0, :, :, :width].transpose(0, 1)

    def _decode(self, q_nope: torch.Tensor, q_rope: torch.Tensor, group: Together, pool: PagePool) -> torch.Tensor:
        """One row of each request -> [requests, heads, value], padded to the longest of them."""
        queries = self._queries(q_nope, q_rope)
        cached = pool.gather_padded(self.layer, group.pages, group.longest, group.padding)
        scores = (queries @ cached.transpose(1, 2)).float().mul_(self.scale)
        if group.beyond is not None:
            scores.masked_fill_(group.beyond[:, None], float("-inf"))
        return self._values(scores.softmax(-1).to(cached.dtype) @ cached[..., : self.config.latent])


def _visible(first: int, end: int, keys: int, device: torch.device) -> torch.Tensor:
    """[end - first, keys] bool: a query sees the keys up to its own position."""
    return torch.arange(keys, device=device)[None] <= torch.arange(first, end, device=device)[:, None]


def _steps(count: int, each: int, most: int) -> list[tuple[int, int]]:
    step = max(1, most // max(1, each))
    return [(start, min(start + step, count)) for start in range(0, count, step)]
