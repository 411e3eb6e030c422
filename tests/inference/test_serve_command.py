"""`kvfs serve` and `kvfs worker` as commands: what cannot work is said in a line, and answers under way are not cut by the end of the server."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest
from tests.inference import oracles

micro = partial(oracles.checkpoint, "micro")
KVFS = (sys.executable, "-m", "kvfs.cli.main")
LIMIT_S = 60


def refused(*arguments: str) -> str:
    done = subprocess.run([*KVFS, *arguments], capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", [("worker", "--no-disk-cache"), ("serve", "--no-disk-cache", "--port", "0"), ("bench", "serve")])
def test_a_model_that_cannot_be_served_is_said_in_a_line(command: tuple[str, ...], tmp_path: Path) -> None:
    assert refused(*command, str(tmp_path / "no")).startswith(
        f"kvfs: error: {tmp_path}/no/config.json is not there: a checkpoint is a directory with"
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer.json").write_bytes((micro() / "tokenizer.json").read_bytes())
    assert refused(*command, str(tmp_path)) == f"kvfs: error: {tmp_path}/config.json: model_type is 'llama', and this code computes deepseek_v3 only"


def test_a_worker_that_cannot_be_set_up_is_said_and_its_log_stays() -> None:
    """The log that the words name is there to be read, although it lay in a temporary directory."""
    for options, words in (
        (("--device", "abacus"), "torch has no device abacus"),
        (("--cache-pages", "1000000000"), "1000000000 pages of 36864 bytes are more than this machine's memory"),
    ):
        said = refused("serve", "--no-disk-cache", "--port", "0", *options, str(micro()))
        found = re.search(r"worker both-1 did not start: (.*) \(log: (\S+)\)$", said)
        assert found is not None and words in found[1], said
        log = Path(found[2])
        assert found[1] in log.read_text()
        shutil.rmtree(log.parent)


@pytest.mark.slow  # half a minute of waiting
def test_a_worker_that_does_not_answer_is_named() -> None:
    last = refused("serve", "--no-disk-cache", "--port", "0", "--worker", "tcp://127.0.0.1:9", str(micro()))
    assert last == "kvfs: error: no worker answered at tcp://127.0.0.1:9 within 30 s: does `kvfs worker --listen` serve there, undrained?"


@contextmanager
def serving(log: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with open(log, "wb") as out:
        process = subprocess.Popen([*KVFS, "serve", str(micro()), "--no-disk-cache", "--port", "0"], stdout=out, stderr=out)
    try:
        end = time.monotonic() + LIMIT_S
        while (found := re.search(r"http://\S+(?=/v1)", log.read_text())) is None:
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        yield process, found[0]
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("again", [False, True])
def test_told_to_stop_it_ends_what_it_answers_and_takes_nothing_new_unless_told_twice(again: bool, tmp_path: Path) -> None:
    request = {"model": "micro", "prompt": oracles.tokens(70), "max_tokens": 120, "temperature": 0, "stream": True, "ignore_eos": True}
    with serving(tmp_path / "log") as (process, url), httpx.Client(timeout=LIMIT_S) as client, httpx.Client(timeout=LIMIT_S) as idle:
        assert idle.get(f"{url}/health").status_code == 200  # its connection stays open
        with client.stream("POST", f"{url}/v1/completions", json=request) as answer:
            lines = (line for line in answer.iter_lines() if line)
            pieces = [json.loads(next(lines).removeprefix("data: "))]
            process.send_signal(signal.SIGTERM)
            if again:
                time.sleep(0.2)
                process.send_signal(signal.SIGTERM)
                assert process.wait(5) != 0
                return
            with pytest.raises(httpx.TransportError):
                for _ in range(100):
                    httpx.get(f"{url}/health")
                    time.sleep(0.02)
            for line in lines:
                if line == "data: [DONE]":
                    break
                pieces.append(json.loads(line.removeprefix("data: ")))
            else:
                pytest.fail("the answer was cut")
        assert pieces[-1]["choices"][0]["finish_reason"] == "length"
        assert process.wait(15) == 0, (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text()
