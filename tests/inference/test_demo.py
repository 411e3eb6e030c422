"""The demo, whole: `make demo-inference` without its set-up."""

from __future__ import annotations

import json
import subprocess
import sys
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
