"""The bytes of a page: what 64 tokens' latents are in memory, on the wire and on disk, which is the same.

Owns `PageFormat`. Invariants: a page is layer-major, layer l at l * layer_bytes, within it token t at t * row_bytes; a row is the normed latent
(kv_lora_rank values) and then the rotated key part (qk_rope_head_dim values), so that one page is one block of a KV-cache space and some layers of it
are one range (reference/inference.md, section 3). fp8 is FlashMLA's "fp8 with scale": latent as e4m3, one fp32 scale per 128 values (a power of two),
rope part as bf16: 656 bytes for DeepSeek-V3. This module must never import torch: the router may ask how large pages are.
"""

from __future__ import annotations

from dataclasses import dataclass

PAGE_TOKENS = 64
FP8_TILE = 128
_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, slots=True)
class PageFormat:
    dtype: str
    """fp32, bf16 or fp8."""
    layers: int
    latent: int
    """kv_lora_rank."""
    rope: int
    """qk_rope_head_dim."""

    @property
    def tiles(self) -> int:
        """fp8: scales of one row."""
        return -(-self.latent // FP8_TILE)

    @property
    def row_bytes(self) -> int:
        """One token of one layer."""
        if self.dtype == "fp8":
            return self.latent + 4 * self.tiles + 2 * self.rope
        return (self.latent + self.rope) * _BYTES[self.dtype]

    @property
    def layer_bytes(self) -> int:
        """One layer of one page."""
        return PAGE_TOKENS * self.row_bytes

    @property
    def page_bytes(self) -> int:
        return self.layers * self.layer_bytes
