"""Prometheus metrics of the server and, as the backend tells of them, of its workers.

Owns `Metrics`. Names have vLLM's stems behind `kvfs:` (reference/ecosystem.md, 9.6), so that its dashboards need one replacement; hits, queries and
prompts are counted in tokens. Invariants: counters of the server only grow; a worker's start at 0 when it starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from kvfs.inference.http.backend import WorkerStatus

CONTENT_TYPE: str = CONTENT_TYPE_LATEST

FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
BETWEEN_TOKENS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
WHOLE_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0)

WORKER_GAUGES = {
    "num_requests_running": "Requests that a worker computes.",
    "num_requests_waiting": "Requests that wait for pages.",
    "kv_cache_usage_perc": "Share of a worker's pages that requests hold, 0 to 1.",
}
WORKER_COUNTERS = {
    "prefix_cache_queries": "Prompt tokens looked for in a worker's memory.",
    "prefix_cache_hits": "Of them, found.",
    "external_prefix_cache_queries": "Prompt tokens looked for in the KV cache on kvfs.",
    "external_prefix_cache_hits": "Of them, found and read.",
    "kv_bytes_read": "Read from the KV cache on kvfs.",
    "kv_bytes_written": "Written to the KV cache on kvfs.",
    "kv_blocks_dropped": "Pages that were not written, as too many waited.",
    "kv_reads_failed": "Reads that failed: their tokens were computed.",
    "num_preemptions": "Requests that lost their pages to another and were computed again.",
}
"""Names in `WorkerStatus.counters`."""


class Metrics:
    def __init__(self, model: str) -> None:
        self.registry: Any = CollectorRegistry(auto_describe=False)
        self._model = model

        def counter(name: str, text: str, *labels: str) -> Any:
            made = Counter(f"kvfs:{name}", text, ["model_name", *labels], registry=self.registry)
            return made if labels else made.labels(model)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Any:
            return Histogram(f"kvfs:{name}", text, ["model_name"], buckets=buckets, registry=self.registry).labels(model)

        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts whose answers have begun.")
        self.cached_tokens = counter("prompt_tokens_cached", "Of them, not computed.")
        self._by_source = counter("prompt_tokens_cached_by_source", "Where cached tokens came from.", "source")
        self.generated_tokens = counter("generation_tokens", "Tokens of answers.")
        self._ended = counter("request_success", "Answers, by how they ended.", "finished_reason")
        self._responses = counter("http_responses", "Requests, by the status they were answered with.", "code")
        self.first_token_s = histogram("time_to_first_token_seconds", "From a request's arrival.", FIRST_TOKEN_S)
        self.between_tokens_s = histogram("inter_token_latency_seconds", "Between tokens of one answer.", BETWEEN_TOKENS_S)
        self.whole_s = histogram("e2e_request_latency_seconds", "From arrival to the last token.", WHOLE_S)
        for source in ("device", "disk"):
            self._by_source.labels(model, source)

    def answer_begins(self, prompt_tokens: int, cached_tokens: int, disk_tokens: int, seconds: float) -> None:
        self.prompt_tokens.inc(prompt_tokens)
        self.cached_tokens.inc(cached_tokens)
        self._by_source.labels(self._model, "disk").inc(disk_tokens)
        self._by_source.labels(self._model, "device").inc(max(0, cached_tokens - disk_tokens))
        self.first_token_s.observe(seconds)

    def answer_ends(self, reason: str, seconds: float) -> None:
        self._ended.labels(self._model, reason).inc()
        self.whole_s.observe(seconds)

    def responded(self, status: int) -> None:
        self._responses.labels(self._model, str(status)).inc()

    def expose(self, workers: Sequence[WorkerStatus]) -> bytes:
        """The page that Prometheus reads."""
        page: bytes = generate_latest(self.registry) + generate_latest(_Workers(self._model, workers))
        return page


class _Workers:
    """A registry of one moment."""

    def __init__(self, model: str, workers: Sequence[WorkerStatus]) -> None:
        self._model, self._workers = model, workers

    def collect(self) -> Iterator[Any]:
        labels = ["model_name", "engine", "role"]
        for name, text in WORKER_GAUGES.items():
            family = GaugeMetricFamily(f"kvfs:{name}", text, labels=labels)
            for worker in self._workers:
                family.add_metric([self._model, worker.name, worker.role], _gauge(name, worker))
            yield family
        for name, text in WORKER_COUNTERS.items():
            family = CounterMetricFamily(f"kvfs:{name}", text, labels=labels)
            for worker in self._workers:
                family.add_metric([self._model, worker.name, worker.role], worker.counters.get(name, 0.0))
            yield family


def _gauge(name: str, worker: WorkerStatus) -> float:
    if name == "num_requests_running":
        return worker.running
    if name == "num_requests_waiting":
        return worker.waiting
    return worker.pages_used / worker.pages if worker.pages else 0.0
