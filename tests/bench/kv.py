"""KV-cache blocks beside one file per key on the local disk and beside memcpy, in the same run; part of `make bench`.

    python -m tests.bench.kv [--quick] [--rounds 5] [--replicas 1] [--transport shm] [--only SUBSTRING] [--json FILE]

All sides take turns within each round, each round begins with another side, and the ratios are those of a round: a noisy minute hits all of them.
Wall time and ratios are medians over the rounds, CPU time (of this process and of every process of the cluster) is that of all rounds together,
since the kernel counts it in ticks. Blocks are in the page cache on all sides.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import click
from tests.bench.measure import touch_memory

from kvfs.cli import cluster_dir
from kvfs.cli.bench_kv import block_key, client_config
from kvfs.cli.context import console, table
from kvfs.cli.measure import cpu_of, percentile
from kvfs.cli.own_cluster import process_ids, shut_down, work_directory
from kvfs.cli.process import interruptible
from kvfs.cli.up import start_detached
from kvfs.client import Client
from kvfs.kvcache import KVCache, Put, Space, SpaceParams

KIB, MIB = 1 << 10, 1 << 20
ROUNDS = 5
TRANSPORTS = ("shm", "tcp")
REPLICAS = (1, 3)
TOUCHED_MIB = 1024


@dataclass(frozen=True, slots=True)
class Operation:
    label: str
    kind: str
    """get, put or exists."""
    block_bytes: int
    batch: int
    blocks: int
    """That are there (put: that are made)."""
    calls: int
    """In one sample."""

    def quick(self) -> Operation:
        calls = max(2, self.calls // 8)
        blocks = min(self.blocks, calls * self.batch) if self.kind == "put" else self.blocks
        return Operation(self.label, self.kind, self.block_bytes, self.batch, blocks, calls)


OPERATIONS = (
    Operation("64 KiB get, one by one", "get", 64 * KIB, 1, 512, 1024),
    Operation("64 KiB get, batches of 64", "get", 64 * KIB, 64, 512, 48),
    Operation("1 MiB get, one by one", "get", MIB, 1, 64, 256),
    Operation("4 MiB get, one by one", "get", 4 * MIB, 1, 24, 96),
    Operation("4 MiB get, batches of 8", "get", 4 * MIB, 8, 24, 12),
    Operation("4 MiB put, one by one", "put", 4 * MIB, 1, 24, 24),
    Operation("4 MiB put, batches of 8", "put", 4 * MIB, 8, 24, 3),
    Operation("exists, batches of 1,024", "exists", 64 * KIB, 1024, 512, 64),
)


class Side(Protocol):
    name: str
    pids: Sequence[int]

    def prepare(self, operation: Operation, blocks: Sequence[bytes]) -> None:
        """Untimed: the blocks of this operation are there."""

    def call(self, operation: Operation, numbers: Sequence[int]) -> int:
        """Timed: get into this side's buffers, put, or look for these blocks; how many were found or stored."""

    def buffer(self, place: int) -> memoryview: ...

    def tidy(self, operation: Operation, numbers: Sequence[int]) -> None:
        """Untimed: what a put has made goes."""


class MemorySide:
    """memcpy: the blocks lie in memory of this process."""

    name = "memcpy"
    pids: Sequence[int] = ()

    def __init__(self) -> None:
        self._blocks: Sequence[memoryview] = ()
        self._buffers: list[memoryview] = []

    def prepare(self, operation: Operation, blocks: Sequence[bytes]) -> None:
        self._blocks = [memoryview(block) for block in blocks]
        self._buffers = own_buffers(operation)

    def call(self, operation: Operation, numbers: Sequence[int]) -> int:
        for buffer, number in zip(self._buffers, numbers, strict=False):
            buffer[:] = self._blocks[number]
        return len(numbers)

    def buffer(self, place: int) -> memoryview:
        return self._buffers[place]

    def tidy(self, operation: Operation, numbers: Sequence[int]) -> None:
        pass


