"""Keys and chains: against bytes put together by hand, and against each other."""

from __future__ import annotations

import hashlib
import random
import struct
from array import array
from pathlib import Path
from typing import Any

import pytest

from kvfs.common.errors import InvalidArgument
from kvfs.kvcache import keys


def blake(data: bytes, person: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16, person=person).digest()


def test_a_key_of_16_bytes_is_its_own_digest() -> None:
    assert keys.digest(bytes(range(16))) == bytes(range(16))
    for size in (17, 32, 64):
        assert keys.digest(b"k" * size) == blake(b"k" * size, b"kvfs-block")


@pytest.mark.parametrize("size", [0, 1, 15, 65, 1000])
def test_a_key_of_the_wrong_size_is_named(size: int) -> None:
    with pytest.raises(InvalidArgument, match=f"key 1: a key of {size} bytes"):
        keys.digests([b"k" * 16, b"k" * size])


def test_keys_that_can_be_read_only_once() -> None:
    with pytest.raises(InvalidArgument, match="a list of them"):
        keys.digests(key for key in [b"k" * 16])  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="a list of them"):
        keys.digests(None)  # type: ignore[arg-type]


def test_a_key_that_is_no_bytes() -> None:
    with pytest.raises(InvalidArgument, match="key 0 is a str"):
        keys.digests(["k" * 16])  # type: ignore[list-item]


def test_our_chain_is_what_its_description_says() -> None:
    tokens = list(range(100, 110))
    parent = blake(b"tenant", b"kvfs-salt-v1")
    first = blake(parent + struct.pack("<4I", *tokens[:4]), b"kvfs-chain-v1")
    second = blake(first + struct.pack("<4I", *tokens[4:8]), b"kvfs-chain-v1")
    assert keys.chain(tokens, 4, salt=b"tenant") == [first, second]  # two tokens are left over
    assert keys.chain(tokens[4:], 4, parent=first) == [second]
    assert keys.chain(tokens[:3], 4) == []
    assert keys.seed(b"tenant") == parent
    assert keys.unfinished(first, tokens[4:6]) == blake(first + struct.pack("<2I", *tokens[4:6]), b"kvfs-tail-v1")


def test_the_worked_example_of_the_document() -> None:
    text = (Path(__file__).parents[3] / "docs" / "format.md").read_text()
    first = keys.chain([1, 2, 3, 4, 5], 4)[0]
    assert f"{keys.seed().hex()}  # parent of the first block" in text
    assert f"{first.hex()}  # key and digest of tokens 1 2 3 4" in text
    assert f"{keys.unfinished(first, [5]).hex()}  # key of the unfinished block behind it, with token 5" in text


