"""The simulation as a test: some hundred seeds, seeds that once failed, and that a seed is always the same run."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import trio
from tests.sim.many import Tally, run_seeds
from tests.sim.run import TEST_SEEDS, run_seed

SEEDS = int(os.environ.get("KVFS_SIM_SEEDS", TEST_SEEDS))
FIRST = int(os.environ.get("KVFS_SIM_FIRST", "1"))
REGRESSIONS = {40153: "a removed file's chunks came back with the power, and were orphans"}
"""Seeds that failed once, and why."""
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(0)
def test_nothing_is_lost_and_nothing_is_wrong() -> None:
    bad, tally = [], Tally(FIRST, SEEDS)
    for verdict in run_seeds(FIRST, SEEDS, os.cpu_count() or 1):
        tally.add(verdict)
        if verdict.problems:
            bad.append(f"seed {verdict.seed}: {verdict.problems[0]}")
    assert tally.idle() == []
    assert not bad, f"{len(bad)} of {SEEDS} seeds; `make sim SEED=n` replays one\n" + "\n".join(bad)


@pytest.mark.parametrize("seed", REGRESSIONS)
def test_a_seed_that_failed_once(seed: int) -> None:
    assert run_seed(seed).problems == []


def test_a_seed_is_the_same_run_in_any_process() -> None:
    traces = set()
    for hash_seed in ("0", "1", "4711"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-m", "tests.sim", "--seed", "3"]
        traces.add(subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout)
    [trace] = {"\n".join(line for line in trace.splitlines() if "processor" not in line) for trace in traces}
    assert "every target serves" in trace


def test_a_seed_is_the_same_run_beside_another_trio_thread() -> None:
    """A client that a test left open goes on in its own, and trio has one generator for all."""
    over = False

    async def busy() -> None:
        while not over:
            await trio.lowlevel.cancel_shielded_checkpoint()
            time.sleep(0.001)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(busy)

    alone = run_seed(3).digest
    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    try:
        assert run_seed(3).digest == alone
    finally:
        over = True
        thread.join()


def test_seeds_differ() -> None:
    assert run_seed(3).digest != run_seed(4).digest
