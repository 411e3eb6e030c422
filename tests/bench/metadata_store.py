"""How fast the metadata engines commit and read: `python tests/bench/metadata_store.py [memory|lmdb:DIR]` (default: LMDB in a temporary folder).

One operation is like a file's creation: two reads and three writes, synced. Prints operations per second alone and with 64 callers.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable

import trio

from kvfs.meta.kv import Engine, Transaction, open_engine

SERIAL, CONCURRENT, CALLERS = 3000, 20_000, 64


def create(number: int) -> Callable[[Transaction], None]:
    def body(txn: Transaction) -> None:
        txn.get(b"I/parent")
        txn.get(b"E/%d" % number)
        txn.set(b"E/%d" % number, b"x" * 100)
        txn.set(b"I/%d" % number, b"y" * 200)
        txn.set(b"I/parent", b"z" * 200)

    return body


async def timed(name: str, count: int, engine: Engine, callers: int, first: int) -> None:
    numbers = iter(range(first, first + count))
    latencies: list[float] = []

    async def caller() -> None:
        for number in numbers:
            before = time.perf_counter()
            await engine.transact(create(number))
            latencies.append(time.perf_counter() - before)

    wall, cpu = time.perf_counter(), time.process_time()
    async with trio.open_nursery() as nursery:
        for _ in range(callers):
            nursery.start_soon(caller)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    latencies.sort()
    p50, p99 = latencies[count // 2] * 1e6, latencies[count * 99 // 100] * 1e6
    print(f"{name:<22} {count / wall:>8,.0f}/s   p50 {p50:>6,.0f} us   p99 {p99:>6,.0f} us   CPU {cpu / count * 1e6:>5,.0f} us")


async def main(url: str) -> None:
    engine = open_engine(url)
    try:
        await timed("create, one caller", SERIAL, engine, 1, 0)
        await timed(f"create, {CALLERS} callers", CONCURRENT, engine, CALLERS, SERIAL)
        before = time.perf_counter()
        for number in range(SERIAL):
            await engine.transact(lambda txn, number=number: txn.get(b"I/%d" % number))  # type: ignore[misc]
        print(f"{'read one key':<22} {SERIAL / (time.perf_counter() - before):>8,.0f}/s")
    finally:
        engine.close()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        trio.run(main, sys.argv[1])
    else:
        with tempfile.TemporaryDirectory(dir=".") as folder:
            trio.run(main, f"lmdb:{folder}/kv")
