"""Committed and pending versions: what each call makes visible, refuses and leaves behind."""

from __future__ import annotations

from dataclasses import replace as with_changes

import pytest
from engine_world import SMALL, LogDisk, ManualClock, cid, content_of, noise, open_engine, remove, replacement, truncate, write

from kvfs.common.errors import Busy, ChecksumMismatch, ChunkNotFound, InvalidArgument, MissingUpdate, StaleUpdate, TargetOffline
from kvfs.storage.engine.requests import Tag, Update, UpdateKind

A, B = cid(0), cid(1)


def test_a_pending_version_is_not_seen_until_it_is_committed() -> None:
    engine = open_engine(LogDisk())
    engine.apply(write(A, 0, b"old" * 1000), 3)
    meta = engine.prepare(write(A, 0, b"new" * 2000, update_version=2))
    assert (meta.version, meta.pending.version, meta.pending.length) == (1, 2, 6000)
    assert content_of(engine, A) == b"old" * 1000
    assert content_of(engine, A, version=2) == b"new" * 2000
    view = memoryview(bytearray(10))
    assert engine.read(A, 0, 10, view).pending_version == 2
    (meta,) = engine.commit([A], 4)
    assert (meta.version, meta.chain_version, meta.pending, meta.length) == (2, 4, None, 6000)
    assert content_of(engine, A) == b"new" * 2000
    assert content_of(engine, A, version=2) == b"new" * 2000, "a reader told that 2 is committed finds it committed"
    assert engine.read(A, 0, 10, view).pending_version == 0


def test_versions_that_do_not_follow_are_refused() -> None:
    engine = open_engine(LogDisk())
    with pytest.raises(MissingUpdate):
        engine.prepare(write(A, 0, b"x", update_version=2))
    engine.apply(write(A, 0, b"x", update_version=1), 1)
    with pytest.raises(StaleUpdate):
        engine.prepare(write(A, 0, b"y", update_version=1))
    with pytest.raises(MissingUpdate):
        engine.prepare(write(A, 0, b"y", update_version=3))
    assert engine.get(A).pending is None
    with pytest.raises(MissingUpdate):
        engine.read(A, 0, 1, memoryview(bytearray(1)), version=2)


def test_preparing_again_replaces_the_pending_version() -> None:
    disk = LogDisk()
    engine = open_engine(disk)
    engine.apply(write(A, 0, b"base"), 1)
    for attempt in (b"first try" * 9000, b"second"):
        engine.prepare(write(A, 4, attempt, update_version=2))
    assert content_of(engine, A, version=2) == b"basesecond"
    engine.commit([A], 1)
    engine.sync()
    assert content_of(engine, A) == b"basesecond"
    assert not engine.check(read_data=True).problems


def test_dropping_a_pending_version() -> None:
    engine = open_engine(LogDisk())
    engine.apply(write(A, 0, b"kept"), 1)
    engine.prepare(write(A, 4, b"dropped"))
    engine.prepare(write(B, 0, b"never there"))
    assert engine.get(B).version == 0
    with pytest.raises(ChunkNotFound):
        engine.read(B, 0, 4, memoryview(bytearray(4)))
    engine.drop_pending([A, B, cid(7)])
    assert content_of(engine, A) == b"kept"
    assert engine.get(B) is None and engine.space().chunks == 1
    engine.apply(truncate(A, 10), 1)
    assert content_of(engine, A) == b"kept" + bytes(6), "what a dropped append left in the block must not come up"


def test_commit_without_a_pending_version_changes_nothing() -> None:
    engine = open_engine(LogDisk())
    engine.apply(write(A, 0, b"x"), 5)
    assert [meta.chain_version if meta else None for meta in engine.commit([A, B], 6)] == [5, None]


def test_a_batch_has_an_outcome_for_each() -> None:
    disk = LogDisk()
    engine = open_engine(disk)
    bad = Update(B, UpdateKind.WRITE, 0, 3, memoryview(b"abc"), b"wrong!!!")
    before = len(disk.log)
    outcomes = engine.prepare_many([write(A, 0, b"good"), bad, write(cid(2), 0, b"too"), write(A, 0, b"twice")])
    assert [type(one).__name__ for one in outcomes] == ["ChunkMeta", "ChecksumMismatch", "ChunkMeta", "Busy"]
    journalled = [entry for entry in disk.log[before:] if entry[0] == "write" and entry[1].startswith("journal/")]
    assert len(journalled) == 1, "one record for the batch"
    assert [meta.version for meta in engine.commit([A, cid(2)], 1)] == [1, 1]
    assert engine.get(B) is None
    assert not engine.check(read_data=True).problems


def test_apply_many_takes_a_chunk_more_than_once() -> None:
    engine = open_engine(LogDisk())
    tags = [Tag(b"c" * 16, 1, 1), None, Tag(b"c" * 16, 1, 3)]
    outcomes = engine.apply_many([write(A, 0, b"one"), write(A, 3, b"two"), write(A, 6, b"three")], 1, tags)
    assert [meta.version for meta in outcomes] == [1, 2, 3]
    assert content_of(engine, A) == b"onetwothree"
    assert engine.tag(b"c" * 16, 1).sequence == 3


