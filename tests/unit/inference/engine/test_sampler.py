"""The sampler against a plain reference in Python floats, and its independence of everything but logits, seed and place."""

from __future__ import annotations

from math import exp, inf, nan

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfs.inference.engine.sampler import NO_TOKEN, Draw, sample, uniform
from kvfs.inference.request import Sampling

VOCABULARY = 24
GOLDEN = [0.5751258206418983, 0.904780779847226, 0.9958209545947974]


def draw(place: int = 0, tokens: list[int] | None = None, **fields: object) -> Draw:
    return Draw(Sampling(max_tokens=1000, **fields), place, tokens or [])  # type: ignore[arg-type]


def reference(logits: list[float], draw: Draw) -> tuple[int, float]:
    """The token, and how far the random number is from a border between two tokens (too near: another order of additions may decide otherwise)."""
    sampling, scores = draw.sampling, list(logits)
    for token in set(draw.tokens):
        scores[token] = scores[token] * sampling.repetition_penalty if scores[token] < 0 else scores[token] / sampling.repetition_penalty
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if sampling.temperature == 0:
        return order[0], 1.0
    filtered = sampling.top_k > 0 or sampling.top_p < 1
    order = order[: sampling.top_k or len(order)]
    weights = {token: exp((scores[token] - max(scores)) / sampling.temperature) for token in order}
    if sampling.top_p < 1:
        kept, mass = [], 0.0
        for token in order:
            if mass >= sampling.top_p * sum(weights.values()):
                break
            kept.append(token)
            mass += weights[token]
        order = kept
    if not filtered:
        order = sorted(order)
    total = sum(weights[token] for token in order)
    target, mass, near = uniform(sampling.seed, draw.place), 0.0, 1.0
    chosen = order[-1]
    for token in reversed(order):
        chosen = token if target < 1 - mass else chosen
        mass += weights[token] / total
        near = min(near, abs(target - (1 - mass)))
    return chosen, near


draws = st.builds(
    draw,
    place=st.integers(0, 500),
    tokens=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=40),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.05, 0.5, 0.9]),
    top_k=st.sampled_from([0, 1, 3, 10, 1000]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.5]),
    seed=st.sampled_from([0, 1, (1 << 63) - 1]),
)


@settings(max_examples=80)
@given(st.lists(st.tuples(draws, st.integers(0, 1 << 30)), min_size=1, max_size=6))
def test_every_row_is_as_the_reference_says_and_as_if_it_were_alone(rows: list[tuple[Draw, int]]) -> None:
    logits = torch.stack([torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3 for _, seed in rows])
    together = sample(logits.clone(), [draw for draw, _ in rows])
    for row, (draw, _) in enumerate(rows):
        assert sample(logits[row : row + 1].clone(), [draw]) == [together[row]]
        expected, near = reference([float(value) for value in logits[row].double()], draw)
        assert together[row] == expected or near < 1e-6


def test_of_equal_logits_the_lower_id_is_chosen() -> None:
    logits = torch.zeros(3, VOCABULARY)
    logits[:, 7] = logits[:, 9] = 1.0
    greedy, top_one, tiny_p = draw(temperature=0), draw(top_k=1), draw(top_p=1e-9)
    assert sample(logits, [greedy, top_one, tiny_p]) == [7, 7, 7]


def test_what_is_drawn_has_the_distribution_of_the_logits() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125])
    count = 4000
    for fields, expected in (({}, [0.5, 0.25, 0.125, 0.125]), ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]), ({"top_p": 0.8}, [4 / 7, 2 / 7, 1 / 7, 0])):
        tokens = sample(probabilities.log().repeat(count, 1), [draw(place, seed=5, **fields) for place in range(count)])
        for token, share in enumerate(expected):
            assert tokens.count(token) / count == pytest.approx(share, abs=0.03)


def test_random_numbers_are_a_function_of_seed_and_place() -> None:
    """Workers of different releases go on with each other's answers: these values never change."""
    assert [uniform(0, 0), uniform(0, 1), uniform(1, 0)] == GOLDEN
    numbers = [uniform(3, place) for place in range(2000)]
    assert len(set(numbers)) == 2000 and all(0 <= number < 1 for number in numbers)
    assert sum(numbers) / 2000 == pytest.approx(0.5, abs=0.03)


def test_a_row_that_is_no_number_has_no_token_and_leaves_the_others_alone() -> None:
    logits = torch.zeros(5, VOCABULARY)
    logits[:, 3] = 5.0
    logits[1, 20], logits[2, 0], logits[3, :] = nan, inf, -inf
    assert sample(logits, [draw(temperature=0), draw(), draw(top_k=2), draw(), draw(temperature=0)]) == [3, NO_TOKEN, NO_TOKEN, NO_TOKEN, 3]


def test_a_token_that_cannot_be_is_never_drawn() -> None:
    logits = torch.full((50, VOCABULARY), -inf)
    logits[:, 4] = logits[:, 5] = 0.0
    for fields in ({}, {"top_k": 10}, {"top_p": 0.999999}):
        assert set(sample(logits.clone(), [draw(place, **fields) for place in range(50)])) == {4, 5}


@pytest.mark.parametrize("temperature", [1e-300, 1e-310, 5e-324])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 3}])
def test_a_temperature_near_zero_is_greedy(temperature: float, filters: dict[str, float]) -> None:
    """Not an infinity over an infinity: the step would fail, and with it all requests that are in it."""
    logits = torch.tensor([[-30.0, 900.0, 899.0, 3.0], [5.0, -inf, 0.0, 4.0]])
    assert sample(logits, [draw(place, temperature=temperature, **filters) for place in range(2)]) == [1, 0]
