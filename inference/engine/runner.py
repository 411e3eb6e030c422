"""One step in the worker thread: from the scheduler's work to the next tokens.

Owns `Runner`. Invariants: it changes nothing of the scheduler's; sequences whose pages did not arrive are reported, never raised. Everything here
runs in one thread at a time, never in trio's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from kvfs.common.boundary.clock import Clock
from kvfs.inference.cache.pool import PagePool
from kvfs.inference.engine.prefix_store import Reading
from kvfs.inference.engine.sampler import Draw, sample
from kvfs.inference.engine.sequence import Sequence, Work
from kvfs.inference.model.batch import Piece
from kvfs.inference.model.deepseek import DeepseekV3, batch_of

PATIENCE_S = 0.1
"""What a step waits for layers altogether. Longer, and requests that come meanwhile would notice."""


@dataclass(slots=True)
class Outcome:
    tokens: list[int | None]
    """Of each work: the next token, where one was to be chosen."""
    broken: set[Sequence] = field(default_factory=set)
    """Their pages did not all arrive."""
    waited_s: float = 0.0
    """For layers."""
    postponed: bool = False
    """Layers were too long in coming: nothing was computed."""


class _Late(Exception):
    """Out of the model's forward pass."""


class Runner:
    def __init__(self, model: DeepseekV3, pool: PagePool, clock: Clock, threads: int) -> None:
        self._threads = threads
        self._model = model
        self._pool = pool
        self._clock = clock

    def run(self, works: list[Work], readings: Mapping[Sequence, Reading]) -> Outcome:
        if torch.get_num_threads() != self._threads:  # a setting of each thread that computes, whatever was set elsewhere
            torch.set_num_threads(self._threads)
        outcome = Outcome([])
        before_layer = partial(self._wait, outcome, readings) if readings else None
        with torch.inference_mode():
            pieces = [Piece(work.tokens, work.start, work.sequence.pages, work.sample) for work in works]
            try:
                logits = self._model.forward(batch_of(pieces, self._model.device), self._pool, before_layer)
            except _Late:
                outcome.postponed = True
                return outcome
            chosen = iter(sample(logits, [draw(work.sequence) for work in works if work.sample]))
        outcome.tokens = [next(chosen) if work.sample else None for work in works]
        return outcome

    def _wait(self, outcome: Outcome, readings: Mapping[Sequence, Reading], layer: int) -> None:
        for sequence, reading in readings.items():
            if sequence in outcome.broken:
                continue
            began = self._clock.monotonic()
            there = reading.wait(layer, max(0.0, PATIENCE_S - outcome.waited_s))
            outcome.waited_s += self._clock.monotonic() - began
            if there is None:
                raise _Late
            if not there:
                outcome.broken.add(sequence)


def draw(sequence: Sequence) -> Draw:
    request = sequence.request
    return Draw(request.sampling, len(sequence.tokens) - len(request.prompt), sequence.tokens)
