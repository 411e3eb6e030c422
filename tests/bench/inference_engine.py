"""What the engine costs beside its model: `python -m tests.bench.inference_engine [--requests N] [--tokens N] [--prompt N]`.

The micro checkpoint on one thread. Prints, for greedy and for sampled answers, CPU microseconds a generated token while all requests decode together:
of the model's forward pass, and of everything else (scheduler, batch, sampler, events, the loop).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import trio

from kvfs.common.boundary.clock import SystemClock
from kvfs.inference.cache.pool import PagePool
from kvfs.inference.config import EngineConfig
from kvfs.inference.engine.engine import Engine
from kvfs.inference.model import sample
from kvfs.inference.model.batch import Batch
from kvfs.inference.model.deepseek import DeepseekV3
from kvfs.inference.request import Request, Sampling, TokenEvent


class Timed:
    """Counts the CPU time of a model's forward passes."""

    def __init__(self, model: DeepseekV3) -> None:
        self.spent_s = 0.0
        self._forward = model.forward
        model.forward = self.forward  # type: ignore[method-assign]

    def forward(self, batch: Batch, pool: PagePool, before_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        began = time.thread_time()
        logits = self._forward(batch, pool, before_layer)
        self.spent_s += time.thread_time() - began
        return logits


async def measure(model: DeepseekV3, timed: Timed, requests: int, tokens: int, prompt: int, sampling: dict[str, float]) -> tuple[float, float]:
    """CPU seconds a token: of the model, of the rest."""
    marks: list[tuple[float, float]] = []
    ended = trio.Event()
    left = requests

    def heard(events: list[TokenEvent]) -> None:
        nonlocal left
        if len(events) == requests:  # all of them decode
            marks.append((time.process_time(), timed.spent_s))
        left -= sum(event.finish is not None for event in events)
        if not left:
            ended.set()

    pool = PagePool(model.page_format("fp32"), requests * (-(-(prompt + tokens) // 64) + 1))
    engine = Engine(EngineConfig(running_requests=requests, step_tokens=max(512, requests)), model, pool, SystemClock(), heard)
    generator = torch.Generator().manual_seed(1)
    async with trio.open_nursery() as nursery:
        for number in range(requests):
            ids = torch.randint(2, model.config.vocabulary, (prompt,), generator=generator).tolist()
            asked = Sampling(max_tokens=tokens, ignore_eos=True, seed=number, **sampling)  # type: ignore[arg-type]
            engine.submit(Request(id=str(number), prompt=tuple(ids), sampling=asked))
        nursery.start_soon(engine.run)
        await ended.wait()
        nursery.cancel_scope.cancel()
    pool.close()
    (all_began, model_began), (all_ended, model_ended) = marks[0], marks[-1]
    generated = (len(marks) - 1) * requests
    spent = (model_ended - model_began) / generated
    return spent, (all_ended - all_began) / generated - spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--prompt", type=int, default=100)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        sample.make("micro", Path(directory))
        model = DeepseekV3.load(directory)
        timed = Timed(model)
        print(f"{chosen.requests} requests, prompts of {chosen.prompt} tokens, CPU microseconds a generated token")
        print(f"{'':24}{'model':>8}{'engine':>8}")
        for name, sampling in (
            ("greedy", {"temperature": 0.0}),
            ("temperature", {"temperature": 0.8}),
            ("top-k and top-p", {"temperature": 0.8, "top_k": 40, "top_p": 0.9}),
            ("repetition penalty", {"temperature": 0.0, "repetition_penalty": 1.1}),
        ):
            model_s, engine_s = trio.run(measure, model, timed, chosen.requests, chosen.tokens, chosen.prompt, sampling)
            print(f"{name:24}{model_s * 1e6:8.0f}{engine_s * 1e6:8.0f}")


if __name__ == "__main__":
    main()
