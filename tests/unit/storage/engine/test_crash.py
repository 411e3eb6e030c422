"""Every prefix of the write log, as a killed process and as a power loss would leave it: the target opens, fsck is clean, what was synced is there,
what was acknowledged survives a kill, and every chunk is some state it really had."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from engine_world import SMALL, LogDisk, cid, content_of, noise, open_engine, remove, replacement, truncate, write

from kvfs.common.errors import KvfsError
from kvfs.storage.engine.engine import ChunkEngine
from kvfs.storage.engine.journal import encode_record, segment_name
from kvfs.storage.engine.requests import Tag

CHUNKS = 4
SEEDS = int(os.environ.get("KVFS_CRASH_SEEDS", "3"))
"""How many scripts of each kind; a long run: KVFS_CRASH_SEEDS=100."""
CLIENT = b"c" * 16


@dataclass
class History:
    """What the chunks were, step by step: states[k] holds after step k; ends[k] is the log's length then."""

    states: list[dict[bytes, bytes]] = field(default_factory=lambda: [{}])
    ends: list[int] = field(default_factory=lambda: [0])
    synced: list[int] = field(default_factory=lambda: [0])
    """synced[k]: the newest step that a sync had covered when step k was over."""
    starts: list[int] = field(default_factory=lambda: [0])


Script = Callable[[int, int], tuple[LogDisk, History]]


def run_script(seed: int, steps: int) -> tuple[LogDisk, History]:
    """Random updates; the script's own dict says what the chunks are."""
    dice = random.Random(seed)
    disk = LogDisk()
    open_engine(disk).close()
    disk.start_log()
    engine = open_engine(disk)
    history = History(ends=[len(disk.log)], starts=[0])
    state: dict[bytes, bytes] = {}
    for step in range(1, steps + 1):
        history.starts.append(len(disk.log))
        chunk = cid(dice.randrange(CHUNKS))
        old = state.get(chunk, b"")
        kind = dice.choice(["append", "append", "overwrite", "overwrite", "truncate", "remove", "sync", "checkpoint", "drop", "pair", "killed"])
        synced = history.synced[-1]
        state = dict(state)
        tag = Tag(CLIENT, 1, step)
        if kind == "append":
            data = noise(step, dice.randrange(1, 60_000))[: 200_000 - len(old)]
            if data:
                two_steps(engine, dice, write(chunk, len(old), data), tag)
                state[chunk] = old + data
        elif kind == "overwrite":
            offset = dice.randrange(0, 100_000)
            data = noise(step, dice.randrange(1, 60_000))
            two_steps(engine, dice, write(chunk, offset, data), tag)
            grown = old.ljust(offset, b"\0")
            state[chunk] = grown[:offset] + data + grown[offset + len(data) :]
        elif kind == "truncate":
            length = dice.randrange(0, 120_000)
            two_steps(engine, dice, truncate(chunk, length), tag)
            if length or chunk in state:
                state[chunk] = old[:length].ljust(length, b"\0")
        elif kind == "remove":
            two_steps(engine, dice, remove(chunk), tag)
            state.pop(chunk, None)
        elif kind == "drop":
            engine.prepare(write(chunk, len(old), noise(step, 5000)))
            engine.drop_pending([chunk])
        elif kind == "pair":
            other = cid((int.from_bytes(chunk[8:], "big") + 1) % CHUNKS)
            engine.prepare_many([write(chunk, 0, b"one" * 99), write(other, 0, b"two" * 99)])
            engine.commit([chunk, other], 3, [tag])
            for name, data in ((chunk, b"one" * 99), (other, b"two" * 99)):
                state[name] = data + state.get(name, b"")[len(data) :]
        elif kind == "sync":
            engine.sync()
            synced = step
        elif kind == "killed":
            engine = open_engine(disk)  # what was not synced is in the page cache, and still not synced
            synced = step
        else:
            engine._ledger.checkpoint()
            synced = step
        history.states.append(state)
        history.ends.append(len(disk.log))
        history.synced.append(synced)
    return disk, history


