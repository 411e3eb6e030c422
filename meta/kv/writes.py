"""The pending writes of one transaction, and how they change what the transaction itself reads.

Invariants: `cleared` is sorted and its ranges neither overlap nor touch; a key in `values` was set or cleared after every clear of a range that holds
it, so at commit the ranges go first and the values after. A key with a pending versionstamped value cannot be read before commit, and a
versionstamped key is not seen by reads at all: neither is known before commit.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from enum import Enum
from typing import Final

from kvfs.common.errors import InvalidArgument, TxnTooBig
from kvfs.meta.kv.limits import MAX_TRANSACTION_BYTES, VERSIONSTAMP_BYTES, check_bound, check_key, check_value


class Untouched(Enum):
    """The answer of `WriteSet.get` for a key this transaction did not write."""

    UNTOUCHED = 0


UNTOUCHED: Final = Untouched.UNTOUCHED


class WriteSet:
    __slots__ = ("_sorted", "cleared", "size_bytes", "stamped_keys", "stamped_values", "values")

    def __init__(self) -> None:
        self.values: dict[bytes, bytes | None] = {}
        self.cleared: list[tuple[bytes, bytes]] = []
        self.stamped_keys: list[tuple[bytes, bytes, bytes]] = []
        """(prefix, suffix, value): the key is prefix + versionstamp + suffix."""
        self.stamped_values: dict[bytes, tuple[bytes, bytes]] = {}
        """key -> (prefix, suffix): the value is prefix + versionstamp + suffix. Such a key is in `values` too (as None), to keep its place."""
        self.size_bytes = 0
        self._sorted: list[bytes] | None = None

    def __bool__(self) -> bool:
        return bool(self.values or self.cleared or self.stamped_keys)

    # --- changes

    def set(self, key: bytes, value: bytes) -> None:
        check_key(key)
        check_value(value)
        self._put(key, value, len(key) + len(value))

    def clear(self, key: bytes) -> None:
        check_key(key)
        self._put(key, None, len(key))

    def set_versionstamped_key(self, prefix: bytes, suffix: bytes, value: bytes) -> None:
        check_key(bytes(VERSIONSTAMP_BYTES) + prefix + suffix)
        check_value(value)
        self._grow(len(prefix) + len(suffix) + VERSIONSTAMP_BYTES + len(value))
        self.stamped_keys.append((prefix, suffix, value))

    def set_versionstamped_value(self, key: bytes, prefix: bytes, suffix: bytes) -> None:
        check_key(key)
        length = len(prefix) + VERSIONSTAMP_BYTES + len(suffix)
        check_value(bytes(length))
        self._put(key, None, len(key) + length)
        self.stamped_values[key] = (prefix, suffix)

    def clear_range(self, begin: bytes, end: bytes) -> None:
        check_bound(begin)
        check_bound(end)
        if begin >= end:
            return
        self._grow(len(begin) + len(end))
        for key in self._keys_between(begin, end):
            self.size_bytes -= self._cost(key)
            del self.values[key]
            self.stamped_values.pop(key, None)
        self._sorted = None
        # Merge with every range that overlaps or touches, so that the list stays sorted and disjoint.
        first = bisect_left(self.cleared, begin, key=lambda pair: pair[1])
        last = bisect_right(self.cleared, end, key=lambda pair: pair[0])
        if first < last:
            begin = min(begin, self.cleared[first][0])
            end = max(end, self.cleared[last - 1][1])
        self.cleared[first:last] = [(begin, end)]

    def _put(self, key: bytes, value: bytes | None, cost: int) -> None:
        if key in self.values:
            self._grow(cost - self._cost(key))
            self.stamped_values.pop(key, None)
        else:
            self._grow(cost)
            self._sorted = None
        self.values[key] = value

    def _cost(self, key: bytes) -> int:
        stamped = self.stamped_values.get(key)
        if stamped is not None:
            return len(key) + len(stamped[0]) + VERSIONSTAMP_BYTES + len(stamped[1])
        return len(key) + len(self.values[key] or b"")

    def _grow(self, by: int) -> None:
        if self.size_bytes + by > MAX_TRANSACTION_BYTES:
            raise TxnTooBig(f"a transaction of more than {MAX_TRANSACTION_BYTES} bytes: split it")
        self.size_bytes += by

    # --- what the transaction's own reads see

    def get(self, key: bytes) -> bytes | Untouched | None:
        if key in self.values:
            if key in self.stamped_values:
                raise InvalidArgument(f"the value of {key!r} holds the versionstamp of this transaction: it cannot be read before commit")
            return self.values[key]
        return None if self.covers(key) else UNTOUCHED

    def covers(self, key: bytes) -> bool:
        """Whether a cleared range holds the key."""
        if not self.cleared:
            return False
        place = bisect_right(self.cleared, key, key=lambda pair: pair[0]) - 1
        return place >= 0 and key < self.cleared[place][1]

    def touches(self, begin: bytes, end: bytes) -> bool:
        """Whether a read of [begin, end) may see any of these writes."""
        if any(low < end and begin < high for low, high in self.cleared):
            return True
        return bool(self._keys_between(begin, end))

    def rows(self, begin: bytes, end: bytes, *, reverse: bool) -> Iterator[tuple[bytes, bytes | None]]:
        """Keys set (value) or cleared one by one (None) in the range, in order."""
        keys = self._keys_between(begin, end)
        for key in reversed(keys) if reverse else keys:
            value = self.get(key)
            assert value is not UNTOUCHED
            yield key, value

    def _keys_between(self, begin: bytes, end: bytes) -> list[bytes]:
        if not self.values:
            return []
        if self._sorted is None:
            self._sorted = sorted(self.values)
        return self._sorted[bisect_left(self._sorted, begin) : bisect_left(self._sorted, end)]
