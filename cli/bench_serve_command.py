"""`kvfs bench serve`: one server that is named, or two of the command's own for a checkpoint, with the disk cache and without; table, JSON, plot.

Owns the run of the command and what it prints. Its figures are bench_serve.py's. Needs the extra `inference`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import click
import trio

from kvfs.cli.bench_serve import DEFAULT_VOCABULARY, Plan, ServeRun, Source, make_plan, measure
from kvfs.cli.bench_trace import space_name
from kvfs.cli.context import Options, console, human_bytes, print_json, table
from kvfs.cli.engine_options import as_arguments, model_config
from kvfs.cli.measure import steps_bar
from kvfs.cli.own_cluster import place_to_measure, work_directory
from kvfs.cli.own_server import own_server
from kvfs.cli.plots import answer_times, check_can_plot
from kvfs.cli.serve_load import Answered, Server
from kvfs.client import Client
from kvfs.common.errors import NotFound
from kvfs.kvcache import KVCache

WITH, WITHOUT = "with disk cache", "without"
DEFAULT_WORKLOAD = "deepseek"


def run(options: Options, target: str, storage: int, directory: Path | None, settings: dict[str, Any]) -> None:
    """`settings`: the command's options by their names."""
    if settings["workload"] and settings["trace_file"]:
        raise click.UsageError("--workload and --trace: one of them")
    if settings["plot"] is not None:
        check_can_plot()
    workload = None if settings["trace_file"] else settings["workload"] or DEFAULT_WORKLOAD
    lengths, time = settings["scale_lengths"], settings["scale_time"]
    source = Source(workload, settings["trace_file"], settings["seed"], settings["limit"], lengths, time)
    bench = partial(_one, source, settings, quiet=options.as_json)
    if target.startswith(("http://", "https://")):
        results = [bench(target, target)]
    else:
        model_config(Path(target))
        results = list(_own(options, target, storage, directory, settings, bench))
    plan = results[0][1]
    _report(options, [result for result, _ in results], plan, settings)


def _own(
    options: Options, target: str, storage: int, directory: Path | None, settings: dict[str, Any], bench: Any
) -> Iterator[tuple[ServeRun, Plan]]:
    arguments = as_arguments(settings)
    for name in ("prefill", "decode", "workers"):
        arguments += [f"--{name}", str(settings[name])] if settings[name] else []
    with place_to_measure(options, storage=storage, replicas=(1,), parent=directory) as place, work_directory("kvfs-bench-serve-", directory) as base:
        if not options.as_json:
            console.print(f"on {place.description}", style="dim")
        with own_server(Path(target), [*arguments, "--no-disk-cache"], base / "without") as server:
            yield bench(server.url, WITHOUT)
        with _space(place.spec, settings["space"]) as space:
            cached = ["--cluster", place.spec, "--space", space]
            with own_server(Path(target), [*arguments, *cached], base / "with") as server:
                yield bench(server.url, WITH)


@contextmanager
def _space(cluster: str, named: str) -> Iterator[str]:
    """The space that is named, or a new one that goes again."""
    if named:
        yield named
        return
    name = space_name("bench-serve", 0)
    try:
        yield name
    finally:
        with Client(cluster, description="kvfs bench serve") as client, suppress(NotFound):
            KVCache(client).drop(name)


def _one(source: Source, settings: dict[str, Any], url: str, label: str, *, quiet: bool) -> tuple[ServeRun, Plan]:
    async def main() -> tuple[ServeRun, Plan]:
        async with Server(url, settings["api_key"]) as server:
            model = await server.model()
            vocabulary = await server.vocabulary() or DEFAULT_VOCABULARY
            plan = make_plan(source, vocabulary, int(model.get("max_model_len") or 1 << 30))
            with steps_bar(len(plan.asks), label, quiet=quiet) as advance:

                def progress(answered: Answered) -> None:
                    advance(1, "")

                loop = {"at_once": settings["at_once"], "closed_loop": settings["closed_loop"]}
                return await measure(server, label, model["id"], plan, progress=progress, **loop), plan

    return trio.run(main)


# --- what it prints --------------------------------------------------------------------------------------------------------------------------


def _report(options: Options, runs: Sequence[ServeRun], plan: Plan, settings: dict[str, Any]) -> None:
    described = [run.describe() for run in runs]
    facts = {
        "workload": None if settings["trace_file"] else settings["workload"] or DEFAULT_WORKLOAD,
        "trace": str(settings["trace_file"]) if settings["trace_file"] else None,
        "requests": len(plan.asks),
        "prompts_cut": plan.cut,
        "scale_lengths": settings["scale_lengths"],
        "scale_time": settings["scale_time"],
        "closed_loop": settings["closed_loop"],
        "at_once": settings["at_once"],
        "unlimited_hit_share": plan.unlimited.hit_rate,
        "runs": described,
    }
    if settings["output"] is not None:
        settings["output"].write_text(json.dumps(facts, indent=2) + "\n")
    if settings["plot"] is not None:
        times = [
            (f"{run.label}: {100 * about['hit_share']:.1f} % hits", run.to_first_ms(), run.per_token_ms())
            for run, about in zip(runs, described, strict=True)
        ]
        answer_times(settings["plot"], f"{len(plan.asks)} requests, {facts['workload'] or facts['trace']}", times)
    if options.as_json:
        print_json(facts)
        return
    _show(described)
    console.print(f"hits of an unlimited cache: {100 * plan.unlimited.hit_rate:.1f} % of prompt tokens, in pages of 64", style="dim")
    if plan.cut:
        console.print(f"{plan.cut} prompts were longer than the model takes, and lost their ends", style="yellow")
    for about in described:
        if about["failed"]:
            console.print(f"{about['server']}: {about['failed']} requests failed; the first: {about['first_error']}", style="yellow")


def _show(described: Sequence[dict[str, Any]]) -> None:
    names = [str(about["server"]) for about in described]
    made = table("", *names, right=tuple(names))

    def row(label: str, *cells: str) -> None:
        made.add_row(label, *cells)

    def count(name: str) -> list[str]:
        return ["-" if about[name] is None else f"{about[name]:,.0f}" for about in described]

    row("requests answered", *(f"{about['requests'] - about['failed']:,}" for about in described))
    row("prompt tokens", *count("prompt_tokens"))
    row("hit tokens", *(f"{about['hit_tokens']:,} ({100 * about['hit_share']:.1f} %)" for about in described))
    row("of them from disk", *count("disk_hit_tokens"))
    row("answer tokens", *count("answer_tokens"))
    for name in ("bytes_read", "bytes_written"):
        row(name.replace("_", " "), *("-" if about[name] is None else human_bytes(about[name]) for about in described))
    row("seconds", *(f"{about['seconds']:.1f}" for about in described))
    row("requests a second", *(f"{about['requests_per_s']:.2f}" for about in described))
    for name in ("prompt", "answer"):
        row(f"{name} tokens a second", *count(f"{name}_tokens_per_s"))
    for name, label in (("ttft_ms", "first token, ms"), ("tpot_ms", "next tokens, ms each")):
        row(f"{label} (p50 / p90 / p99)", *(" / ".join(f"{value:,.1f}" for value in about[name].values()) for about in described))
    console.print(made)
