"""A storage process's data directory from nothing: node file, a target, chunks and KV-cache blocks, the log of touches, opened again and again.

With several threads these change chunks side by side, and the engine does its upkeep in one of its own.
"""

from __future__ import annotations

import random
import sys
import threading
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "storage" / "engine"))
from engine_world import SMALL, ManualClock, cid, content_of, noise, remove, replacement, truncate, write
from promises import Promises
from replay import Begin

from kvfs.common.boundary.random import SeededRandom
from kvfs.common.ids import SPACE_BIT, chunk_id
from kvfs.common.wire import storage_pb2 as pb
from kvfs.storage.config import StorageConfig
from kvfs.storage.disks import Disks
from kvfs.storage.engine.engine import ChunkEngine
from kvfs.storage.engine.requests import Tag
from kvfs.storage.retention.retention import Retention

CONFIG = replace(SMALL, index_bytes=64 << 20, rest_s=0.05)
TARGET = 1001
CLUSTER = "crash"
SPACE = SPACE_BIT | 9
CLIENT = b"c" * 16
CHUNKS = 6
BLOCKS = 4
SLABS = (12 << 10, 64 << 10)
NEW = noise(0, 70_000)


def block_id(index: int) -> bytes:
    return chunk_id(SPACE, index)


class TargetLife:
    def __init__(self, seed: int, *, threads: int = 1, steps: int = 20) -> None:
        self.seed = seed
        self.threads = threads
        self.steps = steps
        self.promises = Promises([*map(cid, range(CHUNKS)), *map(block_id, range(BLOCKS))])

    def __repr__(self) -> str:
        return f"target, seed {self.seed}, {self.threads} threads"

    # --- the work that is recorded ---

    def life(self, folder: Path, number: int, begin: Begin) -> None:
        disks, engine, retention = self._open(folder, background=self.threads > 1)
        begin({key: content_of(engine, key) for key in self.promises.keys})
        retention.learn(pb.KvSpace(inode=SPACE, block_bytes=64 << 10, version=1))
        workers = [
            threading.Thread(target=self._work, args=(engine, retention if not place else None, place, number)) for place in range(self.threads)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        retention.close()
        engine.close()
        disks.close()

    def _open(self, folder: Path, *, background: bool = False) -> tuple[Disks, ChunkEngine, Retention]:
        """As the storage process does."""
        config = StorageConfig(data=(str(folder / "data"),), cluster_id=CLUSTER)
        clock = ManualClock()
        disks = Disks(config, clock, SeededRandom(self.seed), engine=replace(CONFIG, background=background))
        try:
            engine = disks.open_target(disks.directories[0], TARGET, CLUSTER)
        except BaseException:
            disks.close()
            raise
        retention = Retention(clock, engine)
        retention.load()
        return disks, engine, retention

    def _work(self, engine: ChunkEngine, retention: Retention | None, place: int, life: int) -> None:
        dice = random.Random(f"{self.seed} {place} {life}")
        mine = [key for number, key in enumerate(self.promises.keys) if number % self.threads == place]
        for step in range(self.steps // self.threads):
            chunk = dice.choice(mine)
            if dice.random() < 0.15:
                with self.promises.sync():
                    engine.sync()
            elif chunk[:8] == SPACE.to_bytes(8, "big"):
                self._change_block(engine, dice, chunk, step)
            else:
                self._change_chunk(engine, dice, chunk, step)
            if retention is not None and step % 4 == 3:
                for index in range(BLOCKS):
                    retention.settled(block_id(index), 0, at_head=True)
                retention.touch(SPACE, b"".join(block_id(dice.randrange(BLOCKS))[8:] for _ in range(3)))
                append = retention.write_log(retention.take_news())
                if append is not None:
                    append()
            if not self.threads > 1 and dice.random() < 0.1:
                dice.choice((engine._ledger.checkpoint, engine._ledger.tidy, engine._ledger.release_removed))()

    def _change_chunk(self, engine: ChunkEngine, dice: random.Random, chunk: bytes, step: int) -> None:
        old = self.promises.now(chunk) or b""
        kind = dice.choice(("append", "append", "overwrite", "overwrite", "truncate", "remove", "drop"))
        data = noise(dice.randrange(1 << 30), dice.randrange(1, 60_000))
        if kind == "append":
            data = data[: 200_000 - len(old)]
            if data:
                self._apply(engine, dice, chunk, old + data, write(chunk, len(old), data))
        elif kind == "overwrite":
            offset = dice.randrange(0, 100_000)
            grown = old.ljust(offset, b"\0")
            self._apply(engine, dice, chunk, grown[:offset] + data + grown[offset + len(data) :], write(chunk, offset, data))
        elif kind == "truncate":
            length = dice.randrange(0, 120_000)
            new = old[:length].ljust(length, b"\0") if length or self.promises.now(chunk) is not None else None
            self._apply(engine, dice, chunk, new, truncate(chunk, length))
        elif kind == "remove":
            self._apply(engine, dice, chunk, None, remove(chunk))
        else:
            engine.prepare(write(chunk, len(old), data[:5000]))
            engine.drop_pending([chunk])

    def _change_block(self, engine: ChunkEngine, dice: random.Random, block: bytes, step: int) -> None:
        slab = SLABS[block[-1] % 2]
        data = noise(dice.randrange(1 << 30), dice.randrange(1, slab))
        if self.promises.now(block) is None:
            self._apply(engine, dice, block, data, write(block, 0, data, slab_bytes=slab))
        elif dice.random() < 0.3:
            meta = engine.get(block)
            assert meta is not None
            with self.promises.change(block, data):
                engine.replace(replace(replacement(block, data, meta.version + 1), slab_bytes=slab))
        else:
            self._apply(engine, dice, block, None, remove(block))

    def _apply(self, engine: ChunkEngine, dice: random.Random, chunk: bytes, state: bytes | None, update: object) -> None:
        with self.promises.change(chunk, state) as number:
            tag = Tag(CLIENT, self.promises.keys.index(chunk), number)
            if dice.random() < 0.5:
                engine.apply(update, 3, tag)  # type: ignore[arg-type]
            else:
                engine.prepare(update)  # type: ignore[arg-type]
                engine.commit([chunk], 3, [tag])

    # --- what must be true after a crash ---

    def check(self, folder: Path, *, power_lost: bool) -> None:
        disks, engine, retention = self._open(folder)
        report = engine.check(read_data=True)
        assert not report.problems, report.problems
        found = {chunk: content_of(engine, chunk) for chunk in self.promises.keys}
        self.promises.check(found, power_lost=power_lost)
        self._check_tags(engine, found)
        present = {block[8:] for block, data in found.items() if data is not None and block[:8] == SPACE.to_bytes(8, "big")}
        assert ({digest for digest, _ in retention.tables[SPACE].order()} if SPACE in retention.tables else set()) == present
        # It goes on as a target does, and is killed again.
        for chunk in (cid(0), cid(CHUNKS + 2)):
            engine.apply(write(chunk, 0, NEW), 4)
            found[chunk] = NEW + (found.get(chunk) or b"")[len(NEW) :]
        for index in range(BLOCKS + 1, BLOCKS + 5):
            engine.apply(write(block_id(index), 0, NEW[:9000], slab_bytes=SLABS[index % 2]), 4)
        retention.close()
        _kill(engine)
        disks.close()
        disks, engine, retention = self._open(folder)
        assert found == {chunk: content_of(engine, chunk) for chunk in found}
        report = engine.check()
        assert not report.problems, report.problems
        retention.close()
        engine.close()
        disks.close()

    def _check_tags(self, engine: ChunkEngine, found: dict[bytes, bytes | None]) -> None:
        """A tag promises that its update is there: the chunk must not be older than it."""
        for place, chunk in enumerate(self.promises.keys):
            tag = engine.tag(CLIENT, place)
            if tag is not None:
                assert found[chunk] in self.promises.since(chunk, tag.sequence), (chunk.hex(), "the tag is there, its update is not")


def _kill(engine: ChunkEngine) -> None:
    """What the kernel does with a process that ends; LMDB would not let this one open the index again otherwise."""
    ledger = engine._ledger
    ledger.journal.close()
    ledger.index.close()
    ledger.files.close()
    engine.disk.close()
