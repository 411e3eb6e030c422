"""Root mean square layer normalisation (Zhang and Sennrich 2019), computed in fp32."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """[..., d] -> [..., d]: x / sqrt(mean(x^2) + eps) * weight."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
