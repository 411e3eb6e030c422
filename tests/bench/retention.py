"""What the retention of KV-cache blocks costs: `python -m tests.bench.retention`. CPU time of this process, in which service and client both run.

Memory and touches of a table of 200,000 blocks; probes over the real RPC, 256 and 16,384 keys a call; removals at a head alone and with two
followers, and what reads of other blocks wait meanwhile.
"""

from __future__ import annotations

import gc
import os
import resource
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "storage"))

from block_world import INODE, Blocks, block_world, digest

from kvfs.client.storage_blocks import Probe
from kvfs.storage.retention.table import Policy, SpaceTable

BLOCKS = 200_000


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def table() -> None:
    names = [os.urandom(16) for _ in range(BLOCKS)]
    joined = b"".join(names)
    gc.collect()
    tracemalloc.start()
    made = SpaceTable(1)
    made.learn(Policy(4096, 0, 0, 1))
    for place in range(BLOCKS):
        made.put(joined[place * 16 : place * 16 + 16], 4000, 1_700_000_000_000 + place)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"table: {taken / BLOCKS:.0f} bytes a block")
    for what in ("probe", "touch"):
        began = cpu_s()
        made.probe(joined) if what == "probe" else made.touch(joined, 1_700_001_000_000)
        print(f"table: {what} {BLOCKS / (cpu_s() - began) / 1e6:.2f} million keys/s")


async def probes(blocks: Blocks) -> None:
    blocks.sizes(64)
    await blocks.put(range(2000), [b"x" * 64] * 2000)
    for keys, calls in ((256, 400), (16_384, 12)):
        digests = b"".join(digest(key % 4000) for key in range(keys))
        for touch in (False, True):
            began = cpu_s()
            for _ in range(calls):
                [bits] = await blocks.client.probe([Probe(blocks.chain, INODE, digests, touch)])
                assert isinstance(bits, bytes)
            rate = keys * calls / (cpu_s() - began)
            print(f"probe: {keys} keys a call{', touching' if touch else ''}: {rate / 1e3:.0f}k keys/s of CPU, client and service together")


async def removals(blocks: Blocks, replicas: int) -> None:
    blocks.sizes(4000)
    count = 6000
    for first in range(0, count, 250):
        await blocks.put(range(first, first + 250), [b"s" * 4000] * 250)
    waits: list[float] = []
    over = trio.Event()

    async def read() -> None:
        while not over.is_set():
            began = time.monotonic()
            await blocks.get([count - 1], 4000)
            waits.append(time.monotonic() - began)
            await trio.sleep(0.001)

    for reading in (False, True):
        async with trio.open_nursery() as nursery:
            if reading:
                nursery.start_soon(read)
            began_cpu, began = cpu_s(), time.monotonic()
            gone = await blocks.client.evict(blocks.chain, INODE, count // 2 - 1)
            spent, wall = cpu_s() - began_cpu, time.monotonic() - began
            if reading:
                over.set()
        beside = ", beside a reader" if reading else ""
        print(f"removal: {replicas} replicas{beside}: {gone / wall:.0f}/s, {spent / gone * 1e6:.0f} us of CPU each, all replicas together")
    waits.sort()
    print(
        f"read beside it: p50 {waits[len(waits) // 2] * 1e3:.1f} ms, p99 {waits[len(waits) * 99 // 100] * 1e3:.1f} ms, worst {waits[-1] * 1e3:.1f} ms"
    )


async def main() -> None:
    for replicas in (1, 3):
        with tempfile.TemporaryDirectory(prefix="wt-kvs-bench-") as path:
            async with block_world(Path(path), replicas=replicas) as blocks:
                if replicas == 1:
                    await probes(blocks)
            await trio.sleep(0)
        with tempfile.TemporaryDirectory(prefix="wt-kvs-bench-") as path:
            async with block_world(Path(path), replicas=replicas) as blocks:
                await removals(blocks, replicas)


if __name__ == "__main__":
    table()
    trio.run(main)
