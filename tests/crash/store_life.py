"""The metadata store: several clients commit side by side, each its own steps; a checkpoint comes every few commits and segments are small.

A commit that was acknowledged survives a loss of power; one that was not is there as a whole or not at all.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).parent))
from promises import Promises
from replay import Begin

from kvfs.common.boundary.random import SeededRandom
from kvfs.common.boundary.real_disk import RealDisk
from kvfs.meta.kv import lmdb_engine
from kvfs.meta.kv.lmdb_engine import LmdbEngine
from kvfs.meta.kv.worker import InlineWorker, ThreadWorker, Worker

CLIENTS = 3
SEGMENT_BYTES = 5 * 4096
CHECKPOINT_COMMITS = 7
MAP_BYTES = 64 << 20
Rows = dict[bytes, bytes]


def changes(client: int, step: int) -> dict[bytes, bytes | None]:
    """Some take several blocks, some one; all write `last`, so that a part of a commit shows."""
    value = b"%d " % step * (4000 if step % 5 == 2 else 3)
    rows = {b"last": b"%d" % step, b"k%d" % (step % 4): value, b"gone%d" % step: b"x", b"gone%d" % (step - 1): None}
    return {b"%d/" % client + key: rows[key] for key in rows}


def rows_after(client: int, step: int) -> Rows:
    rows: Rows = {}
    for done in range(1, step + 1):
        for key, value in changes(client, done).items():
            if value is None:
                rows.pop(key, None)
            else:
                rows[key] = value
    return rows


def open_store(folder: Path, worker: type[Worker]) -> LmdbEngine:
    lmdb_engine.CHECKPOINT_COMMITS = CHECKPOINT_COMMITS  # type: ignore[misc]
    disk = RealDisk(folder / "store")
    disk.makedirs("")
    return LmdbEngine(disk, segment_bytes=SEGMENT_BYTES, map_bytes=MAP_BYTES, random=SeededRandom(1), worker=lambda name: _make(worker, name))


def _make(worker: type[Worker], name: str) -> Worker:
    return InlineWorker() if worker is InlineWorker else ThreadWorker(name)


def kill(engine: LmdbEngine) -> None:
    """What the kernel does with a process that ends; LMDB would not let this one open the map again otherwise."""
    engine._close_segments([*engine._free, *engine._sealed, engine._current])
    engine._map.close()
    engine._disk.close()


async def commit(engine: LmdbEngine, client: int, step: int) -> None:
    with await engine.begin() as txn:
        for key, value in changes(client, step).items():
            if value is None:
                txn.clear(key)
            else:
                txn.set(key, value)
        await txn.commit()


async def found_steps(engine: LmdbEngine) -> dict[int, int | None]:
    """How far each client is; all its rows must be of that step."""
    rows, more = await engine.transact(lambda txn: txn.get_range(b"", b"\xff"))
    assert not more
    steps: dict[int, int | None] = {}
    for client in range(CLIENTS):
        own = {key: value for key, value in rows if key.startswith(b"%d/" % client)}
        step = int(own.get(b"%d/last" % client, b"0"))
        assert own == rows_after(client, step), (client, step, "a part of a commit")
        steps[client] = step or None
    return steps


class StoreLife:
    def __init__(self, seed: int, *, steps: int = 20) -> None:
        self.seed = seed
        self.steps = steps
        self.promises = Promises(list(range(CLIENTS)), durable=True)

    def __repr__(self) -> str:
        return f"metadata store, seed {self.seed}"

    def life(self, folder: Path, number: int, begin: Begin) -> None:
        async def live() -> None:
            engine = open_store(folder, ThreadWorker)
            begin(dict(await found_steps(engine)))
            reader = await engine.begin()

            async def client(place: int) -> None:
                dice = random.Random(f"{self.seed} {number} {place}")
                for _ in range(self.steps // CLIENTS):
                    step = (self.promises.now(place) or 0) + 1
                    with self.promises.change(place, step):
                        await commit(engine, place, step)
                    if dice.random() < 0.2:
                        reader.reset()
                        reader.get(b"0/last")  # an open snapshot: a checkpoint takes only what is older

            async with trio.open_nursery() as nursery:
                for place in range(CLIENTS):
                    nursery.start_soon(client, place)
            engine.close()

        trio.run(live)

    def check(self, folder: Path, *, power_lost: bool) -> None:
        async def look() -> None:
            engine = open_store(folder, InlineWorker)
            found = await found_steps(engine)
            self.promises.check(found, power_lost=power_lost)
            for client in range(CLIENTS):
                found[client] = (found[client] or 0) + 1
                await commit(engine, client, found[client] or 0)
            kill(engine)
            engine = open_store(folder, InlineWorker)
            assert await found_steps(engine) == found
            engine.close()

        trio.run(look)
