"""Keys of blocks: from tokens to the 16 bytes that name a chunk.

Owns the digest of a key, our own chain of hashes over full blocks of tokens, and the chains of two engines, byte for byte, so that their keys can be
computed here too. Invariants: every function is pure and the same on every machine; a block's key stands for all tokens before it as well, so two
prompts share a key exactly where they share everything up to there; a chain covers full blocks only, what is left over has no key.
This module must never do I/O.

Our chain (docs/format.md has a worked example); tokens are 4 bytes little-endian each:
    parent of the first block = BLAKE2b-16(salt, person "kvfs-salt-v1")
    key = BLAKE2b-16(key of the block before || tokens of the block, person "kvfs-chain-v1")
    key of an unfinished block = BLAKE2b-16(key of the block before || its tokens, person "kvfs-tail-v1")
The digest of a key is the key itself when it has 16 bytes, else BLAKE2b-16(key, person "kvfs-block").
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b, sha256
from typing import Any, Final

from kvfs.common.errors import InvalidArgument

KEY_BYTES_MIN: Final = 16
KEY_BYTES_MAX: Final = 64
DIGEST_BYTES: Final = 16
TOKEN_BYTES: Final = 4

Tokens = Sequence[int] | Iterable[int]
"""Token ids from 0 to 2**32 - 1: a list, an array, a numpy array or a torch tensor."""


def digest(key: bytes) -> bytes:
    """What names the block of this key in its space. InvalidArgument for a key of the wrong size."""
    size = len(key)
    if size == DIGEST_BYTES:
        return bytes(key)
    if not KEY_BYTES_MIN <= size <= KEY_BYTES_MAX:
        raise InvalidArgument(f"a key of {size} bytes: keys have {KEY_BYTES_MIN} to {KEY_BYTES_MAX}")
    return blake2b(key, digest_size=DIGEST_BYTES, person=b"kvfs-block").digest()


def digests(keys: Sequence[bytes]) -> list[bytes]:
    """The digest of each key; the error says which key is wrong."""
    if not hasattr(keys, "__len__"):  # a generator would be empty by now
        raise InvalidArgument(f"keys are a {type(keys).__name__}: a list of them is needed")
    if set(map(type, keys)) == {bytes} and set(map(len, keys)) == {DIGEST_BYTES}:
        return list(keys)  # what is asked for hundreds of thousands of times a second
    found = []
    for place, key in enumerate(keys):
        if not isinstance(key, bytes | bytearray | memoryview):
            raise InvalidArgument(f"key {place} is a {type(key).__name__}: keys are bytes")
        try:
            found.append(digest(bytes(key)))
        except InvalidArgument as error:
            raise InvalidArgument(f"key {place}: {error.message}") from None
    return found


def token_bytes(tokens: Tokens) -> bytes:
    """Tokens as 4 bytes little-endian each."""
    if hasattr(tokens, "tolist"):  # numpy and torch: a list at once is much faster than one element after another
        tokens = tokens.tolist()
    try:
        packed = array("I", tokens)
    except (OverflowError, TypeError, ValueError) as error:
        raise InvalidArgument(f"tokens are whole numbers from 0 to {2**32 - 1}: {error}") from None
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def chain(tokens: Tokens, block_tokens: int, *, salt: bytes = b"", parent: bytes = b"") -> list[bytes]:
    """The keys of all full blocks, in order. `parent`: the key of the block before, to go on where an earlier call ended (then no salt)."""
    if parent and salt:
        raise InvalidArgument("a chain begins with a salt or goes on from a parent, not both")
    if parent and len(parent) != DIGEST_BYTES:
        raise InvalidArgument(f"a parent of {len(parent)} bytes: keys of this chain have {DIGEST_BYTES}")
    last = parent or seed(salt)
    keys = []
    for block in _blocks(token_bytes(tokens), block_tokens):
        last = blake2b(last + block, digest_size=DIGEST_BYTES, person=b"kvfs-chain-v1").digest()
        keys.append(last)
    return keys


def seed(salt: bytes = b"") -> bytes:
    """What the first block of a chain has for a parent."""
    return blake2b(salt, digest_size=DIGEST_BYTES, person=b"kvfs-salt-v1").digest()


def unfinished(parent: bytes, tokens: Tokens) -> bytes:
    """The key of a block that isn't full: fewer tokens than a block has, behind the block `parent` (or `seed`). A chain never goes on from it."""
    return blake2b(parent + token_bytes(tokens), digest_size=DIGEST_BYTES, person=b"kvfs-tail-v1").digest()


