"""One step in the worker thread: from the scheduler's work to the next tokens.

Owns `Runner`. Invariants: it changes nothing of the scheduler's; sequences whose pages did not arrive are reported, never raised. Everything here
runs in one thread at a time, never in trio's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from kvfs.common.boundary.clock import Clock
from kvfs.inference.cache.pool import PagePool
from kvfs.inference.engine.prefix_store import Reading
from kvfs.inference.engine.sampler import Draw, sample
from kvfs.inference.engine.sequence import Sequence, Work
from kvfs.inference.model.batch import Piece
from kvfs.inference.model.deepseek import DeepseekV3, batch_of


@dataclass(slots=True)
class Outcome:
    tokens: list[int | None]
    """Of each work: the next token, where one was to be chosen."""
    broken: set[Sequence] = field(default_factory=set)
    """Their pages did not all arrive."""
    waited_s: float = 0.0
    """For layers."""


class Runner:
    def __init__(self, model: DeepseekV3, pool: PagePool, clock: Clock, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = model
        self._pool = pool
        self._clock = clock

    def run(self, works: list[Work], readings: Mapping[Sequence, Reading]) -> Outcome:
        outcome = Outcome([])

        def before_layer(layer: int) -> None:
            began = self._clock.monotonic()
            for sequence, reading in readings.items():
                if sequence not in outcome.broken and not reading.wait(layer):
                    outcome.broken.add(sequence)
            outcome.waited_s += self._clock.monotonic() - began

        with torch.inference_mode():
            pieces = [Piece(work.tokens, work.start, work.sequence.pages, work.sample) for work in works]
            logits = self._model.forward(batch_of(pieces, self._model.device), self._pool, before_layer if readings else None)
            chosen = iter(sample(logits, [draw(work.sequence) for work in works if work.sample]))
        outcome.tokens = [next(chosen) if work.sample else None for work in works]
        return outcome


def draw(sequence: Sequence) -> Draw:
    request = sequence.request
    return Draw(request.sampling, len(sequence.tokens) - len(request.prompt), sequence.tokens)
