"""`python -m tests.bench.recovery`: what users see when a storage service dies or hangs, and how long until everything is as before, as a table.

A cluster of real processes with three replicas; native readers, a reader on a mount and a writer work on one chain while its head, middle or tail is
killed (SIGKILL) or stopped (SIGSTOP). `lose` is one such loss, tests/cluster/test_failover.py calls it too. `resync` fills a cluster, empties one
service's disk and times its way back.
"""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import trio
from tests.histories.history import fill, name_of
from tests.process_cluster import ProcessCluster

from kvfs.client.async_client import AsyncClient, open_client
from kvfs.client.file.open_file import OpenFile
from kvfs.client.placement import Placement
from kvfs.client.storage_reads import ChunkRead
from kvfs.client.storage_writes import ChunkWrite
from kvfs.common.errors import KvfsError

POSITIONS = ("head", "middle", "tail")
MIB = 1 << 20
SIZE = 64 << 10
CHUNKS = 48
FILE = "watched"
OUT_S = 30.0


class Steps:
    """One thing done over and over: when it last went well, and the longest time in which it did not."""

    def __init__(self) -> None:
        self.last_s = time.monotonic()
        self.longest_s = 0.0
        self.count = 0

    def done(self) -> None:
        now_s = time.monotonic()
        self.longest_s = max(self.longest_s, now_s - self.last_s)
        self.last_s = now_s
        self.count += 1

    def take_longest(self) -> float:
        """Since the last call, also when it still lasts."""
        longest_s = max(self.longest_s, time.monotonic() - self.last_s)
        self.longest_s = 0.0
        return longest_s


@dataclass(frozen=True, slots=True)
class Loss:
    """Seconds. The longest pauses of those at work, from the fault until a while after the service was out of its chains; and what came after."""

    position: str
    how: str
    detected_s: float
    """From the fault until the manager had taken the service out of its chains and clients knew it."""
    read_s: float
    mount_s: float
    write_s: float
    serving_s: float
    """From the start of its new process until it served again in all of its chains."""


class Work:
    """Readers and a writer of one chain, until cancelled. A read of wrong bytes ends everything."""

    def __init__(self, client: AsyncClient, mounted: Path, placement: Placement) -> None:
        self.client = client
        self.placement = placement
        self.chain = placement.chain(0)
        self._mounted = mounted
        self._mine = [index for index in range(CHUNKS) if placement.chain(index) == self.chain]
        self.reads, self.raw_reads, self.mount_reads, self.writes = self.steps = (Steps(), Steps(), Steps(), Steps())
        self.stopping = False

    async def read_file(self, file: OpenFile) -> None:
        while True:
            index = random.choice(self._mine[1:])
            await self._try(self.reads, lambda index=index: self._read(file, index))  # type: ignore[misc]

    async def _read(self, file: OpenFile, index: int) -> None:
        _check(await file.pread(index * MIB, SIZE), index)

    async def read_chunks(self) -> None:
        while True:
            index = random.choice(self._mine[1:])
            await self._try(self.raw_reads, lambda index=index: self._read_chunk(index))  # type: ignore[misc]

    async def _read_chunk(self, index: int) -> None:
        into = memoryview(bytearray(SIZE))
        await self.client.storage.read([ChunkRead(self.chain, self.placement.chunk(index), 0, SIZE, into)])
        _check(into, index)

    async def write(self) -> None:
        """The first chunk: so that an update is always under way."""
        update = ChunkWrite(self.chain, self.placement.chunk(0), 0, SIZE, MIB, fill("w", SIZE))
        while True:
            await self._try(self.writes, lambda: self.client.storage.write([update]))

    async def _try(self, steps: Steps, act: Callable[[], Awaitable[object]]) -> None:
        try:
            await act()
            steps.done()
        except KvfsError:
            pass  # the pause goes on
        await trio.sleep(0.005)

    def read_mount(self) -> None:
        """In a thread: past the kernel's cache. An error of a system call ends it."""
        fd = os.open(self._mounted / FILE, os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, SIZE) as buffer:
                while not self.stopping:
                    index = random.choice(self._mine[1:])
                    assert os.preadv(fd, [buffer], index * MIB) == SIZE
                    _check(memoryview(bytes(buffer)), index)
                    self.mount_reads.done()
                    time.sleep(0.005)
        finally:
            os.close(fd)


def _check(data: memoryview, index: int) -> None:
    found = name_of(data)
    assert found == f"chunk-{index}", f"chunk {index} was read as {found}"


@asynccontextmanager
async def at_work(cluster: ProcessCluster, mounted: Path) -> AsyncIterator[Work]:
    async with open_client(str(cluster.path)) as client, await client.open(f"/{FILE}", "w+b") as file:
        for index in range(CHUNKS):
            await file.file.pwrite(index * MIB, [fill(f"chunk-{index}", SIZE)])
        await file.file.fsync()
        work = Work(client, mounted, Placement.of(await client.stat(f"/{FILE}")))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work.read_file, file.file)
            nursery.start_soon(work.read_chunks)
            nursery.start_soon(work.write)
            nursery.start_soon(trio.to_thread.run_sync, work.read_mount)
            try:
                yield work
            finally:
                work.stopping = True
            nursery.cancel_scope.cancel()