class FileSide:
    """One file per key on the local disk."""

    name = "local"
    pids: Sequence[int] = ()

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self._blocks: Sequence[bytes] = ()
        self._buffers: list[memoryview] = []

    def _path(self, operation: Operation, number: int) -> str:
        return f"{self._root}/{operation.block_bytes}-{number}"

    def prepare(self, operation: Operation, blocks: Sequence[bytes]) -> None:
        self._blocks, self._buffers = blocks, own_buffers(operation)
        if operation.kind != "put":
            for number, block in enumerate(blocks):
                Path(self._path(operation, number)).write_bytes(block)

    def call(self, operation: Operation, numbers: Sequence[int]) -> int:
        if operation.kind == "exists":
            return sum(os.path.exists(self._path(operation, number)) for number in numbers)
        if operation.kind == "put":
            for number in numbers:
                with open(self._path(operation, number), "wb", buffering=0) as file:
                    file.write(self._blocks[number])
        else:
            for buffer, number in zip(self._buffers, numbers, strict=True):
                with open(self._path(operation, number), "rb", buffering=0) as file:
                    file.readinto(buffer)
        return len(numbers)

    def buffer(self, place: int) -> memoryview:
        return self._buffers[place]

    def tidy(self, operation: Operation, numbers: Sequence[int]) -> None:
        for number in numbers:
            os.unlink(self._path(operation, number))


class SpaceSide:
    """A space, over one transport."""

    def __init__(self, client: Client, transport: str, replicas: int, pids: Sequence[int]) -> None:
        self.name, self.pids = f"{transport} r{replicas}", pids
        self._cache = KVCache(client)
        self._space: Space | None = None
        self._keys: list[bytes] = []
        self._buffers: Any = None
        self._into: list[memoryview] = []

    @property
    def space(self) -> Space:
        assert self._space is not None
        return self._space

    def prepare(self, operation: Operation, blocks: Sequence[bytes]) -> None:
        self.drop()
        params = SpaceParams(block_tokens=64, block_bytes=operation.block_bytes)
        self._space = self._cache.create(f"bench-{self.name.replace(' ', '-')}", params)
        self._keys = [block_key(number) for number in range(len(blocks))]
        count = len(blocks) if operation.kind == "put" else min(operation.batch, len(blocks))
        self._buffers = self.space.buffers(count)
        self._into = [self._buffers[place] for place in range(count)]
        if operation.kind == "put":
            for buffer, block in zip(self._into, blocks, strict=True):
                buffer[:] = block
            return
        for begin in range(0, len(blocks), 16):
            assert all(self.space.put(self._keys[begin : begin + 16], blocks[begin : begin + 16]))

    def call(self, operation: Operation, numbers: Sequence[int]) -> int:
        keys = [self._keys[number] for number in numbers]
        if operation.kind == "exists":
            return self.space.exists(keys).count(True)
        if operation.kind == "put":
            return self.space.put(keys, [self._into[number] for number in numbers]).count(Put.STORED)
        return sum(length is not None for length in self.space.get(keys, self._into))

    def buffer(self, place: int) -> memoryview:
        return self._into[place]

    def tidy(self, operation: Operation, numbers: Sequence[int]) -> None:
        assert all(self.space.remove([self._keys[number] for number in numbers]))

    def drop(self) -> None:
        if self._space is not None:
            self._cache.drop(self._space.name)
            self._space = None
            self._into.clear()
            self._buffers.close()


def own_buffers(operation: Operation) -> list[memoryview]:
    """Touched memory for one call."""
    count = 0 if operation.kind == "exists" else operation.batch
    return [memoryview(bytearray(b"x" * operation.block_bytes)) for _ in range(count)]


@dataclass(slots=True)
class Line:
    """One operation on one side, over all rounds."""

    label: str
    side: str
    block_bytes: int
    keys: int = 0
    """Over all rounds."""
    rates: list[float] = field(default_factory=list)
    """Keys a second, by round."""
    p50_s: list[float] = field(default_factory=list)
    """Of one call, by round."""
    cpu_s: float = 0.0
    to_local: list[float] = field(default_factory=list)
    """By throughput, as the next; by round."""
    to_memcpy: list[float] = field(default_factory=list)
    p50_to_local: list[float] = field(default_factory=list)
    """By the median call: a stall of one side, as when the kernel writes its dirty pages, does not count."""

    @property
    def rate(self) -> float:
        return median(self.rates)

    @property
    def bytes_per_s(self) -> float:
        return self.rate * self.block_bytes

    @property
    def cpu_us(self) -> float:
        return self.cpu_s / self.keys * 1e6

    @property
    def ratio(self) -> float:
        """The worse of both: what a mark is held against."""
        return min(median(self.to_local), median(self.p50_to_local))

    def describe(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "side": self.side,
            "block_bytes": self.block_bytes,
            "keys_per_s": self.rate,
            "p50_s": median(self.p50_s),
            "cpu_us": self.cpu_us,
            "ratio_to_local": median(self.to_local),
            "p50_ratio_to_local": median(self.p50_to_local),
            "ratio_to_memcpy": median(self.to_memcpy) if self.to_memcpy else None,
            "rates": self.rates,
        }


