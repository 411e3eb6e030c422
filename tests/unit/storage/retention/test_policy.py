"""Tables and choices: order, quota, time to live, watermarks."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest

from kvfs.storage.retention import policy
from kvfs.storage.retention.policy import Reason, choose, pooled
from kvfs.storage.retention.table import Policy, SpaceTable, pack_bits

SLAB = 4096


def digest(number: int) -> bytes:
    return number.to_bytes(16, "big")


def digests(*numbers: int) -> bytes:
    return b"".join(map(digest, numbers))


def table(inode: int = 1, blocks: int = 0, *, quota: int = 0, ttl_ms: int = 0, start_ms: int = 0) -> SpaceTable:
    made = SpaceTable(inode)
    made.learn(Policy(SLAB, quota, ttl_ms, 1))
    for number in range(blocks):
        made.put(digest(number), 1000, start_ms + number)
    return made


def numbers(victims: list[policy.Victim]) -> list[int]:
    return [int.from_bytes(victim.digest, "big") for victim in victims]


def test_within_one_touch_the_deepest_goes_first() -> None:
    blocks = table(blocks=6)
    # A lookup of the prefix 0, 1, 2: the deepest is named first.
    assert blocks.touch(digests(2, 1, 0, 99), 50) == [digest(2), digest(1), digest(0)]
    assert [digest(number) for number in (3, 4, 5, 2, 1, 0)] == blocks.digests(9)
    assert [at for _, at in blocks.order()] == [3, 4, 5, 50, 50, 50]


def test_order_is_that_of_a_plain_model() -> None:
    dice = random.Random(1)
    blocks, model, size = table(), OrderedDict[bytes, int](), 0
    for now_ms in range(3000):
        name = digest(dice.randrange(60))
        what = dice.randrange(4)
        if what == 0:
            length = dice.randrange(1, 5000)
            assert blocks.put(name, length, now_ms) == (name not in model)
            model[name] = length
            model.move_to_end(name)
        elif what == 1:
            assert blocks.drop(name) == (model.pop(name, None) is not None)
        else:
            names = [digest(dice.randrange(60)) for _ in range(5)]
            there = [one for one in names if one in model]
            assert blocks.touch(b"".join(names), now_ms) == there
            for one in there:
                model.move_to_end(one)
        size = sum(model.values())
        assert (len(blocks), blocks.bytes, blocks.block_space) == (len(model), size, len(model) * SLAB)
    assert [(name, length) for name, _, length in blocks.oldest()] == list(model.items())


def test_probe_answers_in_order_as_bits() -> None:
    blocks = table(blocks=20)
    asked = [0, 50, 3, 19, 20, 7, 60, 61, 5, 70]
    found = blocks.probe(digests(*asked))
    assert found == [number < 20 for number in asked]
    bits = pack_bits(found)
    assert [bool(bits[place // 8] >> place % 8 & 1) for place in range(len(asked))] == found
    assert pack_bits([]) == b"" and pack_bits([True]) == b"\x01" and pack_bits([False] * 9) == b"\0\0"


def test_only_a_newer_policy_is_learnt() -> None:
    blocks = table()
    assert not blocks.learn(Policy(SLAB, 5, 5, 1))
    assert blocks.learn(Policy(5000, 7, 5, 2))
    assert blocks.policy.quota_bytes == 7 and blocks.slab_bytes == 8192


def test_time_to_live_counts_from_the_last_touch() -> None:
    blocks = table(blocks=5, ttl_ms=100)
    blocks.touch(digests(0), 90)
    assert choose([blocks], 100, 0, 99) == []
    victims = choose([blocks], 104, 0, 99)
    assert numbers(victims) == [1, 2, 3] and {victim.reason for victim in victims} == {Reason.EXPIRED}
    assert numbers(choose([blocks], 104, 0, 2)) == [1, 2], "no more than asked"


def test_quota_takes_the_oldest_until_it_is_kept() -> None:
    blocks = table(blocks=10, quota=7_500)
    victims = choose([blocks], 0, 0, 99)
    assert numbers(victims) == [0, 1, 2] and {victim.reason for victim in victims} == {Reason.EVICTED}
    for victim in victims:
        blocks.drop(victim.digest)
    assert choose([blocks], 0, 0, 99) == []


def test_tables_of_one_space_share_their_quota_and_the_oldest_of_all_goes() -> None:
    old, new = table(1, 6, quota=5_000, start_ms=10), table(1, 3, quota=5_000, start_ms=100)
    assert pooled([old, new], 99) == [0, 0], "one over its own, both under the sum"
    assert choose([old], 200, 0, 99, {1: 0}) == []
    more = table(1, 8, quota=5_000, start_ms=50)  # 17 blocks where 15 are allowed
    assert pooled([old, new, more], 99) == [2_000, 0, 0]
    old.touch(digests(*range(6)), 300)
    assert pooled([old, new, more], 99) == [0, 0, 2_000] and pooled([old, new, more], 1) == [0, 0, 1_000]
    assert numbers(choose([more], 300, 0, 99, {1: 2_000})) == [0, 1]


def test_a_full_target_takes_the_oldest_over_all_spaces() -> None:
    old, new = table(1, 4, start_ms=10), table(2, 4, start_ms=12)
    victims = choose([old, new], 100, 4 * SLAB - 1, 99)
    assert [(victim.inode, number) for victim, number in zip(victims, numbers(victims), strict=True)] == [(1, 0), (1, 1), (1, 2), (2, 0)]
    # What a space's own policy takes counts for it too, and is not taken twice.
    old.learn(Policy(SLAB, 3000, 0, 2))
    victims = choose([old, new], 100, 2 * SLAB, 99)
    assert [(victim.inode, number) for victim, number in zip(victims, numbers(victims), strict=True)] == [(1, 0), (1, 1)]
    assert len(choose([old, new], 100, 1 << 40, 99)) == 8, "all there is"


def test_a_clock_that_was_set_back_does_not_change_the_order() -> None:
    blocks, other = table(1), table(2)
    for number, at_ms in enumerate((100, 20, 30)):
        blocks.put(digest(number), 1, at_ms)
    other.put(digest(9), 1, 50)
    assert numbers(choose([blocks, other], 200, 1 << 40, 99)) == [9, 0, 1, 2]


@pytest.mark.parametrize(
    ("members", "freed"),
    [([(1000, 900)], 0), ([(1000, 901)], 51), ([(1000, 901), (1000, 950)], 100), ([(1000, 100), (500, 460)], 35), ([], 0)],
)
def test_the_fullest_member_says_how_much(members: list[tuple[int, int]], freed: int) -> None:
    assert policy.excess(members, 0.90, 0.85) == freed


def test_a_log_puts_blocks_in_order() -> None:
    blocks = table(blocks=5, start_ms=100)  # written at 100 .. 104
    blocks.arrange({digest(3): 900, digest(1): 900, digest(9): 950, digest(0): 40, digest(2): 960})
    # 0 was written after its last touch in the log (an earlier block of that name was evicted), 4 was never touched.
    assert [int.from_bytes(name, "big") for name in blocks.digests(9)] == [0, 4, 3, 1, 2]
    assert [at for _, at in blocks.order()] == [100, 104, 900, 900, 960]
    assert blocks.bytes == 5000
