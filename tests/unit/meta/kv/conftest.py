"""`store` runs an async test body with each engine in turn, on a clock that jumps: the contract suite is the same for all of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol, TypeVar

import pytest
import trio
import trio.testing

from kvfs.common.boundary.disk import Disk
from kvfs.common.boundary.real_disk import RealDisk
from kvfs.meta.kv import Engine
from kvfs.meta.kv.lmdb_engine import LmdbEngine
from kvfs.meta.kv.memory import MemoryEngine
from kvfs.meta.kv.worker import InlineWorker, ThreadWorker

T = TypeVar("T")
Store = Callable[[Callable[[Engine], Awaitable[T]]], T]


@pytest.fixture(autouse=True)
def _small_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that every test of some length goes through several."""
    monkeypatch.setattr("kvfs.meta.kv.lmdb_engine.CHECKPOINT_COMMITS", 100)


class OpenLmdb(Protocol):
    def __call__(self, path: Path, *, inline: bool = False, segment_bytes: int = 2 << 20, disk: Disk | None = None) -> LmdbEngine: ...


@pytest.fixture(scope="session")
def open_lmdb() -> OpenLmdb:
    def open_it(path: Path, *, inline: bool = False, segment_bytes: int = 2 << 20, disk: Disk | None = None) -> LmdbEngine:
        disk = disk or RealDisk(path)
        disk.makedirs("")
        return LmdbEngine(disk, segment_bytes=segment_bytes, worker=(lambda name: InlineWorker()) if inline else ThreadWorker)

    return open_it


@pytest.fixture(params=["memory", "lmdb", "lmdb-inline"])
def store(request: pytest.FixtureRequest, tmp_path: Path, open_lmdb: OpenLmdb) -> Store[T]:
    def run(body: Callable[[Engine], Awaitable[T]]) -> T:
        async def main() -> T:
            engine: Engine
            if request.param == "memory":
                engine = MemoryEngine()
            else:
                engine = open_lmdb(tmp_path / "kv", inline=request.param == "lmdb-inline")
            try:
                return await body(engine)
            finally:
                engine.close()

        return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))

    return run
