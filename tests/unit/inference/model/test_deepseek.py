"""The model against transformers: logits and greedy tokens, whole prompts, chunks, single tokens, several requests in a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.inference import oracles

from kvfs.inference.cache.format import PAGE_TOKENS
from kvfs.inference.cache.pool import PagePool
from kvfs.inference.model import sample
from kvfs.inference.model.batch import Piece
from kvfs.inference.model.deepseek import DeepseekV3, batch_of

TOLERANCE = 1e-4
LENGTH = {"micro": 256, "tiny": 256, "tiny-yarn64": 200, "latent576": 100}


def pages(count: int, first: int = 0) -> list[int]:
    """Every second page, backwards: nothing may rely on pages that lie side by side."""
    return [first + 2 * place for place in reversed(range(-(-count // PAGE_TOKENS)))]


def run(model: DeepseekV3, pool: PagePool, prompt: list[int], steps: list[int], where: list[int]) -> torch.Tensor:
    """The logits after each step of so many tokens."""
    found, start = [], 0
    for step in steps:
        piece = Piece(prompt[start : start + step], start, where, True)
        found.append(model.forward(batch_of([piece]), pool)[0])
        start += step
    return torch.stack(found)


@pytest.mark.parametrize("name", LENGTH)
def test_logits_are_those_of_transformers(name: str) -> None:
    """A prompt at once, in chunks over page borders, and token by token."""
    path, length = oracles.checkpoint(name), LENGTH[name]
    model = DeepseekV3.load(path)
    prompt = oracles.tokens(length, model.config.vocabulary)
    expected = oracles.logits(path, prompt)
    pool = PagePool(model.page_format("fp32"), 24)
    for steps in ([length], [37, 40, length - 77], [length - 8] + [1] * 8):
        found = run(model, pool, prompt, steps, pages(length))
        ends = torch.tensor(steps).cumsum(0) - 1
        assert (found - expected[ends]).abs().max() < TOLERANCE
        assert found.argmax(-1).tolist() == expected[ends].argmax(-1).tolist()


@pytest.mark.parametrize("name", ["micro", "tiny", "latent576"])
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    path = oracles.checkpoint(name)
    model = DeepseekV3.load(path)
    count = 8 if name == "latent576" else 32
    answer = list(oracles.tokens(64, model.config.vocabulary))
    expected = oracles.greedy(path, answer, count)
    pool = PagePool(model.page_format("fp32"), 4)
    start = 0
    while len(answer) < 64 + count:
        piece = Piece(answer[start:], start, [3, 1], True)
        start = len(answer)
        answer.append(int(model.forward(batch_of([piece]), pool).argmax()))
    assert answer[64:] == expected


def test_requests_of_different_lengths_share_a_batch() -> None:
    """Decoding and prefilling side by side: each row is what it is alone."""
    path = oracles.checkpoint("micro")
    model = DeepseekV3.load(path)
    pool = PagePool(model.page_format("fp32"), 64)
    prompts = [oracles.tokens(length, seed=length) for length in (1, 3, 64, 65, 130, 200)]
    where = [pages(len(prompt), first) for prompt, first in zip(prompts, (0, 2, 4, 1, 21, 41), strict=True)]
    pieces = [Piece(prompt[:-1], 0, own, False) for prompt, own in zip(prompts, where, strict=True) if len(prompt) > 1]
    model.forward(batch_of(pieces), pool)
    late = oracles.tokens(70, seed=5)
    pieces = [Piece(prompt[-1:], len(prompt) - 1, own, True) for prompt, own in zip(prompts, where, strict=True)]
    pieces.insert(2, Piece(late, 0, [62, 63], True))
    prompts.insert(2, late)
    found = model.forward(batch_of(pieces), pool)
    for row, prompt in zip(found, prompts, strict=True):
        assert (row - oracles.logits(path, prompt)[-1]).abs().max() < TOLERANCE


def test_what_lies_behind_a_request_never_reaches_it() -> None:
    """A failed read may leave anything in a page, also what is no number."""
    path = oracles.checkpoint("micro")
    model = DeepseekV3.load(path)
    pool = PagePool(model.page_format("fp32"), 4)
    for page in range(4):
        pool.buffer(page)[:] = b"\xff" * len(pool.buffer(page))
    prompts = [oracles.tokens(70), oracles.tokens(10, seed=2), oracles.tokens(40, seed=3)]  # 70 and 40 are computed together, padded
    where = [[0, 1], [2], [3]]
    model.forward(batch_of([Piece(prompt[:-1], 0, own, False) for prompt, own in zip(prompts, where, strict=True)]), pool)
    found = model.forward(batch_of([Piece(prompt[-1:], len(prompt) - 1, own, True) for prompt, own in zip(prompts, where, strict=True)]), pool)
    for row, prompt in zip(found, prompts, strict=True):
        assert (row - oracles.logits(path, prompt)[-1]).abs().max() < TOLERANCE


def test_both_ways_of_attention_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    path = oracles.checkpoint("tiny")
    model = DeepseekV3.load(path)
    pool = PagePool(model.page_format("fp32"), 24)
    prompt = oracles.tokens(200)
    found = []
    for pays in (False, True):
        monkeypatch.setattr("kvfs.inference.model.attention.Attention._expansion_pays", lambda self, queries, pays=pays: pays)
        for scores in (1 << 24, 5000):
            monkeypatch.setattr("kvfs.inference.model.attention.SCORES_MAX", scores)
            found.append(run(model, pool, prompt, [120, 80], pages(200)))
    for other in found[1:]:
        assert (other - found[0]).abs().max() < TOLERANCE


def test_queries_without_a_low_rank_and_a_plain_rope(tmp_path: Path) -> None:
    """As DeepSeek-V2-Lite has them."""
    sample.make("micro", tmp_path, q_lora_rank=None, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    model = DeepseekV3.load(tmp_path)
    prompt = oracles.tokens(100)
    found = run(model, PagePool(model.page_format("fp32"), 8), prompt, [100], pages(100))
    assert (found[0] - oracles.logits(tmp_path, prompt)[-1]).abs().max() < TOLERANCE


@pytest.mark.parametrize("left_out", [("mscale",), ("mscale_all_dim",), ("mscale", "mscale_all_dim")])
def test_a_yarn_that_leaves_out_its_scales(left_out: tuple[str, ...], tmp_path: Path) -> None:
    stated = {**sample.SHAPES["tiny-yarn64"]["rope_parameters"], "mscale": 0.7}
    sample.make("micro", tmp_path, rope_parameters={name: value for name, value in stated.items() if name not in left_out})
    model = DeepseekV3.load(tmp_path)
    prompt = oracles.tokens(100)
    found = run(model, PagePool(model.page_format("fp32"), 8), prompt, [100], pages(100))
    assert (found[0] - oracles.logits(tmp_path, prompt)[-1]).abs().max() < TOLERANCE


def test_layers_are_announced_in_order() -> None:
    """So that their pages may be waited for."""
    model = DeepseekV3.load(oracles.checkpoint("micro"))
    seen: list[int] = []
    model.forward(batch_of([Piece([5, 6], 0, [0], True)]), PagePool(model.page_format("fp32"), 1), seen.append)
    assert seen == [0, 1, 2]