MARKS: dict[tuple[str, str], tuple[str, Callable[[Line], bool]]] = {
    ("64 KiB get, one by one", "shm r1"): ("p50 < 80 us", lambda line: median(line.p50_s) < 80e-6),
    ("64 KiB get, batches of 64", "shm r1"): ("5 GB/s", lambda line: line.bytes_per_s >= 5e9),
    ("4 MiB get, one by one", "shm r1"): ("0.7", lambda line: line.ratio >= 0.7),
    ("4 MiB get, batches of 8", "shm r1"): ("1.0", lambda line: line.ratio >= 1.0),
    ("4 MiB get, one by one", "tcp r1"): ("0.2", lambda line: line.ratio >= 0.2),
    ("4 MiB put, one by one", "shm r1"): ("0.6", lambda line: line.ratio >= 0.6),
    ("4 MiB put, one by one", "shm r3"): ("0.25", lambda line: line.ratio >= 0.25),
    ("exists, batches of 1,024", "shm r1"): ("300k/s", lambda line: line.rate >= 300_000),
}
"""What issue 3 asks for, by operation and side. Mooncake over TCP reads 4 MiB at 0.1 of the same local file."""


class KVBench:
    def __init__(self, stack: ExitStack, base: Path, replicas: Sequence[int], transports: Sequence[str]) -> None:
        local = base / "local"
        local.mkdir(parents=True)
        touch_memory(local, TOUCHED_MIB)
        self.sides: list[Side] = [MemorySide(), FileSide(local)]
        for count in replicas:
            cluster = cluster_dir.create(
                base / f"cluster-{count}", storage=count, replicas=count, mount=None, chunk_size_bytes=1 << 20, lease_ms=2000, base_port=None
            )
            stack.callback(shut_down, cluster)
            start_detached(cluster, restart=False)
            for transport in transports:
                client = stack.enter_context(Client(str(cluster.path), description="bench", config=client_config(transport)))
                self.sides.append(SpaceSide(client, transport, count, process_ids(cluster)))

    def run(self, operation: Operation, rounds: int) -> list[Line]:
        blocks = [os.urandom(operation.block_bytes) for _ in range(operation.blocks)]
        sides = [side for side in self.sides if operation.kind != "exists" or side.name != "memcpy"]
        for side in sides:
            side.prepare(operation, blocks)
            self._sample(side, operation, blocks)  # warm: memory touched, files open
        lines = {side.name: Line(operation.label, side.name, operation.block_bytes) for side in sides}
        for number in range(rounds):
            first = number % len(sides)
            for side in sides[first:] + sides[:first]:
                keys, calls, cpu_s = self._sample(side, operation, blocks)
                line = lines[side.name]
                line.keys += keys
                line.cpu_s += cpu_s
                line.rates.append(keys / sum(calls))
                line.p50_s.append(percentile(sorted(calls), 0.5))
            for line in lines.values():
                line.to_local.append(line.rates[-1] / lines["local"].rates[-1])
                line.p50_to_local.append(lines["local"].p50_s[-1] / line.p50_s[-1])
                if "memcpy" in lines:
                    line.to_memcpy.append(line.rates[-1] / lines["memcpy"].rates[-1])
        for side in sides:
            if isinstance(side, SpaceSide):
                side.drop()
        return list(lines.values())

    def _sample(self, side: Side, operation: Operation, blocks: Sequence[bytes]) -> tuple[int, list[float], float]:
        """(keys, seconds of each call, CPU seconds). Raises AssertionError for a block that is missing or wrong."""
        calls: list[float] = []
        keys = found = 0
        numbers: list[int] = []
        before_s = cpu_of(side.pids) + time.process_time()
        for number in range(operation.calls):
            begin = number * operation.batch % len(blocks)
            numbers = [(begin + place) % len(blocks) for place in range(operation.batch)]
            began_s = time.perf_counter()
            found += side.call(operation, numbers)
            calls.append(time.perf_counter() - began_s)
            keys += len(numbers)
        cpu_s = cpu_of(side.pids) + time.process_time() - before_s
        assert found == keys, f"{operation.label} on {side.name}: {found} of {keys} blocks"
        if operation.kind == "get":
            for place, number in enumerate(numbers):
                assert bytes(side.buffer(place)) == blocks[number], f"{operation.label} on {side.name}: a wrong block"
        elif operation.kind == "put":
            side.tidy(operation, range(len(blocks)))
        return keys, calls, cpu_s


