"""The demo, whole: `make demo-inference` without its set-up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest


@pytest.mark.slow
def test_all_three_runs_say_what_transformers_says_and_two_of_them_find_their_prefixes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvfs.cli.main", "demo-inference", "--json", "--directory", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=290, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    cold, warm, again = found["runs"]
    assert found["same_text_as_transformers"] and cold["prompt_tokens"] == warm["prompt_tokens"] == again["prompt_tokens"]
    # All full pages of every prompt but the last token's: at most a page less a request.
    assert warm["cache_hit_tokens"] == again["cache_hit_tokens"] >= warm["prompt_tokens"] - 64 * warm["requests"]
    assert again["bytes_read"] > 0, "after a restart they come from kvfs"
    assert not list(tmp_path.iterdir()), "the demo cleans up"


@pytest.mark.slow
def test_an_interrupt_leaves_nothing() -> None:
    """Ctrl-C while conversations are held. The directory's path is short, so that processes can be told by it."""
    with tempfile.TemporaryDirectory(prefix="kvfs-", dir="/tmp") as directory:
        command = [sys.executable, "-m", "kvfs.cli.main", "demo-inference", "--directory", directory]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as running:
            assert running.stdout is not None
            said = ""
            for line in running.stdout:
                said += line
                if "serve it over HTTP" in line:
                    time.sleep(1)
                    assert _processes(directory) >= 6, "manager, meta, storage services, server, workers"
                    running.send_signal(signal.SIGINT)
            assert running.wait(60) == 130 and "Traceback" not in said, said
        assert not list(Path(directory).iterdir()) and _processes(directory) == 0


def _processes(directory: str) -> int:
    found = subprocess.run(
        ["pgrep", "-f", f"kvfs.cli.main (supervise|manager|meta|storage|serve|worker).*{directory}/"], capture_output=True, check=False
    )
    return len(found.stdout.split())
