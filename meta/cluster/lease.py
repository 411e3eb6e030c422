"""Pure core: which manager is the primary.

One record in the KV store, {manager, epoch, renewal, duration}, and no times of day in it: wall clocks step (a step back once left a 3FS cluster
without a primary, issue 135). A standby measures with its own monotonic clock how long `renewal` has not moved. Invariants:
  - the epoch grows with every change of primary, also when a manager succeeds its own earlier run;
  - a primary believes in its lease only until two thirds of the duration after the renewal was BEGUN, a standby takes over only a full duration
    after it first SAW the last renewal; so, with clocks that run at about the same rate, no two believe at once;
  - belief saves reads only. What keeps the data right is the fence: each write transaction of a manager reads the record with a conflict and
    refuses when the epoch is no longer its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvfs.common.wire import cluster_pb2 as pb


@dataclass(frozen=True, slots=True)
class Lease:
    """The record."""

    manager_uuid: str
    address: str
    epoch: int
    renewal: int
    duration_ms: int

    def encode(self) -> bytes:
        message = pb.ManagerLease(
            manager_uuid=self.manager_uuid, address=self.address, epoch=self.epoch, renewal=self.renewal, duration_ms=self.duration_ms
        )
        return message.SerializeToString()

    @classmethod
    def decode(cls, data: bytes) -> Lease:
        message = pb.ManagerLease.FromString(data)
        return cls(message.manager_uuid, message.address, message.epoch, message.renewal, message.duration_ms)


def claim(current: Lease | None, manager_uuid: str, address: str, duration_ms: int) -> Lease:
    """The record that makes this manager the primary after `current`."""
    return Lease(manager_uuid, address, (current.epoch if current else 0) + 1, 1, duration_ms)


def renew(current: Lease) -> Lease:
    return replace(current, renewal=current.renewal + 1)


@dataclass(frozen=True, slots=True)
class Watch:
    """What a standby has seen: the record, and since when it looks like that."""

    lease: Lease | None
    since_s: float


def observe(watch: Watch | None, lease: Lease | None, now_s: float) -> Watch:
    """The watch after reading the record: unchanged records keep their age."""
    if watch is not None and watch.lease == lease:
        return watch
    return Watch(lease, now_s)


def may_take(watch: Watch, manager_uuid: str, now_s: float) -> bool:
    """Whether this manager may put its own claim in place of what it watches. Its own earlier run is dead (the data directory is locked): no wait."""
    if watch.lease is None or watch.lease.manager_uuid == manager_uuid:
        return True
    return now_s - watch.since_s >= watch.lease.duration_ms / 1000


@dataclass(frozen=True, slots=True)
class Holding:
    """A primary's own lease: the record it wrote, and when it began to write it."""

    lease: Lease
    begun_s: float

    def believed(self, now_s: float) -> bool:
        return now_s - self.begun_s < self.lease.duration_ms / 1000 * 2 / 3

    def renew_at_s(self) -> float:
        return self.begun_s + self.lease.duration_ms / 1000 / 6


def same_reign(current: Lease | None, mine: Lease) -> bool:
    """The fence: is the record in the store still of this manager's reign?"""
    return current is not None and current.epoch == mine.epoch and current.manager_uuid == mine.manager_uuid
