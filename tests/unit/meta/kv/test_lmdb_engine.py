"""The LMDB engine beyond the contract: durability, group commit, and what a failing disk does."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Awaitable
from pathlib import Path

import pytest
import trio
from tests.unit.meta.kv.lmdb_store import everything, put

from kvfs.common.boundary.disk import DiskFile
from kvfs.common.boundary.real_disk import RealDisk
from kvfs.common.errors import (
    ConfigError,
    InputOutput,
    NoSpace,
    ServiceStopping,
    TxnMaybeCommitted,
    TxnThrottled,
)
from kvfs.meta.kv import open_engine
from kvfs.meta.kv.conflicts import ReadSet
from kvfs.meta.kv.lmdb_engine import LmdbEngine
from kvfs.meta.kv.writes import WriteSet


class WatchedDisk(RealDisk):
    """A disk that counts the journal's syncs, can hold them, and can fail."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.syncs = 0
        self.free = threading.Event()
        self.free.set()
        self.write_error: Exception | None = None
        self.sync_error: Exception | None = None
        self.map_error: Exception | None = None

    def open(self, name: str, *, create: bool = False) -> DiskFile:
        file = super().open(name, create=create)
        real_write, real_sync = file.write, file.sync

        def write(buffers, offset):
            if self.write_error is not None:
                raise self.write_error
            real_write(buffers, offset)

        def sync():
            assert self.free.wait(10)
            if self.sync_error is not None:
                raise self.sync_error
            real_sync()
            self.syncs += 1

        file.write, file.sync = write, sync  # type: ignore[method-assign]
        return file

    def open_map(self, name: str, *, size_bytes: int):
        found = super().open_map(name, size_bytes=size_bytes)
        real_commit = found.commit

        def commit(writes):
            if self.map_error is not None:
                raise self.map_error
            real_commit(writes)

        found.commit = commit  # type: ignore[method-assign]
        return found


@pytest.fixture
def disk(tmp_path: Path) -> WatchedDisk:
    disk = WatchedDisk(tmp_path / "kv")
    disk.makedirs("")
    return disk


async def until(condition) -> None:
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.001)


# --- durability


def test_a_commit_answers_only_when_it_is_synced(disk):
    async def main():
        engine = LmdbEngine(disk)
        disk.free.clear()
        answered = []

        async def commit():
            await engine.transact(put(b"k"))
            answered.append("writer")

        async def read():
            assert await engine.transact(lambda txn: txn.get(b"k")) == b"v"
            answered.append("reader of it")

        async def read_other():
            assert await engine.transact(lambda txn: txn.get(b"other")) is None
            answered.append("reader of another key")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(commit)
            await trio.testing.wait_all_tasks_blocked(0.02)
            nursery.start_soon(read)
            nursery.start_soon(read_other)
            await trio.testing.wait_all_tasks_blocked(0.02)
            assert answered == ["reader of another key"]
            before = disk.syncs
            disk.free.set()
        assert sorted(answered[1:]) == ["reader of it", "writer"]
        assert disk.syncs == before + 1
        engine.close()

    trio.run(main)


def test_commits_that_come_during_a_sync_share_the_next_one(disk):
    async def main():
        engine = LmdbEngine(disk)
        before = disk.syncs
        disk.free.clear()
        async with trio.open_nursery() as nursery:
            for number in range(64):
                nursery.start_soon(engine.transact, put(b"k%d" % number))
            await trio.testing.wait_all_tasks_blocked(0.02)
            disk.free.set()
        assert disk.syncs == before + 2
        assert len(await everything(engine)) == 64
        engine.close()

    trio.run(main)


def test_at_once_answers_only_what_is_synced(disk, monkeypatch):
    monkeypatch.setattr("kvfs.meta.kv.lmdb_engine.QUICK_SYNC_S", 10)

    async def main():
        engine = LmdbEngine(disk)
        answers = []
        for number in range(40):
            before = disk.syncs
            outcome = engine.transact_at_once(lambda txn, number=number: (txn.set(b"k%d" % number, b"v"), number)[1])
            if isinstance(outcome, int):
                assert disk.syncs == before + 1
                answers.append(outcome)
            else:
                await outcome
        assert len(answers) > 30
        engine._at_once = 0
        disk.free.clear()
        writer = engine.transact_at_once(put(b"k0", b"new"))
        reader = engine.transact_at_once(lambda txn: txn.get(b"k0"))
        other = engine.transact_at_once(lambda txn: txn.get(b"k1"))
        assert isinstance(writer, Awaitable) and isinstance(reader, Awaitable) and other == b"v"
        disk.free.set()
        await writer
        assert await reader == b"new"
        engine.close()

    trio.run(main)


def test_at_once_tells_of_a_failed_sync(disk):
    async def main():
        engine = LmdbEngine(disk)
        await engine.transact(put(b"k", b"old"))
        disk.sync_error = InputOutput("the device failed")
        for _ in range(2):
            outcome = None
            with pytest.raises(InputOutput):
                outcome = engine.transact_at_once(put(b"k", b"unknown"))
                await outcome
        engine.close()

    trio.run(main)


