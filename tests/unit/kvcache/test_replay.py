"""Replays: the format, the rule of counting, the oracles, and a replay against a real space beside them."""

from __future__ import annotations

import json
import os
import random
from collections import OrderedDict
from pathlib import Path

import pytest
import trio
from tests.unit.client.fakes import run
from tests.unit.kvcache.test_space import eventually, space

from kvfs.common.errors import InvalidArgument
from kvfs.kvcache import SpaceParams
from kvfs.kvcache.replay import Request, oracle, read_trace, replay, trace_key

TRACE = Path(os.environ.get("KVFS_TRACE", "/work/shared/data/mooncake_synthetic_trace.jsonl"))


def conversations(count: int, seed: int = 1) -> list[Request]:
    """Prompts with shared beginnings that grow from turn to turn."""
    chance = random.Random(seed)
    fresh = iter(range(1, 1 << 30))
    systems = [tuple(next(fresh) for _ in range(chance.randrange(1, 6))) for _ in range(5)]
    open_ones: list[tuple[int, ...]] = []
    requests = []
    for number in range(count):
        known = open_ones.pop(chance.randrange(len(open_ones))) if open_ones and chance.random() < 0.6 else chance.choice(systems)
        blocks = known + tuple(next(fresh) for _ in range(chance.randrange(1, 4)))
        requests.append(Request(number, len(blocks) * 512 - chance.randrange(512), 10, blocks))
        open_ones = [*open_ones, blocks][-12:]
    return requests


def test_the_rule_of_counting() -> None:
    requests = [Request(0, 1100, 5, (1, 2, 3)), Request(1, 1030, 5, (1, 2, 4)), Request(2, 512, 5, (2,)), Request(3, 1300, 5, (1, 2, 3))]
    tally = oracle(requests)
    assert [hit for _, hit, _ in tally.points] == [0, 1024, 512, 1300]
    assert (tally.requests, tally.input_tokens, tally.hit_tokens, tally.blocks_found) == (4, 3942, 2836, 6)
    # Room for two: the first prompt leaves its first two blocks, since its last was touched first.
    assert [hit for _, hit, _ in oracle(requests[:2], 2).points] == [0, 1024]
    assert oracle([]).hit_rate == 0.0


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not a request"),
        ("[]", "not a request"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 1}', "not a request"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 1, "hash_ids": [1, 2]}', "2 hash_ids for 5 tokens"),
        ('{"timestamp": 1, "input_length": -5, "output_length": 1, "hash_ids": []}', "whole numbers"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 1, "hash_ids": ["x"]}', "whole numbers"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, why: str) -> None:
    file = tmp_path / "trace.jsonl"
    good = json.dumps({"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [7, 8]})
    file.write_text(f"{good}\n\n{line}\n")
    with pytest.raises(InvalidArgument, match=f"trace.jsonl:3: .*{why}"):
        list(read_trace(file))
    assert next(read_trace(file)) == Request(0, 513, 1, (7, 8))


@pytest.mark.skipif(not TRACE.exists(), reason="the Mooncake trace is not on this machine")
def test_the_oracles_give_the_published_figures() -> None:
    trace = list(read_trace(TRACE))
    assert len(trace) == 3993 and sum(request.input_tokens for request in trace) == 61_194_628
    rates = [round(100 * oracle(trace, blocks).hit_rate, 2) for blocks in (None, 1_000, 10_000, 30_000)]
    assert rates == [65.12, 8.57, 43.18, 63.56]


def test_a_space_of_unlimited_size_finds_exactly_what_the_oracle_does() -> None:
    async def test() -> None:
        requests = conversations(120)
        seen = []
        async with space(SpaceParams(block_tokens=512, block_bytes=4096), storage=2, replicas=1) as (made, _, _):
            tally = await replay(made, requests, read=True, progress=lambda request, so_far: seen.append(so_far.requests))
            expected = oracle(requests)
            assert tally.points == expected.points and tally.hit_rate > 0.4
            assert (tally.blocks_read, tally.wrong_bytes, tally.blocks_refused) == (expected.blocks_found, 0, 0)
            assert seen == list(range(1, 121))

    run(test, 60)


def test_under_a_quota_a_space_keeps_what_an_exact_lru_keeps_and_no_prefix_goes_before_its_suffix() -> None:
    """On one chain, where there is one order of touches. Blocks evicted meanwhile make the counts differ if a single one were wrong."""
    capacity = 24

    async def test() -> None:
        requests = conversations(70, seed=5)
        params = SpaceParams(block_tokens=512, block_bytes=4096, quota_bytes=capacity * 4096)
        async with space(params, storage=1, replicas=1) as (made, _, _):
            assert len(made.chain_ids) == 1
            model: OrderedDict[int, None] = OrderedDict()
            for request in requests:
                await replay(made, [request])
                for number in reversed(request.blocks):
                    model[number] = None
                    model.move_to_end(number)
                while len(model) > capacity:
                    model.popitem(last=False)
                await trio.sleep(0.02)  # the touches of the put are told in the background

                async def settled(left: int = len(model)) -> bool:
                    return (await made.stats()).blocks == left

                await eventually(settled)
                known = sorted({number for one in requests for number in one.blocks})
                there = await made.exists([trace_key(number) for number in known])
                assert {number for number, found in zip(known, there, strict=True) if found} == set(model)
                present = set(model)
                for one in requests:
                    kept = [number in present for number in one.blocks]
                    assert kept == sorted(kept, reverse=True), "a block is there without what comes before it"
            assert (await made.stats()).evicted > 50

    run(test, 90)
