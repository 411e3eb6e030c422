"""The whole model: tokens of a batch in, logits out.

Owns `DeepseekV3` and how it is put together from a checkpoint. Invariants: one class computes on any device in any type; a row's logits depend on its
request alone (its tokens and pages), up to the rounding of sums; the latents of a batch's rows are in their slots when `forward` is over.
Names of weights: reference/inference.md 2.2. Layers behind num_hidden_layers (multi-token prediction) are not read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from kvfs.inference.cache.format import PAGE_TOKENS, PageFormat
from kvfs.inference.cache.pool import PagePool
from kvfs.inference.model.attention import Attention
from kvfs.inference.model.batch import Batch, Piece
from kvfs.inference.model.checkpoint import Checkpoint
from kvfs.inference.model.config import ModelConfig
from kvfs.inference.model.moe import Gate, Mlp, Moe
from kvfs.inference.model.norm import rms_norm
from kvfs.inference.model.plan import plan
from kvfs.inference.model.rope import Rotation, softmax_scale

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(slots=True)
class Layer:
    attention: Attention
    mlp: Mlp | Moe
    input_norm: torch.Tensor
    mlp_norm: torch.Tensor


class DeepseekV3:
    def __init__(self, config: ModelConfig, embedding: torch.Tensor, layers: list[Layer], norm: torch.Tensor, head: torch.Tensor) -> None:
        self.config = config
        self.device = embedding.device
        self.dtype = embedding.dtype
        self._embedding = embedding
        self._layers = layers
        self._norm = norm
        self._head = head
        self._rotation = Rotation(config, self.device)

    @classmethod
    def load(cls, directory: str | Path, *, device: str = "cpu", dtype: str = "fp32") -> DeepseekV3:
        """From a checkpoint's directory. NotFound, InvalidArgument: it is not there, incomplete, or of another architecture."""
        config = ModelConfig.load(directory)
        return _Builder(config, Checkpoint(directory, config.fp8_block), torch.device(device), DTYPES[dtype]).model()

    def page_format(self, dtype: str) -> PageFormat:
        return PageFormat(dtype, self.config.layers, self.config.latent, self.config.rope_dim)

    def forward(self, batch: Batch, pool: PagePool, before_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        """[W, vocab] fp32: logits after the rows that are wanted. `before_layer` is called with each layer's number before its pages are read."""
        eps = self.config.norm_eps
        with torch.inference_mode():
            x = F.embedding(batch.tokens, self._embedding)
            angles = self._rotation.angles(batch.positions, x.dtype)
            planned = plan(batch, self.config.heads)
            for number, layer in enumerate(self._layers):
                if before_layer is not None:
                    before_layer(number)
                x = x + layer.attention(rms_norm(x, layer.input_norm, eps), planned, angles, pool)
                x = x + layer.mlp(rms_norm(x, layer.mlp_norm, eps))
            return F.linear(rms_norm(x[batch.wanted], self._norm, eps), self._head).float()


def batch_of(pieces: list[Piece], device: torch.device | str = "cpu") -> Batch:
    """The tensors of a step."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    wanted: list[int] = []
    for piece in pieces:
        end = piece.start + len(piece.tokens)
        tokens += piece.tokens
        positions += range(piece.start, end)
        slots += [piece.pages[place // PAGE_TOKENS] * PAGE_TOKENS + place % PAGE_TOKENS for place in range(piece.start, end)]
        if piece.logits:
            wanted.append(len(tokens) - 1)
    made = torch.tensor([tokens, positions, slots], device=device)
    return Batch(pieces, made[0], made[1], made[2], torch.tensor(wanted, dtype=torch.int64, device=device))


class _Builder:
    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._device = device
        self._dtype = dtype

    def _get(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._checkpoint.get(name, shape, dtype or self._dtype).to(self._device)

    def model(self) -> DeepseekV3:
        config = self._config
        layers = [self._layer(number, f"model.layers.{number}") for number in range(config.layers)]
        return DeepseekV3(
            config,
            self._get("model.embed_tokens.weight", config.vocabulary, config.hidden),
            layers,
            self._get("model.norm.weight", config.hidden),
            self._get("lm_head.weight", config.vocabulary, config.hidden),
        )

    def _layer(self, number: int, name: str) -> Layer:
        config = self._config
        return Layer(
            self._attention(number, f"{name}.self_attn"),
            self._mlp(f"{name}.mlp", config.dense_intermediate) if number < config.dense_layers else self._moe(f"{name}.mlp"),
            self._get(f"{name}.input_layernorm.weight", config.hidden),
            self._get(f"{name}.post_attention_layernorm.weight", config.hidden),
        )

    def _attention(self, number: int, name: str) -> Attention:
        config = self._config
        wide = config.heads * (config.nope + config.rope_dim)
        kv_b = self._get(f"{name}.kv_b_proj.weight", config.heads * (config.nope + config.value), config.latent)
        up_k, up_v = kv_b.view(config.heads, config.nope + config.value, config.latent).split([config.nope, config.value], dim=1)
        low = config.q_latent
        return Attention(
            config=config,
            layer=number,
            scale=softmax_scale(config),
            q_a=None if low is None else self._get(f"{name}.q_a_proj.weight", low, config.hidden),
            q_a_norm=None if low is None else self._get(f"{name}.q_a_layernorm.weight", low),
            q_b=self._get(f"{name}.q_proj.weight", wide, config.hidden) if low is None else self._get(f"{name}.q_b_proj.weight", wide, low),
            kv_a=self._get(f"{name}.kv_a_proj_with_mqa.weight", config.latent + config.rope_dim, config.hidden),
            kv_a_norm=self._get(f"{name}.kv_a_layernorm.weight", config.latent),
            up_k=up_k.contiguous(),
            up_v=up_v.contiguous(),
            out=self._get(f"{name}.o_proj.weight", config.hidden, config.heads * config.value),
        )

    def _mlp(self, name: str, intermediate: int) -> Mlp:
        hidden = self._config.hidden
        up = [self._get(f"{name}.{part}_proj.weight", intermediate, hidden) for part in ("gate", "up")]
        return Mlp(torch.cat(up), self._get(f"{name}.down_proj.weight", hidden, intermediate))

    def _moe(self, name: str) -> Moe:
        config = self._config
        gate = Gate(
            self._get(f"{name}.gate.weight", config.experts, config.hidden, dtype=torch.float32),
            self._get(f"{name}.gate.e_score_correction_bias", config.experts, dtype=torch.float32),
            config,
        )
        gate_up = torch.empty(config.experts, 2 * config.moe_intermediate, config.hidden, dtype=self._dtype, device=self._device)
        down = torch.empty(config.experts, config.hidden, config.moe_intermediate, dtype=self._dtype, device=self._device)
        for number in range(config.experts):  # one at a time: the experts are nearly all of the weights
            expert = self._mlp(f"{name}.experts.{number}", config.moe_intermediate)
            gate_up[number], down[number] = expert.gate_up, expert.down
        return Moe(gate, gate_up, down, self._mlp(f"{name}.shared_experts", config.moe_intermediate * config.shared_experts))
