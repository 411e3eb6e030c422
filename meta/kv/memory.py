"""The engine that keeps everything in memory: for tests and simulation. Same semantics as the others, deterministic, gone when the process ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import trio
from sortedcontainers import SortedDict

from kvfs.meta.kv.local import Changes, LocalEngine, Receipt
from kvfs.meta.kv.transaction import Row


class MemoryEngine(LocalEngine):
    def __init__(self, *, now: Callable[[], float] = trio.current_time) -> None:
        super().__init__(0, now)
        self._done = Receipt()
        self._done.done.set()
        self._base: SortedDict[bytes, bytes] = SortedDict()

    def base_get(self, key: bytes) -> bytes | None:
        found: bytes | None = self._base.get(key)
        return found

    def base_scan(self, begin: bytes, end: bytes, *, reverse: bool, hint: int) -> Iterator[Row]:
        for key in self._base.irange(begin, end, inclusive=(True, False), reverse=reverse):
            yield key, self._base[key]

    def close(self) -> None:
        self._closed = True

    def _accepted(self, version: int, changes: Changes) -> Receipt:
        self._durable = version
        return self._receipt(version)

    def _receipt(self, version: int) -> Receipt:
        return self._done

    def _advance_base(self, version: int) -> None:
        for key, value in self.recent.changes_until(version).items():
            if value is None:
                self._base.pop(key, None)
            else:
                self._base[key] = value
        self.recent.forget(version)
