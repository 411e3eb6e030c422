"""Pure core: the recent versions of recently written keys, laid over a base that holds the older state.

A reader at version v takes the newest entry not newer than v, and looks into the base only where there is none. The base may be at any version
between the newest forgotten one and the oldest that a reader uses: for keys that changed in between, the entries here answer first.
Invariants: the entries of a key are in ascending version order and never empty; a value of None is a removal.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping

from sortedcontainers import SortedDict

Entry = tuple[int, bytes | None]


class VersionedMap:
    def __init__(self) -> None:
        self._entries: SortedDict[bytes, list[Entry]] = SortedDict()
        self._log: deque[tuple[int, tuple[bytes, ...]]] = deque()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def apply(self, version: int, writes: Mapping[bytes, bytes | None]) -> None:
        assert not self._log or self._log[-1][0] < version, "versions go up"
        for key, value in writes.items():
            entries = self._entries.get(key)
            if entries is None:
                self._entries[key] = [(version, value)]
            else:
                entries.append((version, value))
            self.size_bytes += len(key) + len(value or b"")
        self._log.append((version, tuple(writes)))

    def get(self, key: bytes, version: int) -> Entry | None:
        """The newest entry of the key not newer than `version`; None: ask the base."""
        entries = self._entries.get(key)
        if entries is None:
            return None
        newest: Entry = entries[-1]
        if newest[0] <= version:
            return newest
        for entry in reversed(entries):
            if entry[0] <= version:
                return entry  # type: ignore[no-any-return]
        return None

    def rows(self, begin: bytes, end: bytes, version: int, *, reverse: bool) -> Iterator[tuple[bytes, Entry]]:
        for key in self._entries.irange(begin, end, inclusive=(True, False), reverse=reverse):
            entry = self.get(key, version)
            if entry is not None:
                yield key, entry

    def touches(self, begin: bytes, end: bytes) -> bool:
        """Whether any key of the range has an entry."""
        return next(self._entries.irange(begin, end, inclusive=(True, False)), None) is not None

    def changes_until(self, version: int, *, since: int = 0) -> dict[bytes, bytes | None]:
        """The state at `version` of every key written after `since` and up to it: what a base at `since` needs to reach that version."""
        changes: dict[bytes, bytes | None] = {}
        for commit, keys in self._log:
            if commit <= since:
                continue
            if commit > version:
                break
            for key in keys:
                if key not in changes:
                    entry = self.get(key, version)
                    assert entry is not None, "a logged key has an entry"
                    changes[key] = entry[1]
        return changes

    def forget(self, version: int, *, limit: int = 1 << 30) -> None:
        """Drop entries up to `version`, of `limit` commits at most: the base holds them, and nobody reads at an older version."""
        while self._log and self._log[0][0] <= version and limit > 0:
            limit -= 1
            for key in self._log.popleft()[1]:
                self._drop(key, 0)

    def roll_back(self, version: int) -> None:
        """Drop entries newer than `version`: they did not become durable."""
        while self._log and self._log[-1][0] > version:
            for key in self._log.pop()[1]:
                self._drop(key, -1)

    def _drop(self, key: bytes, place: int) -> None:
        entries = self._entries[key]
        _, value = entries.pop(place)
        self.size_bytes -= len(key) + len(value or b"")
        if not entries:
            del self._entries[key]
