"""`kvfs bench serve MODEL`: servers of its own, with the disk cache and without, on a cluster of its own; nothing of it is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from tests.inference import oracles


@pytest.mark.cluster
@pytest.mark.slow
def test_a_model_is_measured_with_the_disk_cache_and_without() -> None:
    with tempfile.TemporaryDirectory(prefix="kvfs-", dir="/tmp") as directory:  # a short path: it has sockets
        _measured(Path(directory))


def _measured(directory: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(directory), "KVFS_CLUSTER": ""}
    arguments = ["--requests", "5", "--scale-lengths", "0.1", "--scale-time", "0", "--storage", "1", "--prefill", "1", "--decode", "1", "--json"]
    command = [sys.executable, "-m", "kvfs.cli.main", "bench", "serve", str(oracles.checkpoint("micro")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    without, cached = json.loads(done.stdout)["runs"]
    assert (without["server"], cached["server"]) == ("without", "with disk cache")
    for run in (without, cached):
        assert (run["requests"], run["failed"]) == (5, 0) and run["answer_tokens"] > 0
    assert (without["bytes_read"], without["bytes_written"], without["disk_hit_tokens"]) == (0, 0, 0)
    assert cached["bytes_written"] > 0 and cached["bytes_read"] > 0, "what the prefill worker hands over is read by the other"
    assert list(directory.iterdir()) == []
    left = subprocess.run(["pgrep", "-f", str(directory)], capture_output=True, text=True, check=False).stdout
    assert left == ""
