"""Checkpoints: sharded files, FP8 weights, what is missing or wrong, and the digest that names a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.inference import oracles

from kvfs.common.errors import InvalidArgument, KvfsError, NotFound
from kvfs.inference.cache.pool import PagePool
from kvfs.inference.model import sample
from kvfs.inference.model.batch import Piece
from kvfs.inference.model.config import ModelConfig
from kvfs.inference.model.deepseek import DeepseekV3, batch_of
from kvfs.inference.model.digest import model_digest

BLOCK = 48
"""Does not divide the sides of micro's weights: blocks at the edges are ragged."""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(oracles.checkpoint("micro"), tmp_path / "copy"))


def change(path: Path, **fields: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **fields}))


def shard(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(weights, reverse=True)
    places = {name: f"model-0000{place % 3 + 1}-of-00003.safetensors" for place, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: weights[name] for name in names if places[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def logits(path: Path) -> torch.Tensor:
    model = DeepseekV3.load(path)
    return model.forward(batch_of([Piece(oracles.tokens(40), 0, [0], True)]), PagePool(model.page_format("fp32"), 1))


def test_sharded_files_are_the_same_model(copy: Path) -> None:
    expected, digest = logits(copy), model_digest(copy)
    shard(copy)
    assert torch.equal(logits(copy), expected)
    assert model_digest(copy) == digest


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As DeepSeek's checkpoints have it: e4m3, and what each block was divided by."""
    rows, columns = (-(-side // BLOCK) for side in weight.shape)
    scales = torch.empty(rows, columns)
    found = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for row in range(rows):
        for column in range(columns):
            part = (slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK))
            scales[row, column] = weight[part].abs().max() / 448
            found[part] = (weight[part] / scales[row, column]).to(torch.float8_e4m3fn)
    return found, scales


def test_fp8_weights_are_multiplied_by_the_scales_of_their_blocks(copy: Path, tmp_path: Path) -> None:
    """The same logits as a checkpoint of the products, in fp32."""
    weights = load_file(copy / "model.safetensors")
    plain = Path(shutil.copytree(copy, tmp_path / "plain"))
    fp8, whole = dict(weights), dict(weights)
    for name, weight in weights.items():
        if name.endswith("_proj.weight") or "kv_a_proj" in name:
            small, scales = quantised(weight)
            fp8[name], fp8[f"{name}_scale_inv"] = small, scales
            whole[name] = torch.stack(
                [torch.stack([small[r, c].float() * scales[r // BLOCK, c // BLOCK] for c in range(weight.shape[1])]) for r in range(weight.shape[0])]
            )
    save_file(fp8, copy / "model.safetensors")
    save_file(whole, plain / "model.safetensors")
    with pytest.raises(InvalidArgument, match="no quantization_config"):
        DeepseekV3.load(copy)
    change(copy, quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"})
    assert torch.allclose(logits(copy), logits(plain), atol=1e-5)
    change(copy, quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [64, 64]})
    with pytest.raises(InvalidArgument, match="scale_inv has the shape"):
        DeepseekV3.load(copy)


def test_what_is_missing_or_wrong_is_named(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")

    def refused(kind: type[KvfsError], match: str) -> None:
        with pytest.raises(kind, match=match):
            DeepseekV3.load(copy)

    missing = dict(weights)
    del missing["model.layers.2.mlp.experts.5.up_proj.weight"]
    save_file(missing, copy / "model.safetensors")
    refused(InvalidArgument, "lacks the tensor model.layers.2.mlp.experts.5.up_proj.weight")
    save_file({**weights, "model.norm.weight": torch.ones(63)}, copy / "model.safetensors")
    refused(InvalidArgument, r"model.norm.weight in .*model.safetensors has the shape \(63,\), and the model needs \(64,\)")
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
    refused(InvalidArgument, "is damaged")
    (copy / "model.safetensors").unlink()
    refused(NotFound, "holds no weights")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "gone.safetensors"}}))
    refused(NotFound, "the download is not complete")
    (copy / "config.json").unlink()
    refused(NotFound, "a checkpoint is a directory with config.json")


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "llama"},
        {"hidden_act": "gelu"},
        {"scoring_func": "softmax"},
        {"attention_bias": True},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 2},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"rope_parameters": {**sample.ROPE, "attention_factor": 1.3}},
        {"rope_parameters": {**sample.ROPE, "truncate": False}},
        {"rope_parameters": "yarn"},
        {"rms_norm_eps": "small"},
        {"n_group": 3},
        {"kv_lora_rank": "many"},
        {"quantization_config": {"quant_method": "awq"}},
        {"quantization_config": ["fp8"]},
    ],
)
def test_another_architecture_is_refused_by_the_name_of_the_field(copy: Path, fields: dict[str, Any]) -> None:
    change(copy, **fields)
    with pytest.raises(InvalidArgument, match="|".join([*fields, "rope_type", "yarn", "equal groups", "of another type"])):
        ModelConfig.load(copy)


def test_the_older_spelling_of_rope_is_read(copy: Path) -> None:
    raw = json.loads((copy / "config.json").read_text())
    expected = ModelConfig.load(copy)
    stated = raw.pop("rope_parameters")
    raw |= {"rope_theta": stated.pop("rope_theta"), "rope_scaling": {**stated, "type": "yarn"}}
    del raw["rope_scaling"]["rope_type"]
    (copy / "config.json").write_text(json.dumps(raw))
    assert ModelConfig.load(copy) == expected


def test_answers_end_as_generation_config_says(copy: Path) -> None:
    """As transformers' generate does: the turns of some models for chat end with another token than their texts."""
    change(copy, eos_token_id=5)
    (copy / "generation_config.json").unlink()
    assert ModelConfig.load(copy).eos == (5,)
    (copy / "generation_config.json").write_text("{}")
    assert ModelConfig.load(copy).eos == (5,)
    (copy / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert ModelConfig.load(copy).eos == (7, 9)
    for damaged, match in (("[", "generation_config"), ('{"eos_token_id": ["<eos>"]}', "of another type")):
        (copy / "generation_config.json").write_text(damaged)
        with pytest.raises(InvalidArgument, match=match):
            ModelConfig.load(copy)


def test_the_digest_tells_models_apart(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs.inference.model.digest.SAMPLE_BYTES", 4096)
    first = model_digest(copy)
    assert model_digest(copy) == first
    change(copy, max_position_embeddings=1234, eos_token_id=[1, 2])
    assert model_digest(copy) == first, "what changes no page"
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.1.mlp.experts.3.down_proj.weight"] += 1e-3
    save_file(weights, copy / "model.safetensors")
    second = model_digest(copy)
    change(copy, routed_scaling_factor=2.4)
    assert len({first, second, model_digest(copy)}) == 3
