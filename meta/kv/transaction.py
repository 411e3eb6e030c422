"""Transaction: reads from one snapshot with its own writes laid over them, and remembers what it read.

Invariants: the snapshot is taken at the first read (or the first conflict added) and is no older than LIFETIME_S at any read and at commit; every key
and every part of a range that a non-snapshot read has seen is in the read set, unless the transaction's own writes alone gave the answer.
After commit the transaction can only be `reset` or closed. It must never await between taking a snapshot and handing it to the engine's commit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING

from kvfs.common.errors import InvalidArgument, TxnTooOld
from kvfs.meta.kv.conflicts import ReadSet
from kvfs.meta.kv.limits import LIFETIME_S, MAX_RANGE_ROWS, VERSIONSTAMP_BYTES, check_bound, check_key
from kvfs.meta.kv.writes import UNTOUCHED, Untouched, WriteSet

if TYPE_CHECKING:
    from kvfs.meta.kv.engine import Engine

Row = tuple[bytes, bytes]


class Snapshot(ABC):
    """The store as it was at one version. Reads are plain calls: the engines are local and quick."""

    __slots__ = ("opened_s", "version")

    version: int
    opened_s: float

    @abstractmethod
    def get(self, key: bytes) -> bytes | None: ...

    @abstractmethod
    def scan(self, begin: bytes, end: bytes, *, reverse: bool, hint: int) -> Iterator[tuple[bytes, bytes]]:
        """Rows of [begin, end) in order; use the iterator up, or drop it, before anyone awaits. `hint`: about how many rows the caller will take."""


class Transaction:
    __slots__ = ("_closed", "_engine", "_reads", "_snapshot", "_version", "_writes")

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._snapshot: Snapshot | None = None
        self._reads = ReadSet()
        self._writes = WriteSet()
        self._version: int | None = None
        self._closed = False

    def __enter__(self) -> Transaction:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # --- reads

    def get(self, key: bytes) -> bytes | None:
        """The value of a key, None if there is none; the commit fails if it changes before."""
        own = self._own(key)
        if own is not UNTOUCHED:
            return own
        view = self._view()
        self._reads.add(key)
        return view.get(key)

    def snapshot_get(self, key: bytes) -> bytes | None:
        """Like `get`, but a change of the key by others does not fail the commit."""
        own = self._own(key)
        return own if own is not UNTOUCHED else self._view().get(key)

    def get_range(
        self,
        begin: bytes,
        end: bytes,
        *,
        limit: int = MAX_RANGE_ROWS,
        reverse: bool = False,
        begin_inclusive: bool = True,
        end_inclusive: bool = False,
    ) -> tuple[list[Row], bool]:
        """Rows from `begin` to `end` in key order (from the end backwards if `reverse`), `limit` at most, and whether there are more.

        The commit fails if the part that was read changes before, also by a key that appears or goes.
        """
        begin, end = _bounds(begin, end, begin_inclusive, end_inclusive)
        rows, has_more = self._range(begin, end, limit, reverse)
        if has_more and rows:
            if reverse:
                begin = rows[-1][0]
            else:
                end = rows[-1][0] + b"\0"
        self._reads.add_range(begin, end)
        return rows, has_more

    def snapshot_get_range(
        self,
        begin: bytes,
        end: bytes,
        *,
        limit: int = MAX_RANGE_ROWS,
        reverse: bool = False,
        begin_inclusive: bool = True,
        end_inclusive: bool = False,
    ) -> tuple[list[Row], bool]:
        """Like `get_range`, but changes by others do not fail the commit."""
        begin, end = _bounds(begin, end, begin_inclusive, end_inclusive)
        return self._range(begin, end, limit, reverse)

    def add_read_conflict(self, key: bytes) -> None:
        """The commit fails if this key changes before, as if it had been read."""
        check_key(key)
        self._view()
        self._reads.add(key)

    def add_read_conflict_range(self, begin: bytes, end: bytes) -> None:
        """The commit fails if anything in [begin, end) changes before, as if it had been read."""
        check_bound(begin)
        check_bound(end)
        self._view()
        self._reads.add_range(begin, end)

    # --- writes: nothing leaves the transaction before commit

    def set(self, key: bytes, value: bytes) -> None:
        self._open()._writes.set(key, value)

    def clear(self, key: bytes) -> None:
        self._open()._writes.clear(key)

    def clear_range(self, begin: bytes, end: bytes) -> None:
        """Remove every key in [begin, end). Costs time for each key that is there: remove large ranges in parts."""
        self._open()._writes.clear_range(begin, end)

    def set_versionstamped_key(self, prefix: bytes, value: bytes, suffix: bytes = b"") -> None:
        """Set the key prefix + versionstamp + suffix. It is unique and later commits have greater ones; reads of this transaction do not see it."""
        self._open()._writes.set_versionstamped_key(prefix, suffix, value)

    def set_versionstamped_value(self, key: bytes, prefix: bytes = b"", suffix: bytes = b"") -> None:
        """Set the key to prefix + versionstamp + suffix. This transaction cannot read it before commit."""
        self._open()._writes.set_versionstamped_value(key, prefix, suffix)

    # --- end

    async def commit(self) -> None:
        """Durable when it returns. TxnConflict, TxnTooOld: nothing was written. TxnMaybeCommitted: unknown.

        One that wrote nothing cannot conflict, but its commit waits until all that it has read is durable: commit it too before you answer anyone.
        """
        self._version = await self._engine.commit(*self.hand_over())

    def hand_over(self) -> tuple[Snapshot | None, ReadSet, WriteSet]:
        """For engines: what is to be committed. The transaction ends with it."""
        self._open()
        if self._snapshot is not None and self._writes and self._reads:
            self._check_age(self._snapshot)
        self._closed = True
        snapshot, self._snapshot = self._snapshot, None
        return snapshot, self._reads, self._writes

    @property
    def settled(self) -> bool:
        """Nothing is written, and all that was read is durable: its reader may answer at once, as after `commit`."""
        return not self._writes and (self._snapshot is None or self._engine.settled(self._snapshot))

    @property
    def versionstamp(self) -> bytes:
        """The 10 bytes that stand for this commit: unique, and greater than those of all commits before. Only after commit."""
        if self._version is None:
            raise InvalidArgument("a transaction has its versionstamp after commit")
        return versionstamp(self._version)

    def reset(self) -> None:
        """Forget everything: as new, with a new snapshot at the next read."""
        self.close()
        self._reads = ReadSet()
        self._writes = WriteSet()
        self._version = None
        self._closed = False

    def close(self) -> None:
        """Give up, or done: lets go of the snapshot. Safe at any time."""
        self._closed = True
        if self._snapshot is not None:
            self._engine.close_snapshot(self._snapshot)
            self._snapshot = None

    # --- inside

    def _open(self) -> Transaction:
        if self._closed:
            raise InvalidArgument("the transaction has ended: reset it first")
        return self

    def _view(self) -> Snapshot:
        snapshot = self._snapshot
        if snapshot is None:
            self._open()
            snapshot = self._snapshot = self._engine.open_snapshot()
        else:
            self._check_age(snapshot)
        return snapshot

    def _check_age(self, snapshot: Snapshot) -> None:
        if self._engine.now() - snapshot.opened_s > LIFETIME_S:
            raise TxnTooOld(f"the transaction is older than {LIFETIME_S:g} s: start again, and do less in one")

    def _own(self, key: bytes) -> bytes | Untouched | None:
        check_key(key)
        return self._writes.get(key) if self._writes else UNTOUCHED

    def _range(self, begin: bytes, end: bytes, limit: int, reverse: bool) -> tuple[list[Row], bool]:
        if not 1 <= limit <= MAX_RANGE_ROWS:
            raise InvalidArgument(f"a range read of {limit} rows: 1 to {MAX_RANGE_ROWS}")
        if begin >= end:
            return [], False
        rows = self._view().scan(begin, end, reverse=reverse, hint=limit + 1)
        if self._writes and self._writes.touches(begin, end):
            kept = (row for row in rows if not self._writes.covers(row[0])) if self._writes.cleared else rows
            rows = overlay(self._writes.rows(begin, end, reverse=reverse), kept, reverse=reverse)
        found = list(islice(rows, limit + 1))
        return found[:limit], len(found) > limit


def versionstamp(version: int) -> bytes:
    """8 bytes of commit version and 2 of order within it, which is 0 here: each commit has a version of its own."""
    return version.to_bytes(8, "big") + bytes(VERSIONSTAMP_BYTES - 8)


def overlay(upper: Iterator[tuple[bytes, bytes | None]], lower: Iterator[Row], *, reverse: bool) -> Iterator[Row]:
    """Merge two ordered sequences of rows: a key of the upper one hides it in the lower one, and is left out if its value is None."""
    above = next(upper, None)
    for row in lower:
        while above is not None and (above[0] > row[0] if reverse else above[0] < row[0]):
            if above[1] is not None:
                yield above[0], above[1]
            above = next(upper, None)
        if above is not None and above[0] == row[0]:
            if above[1] is not None:
                yield above[0], above[1]
            above = next(upper, None)
        else:
            yield row
    while above is not None:
        if above[1] is not None:
            yield above[0], above[1]
        above = next(upper, None)


def _bounds(begin: bytes, end: bytes, begin_inclusive: bool, end_inclusive: bool) -> tuple[bytes, bytes]:
    """The half-open range that the four arguments name: the key just behind k is k + one zero byte."""
    if not begin_inclusive:
        begin += b"\0"
    if end_inclusive:
        end += b"\0"
    check_bound(begin)
    check_bound(end)
    return begin, end
