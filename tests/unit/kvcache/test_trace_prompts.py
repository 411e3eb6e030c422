"""Prompts made up for a trace share what the trace says they share, at every scale."""

from __future__ import annotations

import pytest

from kvfs.common.errors import InvalidArgument
from kvfs.kvcache.replay import Request, oracle
from kvfs.kvcache.trace_prompts import TraceScale, prompts_of
from kvfs.kvcache.workload import Prompt, as_requests

TRACE = [
    Request(0, 1200, 100, (1, 2, 3)),
    Request(100, 1536, 10, (1, 2, 3)),
    Request(250, 1100, 7, (1, 2, 4)),
    Request(400, 30, 0, (5,)),
]


@pytest.mark.parametrize("lengths", [1.0, 0.125, 0.5])
def test_equal_numbers_give_equal_tokens_and_others_give_others(lengths: float) -> None:
    made = list(prompts_of(TRACE, TraceScale(vocabulary=500, lengths=lengths)))
    block = round(512 * lengths)
    assert [len(prompt.tokens) for prompt in made] == [round(request.input_tokens * lengths) for request in TRACE]
    assert made[1].tokens[: len(made[0].tokens)] == made[0].tokens
    assert made[2].tokens[: 2 * block] == made[0].tokens[: 2 * block]
    assert made[2].tokens[2 * block] != made[0].tokens[2 * block] or made[2].tokens[2 * block :] != made[0].tokens[2 * block : len(made[2].tokens)]
    assert made[3].tokens[:10] != made[0].tokens[:10]
    assert all(0 <= token < 500 for prompt in made for token in prompt.tokens)
    as_prompts = [Prompt(prompt.arrival_ms, 0, 0, 0, prompt.tokens, prompt.tokens[:0]) for prompt in made]
    hits = oracle(as_requests(as_prompts, block), block_tokens=block)
    assert hits.blocks_found == 2 + 2, "full blocks only: the third of the first prompt is not full"


def test_it_is_the_same_everywhere() -> None:
    [prompt] = prompts_of(TRACE[3:], TraceScale(vocabulary=129_280))
    assert list(prompt.tokens[:3]) == GOLDEN and (prompt.arrival_ms, prompt.answer_tokens, prompt.cut) == (400, 1, False)


GOLDEN = [35255, 125202, 101948]


def test_time_is_scaled_and_what_is_too_long_loses_its_end() -> None:
    made = list(prompts_of(TRACE, TraceScale(vocabulary=500, time=0.5, context_tokens=1150)))
    assert [prompt.arrival_ms for prompt in made] == [0, 50, 125, 200]
    assert [(len(prompt.tokens), prompt.cut) for prompt in made] == [(1050, True), (1140, True), (1100, False), (30, False)]
    assert made[0].tokens == made[1].tokens[:1050]


def test_a_scale_that_makes_no_sense_is_refused() -> None:
    for bad in ({"lengths": 0}, {"time": -1}, {"vocabulary": 0}, {"context_tokens": 1}):
        with pytest.raises(InvalidArgument):
            TraceScale(**{"vocabulary": 9} | bad)  # type: ignore[arg-type]
