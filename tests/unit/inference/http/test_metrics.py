"""What /metrics and /server_info tell."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
from prometheus_client.parser import text_string_to_metric_families
from tests.unit.inference.http.conftest import Serve, Served, Step

from kvfs import __version__
from kvfs.inference.http.backend import WorkerStatus
from kvfs.inference.http.metrics import WORKER_COUNTERS
from kvfs.inference.request import Finish, Request, TokenEvent


def samples(served: Served) -> dict[tuple[str, str], float]:
    """(name, the label that tells it from others) -> value."""
    found = {}
    for family in text_string_to_metric_families(httpx.get(served.url + "/metrics").text):
        for sample in family.samples:
            extra = [value for name, value in sample.labels.items() if name in ("source", "finished_reason", "engine", "code")]
            if "le" not in sample.labels:
                found[sample.name, "".join(extra)] = sample.value
    return found


def test_tokens_times_and_ends_are_counted(serving: Serve) -> None:
    def answer(request: Request) -> Iterator[Step]:
        for index in range(3):
            finish = Finish.LENGTH if index == 2 else None
            yield TokenEvent(request=request.id, index=index, token=9, finish=finish, cached_tokens=128, disk_tokens=64)

    served = serving(answer)
    for _ in range(2):
        assert httpx.post(served.url + "/v1/completions", json={"prompt": [5] * 150, "max_tokens": 3}).status_code == 200
    httpx.get(served.url + "/nowhere")
    found = samples(served)
    assert {name: found["kvfs:" + name, ""] for name in ("prompt_tokens_total", "prompt_tokens_cached_total", "generation_tokens_total")} == {
        "prompt_tokens_total": 300,
        "prompt_tokens_cached_total": 256,
        "generation_tokens_total": 6,
    }
    assert found["kvfs:prompt_tokens_cached_by_source_total", "disk"] == found["kvfs:prompt_tokens_cached_by_source_total", "device"] == 128
    assert found["kvfs:request_success_total", "length"] == 2
    assert found["kvfs:time_to_first_token_seconds_count", ""] == found["kvfs:e2e_request_latency_seconds_count", ""] == 2
    assert found["kvfs:inter_token_latency_seconds_count", ""] == 4
    assert (found["kvfs:http_responses_total", "200"], found["kvfs:http_responses_total", "404"]) == (2, 1)


def test_workers_are_told_of_one_by_one(serving: Serve) -> None:
    served = serving(lambda request: [9])
    counters = {name: float(place) for place, name in enumerate(WORKER_COUNTERS, 1)}
    served.backend.workers = [
        WorkerStatus(name="p0", role="prefill", serving=True, waiting=3, running=1, waiting_tokens=900, pages=10, pages_used=4, counters=counters),
        WorkerStatus(name="d0", role="decode", serving=False),
    ]
    found = samples(served)
    assert (found["kvfs:num_requests_waiting", "p0"], found["kvfs:num_requests_running", "p0"], found["kvfs:num_requests_running", "d0"]) == (3, 1, 0)
    assert (found["kvfs:kv_cache_usage_perc", "p0"], found["kvfs:kv_cache_usage_perc", "d0"]) == (0.4, 0)
    assert {name: found[f"kvfs:{name}_total", "p0"] for name in counters} == counters
    told = httpx.get(served.url + "/server_info").json()
    assert (told["version"], told["model"]["id"], told["model"]["max_model_len"]) == (__version__, "micro", 1000)
    assert [(worker["name"], worker["role"], worker["serving"], worker["tokens_waiting"]) for worker in told["workers"]] == [
        ("p0", "prefill", True, 900),
        ("d0", "decode", False, 0),
    ]
    assert httpx.get(served.url + "/version").json() == {"version": __version__}


def test_caches_in_memory_are_forgotten_when_asked(serving: Serve) -> None:
    served = serving(lambda request: [9])
    for path in ("/flush_cache", "/reset_prefix_cache"):
        assert httpx.post(served.url + path).json() == {"success": True}
    assert served.backend.flushed == 2
