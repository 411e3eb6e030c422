"""`kvfs bench serve` against a server that is told what to say: what it sends, when, and what it counts."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner
from tests.unit.inference.http.conftest import Serve, Served, Step

from kvfs.cli.bench_serve import Source, make_plan
from kvfs.cli.commands import cli
from kvfs.cli.serve_load import Answered, Ask, Server, drive
from kvfs.common.errors import ConnectionLost, InvalidArgument, Overloaded, Unreachable
from kvfs.inference.cache.format import PAGE_TOKENS
from kvfs.inference.http.backend import WorkerStatus
from kvfs.inference.request import Finish, Request, TokenEvent

PATIENCE_S = 0.1


def answer(request: Request) -> Iterator[Step]:
    """As many tokens as are asked for; of prompts all full pages are cached. Keeps nothing waiting but the first token."""
    yield PATIENCE_S
    for index in range(request.sampling.max_tokens):
        last = index + 1 == request.sampling.max_tokens
        cached = (len(request.prompt) - 1) // PAGE_TOKENS * PAGE_TOKENS
        yield TokenEvent(request=request.id, index=index, token=9, finish=Finish.LENGTH if last else None, cached_tokens=cached)


def driven(served: Served, asks: list[Ask], **how: Any) -> list[Answered]:
    async def main() -> list[Answered]:
        async with Server(served.url) as server:
            return await drive(server, "micro", asks, **{"at_once": 100, "closed_loop": False} | how)

    return trio.run(main)


def test_what_was_answered_and_when(serving: Serve) -> None:
    asks = [Ask(0.0, [5] * 100, 3), Ask(0.3, [6] * 10, 1)]
    began_s = time.perf_counter()
    one, two = driven(serving(answer), asks)
    assert (one.prompt_tokens, one.cached_tokens, one.answer_tokens, one.error) == (100, 64, 3, "")
    assert PATIENCE_S <= one.to_first_s < 5 and one.per_token_s is not None and one.per_token_s < PATIENCE_S
    assert two.due_s - began_s >= 0.3 and two.per_token_s is None and two.cached_tokens == 0


def test_requests_are_as_the_workload_says(serving: Serve) -> None:
    served = serving(answer)
    driven(served, [Ask(0.0, [5, 6, 7], 4)])
    [asked] = served.backend.asked
    assert asked.prompt == (5, 6, 7)
    assert (asked.sampling.max_tokens, asked.sampling.temperature, asked.sampling.ignore_eos) == (4, 0.0, True)


@pytest.mark.parametrize("closed_loop", [True, False])
def test_no_more_than_so_many_at_once(serving: Serve, closed_loop: bool) -> None:
    under_way, most = 0, 0

    def counted(request: Request) -> Iterator[Step]:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        yield 0.05
        under_way -= 1
        yield from answer(request)

    results = driven(serving(counted), [Ask(0.0, [5], 1)] * 9, at_once=3, closed_loop=closed_loop)
    assert most == 3 and not any(each.error for each in results)
    last_due_s, first_answer_s = max(each.due_s for each in results), min(each.first_s for each in results)
    assert (last_due_s > first_answer_s) == closed_loop, "in an open loop those that waited for others count it"


def test_a_turn_waits_for_the_one_before(serving: Serve) -> None:
    served = serving(answer)
    asks = [Ask(0.0, [5], 2), Ask(0.0, [6], 2, after=0), Ask(0.0, [7], 2, after=1)]
    results = driven(served, asks)
    assert [request.prompt for request in served.backend.asked] == [(5,), (6,), (7,)]
    assert all(two.due_s >= one.last_s for one, two in pairwise(results))


def test_failures_are_counted_and_no_server_is_said_so(serving: Serve) -> None:
    def picky(request: Request) -> Iterator[Step]:
        yield from [Overloaded("full")] if request.prompt == (5,) else answer(request)

    served = serving(picky)
    bad, good = driven(served, [Ask(0.0, [5], 1), Ask(0.0, [6], 1)])
    assert bad.error.startswith("429 ") and "full" in bad.error and not good.error
    with pytest.raises(ConnectionLost, match="429"):
        driven(served, [Ask(0.0, [5], 1)])

    async def nobody() -> None:
        async with Server("http://127.0.0.1:1/v1") as server:
            await server.model()

    with pytest.raises(Unreachable, match="no server answers"):
        trio.run(nobody)


# --- plans -----------------------------------------------------------------------------------------------------------------------------------


def test_a_workload_becomes_conversations_that_fit_the_model() -> None:
    plan = make_plan(Source("laptop", None, 1, 60, 0.5, 2.0), 400, 500)
    again = make_plan(Source("laptop", None, 1, 60, 0.5, 2.0), 400, 500)
    assert [list(ask.tokens) for ask in plan.asks] == [list(ask.tokens) for ask in again.asks] and len(plan.asks) == 60
    assert all(len(ask.tokens) + ask.answer_tokens <= 500 and max(ask.tokens) < 400 for ask in plan.asks)
    assert 0 < plan.cut <= sum(len(ask.tokens) + ask.answer_tokens == 500 for ask in plan.asks)
    later = [(ask, plan.asks[ask.after]) for ask in plan.asks if ask.after is not None]
    assert len(later) > 20
    for ask, before in later:
        both = min(len(ask.tokens), len(before.tokens))  # either may have lost its end
        assert ask.tokens[:both] == before.tokens[:both]
    assert 0.2 < plan.unlimited.hit_rate < 0.9


def test_a_trace_becomes_prompts(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 1000 * n, "input_length": 1000, "output_length": 8, "hash_ids": [0, n % 2 + 1]} for n in range(6)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = make_plan(Source(None, trace, 1, 5, 0.25, 0.5), 400, 10_000)
    assert [(ask.arrival_s, len(ask.tokens), ask.answer_tokens) for ask in plan.asks] == [(0.5 * n, 250, 2) for n in range(5)]
    assert plan.asks[0].tokens == plan.asks[2].tokens != plan.asks[1].tokens and plan.asks[0].tokens[:128] == plan.asks[1].tokens[:128]
    assert plan.unlimited.hit_tokens == 128 + 3 * 192
    trace.write_text("")
    with pytest.raises(InvalidArgument, match="no requests"):
        make_plan(Source(None, trace, 1, 5, 1.0, 1.0), 400, 10_000)


# --- the command -----------------------------------------------------------------------------------------------------------------------------


def test_the_command_reports_a_server_that_is_named(serving: Serve, tmp_path: Path) -> None:
    served = serving(answer, context_tokens=3000)
    written = iter((0.0, 100.0, 2000.0, 4196.0))  # /server_info, /metrics before, and after until it stands

    async def status() -> list[WorkerStatus]:
        """A worker that has written some more when it is looked at again."""
        counters = {"kv_bytes_written": next(written, 4196.0)}
        return [WorkerStatus(name="worker-0", role="both", serving=True, counters=counters)]

    served.backend.status = status  # type: ignore[method-assign]
    output, plot = tmp_path / "out.json", tmp_path / "plot.png"
    arguments = ["bench", "serve", served.url + "/v1", "--requests", "6", "--scale-lengths", "0.05", "--scale-time", "0", "--seed", "3"]
    done = CliRunner().invoke(cli, [*arguments, "--output", str(output), "--plot", str(plot), "--at-once", "4", "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.output)
    assert facts == json.loads(output.read_text()) and plot.read_bytes().startswith(b"\x89PNG")
    [run] = facts["runs"]
    asked = served.backend.asked
    assert (facts["requests"], facts["workload"], run["requests"], run["failed"], len(asked)) == (6, "deepseek", 6, 0, 6)
    assert run["prompt_tokens"] == sum(len(request.prompt) for request in asked)
    assert run["hit_tokens"] == sum((len(request.prompt) - 1) // 64 * 64 for request in asked)
    assert run["answer_tokens"] == sum(request.sampling.max_tokens for request in asked)
    assert (run["bytes_written"], run["bytes_read"]) == (4096, 0)
    assert 1000 * PATIENCE_S <= run["ttft_ms"]["p50"] <= run["ttft_ms"]["p90"] <= run["ttft_ms"]["p99"]
    shown = CliRunner().invoke(cli, ["bench", "serve", served.url, "--requests", "2", "--scale-lengths", "0.02", "--closed-loop"])
    assert shown.exit_code == 0 and "hit tokens" in shown.output and "hits of an unlimited cache" in shown.output


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text("")
    both = CliRunner().invoke(cli, ["bench", "serve", "http://127.0.0.1:1", "--workload", "chat", "--trace", str(tmp_path / "trace")])
    assert both.exit_code == 2 and "one of them" in both.output
    nobody = CliRunner().invoke(cli, ["bench", "serve", "http://127.0.0.1:1"])
    assert nobody.exit_code == 1 and "no server answers" in nobody.output