def run_block_script(seed: int, steps: int) -> tuple[LogDisk, History]:
    """The same for KV-cache blocks of two sizes: made whole, removed, made anew in what is left, replaced, their space given back."""
    dice = random.Random(seed)
    disk = LogDisk()
    open_engine(disk).close()
    disk.start_log()
    engine = open_engine(disk)
    history = History(ends=[len(disk.log)], starts=[0])
    state: dict[bytes, bytes] = {}
    for step in range(1, steps + 1):
        history.starts.append(len(disk.log))
        index = dice.randrange(CHUNKS)
        block, slab = cid(index), (12 << 10, 64 << 10)[index % 2]
        kind = dice.choice(["create", "create", "create", "remove", "remove", "sync", "tidy", "checkpoint", "drop", "replace", "killed"])
        synced = history.synced[-1]
        state = dict(state)
        tag = Tag(CLIENT, 1, step)
        data = noise(step, dice.randrange(1, slab))
        if kind == "create" and block not in state:
            two_steps(engine, dice, write(block, 0, data, slab_bytes=slab), tag)
            state[block] = data
        elif kind == "remove":
            two_steps(engine, dice, remove(block), tag)
            state.pop(block, None)
        elif kind == "replace":
            engine.replace(replace(replacement(block, data, step), slab_bytes=slab))
            state[block] = data
        elif kind == "drop" and block not in state:
            engine.prepare(write(block, 0, data, slab_bytes=slab))
            engine.drop_pending([block])
        elif kind == "tidy":
            engine._ledger.tidy()
            engine._ledger.tidy()
        elif kind == "sync":
            engine.sync()
            synced = step
        elif kind == "checkpoint":
            engine._ledger.checkpoint()
            synced = step
        elif kind == "killed":
            engine = open_engine(disk)
            synced = step
        history.states.append(state)
        history.ends.append(len(disk.log))
        history.synced.append(synced)
    return disk, history


def two_steps(engine: ChunkEngine, dice: random.Random, update: object, tag: Tag) -> None:
    if dice.random() < 0.5:
        engine.apply(update, 3, tag)  # type: ignore[arg-type]
    else:
        engine.prepare(update)  # type: ignore[arg-type]
        engine.commit([update.chunk_id], 3, [tag])  # type: ignore[attr-defined]


def check_reopened(disk: LogDisk, history: History, oldest: int, newest: int, where: str) -> None:
    """Every chunk is in a state it had at some step of oldest..newest, and the directory is sound, and stays so when it is used again."""
    engine = open_engine(disk)
    report = engine.check(read_data=True)
    assert not report.problems, (where, report.problems)
    for index in range(CHUNKS):
        chunk = cid(index)
        found = content_of(engine, chunk)
        allowed = [history.states[step].get(chunk) for step in range(oldest, newest + 1)]
        assert found in allowed, (where, index, None if found is None else len(found), [None if one is None else len(one) for one in allowed])
    found_tag = engine.tag(CLIENT, 1)
    if found_tag is not None and newest > oldest:
        # A tag promises that its update is there: the chunks of that step must not be older than it.
        step = found_tag.sequence
        for index in range(CHUNKS):
            before, after = history.states[step - 1].get(cid(index)), history.states[step].get(cid(index))
            if before != after:
                allowed = [history.states[later].get(cid(index)) for later in range(step, newest + 1)]
                assert content_of(engine, cid(index)) in allowed, (where, "the tag is there, its update is not")
    engine.apply(write(cid(0), 0, noise(1, 70_000)), 4)
    engine.drop_pending([cid(index) for index in range(CHUNKS)])
    engine.apply(write(cid(9), 0, noise(2, 70_000)), 4)
    for index in range(10, 16):
        engine.apply(write(cid(index), 0, noise(2, 9000), slab_bytes=(12 << 10, 64 << 10)[index % 2]), 4)
    kept = {index: content_of(engine, cid(index)) for index in range(CHUNKS)}
    engine = open_engine(disk)  # killed again, without a close
    assert kept == {index: content_of(engine, cid(index)) for index in range(CHUNKS)}, where
    assert not engine.check(read_data=True).problems, where


