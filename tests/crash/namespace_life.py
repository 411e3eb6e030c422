"""Names and files in the metadata store: every acknowledged change is there after a loss of power, and fsck finds nothing."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))
from promises import Promises
from replay import Begin
from store_life import MAP_BYTES, SEGMENT_BYTES, kill
from tests.unit.meta.namespace.tree import Tree

from kvfs.common.boundary.random import SeededRandom
from kvfs.common.boundary.real_disk import RealDisk
from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.kv import lmdb_engine
from kvfs.meta.kv.lmdb_engine import LmdbEngine
from kvfs.meta.kv.worker import InlineWorker

CHECKPOINT_COMMITS = 9
Shape = dict[str, tuple[int, int]]
"""Path -> (type, length) of everything there is."""
NAMES = "abcd"


def open_store(folder: Path) -> LmdbEngine:
    lmdb_engine.CHECKPOINT_COMMITS = CHECKPOINT_COMMITS  # type: ignore[misc]
    disk = RealDisk(folder / "store")
    disk.makedirs("")
    return LmdbEngine(
        disk, now=time.monotonic, segment_bytes=SEGMENT_BYTES, map_bytes=MAP_BYTES, random=SeededRandom(1), worker=lambda name: InlineWorker()
    )


def all_rows(engine: LmdbEngine) -> list[tuple[bytes, bytes]]:
    rows, more = trio.run(engine.transact, lambda txn: txn.get_range(b"", b"\xff"))
    assert not more
    return rows


def shape_of(tree: Tree) -> Shape:
    shape: Shape = {}
    todo = [""]
    while todo:
        above = todo.pop()
        for entry in tree.readdir(above, attributes=True).entries:
            path = f"{above}/{entry.name.decode()}"
            shape[path] = (entry.type, entry.attributes.length if entry.type == pb.FILE else 0)
            if entry.type == pb.DIRECTORY:
                todo.append(path)
    return shape


def step(tree: Tree, promises: Promises, dice: random.Random) -> None:
    shape: Shape = promises.now("shape") or {}
    folders = ["", *(path for path, (kind, _) in shape.items() if kind == pb.DIRECTORY and path.count("/") < 3)]
    files = [path for path, (kind, _) in shape.items() if kind == pb.FILE]
    path = f"{dice.choice(folders)}/{dice.choice(NAMES)}"
    old = dice.choice(files) if files else None
    new = dict(shape)
    if path not in shape and dice.random() < 0.3:
        new[path] = (pb.DIRECTORY, 0)
        with promises.change("shape", new or None):
            tree.mkdir(path)
    elif path not in shape:
        new[path] = (pb.FILE, 0)
        with promises.change("shape", new or None):
            tree.create(path)
        length = dice.randrange(1, 1 << 30)
        new = {**new, path: (pb.FILE, length)}
        with promises.change("shape", new or None):
            tree.write(path, length)
    elif old is not None and dice.random() < 0.4 and shape[path][0] == pb.FILE and old != path:
        new[path] = new.pop(old)
        with promises.change("shape", new or None):
            tree.rename(old, path)
    elif shape[path][0] == pb.FILE:
        del new[path]
        with promises.change("shape", new or None):
            tree.unlink(path)
    elif not any(other.startswith(path + "/") for other in shape):
        del new[path]
        with promises.change("shape", new or None):
            tree.rmdir(path)


class NamespaceLife:
    def __init__(self, seed: int, *, steps: int = 15) -> None:
        self.seed = seed
        self.steps = steps
        self.promises = Promises(["shape"], durable=True)

    def __repr__(self) -> str:
        return f"namespace, seed {self.seed}"

    def life(self, folder: Path, number: int, begin: Begin) -> None:
        dice = random.Random(f"{self.seed} {number}")
        engine = open_store(folder)
        tree = Tree(engine, first_inode=1000 * number + 10)
        begin({"shape": shape_of(tree) or None})
        for _ in range(self.steps):
            step(tree, self.promises, dice)
        engine.close()

    def check(self, folder: Path, *, power_lost: bool) -> None:
        engine = open_store(folder)
        tree = Tree(engine, first_inode=50_000)
        assert tree.problems() == []
        found = shape_of(tree)
        self.promises.check({"shape": found or None}, power_lost=power_lost)
        tree.mkdir("/after")
        rows = all_rows(engine)
        kill(engine)
        engine = open_store(folder)
        assert all_rows(engine) == rows
        engine.close()
