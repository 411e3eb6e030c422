"""A small byte-level tokenizer with special tokens and a chat template, as a checkpoint has them; trained here in a tenth of a second."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from kvfs.inference.http.tokenizer import Tokenizer

SPECIAL = ("<bos>", "<eos>", "<user>", "<assistant>")
VOCABULARY = 400
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}<user>{{ message.content }}"
    "{% elif message.role == 'assistant' %}<assistant>{% generation %}{{ message.content }}{% endgeneration %}<eos>"
    "{% elif message.role == 'system' %}{{ message.content }}{% else %}{{ raise_exception('no role ' + message.role) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    corpus = [Path(__file__).read_text(), Path(__file__).parents[4].joinpath("README.md").read_text(), "größer, naïve, 深度求索, 🦑🦑"]
    made.train_from_iterator(corpus, trainer)
    made.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": "<bos>"},
        "eos_token": "<eos>",
        "pad_token": None,
        "add_bos_token": True,
        "chat_template": TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(checkpoint)