def span(history: History, point: int) -> tuple[int, int, int]:
    """(last step that was over, newest step begun, newest step that was synced) when the log had `point` entries."""
    over = max((step for step, end in enumerate(history.ends) if end <= point), default=0)
    begun = max((step for step, start in enumerate(history.starts) if start <= point), default=0)
    return over, max(over, begun), history.synced[over]


@pytest.mark.parametrize("script", [run_script, run_block_script])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_killed_at_every_point(seed: int, script: Script) -> None:
    disk, history = script(seed, 40)
    for point in range(len(disk.log) + 1):
        over, begun, _ = span(history, point)
        check_reopened(disk.after_kill(point), history, over, begun, f"seed {seed}, killed after entry {point}")


@pytest.mark.parametrize("script", [run_script, run_block_script])
@pytest.mark.parametrize("seed", range(10, 10 + SEEDS))
def test_power_loss_at_every_point(seed: int, script: Script) -> None:
    disk, history = script(seed, 40)
    for point in range(len(disk.log) + 1):
        _, begun, synced = span(history, point)
        where = f"seed {seed}, power lost after entry {point}"
        check_reopened(disk.after_power_loss(point, random.Random(seed * 1000 + point)), history, synced, begun, where)


@pytest.mark.parametrize("script", [run_script, run_block_script])
def test_power_loss_while_opening(script: Script) -> None:
    """A crash in the middle of recovery must leave as good a directory as the crash before it."""
    for seed in range(77, 77 + 4 * SEEDS):
        disk, history = script(seed, 30)
        lost = disk.after_power_loss(len(disk.log), random.Random(seed))
        _, begun, synced = span(history, len(disk.log))
        lost.start_log()
        open_engine(lost)
        for point in range(len(lost.log) + 1):
            for dice in range(2):
                where = f"seed {seed}, lost again after entry {point}"
                check_reopened(lost.after_power_loss(point, random.Random(dice)), history, synced, begun, where)


def test_a_damaged_synced_record_is_not_taken_for_a_torn_tail() -> None:
    disk = LogDisk()
    engine = open_engine(disk, replace(SMALL, overlay_entries=10_000, journal_bytes=1 << 20))
    for index in range(3):
        engine.apply(write(cid(index), 0, noise(index, 100)), 1)
        engine.sync()
    engine.apply(write(cid(8), 0, noise(8, 100)), 1)
    (name,) = [name for name in disk.files if name.startswith("journal/")]
    journal = disk.files[name].data
    place = journal.find(cid(1))
    journal[place + 30] ^= 1
    before = disk.copy()
    with pytest.raises(KvfsError, match="synced"):
        open_engine(disk)
    assert {name: bytes(file.data) for name, file in disk.files.items()} == {name: bytes(file.data) for name, file in before.files.items()}


def test_a_segment_behind_a_torn_tail_is_removed() -> None:
    """Left there, it would follow the new records once their numbers reach it."""
    disk = LogDisk()
    engine = open_engine(disk)
    engine.apply(write(cid(0), 0, b"kept"), 1)
    stale = engine._ledger.journal.next_sequence + 3
    disk.files[segment_name(stale)] = copy.copy(disk.files[next(name for name in disk.files if name.startswith("journal/"))])
    disk.files[segment_name(stale)].data = bytearray(encode_record(stale, 0, 0, {b"c" + cid(0): None}))
    engine = open_engine(disk)
    assert segment_name(stale) not in disk.files
    for index in range(5):
        engine.apply(write(cid(index + 1), 0, b"more"), 1)
    assert content_of(open_engine(disk), cid(0)) == b"kept"


def test_a_torn_tail_is_cut() -> None:
    disk = LogDisk()
    engine = open_engine(disk)
    engine.apply(write(cid(0), 0, b"kept"), 1)
    engine.apply(write(cid(1), 0, b"torn"), 1)
    (name,) = [name for name in disk.files if name.startswith("journal/")]
    journal = disk.files[name].data
    journal[journal.find(cid(1)) + 30] ^= 1
    engine = open_engine(disk)
    assert content_of(engine, cid(0)) == b"kept"
    assert engine.get(cid(1)) is None
    assert not engine.check(read_data=True).problems