def test_lone_commits_are_synced_one_by_one(disk):
    async def main():
        engine = LmdbEngine(disk)
        before = disk.syncs
        for number in range(40):
            await engine.transact(put(b"k%d" % number))
        assert disk.syncs == before + 40
        engine.close()

    trio.run(main)


@pytest.mark.parametrize("clean", [True, False])
def test_reopening_finds_every_commit_and_versions_go_on(tmp_path, open_lmdb, clean):
    """Without a clean end: from a copy of the files as they are while the engine runs. Small segments, so that they are used again and again."""

    async def main():
        path, expected, last = tmp_path / "kv", {}, b""
        engine = open_lmdb(path, segment_bytes=1 << 20)
        for round_number in range(4):
            for number in range(300):
                key, value = b"k%d" % (number % 90), b"%d.%d" % (round_number, number)
                with await engine.begin() as txn:
                    txn.set(key, value)
                    txn.clear(b"k%d" % ((number + 45) % 90))
                    await txn.commit()
                    assert txn.versionstamp > last
                    last = txn.versionstamp
                expected[key] = value
                expected.pop(b"k%d" % ((number + 45) % 90), None)
            if clean:
                engine.close()
            else:
                copy = tmp_path / f"copy{round_number}"
                shutil.copytree(path, copy)
                engine.close()
                path = copy
            engine = open_lmdb(path, segment_bytes=1 << 20)
            assert await everything(engine) == expected
        engine.close()

    trio.run(main)


def test_checkpoints_free_segments_and_memory(tmp_path, open_lmdb):
    async def main():
        engine = open_lmdb(tmp_path / "kv", segment_bytes=1 << 20)
        for number in range(600):
            await engine.transact(put(b"k%d" % (number % 100), b"%d" % number))
        await until(lambda: not engine._checkpointing)
        for number in range(50):
            await engine.transact(put(b"j%d" % number))
        assert len(engine.recent._log) < 250
        assert len([name for name in os.listdir(tmp_path / "kv") if name.startswith("journal-")]) <= 4
        engine.close()

    trio.run(main)


def test_a_segment_is_not_used_again_before_all_of_it_is_in_the_map(tmp_path, open_lmdb):
    """With the first of two snapshots closed, a checkpoint can take the first of three full segments, but not the others."""

    async def main():
        engine = open_lmdb(tmp_path / "kv", inline=True, segment_bytes=8 * 4096)
        readers = []
        for number in range(60):
            await engine.transact(put(b"k%d" % number))
            if number in (4, 12):
                readers.append(await engine.begin())
                readers[-1].get(b"k")
            if number == 28:
                assert len(engine._sealed) == 3
                readers[0].close()
        assert readers[1].get(b"k13") is None
        shutil.copytree(tmp_path / "kv", tmp_path / "copy")
        engine.close()
        engine = open_lmdb(tmp_path / "copy", segment_bytes=8 * 4096)
        assert len(await everything(engine)) == 60
        engine.close()

    trio.run(main)


def test_a_transaction_larger_than_a_segment_is_kept_whole(tmp_path, open_lmdb):
    async def main():
        engine = open_lmdb(tmp_path / "kv", segment_bytes=8192)
        expected = {b"big%d" % number: os.urandom(50_000) for number in range(20)}
        await engine.transact(lambda txn: [txn.set(key, value) for key, value in expected.items()])
        await engine.transact(put(b"next"))
        shutil.copytree(tmp_path / "kv", tmp_path / "copy")
        engine.close()
        engine = open_lmdb(tmp_path / "copy", segment_bytes=8192)
        assert await everything(engine) == {**expected, b"next": b"v"}
        engine.close()

    trio.run(main)


def test_close_finishes_what_was_accepted(disk, open_lmdb):
    async def main():
        engine = LmdbEngine(disk)
        disk.free.clear()
        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(engine.transact, put(b"k%d" % number))
            await trio.testing.wait_all_tasks_blocked(0.02)
            disk.free.set()
            engine.close()
        engine.close()
        with pytest.raises(ServiceStopping):
            await engine.transact(put(b"late"))
        engine = open_lmdb(disk.path)
        assert len(await everything(engine)) == 10
        engine.close()

    trio.run(main)


def test_a_cancelled_commit_is_still_made_durable(disk, open_lmdb):
    async def main():
        engine = LmdbEngine(disk)
        disk.free.clear()
        with trio.move_on_after(0.02):
            await engine.transact(put(b"k"))
        disk.free.set()
        await engine.transact(put(b"j"))
        engine.close()
        engine = open_lmdb(disk.path)
        assert await everything(engine) == {b"k": b"v", b"j": b"v"}
        engine.close()

    trio.run(main)


# --- a failing disk


