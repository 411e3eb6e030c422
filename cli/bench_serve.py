"""Figures of a serving run: what `kvfs bench serve` reports of one server, and how it makes requests from workloads and traces.

Owns `Plan` (the requests, and what an unlimited cache would find of them) and `ServeRun`. The command is bench_serve_command.py's, sending is
serve_load.py's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from kvfs.cli.measure import percentile
from kvfs.cli.serve_load import Answered, Ask, Progress, Server, drive
from kvfs.common.errors import InvalidArgument
from kvfs.inference.cache.format import PAGE_TOKENS
from kvfs.kvcache.replay import Tally, oracle, read_trace
from kvfs.kvcache.trace_prompts import TraceScale, prompts_of
from kvfs.kvcache.workload import Prompt, as_requests, generate, preset, scaled

SHARES = (0.5, 0.9, 0.99)
DEFAULT_VOCABULARY = 32_000
"""Of a server that does not tell its own: no model has fewer that anybody serves."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where requests come from: a workload's preset, or a trace."""

    workload: str | None
    trace: Path | None
    seed: int
    limit: int
    lengths: float
    time: float


@dataclass(frozen=True, slots=True)
class Plan:
    asks: list[Ask]
    cut: int
    """Prompts that were longer than the model takes."""
    unlimited: Tally
    """What a cache without bounds would have, block by block."""


def make_plan(source: Source, vocabulary: int, context_tokens: int) -> Plan:
    """The same requests every time for the same arguments. A prompt that leaves its answer no room loses its end."""
    make = _from_workload if source.workload is not None else _from_trace
    return make(source, vocabulary, context_tokens)


def _from_workload(source: Source, vocabulary: int, context_tokens: int) -> Plan:
    assert source.workload is not None
    params = scaled(preset(source.workload, seed=source.seed, requests=source.limit, vocabulary=vocabulary), source.lengths)
    asks, kept, cut = [], [], 0
    last_turns: dict[int, int] = {}
    for place, prompt in enumerate(generate(params)):
        answer = min(len(prompt.answer), context_tokens - 1)
        tokens = prompt.tokens[: context_tokens - answer]
        cut += len(tokens) < len(prompt.tokens)
        asks.append(Ask(prompt.arrival_ms * source.time / 1000, tokens, answer, last_turns.get(prompt.conversation)))
        kept.append(replace(prompt, tokens=tokens))
        last_turns[prompt.conversation] = place
    return Plan(asks, cut, _unlimited(kept))


def _from_trace(source: Source, vocabulary: int, context_tokens: int) -> Plan:
    assert source.trace is not None
    scale = TraceScale(vocabulary=vocabulary, lengths=source.lengths, time=source.time, context_tokens=context_tokens)
    made = list(prompts_of(islice(read_trace(source.trace), source.limit), scale))
    if not made:
        raise InvalidArgument(f"{source.trace} has no requests")
    asks = [Ask(prompt.arrival_ms / 1000, prompt.tokens, prompt.answer_tokens) for prompt in made]
    prompts = [Prompt(prompt.arrival_ms, number, 0, 0, prompt.tokens, prompt.tokens[:0]) for number, prompt in enumerate(made)]
    return Plan(asks, sum(prompt.cut for prompt in made), _unlimited(prompts))


def _unlimited(prompts: Sequence[Prompt]) -> Tally:
    return oracle(as_requests(prompts, PAGE_TOKENS), block_tokens=PAGE_TOKENS)


@dataclass(frozen=True, slots=True)
class ServeRun:
    """One server, all requests."""

    label: str
    answered: list[Answered]
    seconds: float
    counters: dict[str, float] | None
    """What /metrics counted meanwhile; None: the server is not kvfs's."""

    @property
    def good(self) -> list[Answered]:
        return [each for each in self.answered if not each.error]

    @property
    def failed(self) -> int:
        return len(self.answered) - len(self.good)

    def to_first_ms(self) -> list[float]:
        return sorted(1000 * each.to_first_s for each in self.good)

    def per_token_ms(self) -> list[float]:
        return sorted(1000 * seconds for each in self.good if (seconds := each.per_token_s) is not None)

    def counter(self, name: str) -> float | None:
        return None if self.counters is None else self.counters.get(name, 0.0)

    def describe(self) -> dict[str, Any]:
        prompt, cached = sum(each.prompt_tokens for each in self.good), sum(each.cached_tokens for each in self.good)
        answer = sum(each.answer_tokens for each in self.good)
        return {
            "server": self.label,
            "requests": len(self.answered),
            "failed": self.failed,
            "first_error": next((each.error for each in self.answered if each.error), None),
            "seconds": self.seconds,
            "prompt_tokens": prompt,
            "hit_tokens": cached,
            "hit_share": cached / prompt if prompt else 0.0,
            "disk_hit_tokens": self.counter("prompt_tokens_cached_by_source.disk"),
            "answer_tokens": answer,
            "requests_per_s": len(self.good) / self.seconds,
            "prompt_tokens_per_s": prompt / self.seconds,
            "answer_tokens_per_s": answer / self.seconds,
            "bytes_read": self.counter("kv_bytes_read"),
            "bytes_written": self.counter("kv_bytes_written"),
            "blocks_dropped": self.counter("kv_blocks_dropped"),
            "reads_failed": self.counter("kv_reads_failed"),
            "ttft_ms": _percentiles(self.to_first_ms()),
            "tpot_ms": _percentiles(self.per_token_ms()),
        }


def _percentiles(ordered: Sequence[float]) -> dict[str, float]:
    return {f"p{100 * share:.0f}": percentile(ordered, share) for share in SHARES}


async def measure(
    server: Server, label: str, model: str, plan: Plan, *, at_once: int, closed_loop: bool, progress: Progress | None = None
) -> ServeRun:
    before = await server.counters()
    began_s = time.perf_counter()
    answered = await drive(server, model, plan.asks, at_once=at_once, closed_loop=closed_loop, progress=progress)
    seconds = time.perf_counter() - began_s
    after = await server.settled_counters() if before else {}
    counters = {name: value - before.get(name, 0.0) for name, value in after.items()} if before else None
    return ServeRun(label, answered, seconds, counters)
