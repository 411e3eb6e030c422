"""Many seeds: over all processors, with what they come to, and whether that proves anything.

Owns the processes and the tally. A run in which next to nothing succeeded finds nothing wrong, so that is wrong too: every kind of operation must
have done what it was to do so many times a seed (`LEAST`).
"""

from __future__ import annotations

import gc
import multiprocessing
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Final, TypeVar

from tests.sim.run import Verdict, run_seed

LEAST: Final = {
    "write of a chunk": 6.0,
    "read of a chunk": 5.5,
    "remove of a chunk": 1.5,
    "append": 1.6,
    "length of a file": 0.8,
    "write of a file": 1.2,
    "synced write of a file": 0.9,
    "truncate of a file": 1.4,
    "unlink of a file": 0.19,
    "rename of a file": 0.12,
    "read of a file": 2.0,
    "use of an unlinked file": 0.6,
    "put of a block": 1.7,
    "get of a block": 1.2,
    "remove of a block": 0.8,
}
"""Operations that did what they were to do, a seed: a tenth of what is usual (seeds 1001 to 1048)."""
ENOUGH: Final = 100
"""Of so many seeds none has come near that by chance: it is five standard deviations away."""
AHEAD: Final = 4
"""Seeds that are handed out, for each process."""
ROOT: Final = Path(__file__).resolve().parents[2]


T = TypeVar("T")


class ProcessDied(Exception):
    """One of those that ran seeds."""


def run_seeds(first: int, count: int, processes: int) -> Iterator[Verdict]:
    """In processes of their own. Raises ProcessDied."""
    return each(run_seed, range(first, first + count), processes)


def each(function: Callable[[int], T], seeds: Iterable[int], processes: int) -> Iterator[T]:
    """What the function says of each seed, in their order. Raises ProcessDied."""
    left = iter(seeds)
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("forkserver"), _settle)
    try:
        under_way = deque((seed, pool.submit(function, seed)) for seed in islice(left, AHEAD * processes))
        while under_way:
            try:
                result = under_way[0][1].result()
            except BrokenProcessPool as error:
                names = ", ".join(str(seed) for seed, future in under_way if not future.done() or future.exception() is not None)
                raise ProcessDied(
                    f"a process died (killed, or out of memory?); of these seeds, that were still to end, it ran one: {names}"
                ) from error
            under_way.popleft()
            under_way.extend((seed, pool.submit(function, seed)) for seed in islice(left, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def _settle() -> None:
    """In a new process: what is imported stays, and need not be looked at whenever garbage is collected."""
    gc.collect()
    gc.freeze()


@dataclass(slots=True)
class Tally:
    first: int
    seeds: int
    begun_s: float = field(default_factory=time.monotonic)
    ran: int = 0
    bad: int = 0
    operations: int = 0
    unknown: int = 0
    virtual_s: float = 0.0
    cpu_s: float = 0.0
    done: Counter[str] = field(default_factory=Counter)

    def add(self, verdict: Verdict) -> None:
        self.ran += 1
        self.bad += bool(verdict.problems)
        self.operations += verdict.operations
        self.unknown += verdict.unknown
        self.virtual_s += verdict.virtual_s
        self.cpu_s += verdict.cpu_s
        self.done += verdict.done

    def idle(self) -> list[str]:
        """What succeeded too seldom for this run to prove anything of it."""
        if self.ran < ENOUGH:
            return []
        return [
            f"{kind}: {self.done[kind]} succeeded in {self.ran} seeds, where {least * self.ran:.0f} are the least: nothing is proved of it"
            for kind, least in LEAST.items()
            if self.done[kind] < least * self.ran
        ]

    def progress(self) -> str:
        rate = self.ran / (time.monotonic() - self.begun_s)
        left_s = round((self.seeds - self.ran) / rate)
        left = f"{left_s // 3600}:{left_s // 60 % 60:02}:{left_s % 60:02}"
        return f"{self.ran} of {self.seeds} seeds, {self.bad} bad, {rate:.2f} seeds/s, {left} left"

    def result(self) -> str:
        return (
            f"{self.ran} seeds from {self.first}: {self.bad} bad; {self.operations} operations, {sum(self.done.values())} did what they were to do, "
            f"{self.unknown} of unknown outcome, {self.virtual_s / 3600:.1f} h of virtual time; {time.monotonic() - self.begun_s:.0f} s, "
            f"{self.cpu_s:.0f} s of processor time; commit {commit()}"
        )


def commit() -> str:
    """Which version ran."""
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def run_many(first: int, seeds: int, processes: int) -> int:
    """The command: says which are bad, how far it is (to a terminal), and what it came to. The exit status."""
    tally = Tally(first, seeds)
    try:
        for verdict in run_seeds(first, seeds, processes):
            tally.add(verdict)
            if verdict.problems:
                _clear()
                print(f"seed {verdict.seed} ({', '.join(verdict.faults)}): {verdict.problems[0][:2000]}\n", flush=True)
            if sys.stderr.isatty():
                print(f"\r\x1b[K{tally.progress()}", end="", file=sys.stderr, flush=True)
            elif tally.ran % 500 == 0:
                print(tally.progress(), file=sys.stderr, flush=True)
    except (ProcessDied, KeyboardInterrupt) as error:
        _clear()
        print(f"{tally.result()}\n{error or 'interrupted'}")
        return 2
    _clear()
    print("\n".join([tally.result(), *tally.idle()]))
    return bool(tally.bad or tally.idle())


def _clear() -> None:
    """The line of progress."""
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
