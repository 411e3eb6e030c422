"""Placement: fixed for ever, even, and hardly moved by another set of chains."""

from __future__ import annotations

import hashlib
import random
from collections import Counter

import pytest
import xxhash
from tests.unit.document import FORMAT

from kvfs.client.block_placement import BlockPlacement
from kvfs.common.errors import InputOutput
from kvfs.kvcache import keys
from kvfs.kvcache.params import SpaceParams


def digests(count: int, seed: int = 1) -> list[bytes]:
    chance = random.Random(seed)
    return [chance.randbytes(16) for _ in range(count)]


def test_it_is_what_its_description_says() -> None:
    chains = [7, 3, 99]
    placement = BlockPlacement(chains)
    for digest in digests(200):
        bucket = xxhash.xxh3_64_intdigest(digest) % 65536
        due = max(chains, key=lambda chain: xxhash.xxh3_64_intdigest(bucket.to_bytes(2, "little") + chain.to_bytes(4, "little")))
        assert placement.chain(digest) == due == BlockPlacement(chains[::-1]).chain(digest)


def test_known_places() -> None:
    """Blocks stored by an older release must be found by every later one."""
    placement = BlockPlacement(range(1, 9))
    assert [placement.chain(bytes([number]) * 16) for number in range(12)] == [2, 6, 1, 2, 7, 1, 6, 6, 8, 1, 1, 8]


def test_the_worked_example_of_the_format_document() -> None:
    section = FORMAT.read_text().split("## KV-cache blocks")[1].split("```")[1]
    text, namespace, parent, key, bucket, chain, *_ = [line.split("#")[0].strip() for line in section.strip().splitlines()]
    params = SpaceParams(block_tokens=4, block_bytes=4096, model="m", dtype="bf16")
    assert hashlib.blake2b(text.encode(), digest_size=16, person=b"kvfs-space").digest() == params.digest == bytes.fromhex(namespace)
    assert keys.chain([1, 2, 3, 4, 5], 4) == [bytes.fromhex(key)] == keys.chain([1, 2, 3, 4], 4, parent=bytes.fromhex(parent))
    assert xxhash.xxh3_64_intdigest(bytes.fromhex(key)) % 65536 == int(bucket, 16)
    assert BlockPlacement(range(1, 9)).chain(bytes.fromhex(key)) == int(chain)


def test_chains_share_evenly() -> None:
    placement = BlockPlacement(range(1, 7))
    counts = Counter(placement.chain(digest) for digest in digests(30_000))
    assert max(counts.values()) < 1.06 * min(counts.values())


def test_one_chain_more_takes_its_share_and_moves_nothing_else() -> None:
    old, new = BlockPlacement(range(1, 7)), BlockPlacement(range(1, 8))
    moved = [new.chain(digest) for digest in digests(7000) if old.chain(digest) != new.chain(digest)]
    assert set(moved) == {7} and 800 < len(moved) < 1200


def test_groups_keep_the_order() -> None:
    placement = BlockPlacement([4, 9])
    found = digests(50)
    groups = placement.group(found)
    assert sorted(place for places in groups.values() for place in places) == list(range(50))
    for chain, places in groups.items():
        assert places == sorted(places) and {placement.chain(found[place]) for place in places} == {chain}


def test_a_space_without_chains() -> None:
    with pytest.raises(InputOutput):
        BlockPlacement([])