def test_no_space_refuses_commits_and_undoes_them_then_goes_on(disk):
    async def main():
        engine = LmdbEngine(disk)
        await engine.transact(put(b"k", b"old"))
        reader = await engine.begin()
        disk.write_error = NoSpace("the disk is full")
        errors = []

        async def commit(number):
            try:
                await engine.transact(put(b"k", b"lost%d" % number))
            except NoSpace as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(commit, number)
        assert len(errors) == 10
        assert reader.get(b"k") == b"old"
        assert await engine.transact(lambda txn: txn.get(b"k")) == b"old"
        reader.close()
        disk.write_error = None
        await engine.transact(put(b"j"))
        assert await everything(engine) == {b"k": b"old", b"j": b"v"}
        engine.close()
        engine = LmdbEngine(disk)
        assert await everything(engine) == {b"k": b"old", b"j": b"v"}
        engine.close()

    trio.run(main)


def test_a_transaction_that_saw_what_was_undone_cannot_go_on(disk):
    async def main():
        engine = LmdbEngine(disk)
        disk.free.clear()
        outcomes = []

        async def commit():
            with pytest.raises(NoSpace):
                await engine.transact(put(b"k", b"lost"))
            outcomes.append("undone")

        async def follow():
            with await engine.begin() as txn:
                assert txn.get(b"k") == b"lost"
                await until(lambda: outcomes)
                with pytest.raises(Exception, match="snapshot has ended"):
                    txn.get(b"j")
                txn.set(b"j", b"from what was lost")
                with pytest.raises(Exception, match="snapshot has ended"):
                    await txn.commit()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.transact, put(b"first"))
            await trio.testing.wait_all_tasks_blocked(0.02)
            nursery.start_soon(commit)
            await trio.testing.wait_all_tasks_blocked(0.02)
            nursery.start_soon(follow)
            await trio.sleep(0.05)
            disk.write_error = NoSpace("the disk is full")
            disk.free.set()
        assert await everything(engine) == {b"first": b"v"}
        engine.close()

    trio.run(main)


def test_a_failed_sync_ends_the_engine_until_it_is_reopened(disk, open_lmdb):
    async def main():
        engine = LmdbEngine(disk)
        await engine.transact(put(b"k", b"old"))
        disk.sync_error = InputOutput("the device failed")
        with await engine.begin() as txn:
            txn.set(b"k", b"unknown")
            with pytest.raises(TxnMaybeCommitted):
                await txn.commit()
        disk.sync_error = None
        for step in (put(b"j"), lambda txn: txn.get(b"k")):
            with pytest.raises(InputOutput, match="restart the service"):
                await engine.transact(step)
        engine.close()
        engine = open_lmdb(disk.path)
        assert await engine.transact(lambda txn: txn.get(b"k")) in (b"old", b"unknown")
        await engine.transact(put(b"j"))
        engine.close()

    trio.run(main)


def test_a_checkpoint_without_space_is_tried_again_and_nothing_is_lost(disk, open_lmdb):
    async def main():
        clock = [0.0]
        engine = LmdbEngine(disk, segment_bytes=1 << 18, now=lambda: clock[0])  # 64 blocks a segment
        disk.map_error = NoSpace("the disk is full")
        accepted = 0
        with pytest.raises(NoSpace):
            for number in range(1000):
                await engine.commit(None, *one_write(b"k%d" % number))
                await trio.sleep(0)
                accepted += 1
        assert 64 * 6 < accepted <= 64 * 8
        disk.map_error = None
        clock[0] += 2
        for _ in range(3):  # the first asks for a checkpoint and may still be refused
            try:
                await engine.commit(None, *one_write(b"after"))
                break
            except (NoSpace, TxnThrottled):
                await until(lambda: not engine._checkpointing)
        else:
            raise AssertionError("a checkpoint makes room again")
        engine.close()
        engine = open_lmdb(disk.path)
        assert len(await everything(engine)) == accepted + 1
        engine.close()

    def one_write(key: bytes):
        writes = WriteSet()
        writes.set(key, b"v")
        return ReadSet(), writes

    trio.run(main)


def test_an_open_snapshot_bounds_the_journal_instead_of_filling_the_disk(disk):
    async def main():
        engine = LmdbEngine(disk, segment_bytes=1 << 18)
        with await engine.begin() as reader:
            reader.get(b"k")
            with pytest.raises(TxnThrottled):
                for number in range(1000):
                    with await engine.begin() as txn:
                        txn.set(b"k", b"%d" % number)
                        await txn.commit()
        assert len([name for name in os.listdir(disk.path) if name.startswith("journal-")]) <= 8
        await engine.transact(put(b"k", b"end"))  # the reader is gone: a retry gets through
        engine.close()

    trio.run(main)


def test_the_address_says_which_engine(tmp_path):
    for wrong in ("", "memory:x", "lmdb", "lmdb:", "etcd:localhost", str(tmp_path)):
        with pytest.raises(ConfigError, match="expected 'memory' or 'lmdb:"):
            open_engine(wrong)