def test_a_removed_chunk_leaves_nothing_behind() -> None:
    disk = LogDisk()
    engine = open_engine(disk)
    engine.apply(write(A, 0, noise(1, 100_000)), 1)
    engine.prepare(remove(A))
    assert content_of(engine, A) == noise(1, 100_000)
    with pytest.raises(ChunkNotFound):
        engine.read(A, 0, 1, memoryview(bytearray(1)), version=2)
    assert engine.commit([A], 1) == [None]
    assert engine.get(A) is None
    assert engine.space().used_bytes == 0
    engine.apply(write(A, 0, b"again"), 1)
    assert engine.get(A).version == 1
    engine.remove([A, B])
    engine.close()
    assert not any(key.startswith(b"c") for key in disk.maps["index"])
    assert open_engine(disk).space().used_bytes == 0


def test_truncating_what_is_not_there_to_nothing_makes_nothing() -> None:
    engine = open_engine(LogDisk())
    assert engine.apply(truncate(A, 0), 1) is None
    engine.prepare(truncate(A, 0))
    assert engine.commit([A], 1) == [None]
    assert engine.get(A) is None
    engine.apply(truncate(B, 5), 1)
    assert content_of(engine, B) == bytes(5)
    assert engine.apply(truncate(B, 0), 1).length == 0
    assert content_of(engine, B) == b"", "a chunk that was there is empty now, not gone"


def test_a_replacement_can_be_the_pending_version() -> None:
    engine = open_engine(LogDisk())
    engine.apply(write(A, 0, noise(1, 9000)), 1)
    engine.prepare(write(A, 0, noise(2, 100)))
    meta = engine.prepare(replacement(A, noise(3, 500), version=2))
    assert meta.version == 1 and meta.pending is not None and meta.pending.version == 2
    assert content_of(engine, A) == noise(1, 9000)
    engine.commit([A], 1)
    assert content_of(engine, A) == noise(3, 500)
    with pytest.raises(StaleUpdate):
        engine.prepare(replacement(A, b"x", version=2))
    with pytest.raises(MissingUpdate):
        engine.prepare(replacement(A, b"x", version=4))
    assert not engine.check(read_data=True).problems


def test_replace_sets_the_whole_chunk_and_drops_the_pending_version() -> None:
    engine = open_engine(LogDisk())
    engine.apply(write(A, 0, noise(1, 90_000)), 9)
    engine.prepare(write(A, 0, b"pending"))
    meta = engine.replace(replacement(A, noise(2, 40_000), version=7, chain_version=3), [Tag(b"c" * 16, 2, 5, b"r")])
    assert (meta.version, meta.chain_version, meta.pending) == (7, 3, None)
    assert content_of(engine, A) == noise(2, 40_000)
    assert engine.tag(b"c" * 16, 2) == Tag(b"c" * 16, 2, 5, b"r")
    meta = engine.replace(replacement(A, b"", version=2))
    assert (meta.version, meta.length, meta.block) == (2, 0, None)
    with pytest.raises(InvalidArgument):
        engine.replace(replacement(A, b"x", version=0))
    with pytest.raises(InvalidArgument):
        engine.replace(write(A, 0, b"x"))
    assert not engine.check(read_data=True).problems


def test_an_update_that_comes_in_between_is_found() -> None:
    engine = open_engine(LogDisk())
    engine.apply(write(A, 0, b"one"), 1)
    staged = engine._stager.stage(write(A, 0, b"two"))
    engine.apply(write(A, 0, b"three"), 1)
    with pytest.raises(Busy):
        engine._record([(staged, staged.prepared())])
    assert content_of(engine, A) == b"three"
    assert not engine.check(read_data=True).problems


def test_bad_requests_change_nothing() -> None:
    disk = LogDisk()
    engine = open_engine(disk)
    engine.apply(write(A, 0, b"x"), 1)
    before = len(disk.log)
    for bad in (
        write(b"short", 0, b"x"),
        write(A, 0, b""),
        write(A, -1, b"x"),
        write(A, (1 << 20) - 1, b"xy"),
        write(A, 0, b"x" * 11, chunk_size=10),
        truncate(A, (1 << 20) + 1),
        truncate(A, 5, offset=1),
        Update(A, UpdateKind.WRITE, 0, 5, memoryview(b"xxxx"), b""),
        Update(A, UpdateKind.WRITE, 0, 5, None, b""),
    ):
        with pytest.raises(InvalidArgument):
            engine.prepare(bad)
    with pytest.raises(ChecksumMismatch):
        engine.prepare(Update(A, UpdateKind.WRITE, 0, 1, memoryview(b"x"), b"12345678"))
    assert len(disk.log) == before


