"""From tokens to text while the tokens arrive: what has been fed so far, as characters that nothing later can change.

Owns the two detokenizers. Invariants: the pieces of an answer, with `finish()` at its end, are together exactly what the tokenizer makes of all its
tokens at once; no piece ends within a character, so none is ever taken back. Byte-level tokenizers (GPT-2's, DeepSeek's) are decoded byte by byte,
at once and without looking back; any other kind by decoding a window of its last tokens again. It must never raise for a token: one that means
nothing is nothing.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

REPLACEMENT = "\ufffd"
"""Stands for bytes that are no character."""


class Detokenizer(Protocol):
    def feed(self, token: int) -> str: ...

    def finish(self) -> str:
        """What was held back. Nothing is fed after it."""
        ...


@cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable characters of Latin-1 stand for themselves, the other bytes for characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def bytes_of(piece: str) -> bytes:
    """What a byte-level tokenizer's piece stands for; an added token with other characters stands for itself."""
    table = byte_of_character()
    try:
        return bytes([table[character] for character in piece])
    except KeyError:
        return piece.encode()


class ByteDetokenizer:
    def __init__(self, bytes_of_token: Callable[[int], bytes]) -> None:
        self._bytes_of_token = bytes_of_token
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        return self._decoder.decode(self._bytes_of_token(token))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """`decode` must make the same text of tokens whatever came before them, but for the first one; what ends in no character is waited for."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        """Tokens whose text is out, needed for the text of the next ones, ..."""
        self._held: list[int] = []
        """... and those whose text is not."""

    def feed(self, token: int) -> str:
        self._held.append(token)
        text = self._new_text()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._window, self._held = self._held, []
        return text

    def finish(self) -> str:
        return self._new_text() if self._held else ""

    def _new_text(self) -> str:
        return self._decode(self._window + self._held)[len(self._decode(self._window)) :]
