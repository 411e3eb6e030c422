"""What people write on a command line and what it means: sizes with a unit, keys of KV-cache blocks, NAME=VALUE pairs.

A wrong one is click's usage error: it names the option or argument and says how it is written. This module must never do I/O.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from typing import Any

import click

from kvfs.kvcache.keys import KEY_BYTES_MAX, KEY_BYTES_MIN

UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT]?)(?:i?B)?)", re.IGNORECASE)
_HEX = re.compile(r"[0-9a-fA-F]+")


class Size(click.ParamType[int]):
    """Bytes: a number, or one with K, M, G or T (KiB and so on: powers of 1024)."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = _SIZE.fullmatch(str(value).strip())
        if found is None:
            self.fail(f"{value!r} is no size: write bytes, or a number with K, M, G or T (powers of 1024), as 64K or 1.5GiB", param, ctx)
        size = float(found[1]) * (1 << UNITS[found[2].upper()])
        if size != int(size):
            self.fail(f"{value!r} is no whole number of bytes", param, ctx)
        return int(size)


@dataclass(frozen=True, slots=True)
class BlockKey:
    """A key as a person gave it."""

    written: str
    key: bytes
    form: str
    """ "hex" or "text"."""

    def describe(self) -> dict[str, str]:
        return {"key": self.key.hex(), "form": self.form} | ({"text": self.written} if self.form == "text" else {})


def block_key(written: str, text: bool) -> BlockKey:
    """`text`: any text, whose SHA-256 is the key; else the key itself in hexadecimal."""
    if text:
        return BlockKey(written, hashlib.sha256(os.fsencode(written)).digest(), "text")
    digits = len(written)
    if _HEX.fullmatch(written) is None or digits % 2 or not 2 * KEY_BYTES_MIN <= digits <= 2 * KEY_BYTES_MAX:
        raise click.UsageError(
            f"the key {written!r} is not {KEY_BYTES_MIN} to {KEY_BYTES_MAX} bytes in hexadecimal (two digits each); with --text any text is a key"
        )
    return BlockKey(written, bytes.fromhex(written), "hex")


def pairs(context: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Callback of an option that is given as NAME=VALUE any number of times."""
    found: dict[str, str] = {}
    for value in values:
        name, equals, content = value.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{value!r} is not NAME=VALUE", context, param)
        if name in found:
            raise click.BadParameter(f"{name} is given twice: {found[name]!r} and {content!r}", context, param)
        found[name] = content
    return found