def test_tags_are_kept_over_a_restart_and_bounded() -> None:
    disk = LogDisk()
    config = with_changes(SMALL, tags=3)
    engine = open_engine(disk, config)
    for channel in range(5):
        engine.apply(write(cid(channel), 0, b"x"), 1, Tag(b"c" * 16, channel, 10 + channel, b"result"))
    assert [tag.channel for tag in engine.tags()] == [2, 3, 4]
    engine.commit([], 1, [Tag(b"c" * 16, 2, 99)])
    engine.commit([], 1, [Tag(b"d" * 16, 0, 1)])
    assert {(tag.client_id[:1], tag.channel) for tag in engine.tags()} == {(b"c", 2), (b"c", 4), (b"d", 0)}, "the least recently used goes"
    killed = open_engine(disk, config)
    assert killed.tag(b"c" * 16, 4) == Tag(b"c" * 16, 4, 14, b"result")
    assert killed.tag(b"c" * 16, 2).sequence == 99
    assert killed.tag(b"c" * 16, 0) is None
    killed.close()
    assert len([key for key in disk.maps["index"] if key.startswith(b"t")]) == 3


def test_old_tags_go() -> None:
    disk, clock = LogDisk(), ManualClock()
    engine = open_engine(disk, clock=clock)
    engine.commit([], 1, [Tag(b"c" * 16, 1, 1)])
    clock.now += 3000
    engine.commit([], 1, [Tag(b"c" * 16, 2, 1)])
    clock.now += 3000
    engine.close()
    assert [tag.channel for tag in open_engine(disk).tags()] == [2]


def test_tags_that_are_not_ones() -> None:
    engine = open_engine(LogDisk())
    for bad in (Tag(b"short", 1, 1), Tag(b"c" * 16, -1, 1), Tag(b"c" * 16, 1, 1, b"x" * 2000)):
        with pytest.raises(InvalidArgument):
            engine.apply(write(A, 0, b"x"), 1, bad)
    assert engine.get(A) is None
    assert not engine.check().problems


def test_listing_and_the_last_chunk() -> None:
    engine = open_engine(LogDisk(), with_changes(SMALL, overlay_entries=5))
    for inode in (4, 5, 6):
        for index in (0, 2, 3, 9):
            engine.apply(write(cid(index, inode), 0, b"x" * (index + 1)), 1)
    engine.apply(truncate(cid(11, 5), 0), 1)
    engine.prepare(write(cid(12, 5), 0, b"pending"))
    engine.apply(remove(cid(0, 5)), 1)
    last = engine.last_chunk(5)
    assert (last.index, last.length, last.chunks, last.bytes) == (9, 10, 3, 17)
    assert engine.last_chunk(7) is None
    found, after = [], b""
    while True:
        metas, more = engine.list(after=after, limit=2)
        found += [meta.chunk_id for meta in metas]
        if not more:
            break
        after = found[-1]
    expected = sorted([cid(index, inode) for inode in (4, 6) for index in (0, 2, 3, 9)] + [cid(index, 5) for index in (2, 3, 9, 12)])
    assert found == expected
    assert [meta.chunk_id for meta in engine.list(inode=6)[0]] == [cid(index, 6) for index in (0, 2, 3, 9)]


def test_removing_chunks() -> None:
    engine = open_engine(LogDisk(), with_changes(SMALL, overlay_entries=4))
    for inode in (4, 5):
        for index in range(6):
            engine.apply(write(cid(index, inode), 0, b"x" * 70_000), 1)
    engine.prepare(write(cid(6, 5), 0, b"pending"))
    assert engine.remove([cid(2), cid(5), cid(6), cid(7)], tags=[Tag(b"c" * 16, 1, 1)]) == 3, "committed and pending; one was not there"
    assert [meta.chunk_id for meta in engine.list(inode=5)[0]] == [cid(0), cid(1), cid(3), cid(4)]
    assert len(engine.list(inode=4)[0]) == 6
    assert engine.tag(b"c" * 16, 1) is not None
    assert not engine.check(read_data=True).problems


def test_a_disk_that_fails_takes_the_target_out_of_service() -> None:
    for where in ("data/", "journal/"):
        disk = LogDisk()
        engine = open_engine(disk)
        engine.apply(write(A, 0, b"x"), 1)
        disk.fail_write = where
        with pytest.raises(Exception, match="planted"):
            engine.apply(write(A, 0, b"yy"), 1)
        disk.fail_write = ""
        with pytest.raises(TargetOffline):
            engine.apply(write(A, 0, b"yy"), 1)
        assert content_of(engine, A) == b"x", "what is there can still be read"


def test_a_failed_sync_is_never_followed_by_one_that_claims_success() -> None:
    disk = LogDisk()
    engine = open_engine(disk)
    engine.apply(write(A, 0, b"x"), 1)
    disk.fail_sync = True
    with pytest.raises(Exception, match="planted"):
        engine.sync()
    disk.fail_sync = False
    with pytest.raises(TargetOffline):
        engine.sync()
