"""Cached rows in bf16 and FP8: their bytes, and the logits over them, against a reference that rounds the latents by itself."""

from __future__ import annotations

from math import ceil, log2

import pytest
import torch
from tests.inference import oracles

from kvfs.inference.cache.format import PageFormat
from kvfs.inference.cache.pool import PagePool, pack_fp8
from kvfs.inference.model.batch import Piece
from kvfs.inference.model.deepseek import DeepseekV3, batch_of


def rounded(latent: torch.Tensor, rope: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Value by value, as the formats are written down (reference/inference.md 2.7 and 3)."""
    if dtype == "bf16":
        return latent.bfloat16().float(), rope.bfloat16().float()
    found = torch.empty_like(latent)
    for row in range(len(latent)):
        for start in range(0, latent.shape[1], 128):
            part = latent[row, start : start + 128]
            scale = 2.0 ** ceil(log2(max(float(part.abs().max()) / 448, 1e-4)))
            found[row, start : start + 128] = (part / scale).to(torch.float8_e4m3fn).float() * scale
    return found, rope.bfloat16().float()


def test_a_row_of_the_real_model_has_656_bytes() -> None:
    generator = torch.Generator().manual_seed(3)
    latent, rope = torch.randn(5, 512, generator=generator), torch.randn(5, 64, generator=generator)
    latent[1, 130] = 1000.0
    latent[2] = 0.0
    format = PageFormat("fp8", 61, 512, 64)
    assert (format.row_bytes, format.page_bytes) == (656, 61 * 41_984)
    assert (PageFormat("bf16", 61, 512, 64).layer_bytes, PageFormat("bf16", 61, 512, 64).page_bytes) == (73_728, 4_497_408)
    rows = pack_fp8(latent, rope)
    assert rows.shape == (5, 656)
    for row in range(5):
        scales = rows[row, 512:528].clone().view(torch.float32)
        for tile in range(4):
            part = latent[row, tile * 128 : tile * 128 + 128]
            assert scales[tile] == 2.0 ** ceil(log2(max(float(part.abs().max()) / 448, 1e-4)))
            assert torch.equal(rows[row, tile * 128 : tile * 128 + 128].view(torch.float8_e4m3fn), (part / scales[tile]).to(torch.float8_e4m3fn))
        assert torch.equal(rows[row, 528:].clone().view(torch.bfloat16), rope[row].bfloat16())


class Rounding(PagePool):
    """An fp32 pool into which rounded values are written."""

    dtype = "bf16"

    def write(self, layer: int, slots: tuple[torch.Tensor, torch.Tensor], latent: torch.Tensor, rope: torch.Tensor) -> None:
        super().write(layer, slots, *rounded(latent, rope, self.dtype))


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("name", ["micro", "latent576"])
def test_logits_over_a_smaller_cache_are_those_of_rounded_latents(name: str, dtype: str) -> None:
    model = DeepseekV3.load(oracles.checkpoint(name))
    prompt = oracles.tokens(70, model.config.vocabulary)
    real = PagePool(model.page_format(dtype), 2)
    reference = Rounding(model.page_format("fp32"), 2)
    reference.dtype = dtype
    for start, end in ((0, 66), (66, 69), (69, 70)):
        batch = batch_of([Piece(prompt[start:end], start, [1, 0], True)])
        assert (model.forward(batch, real) - model.forward(batch, reference)).abs().max() < 1e-5
    for layer in range(model.config.layers):
        pages = torch.tensor([1, 0])
        assert torch.equal(real.gather(layer, pages, 70), reference.gather(layer, pages, 70))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
def test_a_page_moves_to_another_pool_as_bytes(dtype: str) -> None:
    """What the store does with it."""
    format = PageFormat(dtype, 3, 200, 16)
    one, other = PagePool(format, 3), PagePool(format, 2)
    latent, rope = torch.randn(70, 200), torch.randn(70, 16)
    slots = (torch.arange(70) // 64 + 1, torch.arange(70) % 64)
    both, second = torch.tensor([1, 2]), torch.tensor([2])
    for layer in range(3):
        one.write(layer, slots, latent + layer, rope)
    for mine, theirs in ((1, 1), (2, 0)):
        assert len(one.buffer(mine)) == format.page_bytes
        other.buffer(theirs)[:] = one.buffer(mine)
    assert torch.equal(one.to_host([1, 2]), other.to_host([1, 0]))
    for layer in range(3):
        assert torch.equal(one.gather(layer, both, 70), other.gather(layer, torch.tensor([1, 0]), 70))
        padded = one.gather_padded(layer, torch.tensor([[1, 2], [2, 2]]), 70, torch.arange(128 + 6, 128 + 70))
        assert torch.equal(padded[0], one.gather(layer, both, 70))
        assert torch.equal(padded[1, :6], one.gather(layer, second, 6)) and not padded[1, 6:].any()
    one.clear_tail(2, 6)
    assert not one.gather(2, second, 64)[6:].any() and one.gather(2, second, 6).any()
