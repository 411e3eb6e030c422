"""Changes that are never applied twice: the reply of a change is stored with it, under the caller's request id.

A retry that finds the record gets the same reply, also after the service died between commit and answer. Records lie under the period of five
minutes in which they were made; a period that ended more than five minutes ago is swept. A retry may come two minutes later (clients give up far
sooner). Invariant: the record and the change are one transaction.
"""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import Message

from kvfs.common.errors import FormatTooNew, InvalidArgument
from kvfs.meta.kv.transaction import Transaction
from kvfs.meta.namespace import keys
from kvfs.meta.namespace.step import Step

PERIOD_NS = 300 * 10**9
RETRY_NS_MAX = 120 * 10**9
"""How long after the first try a retry may come: the records of the period before are looked at that long."""
REQUEST_ID_BYTES = 16
SWEEP_ROWS = 2000

R = TypeVar("R", bound=Message)


def recall(step: Step, request_id: bytes, operation: int, reply_class: type[R]) -> R | None:
    """The stored reply, if this request was applied before."""
    if len(request_id) != REQUEST_ID_BYTES:
        raise InvalidArgument(f"a request id has {REQUEST_ID_BYTES} bytes, not {len(request_id)}")
    period, into_ns = divmod(step.now_ns, PERIOD_NS)
    for candidate in (period, period - 1) if into_ns < RETRY_NS_MAX else (period,):
        data = step.txn.get(keys.request(candidate, request_id))
        if data is not None:
            if data[0] != 1:
                raise FormatTooNew(f"request record of format {data[0]}: upgrade kvfs")
            if data[1] != operation:
                raise InvalidArgument("the request id was used for another operation")
            return reply_class.FromString(data[2:])
    return None


def remember(step: Step, request_id: bytes, operation: int, reply: Message) -> None:
    key = keys.request(step.now_ns // PERIOD_NS, request_id)
    step.txn.set(key, bytes((1, operation)) + reply.SerializeToString())


def sweep(txn: Transaction, now_ns: int) -> bool:
    """Drop records of periods that are over, some at a time; whether there are more."""
    begin = keys.request(0, b"")
    end = keys.request(max(0, now_ns // PERIOD_NS - 1), b"")
    rows, more = txn.snapshot_get_range(begin, end, limit=SWEEP_ROWS)
    for key, _ in rows:
        txn.clear(key)
    return more
