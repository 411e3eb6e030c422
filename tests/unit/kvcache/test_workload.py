"""The generated workload: the same on every machine, prompts that share what they should, the distributions it promises."""

from __future__ import annotations

from collections import Counter
from hashlib import sha256
from itertools import pairwise

import pytest

from kvfs.common.errors import InvalidArgument
from kvfs.kvcache.replay import oracle
from kvfs.kvcache.workload import PRESETS, Prompt, WorkloadParams, as_requests, generate, preset, scaled


def shared(one: Prompt, two: Prompt) -> int:
    """Tokens from the start on that both prompts have."""
    return next((place for place, (a, b) in enumerate(zip(one.tokens, two.tokens, strict=False)) if a != b), min(len(one.tokens), len(two.tokens)))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_gives_the_requests_it_promises(name: str) -> None:
    params = preset(name)
    prompts = list(generate(params))
    assert len(prompts) == params.requests
    assert all(one.arrival_ms <= two.arrival_ms for one, two in pairwise(prompts))
    assert max(len(prompt.tokens) for prompt in prompts) <= params.context_tokens
    assert {prompt.system for prompt in prompts} <= set(range(params.systems))
    tally = oracle(as_requests(prompts, 64), block_tokens=64)
    assert 0.5 < tally.hit_rate < 0.95


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_preset_of_deepseeks_day_has_its_share_of_hits_and_of_output(seed: int) -> None:
    """342 of 608 billion input tokens came from the cache, and 168 billion tokens went out."""
    prompts = list(generate(preset("deepseek", seed=seed)))
    tally = oracle(as_requests(prompts, 64), block_tokens=64)
    assert abs(tally.hit_rate - 342 / 608) < (0.002 if seed == PRESETS["deepseek"].seed else 0.015)
    assert abs(sum(len(prompt.answer) for prompt in prompts) / tally.input_tokens - 168 / 608) < 0.01


def test_lengths_are_scaled() -> None:
    params = preset("laptop", requests=60)
    whole, half = list(generate(params)), list(generate(scaled(params, 0.5)))
    ratio = sum(len(prompt.tokens) for prompt in half) / sum(len(prompt.tokens) for prompt in whole)
    assert 0.3 < ratio < 0.7 and max(len(prompt.tokens) for prompt in half) <= params.context_tokens // 2
    assert scaled(params, 1.0) == params and scaled(params, 1e-6).turn_tokens == (1, 1)


def test_it_is_the_same_everywhere_and_another_with_another_seed() -> None:
    def digest(seed: int) -> str:
        state = sha256()
        for prompt in generate(preset("laptop", seed=seed, requests=50)):
            state.update(repr((prompt.arrival_ms, prompt.conversation, prompt.turn, list(prompt.tokens), list(prompt.answer))).encode())
        return state.hexdigest()[:16]

    assert (digest(1), digest(2)) == GOLDEN


GOLDEN = ("f49fb3e894fbd28b", "4ffb78c1131171e2")


def test_a_conversation_grows_and_others_share_its_system_prompt_only() -> None:
    prompts = list(generate(preset("laptop")))
    last: dict[int, Prompt] = {}
    for prompt in prompts:
        before = last.get(prompt.conversation)
        assert prompt.turn == (0 if before is None else before.turn + 1)
        if before is not None:
            spoken = before.tokens + before.answer
            assert prompt.tokens[: len(spoken)] == spoken and len(prompt.tokens) > len(spoken)
        last[prompt.conversation] = prompt
    first = [prompt for prompt in prompts if prompt.turn == 0]
    of_system: dict[int, list[Prompt]] = {}
    for prompt in first:
        of_system.setdefault(prompt.system, []).append(prompt)
    lengths = {system: shared(*each[:2]) for system, each in of_system.items() if len(each) > 1}
    assert len(lengths) > 2 and all(192 <= length <= 640 for length in lengths.values())
    for system, each in of_system.items():
        assert all(shared(one, two) == lengths[system] for one, two in pairwise(each))
    assert shared(of_system[0][0], of_system[1][0]) == 0


def test_arrivals_are_poisson_and_systems_follow_zipf() -> None:
    params = WorkloadParams(requests=6000, systems=8, system_tokens=(1, 1), turn_tokens=(1, 1), answer_tokens=(1, 1), rate_per_s=10.0, turns_mean=1.5)
    prompts = list(generate(params))
    gaps = [(two.arrival_ms - one.arrival_ms) / 1000 for one, two in pairwise(prompts)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert abs(mean - 0.1) < 0.005 and abs(variance**0.5 / mean - 1) < 0.06, "of an exponential distribution both are the same"
    counts = Counter(prompt.system for prompt in prompts if prompt.turn == 0)
    for rank in (1, 2, 3):
        assert abs(counts[0] / counts[rank] / (rank + 1) - 1) < 0.2, counts


def test_full_blocks_only_and_equal_ones_have_equal_numbers() -> None:
    prompts = list(generate(preset("laptop", requests=40)))
    requests = list(as_requests(prompts, 64))
    for prompt, request in zip(prompts, requests, strict=True):
        assert len(request.blocks) == len(prompt.tokens) // 64 and request.input_tokens == len(prompt.tokens)
    for one, first in zip(prompts, requests, strict=True):
        for two, second in zip(prompts, requests, strict=True):
            same = sum(a == b for a, b in zip(first.blocks, second.blocks, strict=False))
            assert same == min(shared(one, two) // 64, len(first.blocks), len(second.blocks))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"requests": 0}, "requests is 0"),
        ({"turn_tokens": (5, 4)}, "turn_tokens"),
        ({"rate_per_s": 0.0}, "rate_per_s"),
        ({"turns_mean": 0.5}, "turns_mean"),
        ({"context_tokens": 100}, "context_tokens"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        preset("chat", **changes)
    with pytest.raises(InvalidArgument, match="there are chat"):
        preset("nothing")
