"""The model's tokenizer, as its checkpoint has it: text to tokens, tokens to text, messages to the model's own text.

Owns `Tokenizer`: tokenizer.json through the `tokenizers` library, special tokens and the chat template from tokenizer_config.json. Invariants:
decoding what was encoded gives the text back where the tokenizer is lossless; incremental decoding gives what decoding at once gives
(detokenizer.py). Threads may share it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers

from kvfs.common.errors import SetupError
from kvfs.inference.http.chat_template import ChatTemplate
from kvfs.inference.http.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer, bytes_of

SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    def __init__(self, tokenizer: Any, config: dict[str, Any], chat_template: ChatTemplate | None, special_tokens: dict[str, str]) -> None:
        self._tokenizer = tokenizer
        self.chat_template = chat_template
        self.special_tokens = special_tokens
        """By name: bos_token, eos_token, ..."""
        self._special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._begin = tokenizer.token_to_id(special_tokens["bos_token"]) if config.get("add_bos_token") and "bos_token" in special_tokens else None
        self._byte_level = json.loads(tokenizer.to_str())["decoder"].get("type") == "ByteLevel" if tokenizer.decoder is not None else False
        self._bytes_of_token = lru_cache(maxsize=None)(self._bytes)  # bounded by the vocabulary

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """SetupError says what the checkpoint lacks."""
        directory = Path(directory)
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise SetupError(f"{directory} has no tokenizer.json: save it beside the model (`tokenizer.save_pretrained` of a fast tokenizer)")
        config = _read_config(directory / "tokenizer_config.json")
        special = {name: text for name in SPECIAL_NAMES if (text := _token_text(config.get(name))) is not None}
        try:
            made = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise SetupError(f"{file} cannot be read: {error}") from None
        made.no_truncation()
        made.no_padding()
        return cls(made, config, ChatTemplate.find(directory, config, special), special)

    @property
    def size(self) -> int:
        """Tokens it knows, added ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def token_id(self, text: str) -> int | None:
        """Of one token, by its text."""
        number = self._tokenizer.token_to_id(text)
        return None if number is None else int(number)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        if add_special_tokens and self._begin is not None and tokens[:1] != [self._begin]:
            tokens.insert(0, self._begin)
        return tokens

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """Of one answer, token by token."""
        if self._byte_level:
            skipped = self._special if skip_special_tokens else frozenset()
            return ByteDetokenizer(lambda token: b"" if token in skipped else self._bytes_of_token(token))
        return WindowDetokenizer(lambda tokens: self.decode(tokens, skip_special_tokens=skip_special_tokens))

    def _bytes(self, token: int) -> bytes:
        piece = self._tokenizer.id_to_token(token)
        return b"" if piece is None else bytes_of(piece)


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SetupError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise SetupError(f"{file} holds no JSON object")
    return config


def _token_text(value: object) -> str | None:
    """A special token in the configuration is its text, or an object with it."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
