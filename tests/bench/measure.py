"""Runs a workload in one process per stream and reports wall and CPU time: of the processes themselves and of every process of the cluster.

CPU time of the cluster is read from /proc before and after: what the services and the mount spent belongs to the operation as much as what the
caller spent.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.bench.sides import make
from tests.bench.workloads import WORKLOADS, Scale

from kvfs.cli.measure import cpu_of


@dataclass(frozen=True, slots=True)
class Result:
    workload: str
    side: str
    streams: int
    operations: int
    wall_s: float
    cpu_s: float

    @property
    def rate(self) -> float:
        return self.operations / self.wall_s

    @property
    def wall_us(self) -> float:
        return self.wall_s / self.operations * 1e6 * self.streams

    @property
    def cpu_us(self) -> float:
        return self.cpu_s / self.operations * 1e6


def touch_memory(directory: Path, mib: int) -> None:
    """Write and delete as much as the test will: a virtual machine gets a page of memory only when it is first touched, and that costs more than
    the copy into it. Whoever came first would pay for all."""
    path = directory / "touch"
    block = bytes(1 << 20)
    with open(path, "wb", buffering=0) as file:
        for _ in range(mib):
            file.write(block)
    path.unlink()


def _stream(kind: str, where: str, workload: str, stream: int, streams: int, scale: Scale, barrier: Any, pipe: Connection) -> None:
    side = make(kind, where)
    body = WORKLOADS[workload](side, stream, streams, scale)
    barrier.wait(120)
    cpu, start = time.process_time(), time.perf_counter()
    operations = body()
    end = time.perf_counter()
    pipe.send((operations, start, end, time.process_time() - cpu))
    side.close()


def run(kind: str, where: str, workload: str, streams: int, scale: Scale, cluster_pids: Sequence[int]) -> Result:
    """Raises RuntimeError when a stream fails; its own words are on stderr."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(streams)
    before = cpu_of(cluster_pids)
    ends, processes = [], []
    for stream in range(streams):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_stream, args=(kind, where, workload, stream, streams, scale, barrier, send))
        process.start()
        send.close()
        ends.append(receive)
        processes.append(process)
    try:
        outcomes = [end.recv() for end in ends]
    except EOFError:
        raise RuntimeError(f"{workload} on {kind} failed: see above") from None
    finally:
        for process in processes:
            process.join(60)
    cluster_cpu_s = cpu_of(cluster_pids) - before
    wall_s = max(end for _, _, end, _ in outcomes) - min(start for _, start, _, _ in outcomes)
    return Result(workload, kind, streams, sum(o[0] for o in outcomes), wall_s, sum(o[3] for o in outcomes) + cluster_cpu_s)