def test_prompts_share_keys_exactly_as_far_as_they_are_equal() -> None:
    chance = random.Random(1)
    one = [chance.randrange(1 << 32) for _ in range(640)]
    for split in (0, 1, 63, 64, 65, 639):
        two = list(one)
        two[split] ^= 1
        same = [a == b for a, b in zip(keys.chain(one, 64), keys.chain(two, 64), strict=True)]
        assert same == [True] * (split // 64) + [False] * (10 - split // 64)
    assert not set(keys.chain(one, 64)) & set(keys.chain(one, 64, salt=b"x"))
    assert not set(keys.chain(one, 64)) & set(keys.chain(one, 32))


def test_tokens_in_any_form() -> None:
    tokens = [1, 2, 2**32 - 1, 7]
    expected = keys.chain(tokens, 2)
    assert keys.chain(tuple(tokens), 2) == keys.chain(array("I", tokens), 2) == keys.chain(iter(tokens), 2) == expected
    numpy = pytest.importorskip("numpy")
    for kind in ("uint32", "int64"):
        assert keys.chain(numpy.array(tokens, dtype=kind), 2) == expected


@pytest.mark.parametrize("bad", [[-1], [2**32], [1.5], ["a"], [None]])
def test_what_is_no_token(bad: list[Any]) -> None:
    with pytest.raises(InvalidArgument, match="tokens are whole numbers"):
        keys.chain(bad, 1)
    with pytest.raises(InvalidArgument):
        keys.chain([1], 0)
    with pytest.raises(InvalidArgument):
        keys.chain([1], 1, parent=b"short")
    with pytest.raises(InvalidArgument):
        keys.chain([1], 1, parent=b"p" * 16, salt=b"s")


def test_sglang_pages() -> None:
    tokens = [5, 6, 7, 8, 9]
    first = hashlib.sha256(struct.pack("<2I", 5, 6)).digest()
    second = hashlib.sha256(first + struct.pack("<2I", 7, 8)).digest()
    assert keys.sglang_chain(tokens, 2) == [first, second]
    assert keys.sglang_chain(tokens[2:], 2, prior=first) == [second]
    assert keys.sglang_seed() == b""
    text = "sälz"
    seed = hashlib.sha256(b"sglang-cache-namespace-v1" + b"\0" + b"\1" + (5).to_bytes(8, "little") + text.encode()).digest()
    assert keys.sglang_seed(cache_salt=text) == seed
    assert keys.sglang_seed("", None) == hashlib.sha256(b"sglang-cache-namespace-v1" + b"\1" + bytes(8) + b"\0").digest()
    assert keys.sglang_chain(tokens, 2, prior=seed)[0] == hashlib.sha256(seed + struct.pack("<2I", 5, 6)).digest()


@pytest.mark.parametrize(
    ("value", "encoded"),  # appendix A of RFC 8949
    [
        (0, "00"),
        (23, "17"),
        (24, "1818"),
        (100, "1864"),
        (1000, "1903e8"),
        (1000000, "1a000f4240"),
        (1000000000000, "1b000000e8d4a51000"),
        (2**64 - 1, "1bffffffffffffffff"),
        (-1, "20"),
        (-100, "3863"),
        (-1000, "3903e7"),
        (False, "f4"),
        (True, "f5"),
        (None, "f6"),
        (b"", "40"),
        (bytes.fromhex("01020304"), "4401020304"),
        ("", "60"),
        ("IETF", "6449455446"),
        ("\u6c34", "63e6b0b4"),
        ([], "80"),
        ((1, 2, 3), "83010203"),
        ([1, [2, 3], [4, 5]], "8301820203820405"),
        (list(range(1, 26)), "98190102030405060708090a0b0c0d0e0f101112131415161718181819"),
    ],
)
def test_cbor(value: Any, encoded: str) -> None:
    assert keys.cbor(value).hex() == encoded


def test_cbor_refuses_what_it_has_no_form_for() -> None:
    for value in (1.5, {}, object(), 2**64):
        with pytest.raises(InvalidArgument):
            keys.cbor(value)


def test_vllm_blocks() -> None:
    none_hash = keys.vllm_none_hash("0")
    assert none_hash == hashlib.sha256(b"\x610").digest()
    # (bytes(32), [1, 2, 1000], None) and (bytes(32), [3, 4, 5], ("salt", 7)), by hand
    first = hashlib.sha256(b"\x83\x58\x20" + none_hash + b"\x83\x01\x02\x19\x03\xe8" + b"\xf6").digest()
    second = hashlib.sha256(b"\x83\x58\x20" + first + b"\x83\x03\x04\x05" + b"\xf6").digest()
    assert keys.vllm_chain([1, 2, 1000, 3, 4, 5, 6], 3, none_hash=none_hash) == [first, second]
    assert keys.vllm_chain([3, 4, 5], 3, none_hash=none_hash, parent=first) == [second]
    salted = hashlib.sha256(b"\x83\x58\x20" + none_hash + b"\x83\x01\x02\x19\x03\xe8" + b"\x82\x64salt\x07").digest()
    assert keys.vllm_chain([1, 2, 1000], 3, none_hash=none_hash, extra_keys=[("salt", 7)]) == [salted]
