"""`python tests/crash/run.py --states 50000`: records programs, replays crash states until there were so many, and says what failed.
`--kind target --seed 7` replays one life."""

from __future__ import annotations

import argparse
import itertools
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from namespace_life import NamespaceLife
from recording import why_not
from replay import Life, Report, replay
from store_life import StoreLife
from target_life import TargetLife

KINDS: dict[str, Callable[[int], Life]] = {
    "target": TargetLife,
    "target-threads": lambda seed: TargetLife(seed, threads=3),
    "store": StoreLife,
    "namespace": NamespaceLife,
}
ORDER = ("target", "store", "target-threads", "target", "namespace", "store")
Job = tuple[str, int]


def jobs(kind: str, seed: int) -> Iterator[Job]:
    for number, name in enumerate(itertools.cycle([kind] if kind else ORDER)):
        yield name, seed + number


def run(job: Job) -> tuple[Report, float]:
    logging.disable(logging.CRITICAL)
    kind, seed = job
    began = time.monotonic()
    return replay(KINDS[kind](seed)), time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--states", type=int, default=5000, help="go on until so many crash states were opened [%(default)s]")
    parser.add_argument("--kind", choices=KINDS, default="", help="only this program [all, in turn]")
    parser.add_argument("--seed", type=int, default=1, help="of the first life [%(default)s]")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    reason = why_not()
    if reason:
        print(reason)
        return 2
    todo = jobs(options.kind, options.seed)
    lives = states = changes = 0
    failures: list[str] = []
    with ProcessPoolExecutor(options.processes, mp_context=multiprocessing.get_context("fork")) as pool:
        running: dict[Future[tuple[Report, float]], Job] = {}
        while running or (states < options.states and not failures):
            while len(running) < options.processes and states < options.states and not failures:
                job = next(todo)
                running[pool.submit(run, job)] = job
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                kind, seed = running.pop(future)
                report, took_s = future.result()
                lives, states, changes = lives + 1, states + report.states, changes + report.changes
                failures += report.failures
                print(f"{kind:15} seed {seed:5}: {report.changes:4} changes, {report.states:5} crash states, {took_s:4.0f} s", flush=True)
    for failure in failures:
        print("FAILED", failure)
    print(f"{states} crash states of {changes} recorded changes in {lives} lives: {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