def _blocks(packed: bytes, block_tokens: int) -> Iterator[bytes]:
    if block_tokens < 1:
        raise InvalidArgument(f"blocks of {block_tokens} tokens: at least one")
    step = block_tokens * TOKEN_BYTES
    for start in range(0, len(packed) - step + 1, step):
        yield packed[start : start + step]


# --- SGLang (0.5.23, ecosystem.md 2.3) ------------------------------------------------------------------------------------------------


def sglang_seed(extra_key: str | None = None, cache_salt: str | None = None) -> bytes:
    """The digest that a chain of a request with an extra key or a cache salt begins with; empty without either."""
    if extra_key is None and cache_salt is None:
        return b""
    state = sha256(b"sglang-cache-namespace-v1")
    for part in (extra_key, cache_salt):
        if part is None:
            state.update(b"\0")
        else:
            encoded = part.encode()
            state.update(b"\1" + len(encoded).to_bytes(8, "little") + encoded)
    return state.digest()


def sglang_chain(tokens: Tokens, page_tokens: int, *, prior: bytes = b"") -> list[bytes]:
    """SGLang's page hashes, 32 raw bytes each (the engine writes them as 64 hex digits): sha256(hash before || tokens).

    `prior`: the hash of the page before, or `sglang_seed`."""
    keys = []
    for page in _blocks(token_bytes(tokens), page_tokens):
        prior = sha256(prior + page).digest()
        keys.append(prior)
    return keys


# --- vLLM with --prefix-caching-hash-algo sha256_cbor (0.33.0) --------------------------------------------------------------------------


def vllm_none_hash(seed: str) -> bytes:
    """What the first block of a chain has for a parent in a vLLM that runs with PYTHONHASHSEED=seed."""
    return sha256(cbor(seed)).digest()


def vllm_chain(
    tokens: Sequence[int], block_tokens: int, *, none_hash: bytes, extra_keys: Sequence[tuple[Any, ...] | None] = (), parent: bytes = b""
) -> list[bytes]:
    """vLLM's block hashes, 32 bytes each: sha256 of the canonical CBOR of (hash before, tokens, extra keys of the block or None).

    `extra_keys`: of the first blocks, as vLLM puts them together (LoRA name, multimodal hashes, the cache salt in the first block only)."""
    if block_tokens < 1:
        raise InvalidArgument(f"blocks of {block_tokens} tokens: at least one")
    ids = list(tokens.tolist() if hasattr(tokens, "tolist") else tokens)
    last = parent or none_hash
    keys = []
    for number in range(len(ids) // block_tokens):
        block = ids[number * block_tokens : (number + 1) * block_tokens]
        last = sha256(cbor((last, block, extra_keys[number] if number < len(extra_keys) else None))).digest()
        keys.append(last)
    return keys


def cbor(value: Any) -> bytes:
    """Canonical CBOR (RFC 8949, 4.2.1) of None, bool, int, bytes, str and sequences of them: what block hashes are made of."""
    out = bytearray()
    _cbor_into(out, value)
    return bytes(out)


def _cbor_into(out: bytearray, value: Any) -> None:
    if value is None:
        out.append(0xF6)
    elif isinstance(value, bool):
        out.append(0xF5 if value else 0xF4)
    elif isinstance(value, int):
        if not -(1 << 64) <= value < 1 << 64:
            raise InvalidArgument(f"{value} is too large a number for a block hash")
        _cbor_head(out, 0, value) if value >= 0 else _cbor_head(out, 1, -1 - value)
    elif isinstance(value, bytes):
        _cbor_head(out, 2, len(value))
        out += value
    elif isinstance(value, str):
        encoded = value.encode()
        _cbor_head(out, 3, len(encoded))
        out += encoded
    elif isinstance(value, list | tuple):
        _cbor_head(out, 4, len(value))
        for item in value:
            _cbor_into(out, item)
    else:
        raise InvalidArgument(f"a {type(value).__name__} in a block hash: only None, bool, int, bytes, str and sequences have an encoding here")


def _cbor_head(out: bytearray, major: int, number: int) -> None:
    """Type and number in the fewest bytes."""
    kind = major << 5
    if number < 24:
        out.append(kind | number)
        return
    for extra, size in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if number < 1 << 8 * size:
            out.append(kind | extra)
            out += number.to_bytes(size, "big")
            return
