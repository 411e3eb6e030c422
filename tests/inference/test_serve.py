"""`kvfs serve` with real processes over a real cluster: prompts handed over, workers and kvfs killed and started again, asked by the openai client.

What is asked for is greedy, so every answer has to be what transformers says, whoever computed it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.inference import oracles
from tests.real_cluster import RealCluster
from tokenizers import Tokenizer

micro = partial(oracles.checkpoint, "micro")
LIMIT_S = 60
ROW_BYTES = 3 * 48 * 4
"""Of a token: layers, values, bytes of each."""


@dataclass
class Served:
    url: str
    cluster: RealCluster
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=LIMIT_S, max_retries=0)

    def stream(self, prompt: list[int], tokens: int, seen: Callable[[int], None] = lambda count: None) -> tuple[str, Any]:
        """The answer's text, and its usage. `seen` is told how many pieces have come."""
        text, usage = [], None
        answer = self.client.completions.create(
            model="micro",
            prompt=prompt,
            max_tokens=tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        for chunk in answer:
            if chunk.usage is not None:
                usage = chunk.usage
            if chunk.choices and chunk.choices[0].text:
                text.append(chunk.choices[0].text)
                seen(len(text))
        return "".join(text), usage

    def workers(self) -> dict[str, int]:
        """Role -> process id."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
                parent = int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            if parent == self.process.pid and b"worker" in words:
                found[words[words.index(b"--role") + 1].decode()] = int(path.parent.name)
        return found

    def kill(self, role: str) -> None:
        os.kill(self.workers()[role], signal.SIGKILL)

    def wait(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)

    def all_serve(self) -> bool:
        found = re.findall(r"^kvfs:kv_cache_usage_perc\{.*\} ", httpx.get(f"{self.url}/metrics").text, re.MULTILINE)
        return (
            len(found) == 2
            and len(self.workers()) == 2
            and all(worker["serving"] for worker in httpx.get(f"{self.url}/server_info").json()["workers"])
        )

    def metric(self, name: str, role: str = "") -> float:
        """The sum over all workers, or those of a role."""
        text = httpx.get(f"{self.url}/metrics").text
        return sum(float(value) for value in re.findall(rf"^kvfs:{name}_total{{.*{role}.*}} (\S+)$", text, re.MULTILINE))


@pytest.fixture(scope="module")
def served(module_path: Path) -> Iterator[Served]:
    folder = module_path
    cluster = RealCluster(folder / "cluster")
    log = folder / "serve.log"
    try:
        cluster.up("--storage", "2", "--replicas", "1")
        command = [sys.executable, "-m", "kvfs.cli.main", "serve", str(micro()), "--cluster", str(cluster.path), "--prefill", "1", "--decode", "1"]
        with open(log, "wb") as out:
            process = subprocess.Popen(
                [*command, "--port", "0", "--cache-pages", "300", "--log-dir", str(folder / "workers")], stdout=out, stderr=out
            )
        try:
            end = time.monotonic() + LIMIT_S
            while (found := re.search(r"http://\S+(?=/v1)", log.read_text())) is None:
                assert process.poll() is None and time.monotonic() < end, log.read_text()
                time.sleep(0.05)
            yield Served(found[0], cluster, process, log)
        finally:
            process.terminate()
            assert process.wait(30) == 0
            assert "Traceback" not in log.read_text()
    finally:
        cluster.stop()


def expected(prompt: list[int], tokens: int) -> str:
    return str(Tokenizer.from_file(str(micro() / "tokenizer.json")).decode(oracles.greedy(micro(), prompt, tokens), skip_special_tokens=True))


def test_a_prompt_is_handed_over_through_the_store(served: Served) -> None:
    prompt = oracles.tokens(200, seed=11)
    read = served.metric("kv_bytes_read")
    text, usage = served.stream(prompt, 24)
    assert text == expected(prompt, 24)
    assert usage.prompt_tokens == 200 and usage.prompt_tokens_details.cached_tokens == 0
    # The one that answers reads three full pages and the unfinished one; what a worker has counted is heard of with its next status.
    served.wait(lambda: served.metric("kv_bytes_read") - read >= 4 * 64 * ROW_BYTES)


def test_a_worker_killed_while_it_answers(served: Served) -> None:
    """The other one goes on with the tokens that were seen, and with what is on disk."""
    prompt = oracles.tokens(333, seed=12)
    failed, read = served.metric("kv_reads_failed"), served.metric("kv_bytes_read", "prefill")

    def kill(count: int) -> None:
        if count == 120:
            assert httpx.post(f"{served.url}/reset_prefix_cache").status_code == 200  # or the other one had the prompt in its memory
            served.kill("decode")

    text, _ = served.stream(prompt, 250, kill)
    assert text == expected(prompt, 250)
    # Five pages of the prompt, and one at least of the answer.
    served.wait(lambda: served.metric("kv_bytes_read", "prefill") - read >= 6 * 64 * ROW_BYTES)
    served.wait(served.all_serve)
    assert served.metric("kv_reads_failed") == failed


def test_a_worker_killed_while_it_computes_a_prompt(served: Served) -> None:
    prompt = oracles.tokens(3000, seed=13)
    before = len(served.log.read_text())
    timer = threading.Timer(0.2, lambda: served.kill("prefill"))
    timer.start()
    text, _ = served.stream(prompt, 8)
    timer.join()
    assert text == expected(prompt, 8)
    assert re.search(r"prefill-1 is lost .*; 1 requests go on elsewhere", served.log.read_text()[before:]), "it was not with the worker"
    served.wait(served.all_serve)


def test_a_drained_worker_takes_nothing_until_it_is_let(served: Served) -> None:
    """The other one does both meanwhile."""
    prompt = oracles.tokens(140, seed=17)
    assert httpx.post(f"{served.url}/workers/nobody/drain").status_code == 404
    assert httpx.post(f"{served.url}/workers/prefill-1/drain").json() == {"worker": "prefill-1", "draining": True}
    served.wait(lambda: not served.all_serve())
    assert served.stream(prompt, 6)[0] == expected(prompt, 6)
    assert httpx.delete(f"{served.url}/workers/prefill-1/drain").status_code == 200
    served.wait(served.all_serve)


def test_after_all_workers_were_started_anew_prefixes_come_from_disk(served: Served) -> None:
    prompt = oracles.tokens(520, seed=14)
    assert served.stream(prompt, 10)[0] == expected(prompt, 10)
    for role in ("prefill", "decode"):
        served.kill(role)
    served.wait(lambda: not served.all_serve())
    served.wait(served.all_serve)
    text, usage = served.stream(prompt, 10)
    assert text == expected(prompt, 10)
    assert usage.prompt_cache_hit_tokens == 512 and usage.prompt_cache_miss_tokens == 8


def test_after_a_restart_of_kvfs_prefixes_are_still_there(served: Served) -> None:
    prompt = oracles.tokens(400, seed=15)
    assert served.stream(prompt, 10)[0] == expected(prompt, 10)
    served.cluster.stop()
    other = oracles.tokens(130, seed=16)
    assert served.stream(other, 10)[0] == expected(other, 10), "without kvfs everything is computed"
    served.cluster.up()
    for role in ("prefill", "decode"):
        served.kill(role)
    served.wait(lambda: not served.all_serve())
    served.wait(served.all_serve)
    text, usage = served.stream(prompt, 10)
    assert text == expected(prompt, 10)
    assert usage.prompt_cache_hit_tokens == 384
