"""One bit flipped at many places of every file of a target: it has no effect, or it is found. Never wrong bytes, never a missing chunk, never a
target that keeps its process from starting: what cannot be read is refilled from the chain (IndexCorrupt: the target is made anew, host.py).
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from engine_world import SMALL, ManualClock, cid, noise, truncate, write

from kvfs.common.boundary.random import SeededRandom
from kvfs.common.checksum import verify
from kvfs.common.errors import ChecksumMismatch, IndexCorrupt, TargetOffline
from kvfs.common.ids import SPACE_BIT, chunk_id
from kvfs.common.wire import storage_pb2 as pb
from kvfs.storage.config import StorageConfig
from kvfs.storage.disks import Disks
from kvfs.storage.engine.engine import ChunkEngine
from kvfs.storage.engine.requests import Tag
from kvfs.storage.retention.retention import Retention
from kvfs.storage.scrub.state import ScrubState

FLIPS = 16
"""Of a file."""
SPACE, SLAB = SPACE_BIT | 9, 12 << 10
TARGET = 1001
CONFIG = replace(SMALL, index_bytes=8 << 20, overlay_entries=1000)
HARMLESS, RENEWED, DAMAGED = "no effect", "the target is made anew", "a damaged chunk"


class Opened:
    """A data directory as the storage process opens it."""

    def __init__(self, folder: Path) -> None:
        clock = ManualClock()
        self.disks = Disks(StorageConfig(data=(str(folder),), cluster_id="c"), clock, SeededRandom(1), engine=CONFIG)
        try:
            self.engine: ChunkEngine = self.disks.open_target(self.disks.directories[0], TARGET, "c")
            self.retention = Retention(clock, self.engine)
            self.retention.load()
            ScrubState(clock, self.engine).load()
        except BaseException:
            self.disks.close()
            raise

    def close(self) -> None:
        self.engine.abandon(TargetOffline("it is killed"))
        self.engine.close()
        self.disks.close()


def make(folder: Path) -> dict[bytes, bytes]:
    """Chunks in the index, chunks in the journal, blocks with touches, all of it synced; then its process was killed. What must be read."""
    opened = Opened(folder)
    engine, retention = opened.engine, opened.retention
    content: dict[bytes, bytes] = {}

    def put(key: bytes, data: bytes, slab_bytes: int = 0) -> None:
        tag = Tag(b"c" * 16, len(content), 1, b"result")
        engine.apply(replace(write(key, 0, data), slab_bytes=slab_bytes), 1, tag)
        content[key] = bytes(data)

    retention.learn(pb.KvSpace(inode=SPACE, block_bytes=SLAB, version=1))
    for number in range(4):
        put(cid(number), noise(number, 5000 + 9000 * number))
        put(chunk_id(SPACE, number), noise(10 + number, SLAB), SLAB)
        retention.settled(chunk_id(SPACE, number), 0, at_head=True)
    retention.touch(SPACE, b"".join(chunk_id(SPACE, number)[8:] for number in (2, 0)))
    append = retention.write_log(retention.take_news())
    assert append is not None
    append()
    engine._ledger.checkpoint()
    for number in range(4, 7):
        put(cid(number), noise(number, 20_000))
    engine.apply(truncate(cid(2), 1000), 1)
    content[cid(2)] = content[cid(2)][:1000]
    engine.sync()
    left = folder.with_name("left")
    shutil.copytree(folder, left)
    opened.close()
    shutil.rmtree(folder)
    left.rename(folder)
    return content


def outcome(folder: Path, content: dict[bytes, bytes]) -> str:
    try:
        opened = Opened(folder)
    except IndexCorrupt:
        return RENEWED
    try:
        return _outcome(opened.engine, content)
    except IndexCorrupt:
        return RENEWED
    finally:
        opened.close()


def _outcome(engine: ChunkEngine, content: dict[bytes, bytes]) -> str:
    assert {meta.chunk_id for meta in engine.list(limit=1000)[0]} == set(content)
    found = HARMLESS
    for key, data in content.items():
        into = memoryview(bytearray(len(data) + 1))
        try:
            read = engine.read(key, 0, len(into), into)
        except ChecksumMismatch:
            found = DAMAGED
        else:
            assert read is not None
            if not verify(into[: read.length], 0, read.checksums):
                found = DAMAGED
            else:
                assert into[: read.length] == data, key.hex()
        inspection = engine.inspect(key)
        assert inspection is not None
        if inspection.damaged:
            found = DAMAGED
            size = 32 << 10
            mended = engine.repair(key, {unit: memoryview(data[unit * size : (unit + 1) * size]) for unit in inspection.damaged})
            assert sorted(mended) == sorted(inspection.damaged)
            again = engine.inspect(key)
            assert again is not None and not again.damaged
    if found == DAMAGED:
        assert not engine.check(read_data=True).problems
    for _ in engine.check_index():
        pass
    return found


def flip(path: Path, at: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def places(path: Path, dice: random.Random) -> list[int]:
    """Mostly bytes that were written: half of a file may be zeros."""
    data = path.read_bytes()
    written = [at for at, byte in enumerate(data) if byte] if len(data) < 1 << 16 else [at for at in range(0, len(data), 97) if data[at]]
    return [*dice.sample(written, min(FLIPS, len(written))), *dice.sample(range(len(data)), min(FLIPS // 4, len(data)))]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory, where it can be: each flip is an opening with all its syncs."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="kvfs-flips-") as name:
        yield Path(name)


def test_a_flipped_bit_has_no_effect_or_is_found(folder: Path) -> None:
    whole, copy = folder / "whole", folder / "copy"
    content = make(whole)
    dice = random.Random(1)
    seen: dict[str, Counter[str]] = {}
    for path in sorted(path for path in whole.rglob("*") if path.is_file()):
        name = str(path.relative_to(whole))
        counts = seen.setdefault(path.parent.name if path.parent.name in ("data", "index", "journal") else path.name, Counter())
        for at in places(path, dice):
            shutil.copytree(whole, copy)
            bit = dice.randrange(8)
            flip(copy / name, at, bit)
            try:
                counts[outcome(copy, content)] += 1
            except BaseException as error:
                raise AssertionError(f"bit {bit} of byte {at} of {name}: {type(error).__name__}: {error}") from error
            shutil.rmtree(copy)
    assert seen["data"][DAMAGED] and seen["index"][RENEWED] and seen["journal"][RENEWED]
    for name in ("superblock", "retention.log", "node.json"):
        assert set(seen[name]) == {HARMLESS}, "nothing that it says is needed to read"
