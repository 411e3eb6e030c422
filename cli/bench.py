"""`kvfs bench`: measurements of KV-cache spaces and of inference servers, on the cluster that is named or on one of the command's own.

Owns the options and tables; the runs are bench_kv.py's, bench_trace.py's and bench_serve.py's.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import click
import trio

from kvfs.cli import bench_kv, bench_trace
from kvfs.cli.arguments import Size
from kvfs.cli.context import Options, common_options, console, human_bytes, print_json, table
from kvfs.cli.engine_options import engine_options, needs_inference
from kvfs.cli.measure import steps_bar
from kvfs.cli.own_cluster import Place, place_to_measure
from kvfs.common.errors import InvalidArgument
from kvfs.kvcache import SpaceParams
from kvfs.kvcache.params import BLOCK_BYTES_MAX, REPLICATION_MAX
from kvfs.kvcache.replay import TRACE_BLOCK_TOKENS, Request, Tally, read_trace
from kvfs.kvcache.workload import PRESETS, as_requests, generate, preset

STORAGE = 3
DIRECTORY_OPTION = click.option(
    "--directory",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    default=None,
    help="Where a cluster of this command's own lies (default: the temporary directory).",
)
STORAGE_OPTION = click.option("--storage", type=click.IntRange(1, 16), default=STORAGE, help="Storage services of a cluster of this command's own.")


@click.group()
def bench() -> None:
    """Measure. Without --cluster or $KVFS_CLUSTER a cluster is started for it in a temporary directory, and removed."""


def said(options: Options, place: Place) -> None:
    if not options.as_json:
        console.print(f"on {place.description}", style="dim")


# --- kv ------------------------------------------------------------------------------------------------------------------------------------


@bench.command()
@click.option("--block-bytes", "sizes", type=Size(), multiple=True, default=("64K", "1M", "4M"), help="May be given several times, as the next.")
@click.option("--batch", "batches", type=click.IntRange(1, 4096), multiple=True, default=(1, 16), help="Blocks in one put or get.")
@click.option("--clients", type=click.IntRange(1, 64), multiple=True, default=(1,), help="Client processes side by side.")
@click.option("--transport", "transports", type=click.Choice(["shm", "tcp"]), multiple=True, default=("shm",), help="To services on this machine.")
@click.option("--replicas", type=click.IntRange(1, REPLICATION_MAX), multiple=True, default=(1,), help="Copies of each block.")
@click.option("--working-set", type=Size(), default="128M", help="Bytes of blocks, all clients together; more than the machine's memory reads disks.")
@click.option("--seconds", type=click.FloatRange(0.05, 3600), default=2.0, help="Of gets, and of exists, in each measurement.")
@STORAGE_OPTION
@DIRECTORY_OPTION
@common_options
def kv(
    options: Options,
    sizes: tuple[int, ...],
    batches: tuple[int, ...],
    clients: tuple[int, ...],
    transports: tuple[str, ...],
    replicas: tuple[int, ...],
    working_set: int,
    seconds: float,
    storage: int,
    directory: Path | None,
) -> None:
    """Put, get and exists of blocks: throughput, latency of a call, CPU time, for every combination of the options."""
    if any(not 16 <= size <= BLOCK_BYTES_MAX for size in sizes):
        raise InvalidArgument(f"blocks of {', '.join(map(str, sizes))} bytes: 16 to {BLOCK_BYTES_MAX}")
    plans = [
        bench_kv.Plan(size, batch, count, transport, copies, working_set, seconds)
        for copies in replicas
        for transport in transports
        for size in sizes
        for count in clients
        for batch in batches
    ]
    if any(plan.blocks < plan.clients for plan in plans):
        raise InvalidArgument(f"a working set of {working_set} bytes has not one block for each client: say a larger --working-set")
    total = sum(plan.blocks + 2 for plan in plans)
    rows = []
    with place_to_measure(options, storage=max(storage, *replicas), replicas=replicas, parent=directory) as place:
        said(options, place)
        bench_kv.check_room(place.spec, plans)
        with steps_bar(total, "starting", quiet=options.as_json) as advance:
            for number, plan in enumerate(plans):
                rows += bench_kv.run(place.spec, place.pids, bench_trace.space_name("bench-kv", number), plan, advance)
    if options.as_json:
        print_json([row.describe() for row in rows])
        return
    right = ("blocks/s", "rate", "p50 us", "p99 us", "CPU us")
    made = table("operation", *right, right=right)
    for row in rows:
        plan = row.plan
        what = f"{row.operation} {human_bytes(plan.block_bytes)} x{row.batch} {plan.transport} r{plan.replicas} c{plan.clients}"
        rate = f"{human_bytes(row.bytes / row.wall_s)}/s" if row.bytes else ""
        times = (f"{seconds * 1e6:,.0f}" for seconds in (row.p50_s, row.p99_s))
        made.add_row(what, f"{row.blocks / row.wall_s:,.0f}", rate, *times, f"{row.cpu_s / row.blocks * 1e6:,.1f}")
    console.print(made)
    whose = "the clients and all services" if place.pids else "the clients alone"
    console.print(f"x: blocks in a call, r: copies, c: clients. p50 and p99 are of a call, CPU is a block's, of {whose}.", style="dim")
    missed = sum(row.missed for row in rows)
    if missed:
        console.print(f"{missed} blocks were refused or not found: storage is too small for the working set, or too slow", style="yellow")


# --- trace ---------------------------------------------------------------------------------------------------------------------------------


@bench.command()
@click.argument("file", type=click.Path(dir_okay=False, exists=True, path_type=Path), required=False)
@click.option("--workload", type=click.Choice(list(PRESETS)), default=None, help="Generated requests instead of a FILE.")
@click.option("--seed", type=int, default=1, help="Of the generated requests.")
@click.option("--capacity-blocks", "capacities", type=click.IntRange(0), multiple=True, default=(0,), help="Several times if wished; 0: unlimited.")
@click.option("--limit", type=click.IntRange(1), default=None, help="Only the first so many requests.")
@click.option("--block-tokens", type=click.IntRange(1), default=None, help="Default: 512 (Mooncake's) for a FILE, 64 for a workload.")
@click.option("--block-bytes", type=Size(), default="4K", help="What stands for a block: small, so that its bytes are not what is measured.")
@click.option("--replicas", type=click.IntRange(1, REPLICATION_MAX), default=1, help="Copies of each block.")
@click.option("--read", is_flag=True, help="Also get what was found, and compare every byte.")
@STORAGE_OPTION
@DIRECTORY_OPTION
@common_options
def trace(
    options: Options,
    file: Path | None,
    workload: str | None,
    seed: int,
    capacities: tuple[int, ...],
    limit: int | None,
    block_tokens: int | None,
    block_bytes: int,
    replicas: int,
    read: bool,
    storage: int,
    directory: Path | None,
) -> None:
    """Replay FILE (Mooncake's format: JSON lines with timestamp, input_length, output_length, hash_ids) as fast as it goes: hit rate beside exact
    LRU of the same size and beside unlimited capacity, evictions, throughput."""
    requests = _requests(file, workload, seed, block_tokens, limit)
    params = SpaceParams(block_tokens=_tokens(workload, block_tokens), block_bytes=block_bytes, replication=replicas)
    results = []
    with place_to_measure(options, storage=max(storage, replicas), replicas=(replicas,), parent=directory) as place:
        said(options, place)
        with steps_bar(len(requests) * len(capacities), "replaying", quiet=options.as_json) as advance:
            for number, capacity in enumerate(capacities):
                what = f"{capacity:,} blocks" if capacity else "unlimited"

                def progress(request: Request, tally: Tally, what: str = what) -> None:
                    advance(1, f"{what}: {100 * tally.hit_rate:.1f} % hits")

                name = bench_trace.space_name("bench-trace", number)
                results.append(trio.run(_replay, place.spec, name, requests, capacity or None, params, read, progress))
    if options.as_json:
        print_json([result.describe() for result in results])
    else:
        show_replays(results)


async def _replay(
    spec: str, name: str, requests: list[Request], capacity: int | None, params: SpaceParams, read: bool, progress: bench_trace.Progress
) -> bench_trace.Replayed:
    return await bench_trace.run(spec, name, requests, capacity, params, read=read, progress=progress)


def _tokens(workload: str | None, block_tokens: int | None) -> int:
    return block_tokens or (TRACE_BLOCK_TOKENS if workload is None else 64)


def _requests(file: Path | None, workload: str | None, seed: int, block_tokens: int | None, limit: int | None) -> list[Request]:
    if (file is None) == (workload is None):
        raise click.UsageError("name a FILE, or a --workload")
    tokens = _tokens(workload, block_tokens)
    found = as_requests(generate(preset(workload, seed=seed)), tokens) if workload else read_trace(str(file), block_tokens=tokens)
    requests = list(islice(found, limit))
    if not requests:
        raise InvalidArgument(f"{file} has no requests")
    return requests


def show_replays(results: list[bench_trace.Replayed]) -> None:
    right = ("requests", "hit rate", "exact LRU", "unlimited", "evicted", "requests/s", "blocks/s")
    made = table("capacity", *right, right=("capacity", *right))
    for result in results:
        facts: dict[str, Any] = result.describe()
        rates = (f"{100 * facts[name]:.2f} %" for name in ("hit_rate", "lru_hit_rate", "unlimited_hit_rate"))
        capacity = f"{result.capacity_blocks:,}" if result.capacity_blocks else "unlimited"
        counts = (f"{facts[name]:,.0f}" for name in ("evicted", "requests_per_s", "blocks_per_s"))
        made.add_row(capacity, f"{facts['requests']:,}", *rates, *counts)
    console.print(made)
    refused = sum(result.tally.blocks_refused for result in results)
    if refused:
        console.print(f"{refused} blocks were refused: storage is full, or too slow", style="yellow")


# --- serve ---------------------------------------------------------------------------------------------------------------------------------


@bench.command()
@click.argument("target", metavar="URL|MODEL")
@click.option("--workload", type=click.Choice(list(PRESETS)), default=None, help="Generated conversations. Default: deepseek, without a --trace.")
@click.option("--trace", "trace_file", type=click.Path(dir_okay=False, exists=True, path_type=Path), default=None, help="In Mooncake's format.")
@click.option("--requests", "limit", type=click.IntRange(1), default=100, show_default=True, help="The first so many.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of a workload.")
@click.option(
    "--scale-lengths", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True, help="Times the lengths of prompts and answers."
)
@click.option("--scale-time", type=click.FloatRange(0), default=1.0, show_default=True, help="Times the time between arrivals; 0.5 is twice as fast.")
@click.option("--closed-loop", is_flag=True, help="Arrivals do not count: a request is sent when another has ended.")
@click.option("--at-once", type=click.IntRange(1, 10_000), default=16, show_default=True, help="Requests under way at most.")
@click.option("--api-key", default="", envvar="OPENAI_API_KEY", help="Of the server at URL. Default: $OPENAI_API_KEY.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=None, help="Also write the figures there, as JSON.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), default=None, help="Draw the times there (PNG; needs matplotlib).")
@click.option("--prefill", type=click.IntRange(0), default=0, help="Of a server for MODEL: workers for prompts, as the next ones ...")
@click.option("--decode", type=click.IntRange(0), default=0, help="... for answers ...")
@click.option("--workers", type=click.IntRange(1), default=None, help="... and for both. Default: 1.")
@engine_options
@STORAGE_OPTION
@DIRECTORY_OPTION
@common_options
def serve(options: Options, target: str, storage: int, directory: Path | None, **settings: Any) -> None:
    """Send a workload or a trace to the OpenAI-compatible server at URL, and report hits, bytes, throughput and times. For the checkpoint MODEL
    servers are started for it, one with its KV cache on kvfs and one without."""
    needs_inference()
    from kvfs.cli import bench_serve_command

    bench_serve_command.run(options, target, storage, directory, settings)