async def lose(cluster: ProcessCluster, work: Work, position: str, how: str) -> Loss:
    """Lose the service at that place of the chain, look on, and have it back."""
    routing = work.client.routing
    targets = routing.serving(work.chain)
    target = targets[{"head": 0, "middle": len(targets) // 2, "tail": -1}[position]]
    name = f"storage-{routing.node_of_target(target).node_id - 100}"
    await trio.sleep(0.5)
    for steps in work.steps:
        steps.take_longest()
    began_s = time.monotonic()
    (cluster.kill if how == "killed" else cluster.pause)(name)
    with trio.fail_after(OUT_S):
        while target in work.client.routing.serving(work.chain):
            await trio.sleep(0.005)
    detected_s = time.monotonic() - began_s
    counts = [steps.count for steps in work.steps]
    with trio.move_on_after(OUT_S):  # until each has gone on: then its pause is over
        while any(steps.count == count for steps, count in zip(work.steps, counts, strict=True)):
            await trio.sleep(0.01)
    await trio.sleep(0.5)
    read_s = max(work.reads.take_longest(), work.raw_reads.take_longest())
    mount_s, write_s = work.mount_reads.take_longest(), work.writes.take_longest()
    if how == "stopped":
        cluster.resume(name)  # it sees that it was declared dead, and ends
    await trio.to_thread.run_sync(cluster.running[name].wait)
    began_s = time.monotonic()
    cluster.launch(name)
    await trio.to_thread.run_sync(cluster.wait_ready, name)
    with trio.fail_after(2 * OUT_S):
        while len(work.client.routing.serving(work.chain)) < len(targets) or not _all_serve(work.client):
            await trio.sleep(0.01)
    return Loss(position, how, detected_s, read_s, mount_s, write_s, time.monotonic() - began_s)


def _all_serve(client: AsyncClient) -> bool:
    routing = client.routing
    return all(len(routing.serving(chain.chain_id)) == len(chain.targets) for chain in routing.chains)


async def resync(cluster: ProcessCluster, mib: int) -> tuple[float, float]:
    """Seconds per GiB until a service whose disk was lost has everything again, and how many GiB that were."""
    data = os.urandom(8 * MIB)
    async with open_client(str(cluster.path)) as client:
        async with await client.open("/large", "wb") as file:
            for _ in range(mib // 8):
                await file.write(data)
        name = "storage-1"
        await trio.to_thread.run_sync(cluster.kill, name)
        with trio.fail_after(OUT_S):
            while _all_serve(client):
                await trio.sleep(0.01)
        subprocess.run(["rm", "-rf", *map(str, (cluster.path / name).iterdir())], check=True)
        began_s = time.monotonic()
        cluster.launch(name)
        await trio.to_thread.run_sync(cluster.wait_ready, name)
        with trio.fail_after(300):
            while not _all_serve(client):
                await trio.sleep(0.02)
        return (time.monotonic() - began_s) / (mib / 1024), mib / 1024


@click.command()
@click.option("--mib", default=1024, help="To be brought back to the emptied disk.")
@click.option("--lease-ms", default=2000)
@click.option("--times", default=1, help="Losses of each kind.")
def main(mib: int, lease_ms: int, times: int) -> None:
    """Recovery times of a cluster on this machine."""
    with tempfile.TemporaryDirectory(prefix="kvfs-recovery-") as folder:
        base = Path(folder)
        cluster = ProcessCluster(base / "cluster")
        try:
            cluster.create(lease_ms=lease_ms)
            losses = [loss for _ in range(times) for loss in trio.run(lose_each, cluster, base / "mounted")]
            print(f"lease {lease_ms / 1000:g} s; seconds; the longest pause of each")
            print(f"{'':17}{'detected':>10}{'reads':>8}{'mount':>8}{'writes':>8}{'serves again':>14}")
            for loss in losses:
                figures = f"{loss.detected_s:10.2f}{loss.read_s:8.2f}{loss.mount_s:8.2f}{loss.write_s:8.2f}{loss.serving_s:14.2f}"
                print(f"{loss.position:>8} {loss.how:8}{figures}")
            per_gib_s, gib = trio.run(resync, cluster, mib)
            print(f"fully resynced: {per_gib_s:.1f} s per GiB from the start of its process ({gib:g} GiB to an empty disk, one machine)")
        finally:
            subprocess.run(["umount", "-l", str(base / "mounted")], check=False, capture_output=True)
            cluster.stop()


async def lose_each(cluster: ProcessCluster, mounted: Path) -> list[Loss]:
    """Each place of the chain, killed and stopped, under readers and a writer that are never started again."""
    mounted.mkdir(exist_ok=True)
    await trio.to_thread.run_sync(lambda: cluster.kvfs("mount", str(mounted)))
    try:
        async with at_work(cluster, mounted) as work:
            return [await lose(cluster, work, position, how) for position in POSITIONS for how in ("killed", "stopped")]
    finally:
        await trio.to_thread.run_sync(lambda: cluster.kvfs("umount", str(mounted), check=False))


if __name__ == "__main__":
    main()
