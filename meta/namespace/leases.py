"""Attribute leases: who may trust which attributes without asking, and telling them when that ends early.

Pure but for the events that wake waiting tasks; time comes in as an argument. A reply that carries attributes grants its caller a lease, if the
caller watches; before a change by someone else is answered, every other holder has been told and has acknowledged, or its lease has run out.
Invariants: a client without a fresh Watch holds no lease; a holder is remembered at least until its lease ends; the queue of one watcher is
bounded (beyond the bound the client is told to drop everything, by a new epoch).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice

import trio

from kvfs.common.wire import meta_pb2 as pb

HELD_INODES_MAX = 200_000
SWEEP_INODES = 20_000
UNACKNOWLEDGED_MAX = 20_000
WATCH_FRESH_S = 5.0
"""A client whose last Watch ended longer ago than this gets no leases."""
NOTICES_A_REPLY_MAX = 4096


class Watcher:
    """One client's queue of notices."""

    __slots__ = ("acknowledged", "advanced", "epoch", "last_seen_s", "notices", "sequence", "waiting", "woken")

    def __init__(self, epoch: int, now_s: float) -> None:
        self.epoch = epoch
        self.sequence = 0
        self.acknowledged = 0
        self.notices: deque[tuple[int, int]] = deque()
        """(sequence, inode), not yet acknowledged."""
        self.last_seen_s = now_s
        self.waiting = 0
        self.woken = trio.Event()
        """Set when there is a notice to fetch."""
        self.advanced = trio.Event()
        """Set when an acknowledgement came."""

    def fresh(self, now_s: float) -> bool:
        return self.waiting > 0 or now_s - self.last_seen_s < WATCH_FRESH_S

    def tell(self, inode: int) -> int:
        self.sequence += 1
        if len(self.notices) >= UNACKNOWLEDGED_MAX:
            self.notices.clear()
            self.epoch += 1
        self.notices.append((self.sequence, inode))
        self.woken.set()
        return self.sequence

    def acknowledge(self, sequence: int) -> None:
        if sequence <= self.acknowledged:
            return
        self.acknowledged = sequence
        while self.notices and self.notices[0][0] <= sequence:
            self.notices.popleft()
        advanced, self.advanced = self.advanced, trio.Event()
        advanced.set()


Waits = list[tuple[Watcher, int, float]]
"""What to wait for: (watcher, sequence that it must acknowledge, when the lease ends anyway)."""


class LeaseTable:
    def __init__(self, epoch: int, lease_ms: int) -> None:
        self.epoch = epoch
        self.lease_ms = lease_ms
        self.enabled = True
        self._held: dict[int, dict[bytes, tuple[float, int]]] = {}
        """Inode -> client -> (when the lease ends, sequence of the notice that ends it early; 0: none was sent)."""
        self._watchers: dict[bytes, Watcher] = {}

    def watcher(self, client_id: bytes, now_s: float) -> Watcher:
        found = self._watchers.get(client_id)
        if found is None:
            found = self._watchers[client_id] = Watcher(self.epoch, now_s)
        return found

    def watches(self, client_id: bytes, now_s: float) -> bool:
        found = self._watchers.get(client_id)
        return found is not None and found.fresh(now_s)

    def grant(self, inode: pb.Inode, client_id: bytes, now_s: float) -> None:
        """Give the client a lease on these attributes and say so in them, if it may have one."""
        if not self.enabled or self.lease_ms <= 0 or not inode.type or not self.watches(client_id, now_s):
            return
        holders = self._held.get(inode.inode)
        if holders is None:
            if len(self._held) >= HELD_INODES_MAX:
                return
            holders = self._held[inode.inode] = {}
        holders[client_id] = (now_s + self.lease_ms / 1000, 0)
        inode.attr_lease_ms = self.lease_ms

    def revoke(self, inodes: Iterable[int], changer: bytes, now_s: float) -> Waits:
        """Tell every holder but the changer."""
        waits: Waits = []
        for inode in inodes:
            holders = self._held.get(inode)
            if not holders:
                continue
            for client_id in [each for each in holders if each != changer]:
                expiry_s, told = holders[client_id]
                watcher = self._watchers.get(client_id)
                if expiry_s <= now_s or watcher is None or 0 < told <= watcher.acknowledged:
                    del holders[client_id]  # it trusts these attributes no more
                    continue
                if not told:
                    told = watcher.tell(inode)
                    holders[client_id] = (expiry_s, told)
                waits.append((watcher, told, expiry_s))
            if not holders:
                del self._held[inode]
        return waits

    def sweep(self, now_s: float) -> None:
        """Forget leases that have run out and watchers that have gone."""
        for inode in list(islice(self._held, SWEEP_INODES)):  # oldest first; what still holds goes to the end
            holders = self._held.pop(inode)
            for client_id in [each for each, (expiry_s, _) in holders.items() if expiry_s <= now_s]:
                del holders[client_id]
            if holders:
                self._held[inode] = holders
        gone_s = max(WATCH_FRESH_S, self.lease_ms / 1000) * 12
        for client_id, watcher in list(self._watchers.items()):
            if not watcher.waiting and now_s - watcher.last_seen_s > gone_s:
                del self._watchers[client_id]

    def held(self) -> int:
        return len(self._held)


async def settle(waits: Waits, now: Callable[[], float]) -> None:
    """Wait until every holder has acknowledged, or its lease has run out."""
    for watcher, sequence, expiry_s in waits:
        with trio.move_on_after(max(0.0, expiry_s - now())):
            while watcher.acknowledged < sequence:
                await watcher.advanced.wait()


async def watch(table: LeaseTable, request: pb.WatchRequest, client_id: bytes, now: Callable[[], float], wait_s: float) -> pb.WatchReply:
    """One long poll: answered when there is a notice, or empty after `wait_s`."""
    watcher = table.watcher(client_id, now())
    watcher.last_seen_s = now()
    if request.epoch == watcher.epoch:
        watcher.acknowledge(min(request.acknowledged, watcher.sequence))
    elif request.epoch:
        return pb.WatchReply(sequence=watcher.sequence, epoch=watcher.epoch)
    else:  # the client's first: it holds nothing yet
        watcher.acknowledge(watcher.sequence)
        return pb.WatchReply(sequence=watcher.sequence, epoch=watcher.epoch)
    epoch = watcher.epoch
    if not watcher.notices:
        watcher.waiting += 1
        if watcher.woken.is_set():
            watcher.woken = trio.Event()
        try:
            with trio.move_on_after(wait_s):
                await watcher.woken.wait()
        finally:
            watcher.waiting -= 1
            watcher.last_seen_s = now()
    if watcher.epoch != epoch:
        return pb.WatchReply(sequence=watcher.sequence, epoch=watcher.epoch)
    reply = pb.WatchReply(epoch=watcher.epoch, sequence=watcher.acknowledged)
    seen: set[int] = set()
    for sequence, inode in list(watcher.notices)[:NOTICES_A_REPLY_MAX]:
        if inode not in seen:
            seen.add(inode)
            reply.inodes.append(inode)
        reply.sequence = sequence
    return reply
