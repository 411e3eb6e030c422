"""Power is cut at every single disk operation of a run, with unsynced pages kept or lost at random; then again while reopening.

What was acknowledged is there, what was not is there as a whole or not at all, and nothing is reported as damaged.
"""

from __future__ import annotations

import trio

from kvfs.common.boundary.random import SeededRandom
from kvfs.common.sim.disk import SimDisk
from kvfs.meta.kv.lmdb_engine import LmdbEngine
from kvfs.meta.kv.worker import InlineWorker

STEPS = 24
SEGMENT_BYTES = 5 * 4096
State = dict[bytes, bytes]


class PowerLoss(BaseException):
    """Not an Exception: the program does not go on."""


class Fuse:
    """A disk hook that cuts the power before the operation of this number."""

    def __init__(self, blows_at: int) -> None:
        self.count = 0
        self.blows_at = blows_at

    def __call__(self, operation: str, name: str) -> None:
        self.count += 1
        if self.count == self.blows_at:
            raise PowerLoss


def changes(step: int) -> dict[bytes, bytes | None]:
    """Some commits take several blocks, some one; all write `last`, so that a part of a commit shows."""
    value = b"%d " % step * (5000 if step % 5 == 2 else 3)
    return {b"last": b"%d" % step, b"k%d" % (step % 4): value, b"gone%d" % step: b"x", b"gone%d" % (step - 1): None}


def apply(state: State, step: int) -> State:
    after = dict(state)
    for key, value in changes(step).items():
        if value is None:
            after.pop(key, None)
        else:
            after[key] = value
    return after


STATES: list[State] = [{}]
for _step in range(1, 2 * STEPS + 1):
    STATES.append(apply(STATES[-1], _step))


def open_it(disk: SimDisk) -> LmdbEngine:
    return LmdbEngine(disk, worker=lambda name: InlineWorker(), segment_bytes=SEGMENT_BYTES, random=SeededRandom(1))


async def read_all(engine: LmdbEngine) -> State:
    rows, _ = await engine.transact(lambda txn: txn.get_range(b"", b"\xff"))
    return dict(rows)


async def commit(engine: LmdbEngine, step: int) -> None:
    with await engine.begin() as txn:
        for key, value in changes(step).items():
            if value is None:
                txn.clear(key)
            else:
                txn.set(key, value)
        await txn.commit()


async def work(disk: SimDisk, first: int, last: int, acknowledged: list[int]) -> None:
    try:
        engine = open_it(disk)
        reader = await engine.begin()
        for step in range(first, last + 1):
            if step % 6 == 0:
                # An open snapshot: a checkpoint takes only what is older.
                reader.reset()
                reader.get(b"last")
            await commit(engine, step)
            acknowledged.append(step)
        engine.close()
    except PowerLoss:
        pass


async def found_step(disk: SimDisk, acknowledged: int) -> int:
    engine = open_it(disk)
    state = await read_all(engine)
    step = int(state.get(b"last", b"0"))
    assert state == STATES[step]
    assert acknowledged <= step <= acknowledged + 1
    engine.close()
    return step


def test_power_loss_at_every_operation(monkeypatch) -> None:
    monkeypatch.setattr("kvfs.meta.kv.lmdb_engine.CHECKPOINT_COMMITS", 7)

    async def main() -> None:
        whole = Fuse(-1)
        await work(SimDisk(hook=whole), 1, STEPS, [])
        assert whole.count > 2 * STEPS
        for blows_at in range(1, whole.count + 1):
            random = SeededRandom(blows_at)
            disk = SimDisk(hook=Fuse(blows_at))
            acknowledged = [0]
            await work(disk, 1, STEPS, acknowledged)
            disk.crash(random)

            # Power fails again somewhere while it is opened, and it does not matter.
            again = disk.reopen(Fuse(1 + random.randrange(12)))
            try:
                open_it(again).close()
            except PowerLoss:
                pass
            again.crash(random)

            step = await found_step(again.reopen(), acknowledged[-1])
            disk = again.reopen(Fuse(1 + random.randrange(60)))
            disk._medium.holders.clear()
            acknowledged = [step]
            await work(disk, step + 1, 2 * STEPS, acknowledged)
            disk.crash(None)
            await found_step(disk.reopen(), acknowledged[-1])

    trio.run(main)


def test_an_engine_that_does_not_sync_is_caught(monkeypatch) -> None:
    """The test is worth something: without the journal's sync, acknowledged commits are lost."""
    monkeypatch.setattr("kvfs.common.sim.disk.SimFile.sync", lambda self: None)

    async def main() -> int:
        disk = SimDisk()
        acknowledged = [0]
        engine = open_it(disk)
        for step in range(1, 4):
            await commit(engine, step)
            acknowledged.append(step)
        disk.crash(None)
        again = open_it(disk.reopen())
        return int((await read_all(again)).get(b"last", b"0"))

    assert trio.run(main) < 3
