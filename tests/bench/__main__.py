"""`make bench`: the mount and the native client beside the local file system, measured in the same run, printed as ratios.

    python -m tests.bench [--quick] [--replicas 1 --replicas 3] [--only WORDS] [--json FILE]

KV-cache blocks are kv.py's; their rows alone: `python -m tests.bench.kv`, or `--only kv`. The last section, what the KV cache is worth to an
inference worker, is inference_prefix.py's, or `--only inference`; its longest prompt takes minutes.

Both sides use the page cache. "cold" reads follow a new mount of the cluster: nothing is cached by the mount, everything by storage. Machines are
shared and noisy: read the ratios, and the CPU time, which holds better than wall time.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import click
from tests.bench import inference_prefix, kv
from tests.bench.measure import Result, run, touch_memory
from tests.bench.workloads import FULL, QUICK, Scale

from kvfs.cli import cluster_dir, control
from kvfs.cli.context import console, table
from kvfs.cli.own_cluster import process_ids, shut_down, work_directory
from kvfs.cli.up import start_detached
from kvfs.kvcache.params import REPLICATION_MAX

# (label, workload, streams, a new mount before it)
PLAN: list[tuple[str, str, int, bool]] = [
    ("1 MiB sequential write, 1 stream", "seq_write", 1, False),
    ("1 MiB sequential write, 4 streams", "seq_write", 4, False),
    ("1 MiB sequential read, 1 stream, cold", "seq_read", 1, True),
    ("1 MiB sequential re-read, 1 stream", "seq_read", 1, False),
    ("1 MiB sequential read, 4 streams, cold", "seq_read", 4, True),
    ("4 KiB random read, cold", "random_read", 1, True),
    ("create", "create", 1, False),
    ("stat, uncached", "stat", 1, True),
    ("open and close", "open_close", 1, False),
    ("unlink", "unlink", 1, False),
    ("", "fill_listed", 4, False),
    ("list 10,000 entries (per entry)", "listing", 1, True),
]


NEEDS = {
    "seq_read": "seq_write",
    "random_read": "seq_write",
    "stat": "create",
    "open_close": "create",
    "unlink": "create",
    "listing": "fill_listed",
}
"""What another workload must have left."""


def plan(only: tuple[str, ...]) -> list[tuple[str, str, int, bool]]:
    """The rows whose label holds one of the words (all, if there are none), and before them, without a label, what they need."""
    if not only:
        return PLAN
    chosen = [row for row in PLAN if row[0] and any(word in row[0] for word in only)]
    needed = {(NEEDS[workload], 4 if workload == "listing" else streams) for _, workload, streams, _ in chosen if workload in NEEDS}
    rows = []
    for row in PLAN:
        if row in chosen:
            rows.append(row)
        elif row[1:3] in needed:
            rows.append(("", *row[1:]))
    return rows


ROUNDS = 3
REPEATABLE = {"seq_write", "seq_read", "random_read", "stat", "open_close", "listing"}
"""Workloads that leave things as they found them; the best round of each side counts."""


class Bench:
    def __init__(self, base: Path, replicas: int, scale: Scale, only: tuple[str, ...] = ()) -> None:
        self.scale, self.replicas, self.plan = scale, replicas, plan(only)
        self.local, self.mount = base / "local", base / "mnt"
        self.local.mkdir(parents=True)
        self.mount.mkdir()
        self.cluster = cluster_dir.create(
            base / "cluster",
            storage=max(1, replicas),
            replicas=replicas,
            mount=str(self.mount),
            chunk_size_bytes=1 << 20,
            lease_ms=2000,
            base_port=None,
        )
        self.results: list[tuple[str, Result]] = []

    def remount(self) -> None:
        for command in ("stop", "start"):
            control.request(self.cluster.control_socket, command, name="mount", timeout_s=60.0)

    def run(self) -> None:
        start_detached(self.cluster, restart=False)
        (self.mount / "m").mkdir()
        (self.mount / "n").mkdir()
        sides = (("local", str(self.local)), ("mount", str(self.mount / "m")), ("native", str(self.cluster.path)))
        touch_memory(self.local, 4 * self.scale.file_mib)
        for label, workload, streams, fresh in self.plan:
            best: dict[str, Result] = {}
            for _ in range(ROUNDS if workload in REPEATABLE else 1):  # the sides take turns: a noisy minute hits all of them
                if fresh:
                    self.remount()
                for kind, where in sides:
                    result = run(kind, where, workload, streams, self.scale, [] if kind == "local" else process_ids(self.cluster))
                    if kind not in best or result.wall_s < best[kind].wall_s:
                        best[kind] = result
            if label:
                self.results += [(label, result) for result in best.values()]
                rates = ", ".join(f"{kind} {result.rate:,.0f}/s" for kind, result in best.items())
                console.print(f"  replicas {self.replicas}: {label}: {rates}", style="dim")


def show(replicas: int, results: list[tuple[str, Result]]) -> None:
    local = {label: result for label, result in results if result.side == "local"}
    headings = ("operation", "side", "per second", "ratio to local", "wall us/op", "CPU us/op", "CPU ratio")
    made = table(*headings, right=headings[2:])
    made.title = f"replication {replicas}"
    for label, result in results:
        base = local[label]
        ratio = "" if result.side == "local" else f"{result.rate / base.rate:.3f}"
        cpu_ratio = "" if result.side == "local" or not base.cpu_s else f"{result.cpu_us / base.cpu_us:.1f}"
        shown = label if result.side == "local" else ""
        made.add_row(shown, result.side, f"{result.rate:,.0f}", ratio, f"{result.wall_us:,.0f}", f"{result.cpu_us:,.0f}", cpu_ratio)
    console.print(made)


@click.command()
@click.option("--quick", is_flag=True, help="Small sizes: shows that everything runs, not how fast.")
@click.option("--replicas", multiple=True, type=int, default=(1, 3))
@click.option("--only", multiple=True, help="Only rows whose label holds this, as 'create' or 'sequential read'; what they need runs too.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), default=None)
@click.option("--directory", type=click.Path(path_type=Path), default=None, help="Where to work (default: the temporary directory).")
def main(quick: bool, replicas: tuple[int, ...], only: tuple[str, ...], json_file: Path | None, directory: Path | None) -> None:
    """Print the tables."""
    everything = []
    for count in replicas if plan(only) else ():
        with ExitStack() as stack:
            base = stack.enter_context(work_directory("kvfs-bench-", directory))
            bench = Bench(base, count, QUICK if quick else FULL, only)
            stack.callback(shut_down, bench.cluster)
            bench.run()
        show(count, bench.results)
        everything += [{"replicas": count, "label": label, **asdict(result)} for label, result in bench.results]
    copies = sorted({min(count, REPLICATION_MAX) for count in replicas})
    everything += [line.describe() for line in kv.measure(quick, copies, kv.TRANSPORTS, kv.ROUNDS, only, directory)]
    if not only or "inference" in only:
        inference_prefix.measure(*((inference_prefix.QUICK_LENGTHS, 1) if quick else (inference_prefix.LENGTHS, inference_prefix.ROUNDS)), directory)
    if json_file:
        json_file.write_text(json.dumps(everything, indent=2) + "\n")


if __name__ == "__main__":
    main()
