"""Which model it is: 16 bytes that name the weights and how they are used, so that two models never share a cached page.

Owns `model_digest`. Over every tensor, by name: type, shape and content, and over the fields of config.json that change what is computed. Content is
taken whole up to SAMPLE_BYTES a tensor, beyond that in SAMPLES pieces spread evenly over it: a checkpoint of 671 B parameters is named in seconds,
and a fine-tuned one differs in its sampled pieces as everywhere else. How the tensors are spread over files does not matter. The digest is
BLAKE2b-16, person "kvfs-model-v1".
"""

from __future__ import annotations

from dataclasses import fields
from hashlib import blake2b
from pathlib import Path

import torch

from kvfs.inference.model.checkpoint import Checkpoint
from kvfs.inference.model.config import ModelConfig

SAMPLE_BYTES = 1 << 20
SAMPLES = 16
_NOT_COMPUTED = {"eos", "bos", "context"}
"""Where answers end and how long they may be changes nothing in a page."""


def model_digest(directory: str | Path) -> bytes:
    """16 bytes. Errors as those of DeepseekV3.load."""
    config = ModelConfig.load(directory)
    checkpoint = Checkpoint(directory, config.fp8_block)
    state = blake2b(digest_size=16, person=b"kvfs-model-v1")
    for field in fields(config):
        if field.name not in _NOT_COMPUTED:
            _feed(state, field.name, getattr(config, field.name))
    for name in sorted(checkpoint.places):
        tensor = checkpoint.raw(name)
        _feed(state, name, str(tensor.dtype), tuple(tensor.shape))
        content = tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
        for piece in _sampled(content):
            state.update(memoryview(piece.numpy()))
    return state.digest()


def _feed(state: blake2b, *values: object) -> None:
    text = repr(values).encode()
    state.update(len(text).to_bytes(4, "little") + text)


def _sampled(content: torch.Tensor) -> list[torch.Tensor]:
    """[bytes] uint8, or parts of it."""
    size = len(content)
    if size <= SAMPLE_BYTES:
        return [content]
    length = SAMPLE_BYTES // SAMPLES
    return [content[start : start + length] for start in ((size - length) * place // (SAMPLES - 1) for place in range(SAMPLES))]
