"""Changes that are never applied twice: the reply of a change is stored with it, under the caller's request id.

A retry that finds the record gets the same reply, also after the service died between commit and answer, and from another meta service. Records lie
under the period in which they were made. Periods are numbered in the store itself and turned by whoever has seen the present one last for PERIOD_S
on its monotonic clock: a wall clock that is wrong, or set, neither hides a record nor lets it go early. A record stays for the rest of its period
and the whole next one, so a retry may come PERIOD_S later (clients give up far sooner). Invariant: the record and the change are one transaction.
"""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import Message

from kvfs.common.boundary.clock import Clock
from kvfs.common.errors import FormatTooNew, IndexCorrupt, InvalidArgument
from kvfs.meta.kv.engine import Engine
from kvfs.meta.kv.transaction import Transaction
from kvfs.meta.namespace import keys, records
from kvfs.meta.namespace.step import Step

PERIOD_S = 300
REQUEST_ID_BYTES = 16
SWEEP_ROWS = 2000

R = TypeVar("R", bound=Message)


def recall(step: Step, request_id: bytes, operation: int, reply_class: type[R]) -> R | None:
    """The stored reply, if this request was applied before."""
    if len(request_id) != REQUEST_ID_BYTES:
        raise InvalidArgument(f"a request id has {REQUEST_ID_BYTES} bytes, not {len(request_id)}")
    period = present(step.txn)
    for candidate in (period, period - 1):
        data = step.txn.get(keys.request(candidate, request_id))
        if data is not None:
            if data[0] != 1:
                raise FormatTooNew(f"request record of format {data[0]}: upgrade kvfs")
            if data[1] != operation:
                raise InvalidArgument("the request id was used for another operation")
            return reply_class.FromString(data[2:])
    return None


def remember(step: Step, request_id: bytes, operation: int, reply: Message) -> None:
    key = keys.request(present(step.txn), request_id)
    step.txn.set(key, bytes((1, operation)) + reply.SerializeToString())


def present(txn: Transaction) -> int:
    """The number of the present period. Its turn does not fail a change: what is stored a period back is found as well."""
    stored = txn.snapshot_get(keys.PERIOD)
    if stored is None:
        raise IndexCorrupt(f"the metadata store has lost the record {keys.PERIOD!r}. {IndexCorrupt.ADVICE}")
    return records.decode_number(stored)


def prepare(txn: Transaction, now_ns: int) -> None:
    """The first period. Stores made before it have records under the seconds since 1970 / 300: the first goes on from there."""
    if txn.get(keys.PERIOD) is None:
        txn.set(keys.PERIOD, records.encode_number(max(1, now_ns // (PERIOD_S * 10**9))))


class Periods:
    """Turns the periods and drops the records of those that are over, for as many services as share the store."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock
        self._seen = -1
        self._since_s = 0.0

    async def round(self) -> None:
        """To be called now and then: turns the period if it has lasted for PERIOD_S before our eyes."""
        period = await self._engine.transact(present)
        now_s = self._clock.monotonic()
        if period != self._seen:
            self._seen, self._since_s = period, now_s
        elif now_s - self._since_s >= PERIOD_S:
            await self._engine.transact(lambda txn: _turn(txn, period))
        while await self._engine.transact(_sweep):
            pass


def _turn(txn: Transaction, period: int) -> None:
    """Unless another service did: two turns in a row would let records go early."""
    stored = txn.get(keys.PERIOD)
    if stored is not None and records.decode_number(stored) == period:
        txn.set(keys.PERIOD, records.encode_number(period + 1))


def _sweep(txn: Transaction) -> bool:
    """Drop records of periods before the last, some at a time; whether there are more."""
    rows, more = txn.snapshot_get_range(keys.request(0, b""), keys.request(present(txn) - 1, b""), limit=SWEEP_ROWS)
    for key, _ in rows:
        txn.clear(key)
    return more
