"""A transactional store as one process sees it: the memory engine that several services share, with the time that a distant store takes, an outcome
that is not always known, and an end when the process dies."""

from __future__ import annotations

import trio

from kvfs.common.boundary.random import Random
from kvfs.common.errors import ServiceStopping, TxnMaybeCommitted
from kvfs.meta.kv.conflicts import ReadSet
from kvfs.meta.kv.engine import Engine
from kvfs.meta.kv.memory import MemoryEngine
from kvfs.meta.kv.transaction import Snapshot
from kvfs.meta.kv.writes import WriteSet


class StoreFaults:
    """Of all processes together."""

    def __init__(self) -> None:
        self.latency_s = 0.002
        self.unknown = 0.0
        """How often a commit's outcome is not told."""


class SharedStore(Engine):
    """Must never commit for a process that is dead."""

    def __init__(self, inner: MemoryEngine, random: Random, faults: StoreFaults) -> None:
        self._inner = inner
        self._random = random
        self._faults = faults
        self.dead = False

    def now(self) -> float:
        return self._inner.now()

    def open_snapshot(self) -> Snapshot:
        self._check()
        return self._inner.open_snapshot()

    def close_snapshot(self, snapshot: Snapshot) -> None:
        self._inner.close_snapshot(snapshot)

    def settled(self, snapshot: Snapshot) -> bool:
        return self._inner.settled(snapshot)

    async def commit(self, snapshot: Snapshot | None, reads: ReadSet, writes: WriteSet) -> int:
        if not writes:
            return await self._inner.commit(snapshot, reads, writes)
        with trio.CancelScope(shield=True):
            await trio.sleep(self._random.uniform(0, self._faults.latency_s))
            self._check()
            version = await self._inner.commit(snapshot, reads, writes)
            await trio.sleep(self._random.uniform(0, self._faults.latency_s))
        if self._faults.unknown and self._random.uniform(0, 1) < self._faults.unknown:
            raise TxnMaybeCommitted("the store did not say what became of the commit")
        return version

    def close(self) -> None:
        """Others use it still."""

    def _check(self) -> None:
        if self.dead:
            raise ServiceStopping("this process is dead")
