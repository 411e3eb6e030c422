"""Rotary position embedding with YaRN, for interleaved pairs.

Owns `Rotation`. The rotated vector comes out with the even dimensions first, then the odd ones ("half"; config.ROPE_LAYOUT): scores are the same as
in DeepSeek's own interleaved form, stored keys are not. Formulas: YaRN (Peng et al. 2023), section 3; reference/inference.md 2.4.
"""

from __future__ import annotations

from math import ceil, floor, log, pi

import torch

from kvfs.inference.model.config import ModelConfig, Rope


def inverse_frequencies(rope: Rope, dim: int) -> torch.Tensor:
    """[dim / 2] fp32: radians a position, of each pair of dimensions."""
    pairs = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    plain = rope.theta**-pairs
    if rope.factor == 1.0:
        return plain

    def corrected(turns: float) -> float:
        return dim * log(rope.original_context / (turns * 2 * pi)) / (2 * log(rope.theta))

    low, high = max(floor(corrected(rope.beta_fast)), 0), min(ceil(corrected(rope.beta_slow)), dim - 1)
    span = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return plain * (1 - ramp) + plain / rope.factor * ramp


def softmax_scale(config: ModelConfig) -> float:
    """What scores are multiplied by."""
    scale = (config.nope + config.rope_dim) ** -0.5
    if config.rope.mscale_all_dim:
        scale *= _attention_factor(config.rope.factor, config.rope.mscale_all_dim) ** 2
    return float(scale)


def _attention_factor(factor: float, mscale: float) -> float:
    return 0.1 * mscale * log(factor) + 1.0 if factor > 1 else 1.0


class Rotation:
    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._frequencies = inverse_frequencies(config.rope, config.rope_dim).to(device)
        rope = config.rope
        if rope.mscale and rope.mscale_all_dim:
            self._factor = _attention_factor(rope.factor, rope.mscale) / _attention_factor(rope.factor, rope.mscale_all_dim)
        else:
            self._factor = _attention_factor(rope.factor, 1.0)

    def angles(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, [T, dim / 2] each, of positions [T]."""
        angle = positions.float()[:, None] * self._frequencies
        return (angle.cos() * self._factor).to(dtype), (angle.sin() * self._factor).to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x: [T, ..., dim] in interleaved pairs; cos and sin broadcast against [T, ..., dim / 2]. Comes out as even dimensions, then odd ones."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
