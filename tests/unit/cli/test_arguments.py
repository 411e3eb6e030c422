"""What people write on the command line: sizes, keys, pairs."""

from __future__ import annotations

import hashlib

import click
import pytest

from kvfs.cli.arguments import Size, block_key, pairs


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4497408", 4497408), ("64K", 65536), ("64KiB", 65536), ("64kb", 65536), ("1.5G", 3 << 29), (" 2 TiB ", 2 << 40), ("7B", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert Size().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "K", "-1", "1x", "1.5", "0.3K", "1 K i B", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Size().convert(text, None, None)


def test_keys_are_hex_or_text_and_say_which() -> None:
    plain = block_key("00ff" * 8, text=False)
    assert plain.key == bytes.fromhex("00ff" * 8) and plain.describe() == {"key": "00ff" * 8, "form": "hex"}
    named = block_key("00ff" * 8, text=True)
    assert named.key == hashlib.sha256(b"00ff" * 8).digest() and named.describe()["form"] == "text"
    assert block_key("\udcff", text=True).key == hashlib.sha256(b"\xff").digest()  # an argument that is no UTF-8
    assert len(block_key("A" * 128, text=False).key) == 64
    for wrong in ("00" * 15, "0" * 33, "00" * 65, "zz" * 16, ""):
        with pytest.raises(click.UsageError, match="--text"):
            block_key(wrong, text=False)


def test_pairs() -> None:
    command = click.Command("x", params=[click.Option(["--format"])])
    context = click.Context(command)
    assert pairs(context, command.params[0], ("a=b", "c=d=e", "f=")) == {"a": "b", "c": "d=e", "f": ""}
    for wrong in ("a", "=b"):
        with pytest.raises(click.BadParameter, match="NAME=VALUE"):
            pairs(context, command.params[0], (wrong,))
    with pytest.raises(click.BadParameter, match="a is given twice"):
        pairs(context, command.params[0], ("a=b", "a=c"))
