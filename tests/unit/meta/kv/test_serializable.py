"""Random interleaved transactions against a model: what commits must be what a serial run in commit order would have done.

A program is a list of steps on a few open transactions. The model keeps every committed state. A read must show the state of the snapshot with the
transaction's own writes over it; and when a transaction with writes commits, each of its tracked reads must come out the same on the newest state.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvfs.common.errors import TxnConflict
from kvfs.meta.kv import Engine, Transaction
from kvfs.meta.kv.memory import MemoryEngine

State = dict[bytes, bytes]
KEYS = st.sampled_from([b"a", b"aa", b"b", b"b\0", b"c", b"d", b"\xff"])
BOUNDS = st.tuples(st.sampled_from([b"", b"a", b"aa", b"b", b"c", b"d"]), st.sampled_from([b"a", b"b", b"b\0", b"d", b"\xff", b"\xff\0"]))
VALUES = st.sampled_from([b"", b"1", b"2", b"3"])
STEPS = st.one_of(
    st.tuples(st.just("get"), KEYS, st.booleans()),
    st.tuples(st.just("range"), BOUNDS, st.integers(1, 4), st.booleans(), st.booleans()),
    st.tuples(st.just("set"), KEYS, VALUES),
    st.tuples(st.just("clear"), KEYS),
    st.tuples(st.just("clear_range"), BOUNDS),
    st.tuples(st.just("commit")),
    st.tuples(st.just("commit")),
    st.tuples(st.just("reset")),
)
PROGRAMS = st.lists(st.tuples(st.integers(0, 2), STEPS), max_size=60)


def read(state: State, step: tuple) -> object:
    if step[0] == "get":
        return state.get(step[1])
    _, (begin, end), limit, reverse, _ = step
    rows = sorted(((key, value) for key, value in state.items() if begin <= key < end), reverse=reverse)
    return rows[:limit], len(rows) > limit


def write(state: State, step: tuple) -> None:
    if step[0] == "set":
        state[step[1]] = step[2]
    elif step[0] == "clear":
        state.pop(step[1], None)
    else:
        for key in [key for key in state if step[1][0] <= key < step[1][1]]:
            del state[key]


class Modelled:
    """One open transaction beside what the model says of it."""

    def __init__(self, txn: Transaction) -> None:
        self.txn = txn
        self.clear()

    def clear(self) -> None:
        self.before: State | None = None
        self.steps: list[tuple] = []
        self.answers: list[object] = []
        self.tracked: list[bool] = []

    def read(self, step: tuple, newest: State) -> None:
        if self.before is None and not self.needs_no_snapshot(step):
            self.before = dict(newest)  # the snapshot is taken at the first read that needs it
        snapshot = step[-1]
        view = dict(self.before or {})
        for earlier in self.steps:
            if earlier[0] not in ("get", "range"):
                write(view, earlier)
        if step[0] == "get":
            found: object = self.txn.snapshot_get(step[1]) if snapshot else self.txn.get(step[1])
        else:
            _, (begin, end), limit, reverse, _ = step
            call = self.txn.snapshot_get_range if snapshot else self.txn.get_range
            found = call(begin, end, limit=limit, reverse=reverse)
        assert found == read(view, step), step
        self.steps.append(step)
        self.answers.append(found)
        self.tracked.append(not snapshot)

    def needs_no_snapshot(self, step: tuple) -> bool:
        def covers(earlier: tuple) -> bool:
            if earlier[0] == "clear_range":
                return earlier[1][0] <= step[1] < earlier[1][1]
            return earlier[0] in ("set", "clear") and earlier[1] == step[1]

        if step[0] == "range":
            return step[1][0] >= step[1][1]
        return any(covers(earlier) for earlier in self.steps)

    def write(self, step: tuple) -> None:
        getattr(self.txn, step[0])(*(step[1] if step[0] == "clear_range" else step[1:]))
        self.steps.append(step)
        self.answers.append(None)
        self.tracked.append(False)

    async def commit(self, newest: State) -> State:
        writes = any(map(changes, self.steps))
        try:
            await self.txn.commit()
        except TxnConflict:
            assert any(self.tracked), "only tracked reads conflict"
            assert writes, "a transaction that writes nothing cannot conflict"
            return newest
        after = dict(newest)
        for step, answer, tracked in zip(self.steps, self.answers, self.tracked, strict=True):
            if step[0] in ("get", "range"):
                assert not (tracked and writes) or read(after, step) == answer, f"not serializable: {step}"
            else:
                write(after, step)
        return after


def changes(step: tuple) -> bool:
    """Clearing an empty range is no write."""
    return step[0] not in ("get", "range") and not (step[0] == "clear_range" and step[1][0] >= step[1][1])


EMPTY_RANGE = [(1, ("set", b"a", b"")), (2, ("get", b"a", False)), (1, ("commit",)), (2, ("clear_range", (b"a", b"a"))), (2, ("commit",))]
"""A transaction that has read and clears nothing is one that only reads: it was serializable where it read."""


async def run(engine: Engine, program: list) -> None:
    newest: State = {}
    open_txns = [Modelled(await engine.begin()) for _ in range(3)]
    for which, step in program:
        one = open_txns[which]
        if step[0] in ("get", "range"):
            one.read(step, newest)
        elif step[0] in ("commit", "reset"):
            if step[0] == "commit":
                newest = await one.commit(newest)
            one.txn.reset()
            one.clear()
        else:
            one.write(step)
        found, more = await engine.transact(lambda txn: txn.get_range(b"", b"\xff\0"))
        assert (dict(found), more) == (newest, False)
    for one in open_txns:
        one.txn.close()


@settings(max_examples=250, deadline=None)
@given(PROGRAMS)
@example(EMPTY_RANGE)
def test_memory_engine_is_serializable(program):
    trio.run(run, MemoryEngine(), program)


@settings(max_examples=40, deadline=None)
@given(PROGRAMS)
@example(EMPTY_RANGE)
def test_lmdb_engine_is_serializable_and_reopens_to_the_same(open_lmdb, program):
    async def main() -> None:
        with TemporaryDirectory() as folder:
            engine = open_lmdb(Path(folder), inline=True, segment_bytes=16384)
            await run(engine, program)
            before = await engine.transact(lambda txn: txn.get_range(b"", b"\xff\0"))
            engine.close()
            engine = open_lmdb(Path(folder), inline=True, segment_bytes=16384)
            assert await engine.transact(lambda txn: txn.get_range(b"", b"\xff\0")) == before
            engine.close()

    trio.run(main)


def test_the_model_finds_an_engine_that_misses_conflicts(monkeypatch):
    """The check is worth something: an engine without conflict detection does not pass it."""
    monkeypatch.setattr("kvfs.meta.kv.conflicts.CommitLog.conflicts", lambda *_: False)
    program = [(0, ("get", b"a", False)), (1, ("set", b"a", b"1")), (1, ("commit",)), (0, ("set", b"b", b"1")), (0, ("commit",))]
    with pytest.raises(AssertionError, match="not serializable"):
        trio.run(run, MemoryEngine(), program)