def show(lines: Sequence[Line]) -> None:
    headings = ("operation", "side", "rate", "to local", "to memcpy", "p50 us", "to local", "CPU us", "CPU ratio", "mark")
    made = table(*headings, right=headings[2:-1])
    made.title = "KV-cache blocks"
    local = {line.label: line for line in lines if line.side == "local"}
    shown = ""
    for line in lines:
        base = local[line.label]
        rate = f"{line.rate / 1e3:,.0f}k/s" if line.label.startswith("exists") else f"{line.bytes_per_s / 1e9:.2f} GB/s"
        memcpy = f"{median(line.to_memcpy):.3f}" if line.to_memcpy else ""
        words, met = MARKS.get((line.label, line.side), ("", None))
        mark = f"{words}: {'met' if met(line) else 'missed'}" if met else ""
        ratios = (f"{median(line.to_local):.3f}", memcpy, f"{median(line.p50_s) * 1e6:,.0f}", f"{median(line.p50_to_local):.3f}")
        cpu_ratio = f"{line.cpu_us / base.cpu_us:.1f}" if base.cpu_us else ""
        label = line.label if line.label != shown else ""
        made.add_row(label, line.side, rate, *ratios, f"{line.cpu_us:,.1f}", cpu_ratio, mark)
        shown = line.label
    console.print(made)
    notes = "rN: N copies of each block; p50 is of a call; CPU is a block's (exists: a key's), of client and services; a mark holds for both ratios."
    console.print(notes, style="dim")


def measure(quick: bool, replicas: Sequence[int], transports: Sequence[str], rounds: int, only: Sequence[str], directory: Path | None) -> list[Line]:
    lines: list[Line] = []
    chosen = [operation for operation in OPERATIONS if not only or any(word in f"kv: {operation.label}" for word in only)]
    if not chosen:
        return lines
    with interruptible(), ExitStack() as stack:
        base = stack.enter_context(work_directory("kvfs-bench-", directory))
        bench = KVBench(stack, base, replicas, transports)
        for operation in chosen:
            lines += bench.run(operation.quick() if quick else operation, rounds)
            console.print(f"  {operation.label}: done", style="dim")
    show(lines)
    return lines


@click.command()
@click.option("--quick", is_flag=True, help="Few calls: shows that everything runs, not how fast.")
@click.option("--rounds", type=click.IntRange(1), default=ROUNDS)
@click.option("--replicas", multiple=True, type=click.IntRange(1, 3), default=REPLICAS)
@click.option("--transport", "transports", multiple=True, type=click.Choice(TRANSPORTS), default=TRANSPORTS)
@click.option("--only", multiple=True, help="Only rows whose label holds this, as 'put'.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), default=None)
@click.option("--directory", type=click.Path(path_type=Path), default=None, help="Where to work (default: the temporary directory).")
def main(
    quick: bool,
    rounds: int,
    replicas: tuple[int, ...],
    transports: tuple[str, ...],
    only: tuple[str, ...],
    json_file: Path | None,
    directory: Path | None,
) -> None:
    """Print the table."""
    lines = measure(quick, replicas, transports, rounds, only, directory)
    if json_file:
        json_file.write_text(json.dumps([line.describe() for line in lines], indent=2) + "\n")


if __name__ == "__main__":
    main()
