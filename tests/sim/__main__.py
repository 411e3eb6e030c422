"""The command: `python -m tests.sim --seed N` replays a seed with its trace, `--seeds N` runs so many over all processors."""

from __future__ import annotations

import argparse
import os
import sys

from tests.sim.many import run_many
from tests.sim.run import run_seed


def main() -> int:
    parser = argparse.ArgumentParser(prog="make sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="replay one, with its trace")
    parser.add_argument("--seeds", type=int, default=0, help="how many to run")
    parser.add_argument("--first", type=int, default=1, help="the first of them")
    parser.add_argument("--frames", action="store_true", help="with --seed: also show every message")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    if arguments.seed is None:
        return run_many(arguments.first, arguments.seeds, arguments.processes)
    verdict = run_seed(arguments.seed, print, frames=arguments.frames)
    print(f"{len(verdict.problems)} problems, {verdict.operations} operations ({verdict.unknown} of unknown outcome),", end=" ")
    print(f"{verdict.virtual_s:.0f} s of virtual time, trace {verdict.digest}")
    print("\n".join(verdict.problems))
    return bool(verdict.problems)


if __name__ == "__main__":
    sys.exit(main())
