"""What the KV cache on kvfs is worth to a worker, and what it costs: `python -m tests.bench.inference_prefix [--tokens N ...] [--quick]`.

The latent576 checkpoint (cached rows as wide as DeepSeek-V3's, 4 layers) in fp32 on the CPU, one engine in this process, a cluster of its own.
  - Time to first token of a prompt: cold (computed), warm (a new engine with empty memory reads all full pages from kvfs), and from the engine's own
    memory; the bytes read, and the bandwidth of the readings.
  - Tokens decoded a second with write-back and without, in turns; the ratio of the medians.
CPU time is this process's and the cluster's. A prompt of 16,384 tokens is computed for about two minutes here.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import torch
import trio

from kvfs.cli.context import Options, console, table
from kvfs.cli.measure import cpu_of
from kvfs.cli.own_cluster import Place, place_to_measure
from kvfs.client.async_client import open_client
from kvfs.common.boundary.clock import SystemClock
from kvfs.inference.cache.pool import PagePool
from kvfs.inference.config import EngineConfig
from kvfs.inference.engine.engine import Engine
from kvfs.inference.model import sample
from kvfs.inference.model.config import ROPE_LAYOUT
from kvfs.inference.model.deepseek import DeepseekV3
from kvfs.inference.model.digest import model_digest
from kvfs.inference.request import Request, Sampling, TokenEvent
from kvfs.inference.store.store import KvStore
from kvfs.kvcache import AsyncKVCache

LENGTHS = (1024, 4096, 16_384)
QUICK_LENGTHS = (256, 512)
ROUNDS = 5
DECODERS = 8
DECODED = 192


@dataclass
class Side:
    """One engine."""

    engine: Engine
    store: KvStore | None
    done: trio.Event
    left: int = 0

    async def answer(self, requests: list[Request]) -> float:
        """Seconds until all of them have ended."""
        self.left, self.done = len(requests), trio.Event()
        began_s = time.perf_counter()
        for request in requests:
            self.engine.submit(request)
        await self.done.wait()
        return time.perf_counter() - began_s

    def heard(self, events: list[TokenEvent]) -> None:
        self.left -= sum(event.finish is not None for event in events)
        if self.left == 0:
            self.done.set()


class Bench:
    def __init__(self, place: Place, path: Path, model: DeepseekV3, cache: AsyncKVCache) -> None:
        self.place = place
        self._path, self._model, self._cache = path, model, cache
        self._digest = model_digest(path)
        self._number = 0

    def cpu_s(self) -> float:
        return time.process_time() + cpu_of(self.place.pids)

    def request(self, prompt: list[int], tokens: int) -> Request:
        self._number += 1
        return Request(id=str(self._number), prompt=tuple(prompt), sampling=Sampling(max_tokens=tokens, temperature=0, ignore_eos=True))

    @asynccontextmanager
    async def side(self, pages: int, *, stored: bool = True) -> AsyncIterator[Side]:
        config = EngineConfig(model=str(self._path), cache_pages=pages, read_timeout_s=60, write_queue_bytes=1 << 30, threads=1)
        pool = PagePool(self._model.page_format("fp32"), pages)
        for page in range(pages):
            pool.clear_tail(page, 0)  # touched once, as a worker's memory soon is: a virtual machine's first touch costs a millisecond a MiB
        clock = SystemClock()
        store = await KvStore.open(self._cache, self._digest, ROPE_LAYOUT, pool, config, clock) if stored else None
        async with trio.open_nursery() as nursery:
            made = Side(Engine(config, self._model, pool, clock, lambda events: made.heard(events), store), store, trio.Event())
            nursery.start_soon(made.engine.run)
            yield made
            if store is not None:
                await store.idle()
            nursery.cancel_scope.cancel()
        pool.close()


def numbers(count: int, seed: int) -> list[int]:
    found: list[int] = torch.randint(2, 4096, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return found


async def first_tokens(bench: Bench, lengths: tuple[int, ...]) -> None:
    made = table(
        "prompt tokens", "where its pages were", "first token ms", "ratio to cold", "CPU ms", "MiB read", "GB/s read", right=("first token ms",)
    )
    made.title = "Time to first token, latent576, fp32"
    for length in lengths:
        prompt, pages = numbers(length, length), length // 64 + 4
        cold_s = 0.0
        for name in ("nowhere", "kvfs"):
            async with bench.side(pages) as side:
                assert side.store is not None
                for where in (name, "memory") if name == "kvfs" else (name,):
                    before, reading_s, cpu = side.store.stats.read_bytes, side.store.stats.read_seconds, bench.cpu_s()
                    took_s = await side.answer([bench.request(prompt, 1)])
                    cpu, read = bench.cpu_s() - cpu, side.store.stats.read_bytes - before
                    cold_s = cold_s or took_s
                    rate = f"{read / (side.store.stats.read_seconds - reading_s) / 1e9:.2f}" if read else ""
                    made.add_row(
                        f"{length:,}" if where == "nowhere" else "",
                        where,
                        f"{took_s * 1e3:,.0f}",
                        f"{took_s / cold_s:.4f}",
                        f"{cpu * 1e3:,.0f}",
                        f"{read / (1 << 20):,.1f}" if read else "",
                        rate,
                    )
    console.print(made)


async def write_back(bench: Bench, rounds: int) -> None:
    rates: dict[bool, list[float]] = {True: [], False: []}
    cpu: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds):
        for stored in (True, False) if number % 2 else (False, True):
            async with bench.side(DECODERS * 8, stored=stored) as side:
                prompts = [numbers(16, 1_000_000 + number * 100 + place + 50 * stored) for place in range(DECODERS)]
                before = bench.cpu_s()
                took_s = await side.answer([bench.request(prompt, DECODED) for prompt in prompts])
                if side.store is not None:
                    await side.store.idle()
                    assert side.store.stats.written_pages >= DECODERS * (DECODED // 64), "nothing was written: nothing was measured"
                cpu[stored].append((bench.cpu_s() - before) / DECODERS / DECODED)
                rates[stored].append(DECODERS * DECODED / took_s)
    made = table("write-back", "tokens/s", "ratio", "CPU us/token", right=("tokens/s", "ratio", "CPU us/token"))
    made.title = f"Decoding {DECODERS} answers, median of {rounds} rounds"
    plain = statistics.median(rates[False])
    for stored in (False, True):
        rate = statistics.median(rates[stored])
        made.add_row("on" if stored else "off", f"{rate:,.0f}", f"{rate / plain:.3f}", f"{statistics.median(cpu[stored]) * 1e6:,.0f}")
    console.print(made)


def measure(lengths: tuple[int, ...], rounds: int, parent: Path | None = None) -> None:
    """Print both tables."""
    torch.set_num_threads(1)

    async def run(place: Place, path: Path) -> None:
        async with open_client(place.spec) as client:
            bench = Bench(place, path, DeepseekV3.load(path), AsyncKVCache(client))
            await first_tokens(bench, lengths)
            await write_back(bench, rounds)

    with (
        tempfile.TemporaryDirectory(prefix="kvfs-bench-model-", dir=parent) as folder,
        place_to_measure(Options(), storage=2, replicas=[1], parent=parent) as place,
    ):
        path = Path(folder) / "latent576"
        sample.make("latent576", path)
        trio.run(run, place, path)


@click.command()
@click.option("--tokens", multiple=True, type=click.IntRange(65), default=LENGTHS, show_default=True, help="Lengths of prompts.")
@click.option("--rounds", type=click.IntRange(1), default=ROUNDS, show_default=True, help="Of decoding.")
@click.option("--quick", is_flag=True, help="Short prompts: shows that everything runs.")
def main(tokens: tuple[int, ...], rounds: int, quick: bool) -> None:
    """Print the tables."""
    measure(QUICK_LENGTHS if quick else tokens, 1 if quick else rounds)


if __name__ == "__main__":
    main()
