"""Pure core: who is alive. Leases of nodes and clients in the manager's memory, on the monotonic clock.

Invariants: a member is dead only a full lease after its last sign of life, and never because this process itself stood still: time in which the
manager did not run does not count against anyone, since their heartbeats may lie unread in its sockets. A late heartbeat with a lower sequence
number than one already seen changes nothing. Erring is always towards "alive": a node stops serving by itself after half a lease.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass(slots=True)
class _Entry:
    expires_s: float
    sequence: int


class Leases(Generic[K]):
    """`stall_s`: two looks at the clock further apart than this mean that the manager itself was held up."""

    def __init__(self, lease_s: float, stall_s: float) -> None:
        self.lease_s = lease_s
        self._stall_s = stall_s
        self._entries: dict[K, _Entry] = {}
        self._looked_s: float | None = None

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def grant(self, key: K, now_s: float) -> None:
        """A new member (or a known one after a restart of the manager, or of itself): one full lease, sequence from the start."""
        self._entries[key] = _Entry(now_s + self.lease_s, 0)

    def renew(self, key: K, now_s: float, sequence: int = 0) -> bool:
        """A sign of life. False: it is older than one seen before, or the member is not known; nothing was changed."""
        entry = self._entries.get(key)
        if entry is None or (sequence and sequence <= entry.sequence):
            return False
        entry.sequence = sequence or entry.sequence
        entry.expires_s = max(entry.expires_s, now_s + self.lease_s)
        return True

    def drop(self, key: K) -> None:
        self._entries.pop(key, None)

    def left_s(self, key: K, now_s: float) -> float:
        entry = self._entries.get(key)
        return entry.expires_s - now_s if entry else 0.0

    def expired(self, now_s: float) -> list[K]:
        """Members whose lease has run out, oldest first. Call it regularly: the gaps between calls are how a standstill is noticed."""
        if self._looked_s is not None:
            held_up_s = now_s - self._looked_s - self._stall_s
            if held_up_s > 0:
                for entry in self._entries.values():
                    entry.expires_s += held_up_s
        self._looked_s = now_s
        dead = [(entry.expires_s, key) for key, entry in self._entries.items() if entry.expires_s <= now_s]
        return [key for _, key in sorted(dead, key=lambda pair: pair[0])]
