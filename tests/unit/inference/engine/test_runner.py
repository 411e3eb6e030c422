"""A step computes with as many threads as it was told to, whichever thread it runs in."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import torch

from kvfs.common.boundary.clock import SystemClock
from kvfs.inference.engine.runner import Runner


class Model:
    device = "cpu"
    threads = 0

    def forward(self, *_: Any) -> torch.Tensor:
        self.threads = torch.get_num_threads()
        return torch.zeros(0, 8)


def test_a_thread_that_torch_knew_before_computes_with_the_threads_that_are_asked_for() -> None:
    """A worker loads its model in a thread that later computes steps, and torch had set that one up for all cores: a step took five times the CPU."""
    model = Model()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(torch.get_num_threads).result()  # which is when torch sets a thread up
        pool.submit(torch.set_num_threads, 2).result()
        runner = Runner(cast(Any, model), cast(Any, None), SystemClock(), threads=1)
        pool.submit(runner.run, [], {}).result()
    assert model.threads == 1
    torch.set_num_threads(1)
