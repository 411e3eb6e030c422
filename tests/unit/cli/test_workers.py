"""Client processes of a command: what goes wrong in one is said in the command, and none is left."""

from __future__ import annotations

import pytest

from kvfs.cli.bench_kv import Plan, work
from kvfs.cli.workers import Workers
from kvfs.common.errors import ClusterNotFound, InputOutput

PLAN = Plan(4096, 1, 1, "shm", 1, 4096, 0.1)


def test_an_error_of_a_worker_is_raised_as_itself() -> None:
    with pytest.raises(ClusterNotFound, match="/not/there"), Workers(work, [("/not/there", "s", PLAN, 0)]) as workers:
        workers.ask("open")
    assert all(process.exitcode is not None for process in workers._processes)


def test_a_worker_that_dies_is_an_error_and_the_others_end() -> None:
    with pytest.raises(InputOutput, match="ended before"), Workers(work, [("/not/there", "s", PLAN, number) for number in range(2)]) as workers:
        workers._processes[0].kill()
        workers._processes[0].join()
        workers.ask("open")
    assert all(process.exitcode is not None for process in workers._processes)
