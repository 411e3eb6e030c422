"""Small random DeepSeek-V3 checkpoints, to try everything without a download: the shapes of reference/inference.md, section 4.

Owns `SHAPES` and `make`. Needs transformers (the `oracle` extra), which initialises and writes the weights in Hugging Face's own layout: what is
served is a checkpoint like any other. The same name and seed give the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvfs.common.errors import InvalidArgument, SetupError

ROPE: Mapping[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
"""The real model's."""
_COMMON: Mapping[str, Any] = {
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "initializer_range": 0.05,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 163840,
    "rope_parameters": ROPE,
}


def _shape(
    vocab: int, hidden: int, dense: int, moe: int, layers: int, heads: int, experts: int, chosen: int, latent: int, q_latent: int, dims: str
) -> dict[str, Any]:
    nope, rope, value = (int(dim) for dim in dims.split("/"))
    return {
        **_COMMON,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": dense,
        "moe_intermediate_size": moe,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "n_routed_experts": experts,
        "num_experts_per_tok": chosen,
        "kv_lora_rank": latent,
        "q_lora_rank": q_latent,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": value,
    }


_TINY = _shape(512, 128, 256, 64, 4, 4, 16, 4, 64, 96, "32/16/32")
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "micro": _shape(512, 64, 128, 32, 3, 4, 8, 2, 32, 48, "16/16/16"),
    "tiny": _TINY,
    "tiny-yarn64": {**_TINY, "max_position_embeddings": 4096, "rope_parameters": {**ROPE, "original_max_position_embeddings": 64}},
    "latent576": _shape(4096, 256, 512, 128, 4, 8, 16, 4, 512, 192, "128/64/128"),
}
"""Arguments of transformers' DeepseekV3Config. tiny-yarn64: YaRN acts within a short prompt. latent576: the real width of a cached row."""
SPECIAL = ("<bos>", "<eos>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}<assistant>{{ message['content'] }}{{ eos_token }}"
    "{% elif message['role'] == 'user' %}<user>{{ message['content'] }}{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make(name: str, directory: str | Path, *, seed: int = 0, **changes: Any) -> None:
    """Write config.json and model.safetensors. `changes`: of the shape (q_lora_rank=None, ...). InvalidArgument for an unknown name, SetupError
    without transformers."""
    if name not in SHAPES:
        raise InvalidArgument(f"there is no shape {name}; there are {', '.join(SHAPES)}")
    try:
        import torch
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise SetupError(f"a random checkpoint is made by transformers, which is not here ({error}): pip install 'kvfs[inference,oracle]'") from None
    logging.disable_progress_bar()
    state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**SHAPES[name], **changes})).float().eval()
        with torch.no_grad():
            # Freshly initialised, all experts are about as likely, and the bias is zero: spread them, so that the gate's rule matters.
            for layer in model.model.layers:
                if hasattr(layer.mlp, "gate") and hasattr(layer.mlp.gate, "e_score_correction_bias"):
                    layer.mlp.gate.weight.normal_(0, 0.3)
                    layer.mlp.gate.e_score_correction_bias.normal_(0, 0.05)
        model.save_pretrained(str(directory))
    finally:
        torch.set_rng_state(state)


def make_tokenizer(directory: str | Path, texts: list[str], vocabulary: int = 512) -> None:
    """Write tokenizer.json and tokenizer_config.json: a byte-level BPE over these texts, ids 0 to 3 the special tokens, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    path = Path(directory)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": CHAT_TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
