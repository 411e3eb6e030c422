"""The model beside transformers, on the CPU: `python -m tests.bench.inference_model [--shape NAME] [--prompt N ...] [--rounds N] [--profile]`.

Both in this process, in fp32, on one thread, in turns; transformers with its own defaults. Printed are medians.
  - Prefill: one prompt, tokens a second; here also in chunks as the engine computes it, which transformers is not asked to do.
  - Decode: steps a second with 1 and 8 requests of a length, and with 8 of mixed lengths (padded for transformers, as its generate pads them).
CPU time is this process's. Where the machine is busy, its ratio says more than the wall's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from kvfs.inference.cache.format import PAGE_TOKENS
from kvfs.inference.cache.pool import PagePool
from kvfs.inference.config import EngineConfig
from kvfs.inference.model import sample
from kvfs.inference.model.batch import Piece
from kvfs.inference.model.deepseek import DeepseekV3, batch_of

STEPS = 4
"""Decode steps in a round."""


@dataclass(slots=True)
class Spent:
    wall_s: float
    cpu_s: float


def timed(work: Callable[[], None]) -> Spent:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


class Ours:
    def __init__(self, directory: Path, lengths: Sequence[int]) -> None:
        """Room for requests of these lengths, and what they decode."""
        self.model = DeepseekV3.load(directory)
        self._pages: list[list[int]] = []
        first = 0
        for length in lengths:
            count = -(-(length + STEPS) // PAGE_TOKENS)
            self._pages.append(list(range(first, first + count)))
            first += count
        self.pool = PagePool(self.model.page_format("fp32"), first)
        self._lengths = lengths

    def prefill(self, prompts: Sequence[Sequence[int]], chunk: int) -> None:
        for prompt, pages in zip(prompts, self._pages, strict=True):
            for start in range(0, len(prompt), chunk):
                piece = Piece(list(prompt[start : start + chunk]), start, pages, start + chunk >= len(prompt))
                self.model.forward(batch_of([piece]), self.pool)

    def decode(self) -> None:
        tokens = [5] * len(self._lengths)
        for step in range(STEPS):
            pieces = [Piece([token], length + step, pages, True) for token, length, pages in zip(tokens, self._lengths, self._pages, strict=True)]
            tokens = self.model.forward(batch_of(pieces), self.pool).argmax(-1).tolist()

    def close(self) -> None:
        self.pool.close()


class Theirs:
    def __init__(self, directory: Path, lengths: Sequence[int]) -> None:
        from transformers import DeepseekV3ForCausalLM

        self._model = DeepseekV3ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self._lengths = lengths
        self._cache: Any = None

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        longest = max(self._lengths)
        rows = torch.tensor([[2] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        self._mask = torch.tensor([[0] * (longest - length) + [1] * length for length in self._lengths])
        with torch.inference_mode():
            self._cache = self._model(rows, attention_mask=self._mask, use_cache=True, logits_to_keep=1).past_key_values

    def decode(self) -> None:
        """From the end of the prompts, each time: what was decoded before is cut off."""
        self._cache.crop(-STEPS)
        mask, tokens = self._mask, torch.full((len(self._lengths), 1), 5)
        with torch.inference_mode():
            for step in range(STEPS):
                mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
                places = torch.tensor(self._lengths)[:, None] + step
                found = self._model(tokens, attention_mask=mask, position_ids=places, past_key_values=self._cache, use_cache=True)
                tokens = found.logits[:, -1:].argmax(-1)


def report(name: str, unit: int, ours: list[Spent], theirs: list[Spent]) -> None:
    def middle(spent: list[Spent]) -> Spent:
        return Spent(statistics.median(each.wall_s for each in spent), statistics.median(each.cpu_s for each in spent))

    mine, other = middle(ours), middle(theirs)
    print(
        f"{name:34}{unit / mine.wall_s:10.1f}{unit / other.wall_s:14.1f}{other.wall_s / mine.wall_s:8.2f}"
        f"{mine.cpu_s / unit * 1e3:12.3f}{other.cpu_s / unit * 1e3:14.3f}{other.cpu_s / mine.cpu_s:8.2f}",
        flush=True,
    )


def tokens(count: int, vocabulary: int, seed: int) -> list[int]:
    return torch.randint(2, vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def measure_prefill(directory: Path, length: int, rounds: int, chunk: int) -> None:
    ours, theirs = Ours(directory, [length]), Theirs(directory, [length])
    prompts = [tokens(length, ours.model.config.vocabulary, 1)]
    whole, chunked, other = [], [], []
    for _ in range(rounds):
        whole.append(timed(lambda: ours.prefill(prompts, length)))
        chunked.append(timed(lambda: ours.prefill(prompts, chunk)))
        other.append(timed(lambda: theirs.prefill(prompts)))
    report(f"prefill {length}", length, whole, other)
    if length > chunk:
        report(f"prefill {length}, chunks of {chunk}", length, chunked, other)
    ours.close()


def measure_decode(directory: Path, name: str, lengths: Sequence[int], rounds: int) -> None:
    ours, theirs = Ours(directory, lengths), Theirs(directory, lengths)
    prompts = [tokens(length, ours.model.config.vocabulary, seed) for seed, length in enumerate(lengths)]
    ours.prefill(prompts, 512)
    theirs.prefill(prompts)
    mine, other = [], []
    for _ in range(rounds):
        mine.append(timed(ours.decode))
        other.append(timed(theirs.decode))
    report(name, STEPS, mine, other)
    ours.close()


def show_profile(directory: Path, length: int) -> None:
    """Where our own time goes: a prompt, and then steps of eight requests."""
    ours = Ours(directory, [length] * 8)
    prompts = [tokens(length, ours.model.config.vocabulary, seed) for seed in range(8)]
    ours.prefill(prompts, 512)
    for work in (lambda: ours.prefill(prompts, 512), ours.decode):
        with profile(activities=[ProfilerActivity.CPU]) as found:
            work()
        print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=40))
    ours.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--shape", choices=list(sample.SHAPES), default="latent576")
    parser.add_argument("--prompt", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="where our time goes, instead")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        sample.make(chosen.shape, directory)
        if chosen.profile:
            show_profile(directory, chosen.prompt[0])
            return
        print(f"{chosen.shape}, fp32, one thread; prefill in tokens, decode in steps; ratio: theirs / ours, above 1 we are faster")
        print(f"{'':34}{'a second':>10}{'transformers':>14}{'ratio':>8}{'CPU ms each':>12}{'transformers':>14}{'ratio':>8}")
        for length in chosen.prompt:
            measure_prefill(directory, length, chosen.rounds, EngineConfig().step_tokens)
        for requests, length in ((1, 512), (8, 512), (8, 1024)):
            measure_decode(directory, f"decode {requests} of {length}", [length] * requests, chosen.rounds)
        measure_decode(directory, "decode 8 of 64 to 768", [64, 96, 128, 192, 256, 384, 512, 768], chosen.rounds)


if __name__ == "__main__":
    main()
