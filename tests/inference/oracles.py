"""What transformers says: logits and greedy tokens of the small random checkpoints (reference/inference.md, section 4)."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kvfs.inference.model import sample

torch.set_num_threads(1)
_DIRECTORY = tempfile.TemporaryDirectory(prefix="kvfs-oracles-")


@cache
def checkpoint(name: str) -> Path:
    """The directory of a checkpoint with a tokenizer; made once a process."""
    path = Path(_DIRECTORY.name) / name
    sample.make(name, path)
    texts = [file.read_text(encoding="utf-8") for file in sorted((Path(__file__).parents[2] / "docs").glob("*.md"))]
    sample.make_tokenizer(path, texts, sample.SHAPES[name]["vocab_size"])
    return path


@cache
def oracle(path: Path) -> Any:
    from transformers import DeepseekV3ForCausalLM

    return DeepseekV3ForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="eager", attn_implementation="eager").eval()


def tokens(count: int, vocabulary: int = 512, seed: int = 1) -> list[int]:
    return torch.randint(2, vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def logits(path: Path, prompt: list[int]) -> torch.Tensor:
    """[len(prompt), vocab]"""
    return oracle(path)(torch.tensor([prompt])).logits[0]  # type: ignore[no-any-return]


@cache
def _greedy(path: Path, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    model = oracle(path)
    asked = torch.tensor([prompt])
    with torch.no_grad():  # without a mask of its own it takes every token 0, which is also <bos>, for padding
        answer = model.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=-1)
    return tuple(answer[0, len(prompt) :].tolist())


def greedy(path: Path, prompt: list[int], count: int) -> list[int]:
    """The next `count` most likely tokens, one after the other; end-of-sequence does not end them."""
    return list(_greedy(path, tuple(prompt), count))
