"""What the engines of one process share: snapshots, conflict checks, the order of commits, and waiting until they are durable.

State is a base (an ordered map at some older version) and, over it, the recent versions of recently written keys. A commit is checked, gets the
next version and is visible to new snapshots at once, so that concurrent operations on one directory follow each other without conflict; only then
is it made durable. Nobody learns of it too early: a commit answers when it is durable, and so does a transaction that has read what is not durable
yet.

Invariants: durable <= latest; the base is never newer than the oldest live snapshot or than `durable`; commits become durable in version order; if
one cannot be made durable, it and all after it are undone and every snapshot that is open ends (TxnTooOld).
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import trio

from kvfs.common.errors import KvfsError, ServiceStopping, TxnConflict, TxnError, TxnThrottled, TxnTooOld
from kvfs.meta.kv.conflicts import CommitLog, ReadSet
from kvfs.meta.kv.engine import Engine
from kvfs.meta.kv.limits import LIFETIME_S
from kvfs.meta.kv.transaction import Row, Snapshot, Transaction, overlay, versionstamp
from kvfs.meta.kv.versions import VersionedMap
from kvfs.meta.kv.writes import WriteSet

Changes = dict[bytes, bytes | None]
T = TypeVar("T")

MAX_LIVE_SNAPSHOTS = 10_000
"""More open transactions than this are refused (TxnThrottled)."""
MAX_RECENT_BYTES = 256 << 20
"""Recent versions kept in memory at most; more commits are refused (TxnThrottled) until the base has taken some."""


class LocalSnapshot(Snapshot):
    __slots__ = ("_engine", "alive", "newest_seen")

    def __init__(self, engine: LocalEngine, version: int, opened_s: float) -> None:
        self._engine = engine
        self.version = version
        self.opened_s = opened_s
        self.newest_seen = 0
        """The version of the newest recent entry that a read has shown: what must be durable before the reader may answer."""
        self.alive = True

    def get(self, key: bytes) -> bytes | None:
        self._check()
        entry = self._engine.recent.get(key, self.version)
        if entry is None:
            return self._engine.base_get(key)
        if entry[0] > self.newest_seen:
            self.newest_seen = entry[0]
        return entry[1]

    def scan(self, begin: bytes, end: bytes, *, reverse: bool, hint: int) -> Iterator[Row]:
        self._check()
        lower = self._engine.base_scan(begin, end, reverse=reverse, hint=hint)
        if not self._engine.recent.touches(begin, end):
            return lower
        return overlay(self._recent(begin, end, reverse), lower, reverse=reverse)

    def _recent(self, begin: bytes, end: bytes, reverse: bool) -> Iterator[tuple[bytes, bytes | None]]:
        for key, (version, value) in self._engine.recent.rows(begin, end, self.version, reverse=reverse):
            if version > self.newest_seen:
                self.newest_seen = version
            yield key, value

    def _check(self) -> None:
        if not self.alive:
            raise TxnTooOld("the transaction's snapshot has ended: start again")


class Receipt:
    """Whether commits have become durable: `done` is set when that is known, `error` says why they have not."""

    __slots__ = ("done", "error")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: KvfsError | None = None

    async def wait(self) -> None:
        if self.done.is_set():
            # Others may run, as at every commit. No cancellation, for the commit has happened.
            await trio.lowlevel.cancel_shielded_checkpoint()
        else:
            await self.done.wait()
        self.check()

    def check(self) -> None:
        """Once it is done."""
        if self.error is not None:
            raise type(self.error)(self.error.message)


class LocalEngine(Engine):
    def __init__(self, version: int, now: Callable[[], float]) -> None:
        self.recent = VersionedMap()
        self._now = now
        self._latest = version
        self._durable = version
        self._log = CommitLog()
        self._live: OrderedDict[int, LocalSnapshot] = OrderedDict()
        """Open snapshots by id, in the order of opening, which is the order of their versions."""
        self._closed = False

    # --- for the engine at hand

    @abstractmethod
    def base_get(self, key: bytes) -> bytes | None: ...

    @abstractmethod
    def base_scan(self, begin: bytes, end: bytes, *, reverse: bool, hint: int) -> Iterator[Row]: ...

    @abstractmethod
    def _accepted(self, version: int, changes: Changes) -> Receipt:
        """A commit is visible to new snapshots: make it durable and set `_durable`, or `_undo`; then complete the receipt."""

    @abstractmethod
    def _receipt(self, version: int) -> Receipt:
        """The receipt of a commit that is not durable yet."""

    @abstractmethod
    def _advance_base(self, version: int) -> None:
        """The base may take everything up to `version`, then `recent` may forget it."""

    # --- Engine

    def now(self) -> float:
        return self._now()

    @property
    def latest_version(self) -> int:
        return self._latest

    def open_snapshot(self) -> LocalSnapshot:
        self._check_open()
        now_s = self._now()
        self._expire(now_s)
        if len(self._live) >= MAX_LIVE_SNAPSHOTS:
            raise TxnThrottled(f"{MAX_LIVE_SNAPSHOTS} transactions are open")
        snapshot = LocalSnapshot(self, self._latest, now_s)
        self._live[id(snapshot)] = snapshot
        return snapshot

    def close_snapshot(self, snapshot: Snapshot) -> None:
        assert isinstance(snapshot, LocalSnapshot)
        snapshot.alive = False
        self._live.pop(id(snapshot), None)

    def settled(self, snapshot: Snapshot) -> bool:
        assert isinstance(snapshot, LocalSnapshot)
        return snapshot.newest_seen <= self._durable

    async def commit(self, snapshot: Snapshot | None, reads: ReadSet, writes: WriteSet) -> int:
        version, receipt = self._submit(snapshot, reads, writes)
        if receipt is not None:
            await receipt.wait()
        return version

    def transact_at_once(self, body: Callable[[Transaction], T]) -> T | Awaitable[T]:
        txn = Transaction(self)
        try:
            result = body(txn)
            _, receipt = self._submit(*txn.hand_over())
            if receipt is None:
                return result
            if receipt.done.is_set():
                receipt.check()
                return result
        except TxnError as error:
            if not error.retryable:
                raise
            return self.transact(body)
        finally:
            txn.close()
        return self._durable_or_again(receipt, result, body)

    async def _durable_or_again(self, receipt: Receipt, result: T, body: Callable[[Transaction], T]) -> T:
        try:
            await receipt.wait()
        except TxnError as error:
            if not error.retryable:
                raise
            return await self.transact(body)
        return result

    # --- inside

    def _submit(self, snapshot: Snapshot | None, reads: ReadSet, writes: WriteSet) -> tuple[int, Receipt | None]:
        """Check, order and apply one commit. There is no await in here: commits follow each other in one thread. Without writes: the version that
        was read, and what must become durable before its reader may answer, if anything."""
        assert snapshot is None or isinstance(snapshot, LocalSnapshot)
        if not writes:
            if snapshot is None:
                return self._latest, None
            if not snapshot.alive:
                raise TxnTooOld("the transaction's snapshot has ended: start again")
            self.close_snapshot(snapshot)
            return snapshot.version, self._receipt(snapshot.newest_seen) if snapshot.newest_seen > self._durable else None
        self._check_open()
        if snapshot is not None:
            alive = snapshot.alive
            self.close_snapshot(snapshot)
            if not alive:
                raise TxnTooOld("the transaction's snapshot has ended: start again")
            if reads and snapshot.version < self._latest and self._log.conflicts(snapshot.version, reads):
                raise TxnConflict("another transaction changed what this one has read")
        error = self._room_error()
        if error is not None:
            self._trim()  # asks for room: a later try finds it
            raise error
        version = self._latest + 1
        changes = self._flatten(version, writes)
        self._latest = version
        self.recent.apply(version, changes)
        if self._live:
            self._log.append(version, changes.keys())
        receipt = self._accepted(version, changes)
        self._trim()
        return version, receipt

    def _flatten(self, version: int, writes: WriteSet) -> Changes:
        """The writes as plain keys: ranges become removals of the keys that are there, stamps become bytes."""
        changes: Changes = {}
        if writes.cleared:
            now = LocalSnapshot(self, self._latest, 0.0)
            for begin, end in writes.cleared:
                for key, _ in now.scan(begin, end, reverse=False, hint=1000):
                    changes[key] = None
        changes.update(writes.values)
        stamp = versionstamp(version)
        for key, (prefix, suffix) in writes.stamped_values.items():
            changes[key] = prefix + stamp + suffix
        for prefix, suffix, value in writes.stamped_keys:
            changes[prefix + stamp + suffix] = value
        return changes

    def _expire(self, now_s: float) -> None:
        """End snapshots that have lived too long, so that one that was forgotten cannot hold the base back."""
        while self._live:
            oldest = next(iter(self._live.values()))
            if now_s - oldest.opened_s <= LIFETIME_S:
                return
            self.close_snapshot(oldest)

    def _trim(self) -> None:
        """Let go of what no live snapshot can need."""
        self._expire(self._now())
        oldest = next(iter(self._live.values())).version if self._live else self._latest
        self._log.forget(oldest)
        self._advance_base(min(oldest, self._durable))

    def _undo(self) -> None:
        """Nothing newer than `durable` will become durable: forget it, and end all snapshots, which may have seen it."""
        self.recent.roll_back(self._durable)
        self._log.roll_back(self._durable)
        for snapshot in list(self._live.values()):
            self.close_snapshot(snapshot)

    def _room_error(self) -> KvfsError | None:
        """Why no commit can be taken now."""
        if self.recent.size_bytes > MAX_RECENT_BYTES:
            return TxnThrottled("commits come faster than the disk takes them")
        return None

    def _check_open(self) -> None:
        if self._closed:
            raise ServiceStopping("the metadata store is closed")
