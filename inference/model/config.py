"""What a checkpoint's config.json says of the model, under the names the code uses.

Owns `ModelConfig`. Invariants: every field the forward pass depends on is read from the file or has DeepSeek-V3's meaning by default; a model that
this code would compute differently than its authors (another architecture, gate, activation, rope type) is refused with the field's name.
Fields: reference/inference.md, section 2.1; both Hugging Face spellings are read (rope_parameters of transformers 5, rope_scaling of 4).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfs.common.errors import InvalidArgument, NotFound

ROPE_LAYOUT = "half"
"""Of the rotated key part in pages: the even dimensions, then the odd ones, as transformers keeps it (DeepSeek's own code interleaves them)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    theta: float
    factor: float = 1.0
    """YaRN's; 1: plain rope."""
    original_context: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    """0: not stated, and the same for the next one."""
    mscale_all_dim: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    vocabulary: int
    hidden: int
    dense_intermediate: int
    moe_intermediate: int
    layers: int
    heads: int
    experts: int
    shared_experts: int
    experts_per_token: int
    groups: int
    groups_kept: int
    routed_scale: float
    norm_topk: bool
    dense_layers: int
    latent: int
    """kv_lora_rank"""
    q_latent: int | None
    """q_lora_rank; None: queries are projected at once."""
    nope: int
    rope_dim: int
    value: int
    context: int
    norm_eps: float
    rope: Rope
    eos: tuple[int, ...]
    bos: int | None
    fp8_block: tuple[int, int] | None
    """Of a checkpoint in FP8: rows and columns under one scale."""

    @classmethod
    def load(cls, directory: str | Path) -> ModelConfig:
        """Of a checkpoint's directory. NotFound without one, InvalidArgument for a model that this is not the code for."""
        path, generation = Path(directory) / "config.json", Path(directory) / "generation_config.json"
        if not path.exists():
            raise NotFound(f"{path} is not there: a checkpoint is a directory with config.json, tokenizer.json and *.safetensors")
        raw = _read(path)
        # Where both say how answers end, transformers takes the one for generation: a model for chat ends its turns with another token.
        eos = _read(generation).get("eos_token_id") if generation.exists() else None
        try:
            return _parse(raw if eos is None else {**raw, "eos_token_id": eos}, str(path))
        except (TypeError, ValueError, AttributeError) as error:  # what every checkpoint has as a number is something else
            raise InvalidArgument(f"{path} has a field of another type than any checkpoint: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InvalidArgument(f"{path} cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise InvalidArgument(f"{path} is no JSON object")
    return raw


def _parse(raw: Mapping[str, Any], path: str) -> ModelConfig:
    def refuse(name: str, allowed: str) -> InvalidArgument:
        return InvalidArgument(f"{path}: {name} is {raw.get(name)!r}, and this code computes {allowed} only")

    def number(name: str, default: int | None = None) -> int:
        value = raw.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise InvalidArgument(f"{path}: {name} is {value!r}: a whole number is needed")
        return value

    if raw.get("model_type") != "deepseek_v3":
        raise refuse("model_type", "deepseek_v3")
    for name, only in (("hidden_act", "silu"), ("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if raw.get(name, only) != only:
            raise refuse(name, only)
    for name in ("attention_bias", "tie_word_embeddings"):
        if raw.get(name, False):
            raise refuse(name, "false")
    if not raw.get("rope_interleave", True):
        raise refuse("rope_interleave", "true")
    if raw.get("moe_layer_freq", 1) != 1:
        raise refuse("moe_layer_freq", "1")
    heads = number("num_attention_heads")
    if number("num_key_value_heads", heads) != heads:
        raise refuse("num_key_value_heads", "as many as num_attention_heads")
    eos = raw.get("eos_token_id")
    config = ModelConfig(
        vocabulary=number("vocab_size"),
        hidden=number("hidden_size"),
        dense_intermediate=number("intermediate_size"),
        moe_intermediate=number("moe_intermediate_size"),
        layers=number("num_hidden_layers"),
        heads=heads,
        experts=number("n_routed_experts", raw.get("num_local_experts")),
        shared_experts=number("n_shared_experts", 1),
        experts_per_token=number("num_experts_per_tok"),
        groups=number("n_group", 1),
        groups_kept=number("topk_group", 1),
        routed_scale=float(raw.get("routed_scaling_factor", 1.0)),
        norm_topk=bool(raw.get("norm_topk_prob", True)),
        dense_layers=number("first_k_dense_replace", 0),
        latent=number("kv_lora_rank"),
        q_latent=None if raw.get("q_lora_rank") is None else number("q_lora_rank"),
        nope=number("qk_nope_head_dim"),
        rope_dim=number("qk_rope_head_dim"),
        value=number("v_head_dim"),
        context=number("max_position_embeddings"),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=_rope(raw, path),
        eos=() if eos is None else tuple(int(token) for token in (eos if isinstance(eos, list) else [eos])),
        bos=raw.get("bos_token_id"),
        fp8_block=_fp8_block(raw, path),
    )
    if config.groups < 1 or config.experts % config.groups:
        raise InvalidArgument(f"{path}: {config.experts} experts do not fall into {config.groups} equal groups")
    return config


def _rope(raw: Mapping[str, Any], path: str) -> Rope:
    stated = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = float(stated.get("rope_theta", raw.get("rope_theta", 10000.0)))
    kind = stated.get("rope_type", stated.get("type", "default"))
    if kind == "default":
        return Rope(theta=theta)
    if kind != "yarn":
        raise InvalidArgument(f"{path}: rope_type is {kind!r}, and this code computes yarn and default only")
    for name, only in (("attention_factor", None), ("truncate", True), ("partial_rotary_factor", 1.0)):
        if stated.get(name, only) != only:
            raise InvalidArgument(f"{path}: rope has a {name} of {stated[name]!r}, and this code computes yarn without one only")
    try:
        return Rope(
            theta=theta,
            factor=float(stated["factor"]),
            original_context=int(stated["original_max_position_embeddings"]),
            beta_fast=float(stated.get("beta_fast", 32)),
            beta_slow=float(stated.get("beta_slow", 1)),
            mscale=float(stated.get("mscale") or 0.0),
            mscale_all_dim=float(stated.get("mscale_all_dim") or 0.0),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidArgument(f"{path}: the parameters of yarn are not complete: {error}") from None


def _fp8_block(raw: Mapping[str, Any], path: str) -> tuple[int, int] | None:
    stated = raw.get("quantization_config")
    if not stated:
        return None
    if stated.get("quant_method") != "fp8" or stated.get("fmt", "e4m3") != "e4m3":
        raise InvalidArgument(f"{path}: quantization_config is {stated.get('quant_method')!r}: this code reads fp8 (e4m3 with weight_scale_inv) only")
    block = stated.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(side, int) and side > 0 for side in block)):
        raise InvalidArgument(f"{path}: weight_block_size is {block!r}: two whole numbers are needed")
    return block[0], block[1]
