"""`kvfs demo-kvcache` (`make demo-kvcache`): the KV cache's story on one machine, with separate processes and blocks of a real model's size.

A cluster of three storage services comes up. Two client processes look prompts up by prefix in a space for DeepSeek-V3's latent cache, put what is
missing, and get what the other has put, comparing every byte. Everything is stopped and started again, and all blocks are there. A generated workload
runs against a space that is too small for it, beside exact LRU and beside unlimited capacity. Everything lies in one temporary directory, which is
gone at the end, also after an interrupt; only the plot stays.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import trio

from kvfs.cli import bench_trace, cluster_dir
from kvfs.cli.context import common_options, console, human_bytes, print_json, table
from kvfs.cli.kv import packing, share
from kvfs.cli.measure import step_teller, steps_bar
from kvfs.cli.own_cluster import shut_down, work_directory
from kvfs.cli.plots import check_can_plot, hit_rate_over_time
from kvfs.cli.process import interruptible
from kvfs.cli.up import start_detached, stop_supervisor
from kvfs.cli.workers import Line, Workers
from kvfs.client import Client
from kvfs.common.errors import DataError
from kvfs.kvcache import KVCache, Put, SpaceParams, SpaceStats
from kvfs.kvcache.replay import Request, Tally
from kvfs.kvcache.workload import Prompt, as_requests, generate, preset

STORAGE = 3
CLIENTS = 2
SPACE = "deepseek-v3"
BLOCK_TOKENS = 64
LAYERS, LATENT, ROPE, NUMBER_BYTES = 61, 512, 64, 2
BLOCK_BYTES = BLOCK_TOKENS * LAYERS * (LATENT + ROPE) * NUMBER_BYTES
"""4,497,408: the compressed latent and the decoupled rotary key of each token in each layer, in bf16."""
PARAMS = SpaceParams(
    block_tokens=BLOCK_TOKENS,
    block_bytes=BLOCK_BYTES,
    model="deepseek-ai/DeepSeek-V3",
    dtype="bfloat16",
    layout="layer,token,latent+rope",
    rope="yarn",
)
PROMPTS = 8
"""Of the first part, over both clients."""
BATCH = 8
"""Blocks in one put or get."""


def block_content(key: bytes) -> bytes:
    """What stands for the cache of a block: every byte depends on the key."""
    return random.Random(key).randbytes(BLOCK_BYTES)


@dataclass(slots=True)
class Moved:
    """What one client did."""

    matched_blocks: int = 0
    blocks: int = 0
    """Put, or got."""
    seconds: float = 0.0
    """In the calls themselves."""

    def add(self, other: Moved) -> None:
        self.matched_blocks += other.matched_blocks
        self.blocks += other.blocks
        self.seconds = max(self.seconds, other.seconds)

    @property
    def rate(self) -> float:
        """Bytes a second of all clients together; `seconds` is the longest of them."""
        return self.blocks * BLOCK_BYTES / self.seconds if self.seconds else 0.0


# --- in a client's process -------------------------------------------------------------------------------------------------------------------


def client_process(line: Line, cluster: str) -> None:
    with Client(cluster, description="demo-kvcache") as client:
        space = KVCache(client).open(SPACE, PARAMS)
        with space.buffers(BATCH) as buffers:
            for what, prompts in line:
                moved = Moved()
                for tokens in prompts:
                    keys = space.keys(tokens)
                    found = space.match(tokens) // BLOCK_TOKENS
                    moved.matched_blocks += found
                    if what == "put":
                        _put(space, keys, found, buffers, moved)
                    else:
                        _get(space, keys, found, buffers, moved)
                    line.progress(1)
                line.answer(moved)


def _put(space: Any, keys: list[bytes], found: int, buffers: Any, moved: Moved) -> None:
    for begin in range(found, len(keys), BATCH):
        batch = keys[begin : begin + BATCH]
        blocks = [buffers[place] for place in range(len(batch))]
        for key, block in zip(batch, blocks, strict=True):
            block[:] = block_content(key)
        began_s = time.perf_counter()
        results = space.put(batch, blocks, prefix=keys[:begin])
        moved.seconds += time.perf_counter() - began_s
        moved.blocks += results.count(Put.STORED)
        if Put.REFUSED in results:
            raise DataError(f"{results.count(Put.REFUSED)} blocks were refused: {space.counters}")


def _get(space: Any, keys: list[bytes], found: int, buffers: Any, moved: Moved) -> None:
    if found != len(keys):
        raise DataError(f"only {found} of the {len(keys)} blocks of a prompt were found")
    for begin in range(0, len(keys), BATCH):
        batch = keys[begin : begin + BATCH]
        blocks = [buffers[place] for place in range(len(batch))]
        began_s = time.perf_counter()
        lengths = space.get(batch, blocks)
        moved.seconds += time.perf_counter() - began_s
        moved.blocks += len(batch)
        for key, length, block in zip(batch, lengths, blocks, strict=True):
            if length != BLOCK_BYTES or bytes(block) != block_content(key):
                raise DataError(f"block {key.hex()} is not what was put: {length} bytes")


# --- the command -----------------------------------------------------------------------------------------------------------------------------


class KVCacheDemo:
    """The steps, in order; `say` prints what happens."""

    def __init__(self, base: Path, replicas: int, seed: int, capacity_blocks: int, quiet: bool) -> None:
        self.say, self.quiet = step_teller(quiet=quiet), quiet
        self.capacity_blocks = capacity_blocks
        self.params = PARAMS
        self.facts: dict[str, Any] = {"replicas": replicas, "block_bytes": BLOCK_BYTES}
        self.cluster = cluster_dir.create(
            base / "cluster", storage=STORAGE, replicas=replicas, mount=None, chunk_size_bytes=1 << 20, lease_ms=2000, base_port=None
        )
        self.spec = str(self.cluster.path)
        workload = preset("laptop", seed=seed)
        self.requests = list(as_requests(generate(workload), BLOCK_TOKENS))
        first = [prompt for prompt in generate(preset("laptop", seed=seed + 1, requests=4 * PROMPTS)) if prompt.turn == 0][:PROMPTS]
        self.shares = [first[number::CLIENTS] for number in range(CLIENTS)]

    def run(self) -> bench_trace.Replayed:
        started_s = time.perf_counter()
        start_detached(self.cluster, restart=False)
        self.say(f"a cluster of {STORAGE} storage services is up in {time.perf_counter() - started_s:.1f} s")
        self.put_and_get()
        self.restart()
        return self.replay()

    def _clients(self) -> Workers:
        return Workers(client_process, [(self.spec,)] * CLIENTS)

    def _ask(self, clients: Workers, what: str, shares: Sequence[Sequence[Prompt]]) -> Moved:
        total = Moved()
        with steps_bar(sum(map(len, shares)), f"{what} prompts", quiet=self.quiet) as advance:
            requests = [(what, [prompt.tokens for prompt in each]) for each in shares]
            for moved in clients.ask_each(requests, lambda count: advance(count, "")):
                total.add(moved)
        return total

    def put_and_get(self) -> None:
        with Client(self.spec, description="demo-kvcache") as client:
            KVCache(client).create(SPACE, self.params)
        with self._clients() as clients:
            put = self._ask(clients, "put", self.shares)
            self.say(
                f"{CLIENTS} client processes put {put.blocks} blocks of {BLOCK_BYTES:,} bytes at {human_bytes(put.rate)}/s; "
                f"{put.matched_blocks} blocks of shared prefixes were found instead"
            )
            got = self._ask(clients, "get", self.shares[1:] + self.shares[:1])
            self.say(f"each got what the other had put, {got.blocks} blocks at {human_bytes(got.rate)}/s: every byte is right")
        self.facts |= {"put_blocks": put.blocks, "put_bytes_per_s": put.rate, "got_blocks": got.blocks, "get_bytes_per_s": got.rate}

    def restart(self) -> None:
        before = self._stats()
        stop_supervisor(self.cluster)
        start_detached(self.cluster, restart=False)
        with self._clients() as clients:
            again = self._ask(clients, "get", self.shares)
        after = self._stats()
        if after.blocks != before.blocks or after.stored != before.stored:
            raise DataError(f"{before.blocks} blocks before the restart, {after.blocks} after it")
        self.say(f"everything was stopped and started again: all {after.blocks} blocks are there, every byte is right")
        self.facts |= {"blocks_after_restart": after.blocks, "get_after_restart_bytes_per_s": again.rate}
        with Client(self.spec, description="demo-kvcache") as client:
            KVCache(client).drop(SPACE)

    def _stats(self) -> SpaceStats:
        with Client(self.spec, description="demo-kvcache") as client:
            return KVCache(client).stats(SPACE)

    def replay(self) -> bench_trace.Replayed:
        with steps_bar(len(self.requests), "replaying", quiet=self.quiet) as advance:

            def progress(request: Request, tally: Tally) -> None:
                advance(1, f"replaying: {100 * tally.hit_rate:.1f} % hits")

            run = partial(bench_trace.run, read=True, progress=progress)
            result = trio.run(run, self.spec, f"{SPACE}-limited", self.requests, self.capacity_blocks, self.params)
        self.say(
            f"{len(self.requests)} requests of a generated workload ran in {result.seconds:.1f} s; what was found was read, and every byte is right"
        )
        self.facts |= {"replay": result.describe(), "packing": packing(result.stats)}
        return result


def show(facts: dict[str, Any], result: bench_trace.Replayed) -> None:
    replay: dict[str, Any] = facts["replay"]
    made = table("", "")
    rows = (
        ("put, two clients", f"{human_bytes(facts['put_bytes_per_s'])}/s"),
        ("get, two clients", f"{human_bytes(facts['get_bytes_per_s'])}/s"),
        ("get after the restart", f"{human_bytes(facts['get_after_restart_bytes_per_s'])}/s"),
        ("capacity of the replay", f"{result.capacity_blocks} blocks, {human_bytes((result.capacity_blocks or 0) * BLOCK_BYTES)}"),
        ("replay", f"{replay['requests_per_s']:.1f} requests/s, {human_bytes(replay['bytes_per_s'])}/s"),
        ("hit rate (tokens)", f"{100 * replay['hit_rate']:.2f} %"),
        ("exact LRU of that size", f"{100 * replay['lru_hit_rate']:.2f} %"),
        ("unlimited capacity", f"{100 * replay['unlimited_hit_rate']:.2f} %"),
        ("blocks stored, evicted", f"{replay['blocks_stored']:,}, {replay['evicted']:,}"),
        ("packing of so small a space", share(facts["packing"])),
    )
    for row in rows:
        made.add_row(*row)
    console.print(made)


@click.command("demo-kvcache")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), default=Path("demo-kvcache.png"), help="Where the plot goes (PNG).")
@click.option("--no-plot", is_flag=True, help="Draw none: needs no matplotlib.")
@click.option("--replicas", type=click.IntRange(1, STORAGE), default=1, help="Copies of each block.")
@click.option("--capacity-blocks", type=click.IntRange(12, 600), default=150, help="Of the replay: 4.3 MiB each, times the copies.")
@click.option("--seed", type=int, default=1, help="Of the workload.")
@click.option("--keep", is_flag=True, help="Leave the temporary directory (the cluster is stopped all the same).")
@click.option(
    "--directory", type=click.Path(file_okay=False, exists=True, path_type=Path), default=None, help="Where to make the temporary directory."
)
@common_options
def demo_kvcache(options: Any, plot: Path, no_plot: bool, replicas: int, capacity_blocks: int, seed: int, keep: bool, directory: Path | None) -> None:
    """Start a cluster, put and get KV-cache blocks from two processes, restart everything, replay a workload in too little room, clean up."""
    if not no_plot:
        check_can_plot()
    with interruptible(), work_directory("kvfs-demo-kvcache-", directory, keep=keep) as base, ExitStack() as stack:
        made = KVCacheDemo(base, replicas, seed, capacity_blocks, options.as_json)
        stack.callback(shut_down, made.cluster)
        result = made.run()
        if not no_plot:
            lines = [("kvfs", result.tally), (f"exact LRU, {capacity_blocks} blocks", result.lru), ("unlimited", result.unlimited)]
            hit_rate_over_time(plot, f"Prefix hits in a space of {capacity_blocks} blocks of {BLOCK_TOKENS} tokens", lines)
            made.facts["plot"] = str(plot)
        if options.as_json:
            print_json(made.facts)
        else:
            console.print(f"\n{STORAGE} storage services and {replicas} copies of each block on this machine")
            show(made.facts, result)
            if not no_plot:
                console.print(f"plot: {plot}")
