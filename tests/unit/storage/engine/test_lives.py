"""Many lives on one simulated disk: power fails at a random operation (also while the target is being opened), the next life must find sound chunks,
each in a state it had since the last sync, and goes on from there."""

from __future__ import annotations

import random

import pytest
from engine_world import IDENTITY, SMALL, ManualClock, cid, content_of, noise, remove, truncate, write

from kvfs.common.boundary.random import SeededRandom
from kvfs.common.sim.disk import SimDisk
from kvfs.storage.engine.engine import ChunkEngine

CHUNKS = [cid(index) for index in range(4)]
LIVES = 40


class _PowerFails(BaseException):
    pass


class _Fuse:
    """Blows at a set number of operations of the disk."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self, operation: str, name: str) -> None:
        self.left -= 1
        if self.left == 0:
            raise _PowerFails(operation, name)


@pytest.mark.parametrize("seed", range(4))
def test_lives(seed: int) -> None:
    dice = random.Random(seed)
    disk = SimDisk()
    allowed: dict[bytes, list[bytes | None]] = {chunk: [None] for chunk in CHUNKS}
    for life in range(LIVES):
        disk = disk.reopen()
        disk.hook = _Fuse(dice.randrange(1, 250))
        try:
            engine = ChunkEngine(disk, ManualClock(), IDENTITY, SMALL)
            disk.hook, fuse = None, disk.hook
            found = {chunk: content_of(engine, chunk) for chunk in CHUNKS}
            for chunk in CHUNKS:
                assert found[chunk] in allowed[chunk], (seed, life, chunk.hex())
            report = engine.check(read_data=True)
            assert not report.problems, (seed, life, report.problems)
            allowed = {chunk: [data] for chunk, data in found.items()}
            disk.hook = fuse
            for step in range(200):
                work(engine, dice, allowed, life * 1000 + step)
            disk.hook = None
        except _PowerFails:
            disk.hook = None
        disk.crash(SeededRandom(seed * 100 + life) if dice.random() < 0.8 else None)


def work(engine: ChunkEngine, dice: random.Random, allowed: dict[bytes, list[bytes | None]], seed: int) -> None:
    """One step; what it makes of the chunk is allowed from the moment it begins, what was before is ruled out when a sync has returned."""
    chunk = dice.choice(CHUNKS)
    old = allowed[chunk][-1] or b""
    kind = dice.randrange(8)
    if kind == 0:
        engine.sync()
        for states in allowed.values():
            del states[:-1]
    elif kind == 1:
        allowed[chunk].append(None)
        engine.apply(remove(chunk), 1)
    elif kind == 2:
        length = dice.randrange(1, 100_000)
        allowed[chunk].append(old[:length].ljust(length, b"\0"))
        engine.apply(truncate(chunk, length), 1)
    else:
        offset = len(old) if kind > 5 and len(old) < 200_000 else dice.randrange(100_000)
        data = noise(seed, dice.randrange(1, 50_000))
        grown = old.ljust(offset, b"\0")
        if kind == 3:
            engine.prepare(write(chunk, offset, data))
            return  # never committed: nobody may see it
        allowed[chunk].append(grown[:offset] + data + grown[offset + len(data) :])
        engine.prepare(write(chunk, offset, data))
        engine.commit([chunk], 1)
