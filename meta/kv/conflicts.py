"""Pure core: whether a transaction conflicts with what was committed since its snapshot.

Optimistic concurrency: a transaction may commit when no key it read (or would have seen in a range it read) was written by a commit newer than its
snapshot. `CommitLog` remembers which keys each recent commit wrote, back to the oldest snapshot that may still commit.
Invariants: versions in the log only grow; nothing newer than a live snapshot is ever forgotten.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Collection

from kvfs.common.errors import TxnTooBig
from kvfs.meta.kv.limits import MAX_TRANSACTION_BYTES


class ReadSet:
    """What a transaction must find unchanged at commit."""

    __slots__ = ("points", "ranges", "size_bytes")

    def __init__(self) -> None:
        self.points: set[bytes] = set()
        self.ranges: list[tuple[bytes, bytes]] = []
        self.size_bytes = 0

    def __bool__(self) -> bool:
        return bool(self.points or self.ranges)

    def add(self, key: bytes) -> None:
        if key not in self.points:
            self._grow(len(key))
            self.points.add(key)

    def add_range(self, begin: bytes, end: bytes) -> None:
        if begin < end:
            self._grow(len(begin) + len(end))
            self.ranges.append((begin, end))

    def _grow(self, by: int) -> None:
        self.size_bytes += by
        if self.size_bytes > MAX_TRANSACTION_BYTES:
            raise TxnTooBig(f"a transaction tracks more than {MAX_TRANSACTION_BYTES} bytes of read keys: read less in one, or use snapshot reads")

    def hit_by(self, written: Collection[bytes]) -> bool:
        """Whether any of the written keys was read."""
        if self.points and not self.points.isdisjoint(written):
            return True
        if not self.ranges:
            return False
        ordered = sorted(written)
        for begin, end in self.ranges:
            place = bisect_left(ordered, begin)
            if place < len(ordered) and ordered[place] < end:
                return True
        return False


class CommitLog:
    def __init__(self) -> None:
        self._commits: deque[tuple[int, Collection[bytes]]] = deque()

    def append(self, version: int, keys: Collection[bytes]) -> None:
        assert not self._commits or self._commits[-1][0] < version, "commit versions go up"
        self._commits.append((version, keys))

    def conflicts(self, read_version: int, reads: ReadSet) -> bool:
        """Whether a commit newer than `read_version` wrote what `reads` holds."""
        for version, keys in reversed(self._commits):
            if version <= read_version:
                return False
            if reads.hit_by(keys):
                return True
        return False

    def forget(self, version: int) -> None:
        """Drop commits up to `version`: no snapshot older than it can commit any more."""
        while self._commits and self._commits[0][0] <= version:
            self._commits.popleft()

    def roll_back(self, version: int) -> None:
        """Drop commits newer than `version`: they did not become durable."""
        while self._commits and self._commits[-1][0] > version:
            self._commits.pop()

    def __len__(self) -> int:
        return len(self._commits)
