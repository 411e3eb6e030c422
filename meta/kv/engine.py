"""What every metadata engine offers: snapshots, commits, and the loop that retries a transaction.

FoundationDB's semantics: transactions are strictly serializable; reads come from one snapshot, taken at the first read, and see the transaction's own
writes; a commit fails with TxnConflict when anything read has changed since. All engines share `Transaction`; an engine only gives snapshots and
takes commits. Engines live in one trio thread and must never be used from another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from kvfs.common.errors import TxnError
from kvfs.meta.kv.conflicts import ReadSet
from kvfs.meta.kv.transaction import Snapshot, Transaction
from kvfs.meta.kv.writes import WriteSet

T = TypeVar("T")

MAX_TRIES = 10
FIRST_BACKOFF_S = 0.010
LONGEST_BACKOFF_S = 1.0
DEADLINE_S = 5.0


class Engine(ABC):
    """A transactional store. Made by `open_engine`; `close` it when done."""

    async def begin(self) -> Transaction:
        """A new transaction. Its snapshot is taken at its first read. Prefer `transact`, which retries."""
        return Transaction(self)

    async def transact(self, body: Callable[[Transaction], T], *, deadline_s: float = DEADLINE_S) -> T:
        """Run `body` in a transaction and commit it, retrying what may be retried: 10 tries, 10 ms to 1 s between, `deadline_s` in all.

        The body may run several times, also after a try whose outcome is unknown (TxnMaybeCommitted): where doing it twice would be wrong, it must
        read a record that it writes itself (an idempotency record). Nothing the body returns may reach anyone before this returns.
        """
        give_up_s = self.now() + deadline_s
        backoff_s = FIRST_BACKOFF_S
        txn = await self.begin()
        try:
            for attempt in range(1, MAX_TRIES + 1):
                try:
                    result = body(txn)
                    await txn.commit()
                    return result
                except TxnError as error:
                    if not error.retryable or attempt == MAX_TRIES or self.now() + backoff_s > give_up_s:
                        raise
                txn.reset()
                await trio.sleep(backoff_s)
                backoff_s = min(backoff_s * 2, LONGEST_BACKOFF_S)
            raise AssertionError("the last attempt returns or raises")
        finally:
            txn.close()

    def transact_at_once(self, body: Callable[[Transaction], T]) -> T | Awaitable[T]:
        """As `transact`, but the first try runs now, and its result comes without a wait where the commit is durable by then.

        A body's result must not be awaitable itself.
        """
        return self.transact(body)

    @abstractmethod
    def now(self) -> float:
        """Monotonic seconds, for lifetimes."""

    @abstractmethod
    def open_snapshot(self) -> Snapshot: ...

    @abstractmethod
    def close_snapshot(self, snapshot: Snapshot) -> None:
        """The snapshot will not be read or committed any more (no harm if it was closed or has expired)."""

    def settled(self, snapshot: Snapshot) -> bool:
        """Whether all that the snapshot has shown is durable: then a reader may answer without `commit`."""
        return False

    @abstractmethod
    async def commit(self, snapshot: Snapshot | None, reads: ReadSet, writes: WriteSet) -> int:
        """Commit what a transaction read and wrote, at once and durably, or raise a TxnError; the answer is the commit's version.

        Nothing written: waits until everything the snapshot has shown is durable.
        """

    @abstractmethod
    def close(self) -> None:
        """Finish what was accepted and let go of everything. Also safe to call twice."""
