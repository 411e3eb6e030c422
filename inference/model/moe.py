"""The feed-forward half of a layer: dense, or a mixture of experts.

Owns `Mlp`, `Gate` and `Moe`. A gate is DeepSeek-V3's noaux_tc: sigmoid scores; the choice, but not the weight, is made with a bias added; groups
compete by the sum of their two best (DeepSeek-V3 report, 2.1.2; reference/inference.md 2.5). Invariant: a token's result does not depend on the
other tokens of the batch (but for the last bits of the sums): no capacity, nothing is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kvfs.inference.model.config import ModelConfig


@dataclass(slots=True)
class Mlp:
    """down(silu(gate(x)) * up(x))"""

    gate_up: torch.Tensor
    """[2 * intermediate, hidden]: gate's rows, then up's."""
    down: torch.Tensor
    """[hidden, intermediate]"""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] -> [T, hidden]"""
        gate, up = F.linear(x, self.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down)


@dataclass(slots=True)
class Gate:
    weight: torch.Tensor
    """[experts, hidden] fp32"""
    bias: torch.Tensor
    """[experts] fp32: e_score_correction_bias"""
    config: ModelConfig

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, hidden] -> experts [T, k] int64 and their weights [T, k] fp32."""
        config = self.config
        scores = F.linear(x.float(), self.weight).sigmoid()
        choice = scores + self.bias
        if config.groups > 1:
            grouped = choice.view(len(x), config.groups, -1)
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(config.groups_kept, dim=-1, sorted=False).indices
            kept = torch.zeros(len(x), config.groups, dtype=torch.bool, device=x.device).scatter_(1, best, True)
            choice = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)
        experts = choice.topk(config.experts_per_token, dim=-1, sorted=False).indices
        weights = scores.gather(1, experts)
        if config.norm_topk:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return experts, weights * config.routed_scale


@dataclass(slots=True)
class Moe:
    gate: Gate
    gate_up: torch.Tensor
    """[experts, 2 * intermediate, hidden]"""
    down: torch.Tensor
    """[experts, hidden, intermediate]"""
    shared: Mlp

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] -> [T, hidden]"""
        experts, weights = self.gate(x)
        return self.routed(x, experts, weights) + self.shared(x)

    def routed(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Rows are sorted by expert, so that each expert is one product of matrices over all of its rows."""
        per_token = experts.shape[1]
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=len(self.down)).tolist()
        token = order // per_token
        rows = x[token]
        parts, start = [], 0
        for expert, count in enumerate(counts):
            if count:
                gate, up = F.linear(rows[start : start + count], self.gate_up[expert]).chunk(2, dim=-1)
                parts.append(F.linear(F.silu(gate) * up, self.down[expert]))
                start += count
        weighted = torch.cat(parts) * weights.flatten()[order][:, None].to(x.dtype)
        # Back in the order of (token, choice) and then summed: the order of a sum must not depend on which other tokens are there.
        back = torch.empty_like(weighted)
        back[order] = weighted
        return back.view(len(x), per_token, -1).sum(1)
