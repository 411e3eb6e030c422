"""The limits of a transaction, the same for every engine, so that what works on one works on all.

Keys are shorter than FoundationDB's 10 kB because LMDB takes 511 bytes at most; the rest is FoundationDB's.
"""

from __future__ import annotations

from kvfs.common.errors import TxnTooBig

MAX_KEY_BYTES = 500
MAX_VALUE_BYTES = 100_000
MAX_TRANSACTION_BYTES = 10_000_000
"""Keys and values written plus keys and ranges tracked for conflicts."""
LIFETIME_S = 5.0
"""A snapshot older than this can neither read nor commit (TxnTooOld)."""
MAX_RANGE_ROWS = 10_000
"""The most rows one range read returns; `has_more` tells that there are more."""
VERSIONSTAMP_BYTES = 10


def check_key(key: bytes) -> None:
    if len(key) > MAX_KEY_BYTES:
        raise TxnTooBig(f"a key of {len(key)} bytes: the limit is {MAX_KEY_BYTES}")
    if not key:
        raise TxnTooBig("an empty key: keys have 1 byte at least")


def check_value(value: bytes) -> None:
    if len(value) > MAX_VALUE_BYTES:
        raise TxnTooBig(f"a value of {len(value)} bytes: the limit is {MAX_VALUE_BYTES}")


def check_bound(bound: bytes) -> None:
    """A bound of a range is not stored: it may be empty, and one byte longer than a key, to name the place just behind the longest."""
    if len(bound) > MAX_KEY_BYTES + 1:
        raise TxnTooBig(f"a range bound of {len(bound)} bytes: the limit is {MAX_KEY_BYTES + 1}")
