"""The keeper of a storage process's KV-cache blocks: evicts, tells the other replicas of touches, writes the logs.

Owns one task that ticks once a second and one task a target that evicts when it is woken. Invariants: only heads evict, by ordinary removals in
bounded batches; the touches that a head knows reach its followers within a tick, so that the next head has the same order, and after every change of
the chain the whole order does; what followers know of their own readers reaches the head likewise. Touches are advice: what cannot be delivered is
dropped. It must never hold up a request.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator

import trio

from kvfs.common.errors import KvfsError, NoSpace
from kvfs.common.wire import base_pb2 as base
from kvfs.common.wire import storage_pb2 as pb
from kvfs.common.wire.service import method
from kvfs.storage.host import Host
from kvfs.storage.retention import policy
from kvfs.storage.retention.evict import BATCH, may_evict, remove
from kvfs.storage.retention.retention import News
from kvfs.storage.target import Target

log = logging.getLogger("kvfs.storage")

KV_TOUCH = method("Storage", "KvTouch")
STATUS = method("Storage", "Status")

TICK_S = 1.0
CALL_S = 5.0
TOUCHES_A_MESSAGE = 4096
MESSAGES_A_REQUEST = 16
IDLE_STEP_MS = 1000
"""Of a whole order, touches within this time travel as of one time."""
WAITING_BYTES = 16 << 20
WAITING_SHARE = 64
"""After an eviction the target is synced when more than that waits in freed blocks: more, or this part of what is used."""
GROWTH_SHARE = 256
"""Fullness is looked at when this part of the capacity has come in."""

_Addresses = tuple[str, ...]


class Keeper:
    def __init__(self, host: Host) -> None:
        self._host = host
        self._told_version: dict[int, int] = {}
        """Of each target, the version of its chain to whose followers the whole order was told."""
        self._members: dict[int, tuple[int, int]] = {}
        """Of other replicas: (capacity, used) when last asked."""
        self._freed: dict[int, int] = defaultdict(int)
        """What this process's heads have freed on another replica since."""

    async def run(self) -> None:
        """Until cancelled; then what is not in the logs yet is written."""
        try:
            while True:
                await self._host.clock.sleep(TICK_S)
                await self._tick()
        finally:
            with trio.CancelScope(shield=True):
                for target in self._targets():
                    await self._write_log(target, target.retention.take_news())
                    await self._host.workers.run(target.retention.close)

    def _targets(self) -> list[Target]:
        return [target for target in self._host.targets.values() if target.opened]

    async def _tick(self) -> None:
        parcels: dict[_Addresses, list[pb.KvTouch]] = {}
        asked: dict[_Addresses, set[int]] = {}
        for target in self._targets():
            news = target.retention.take_news()
            await self._write_log(target, news)
            for follower in self._followers(target) if any(map(len, target.retention.tables.values())) else ():
                asked.setdefault(self._host.addresses(follower), set()).add(follower)
            await self._gather(target, news, parcels)
        async with trio.open_nursery() as nursery:
            for addresses, touches in parcels.items():
                nursery.start_soon(self._tell, addresses, touches)
            for addresses, members in asked.items():
                nursery.start_soon(self._ask, addresses, members)
        for target in self._targets():
            target.retention.wake.set()

    async def _write_log(self, target: Target, news: News) -> None:
        work = target.retention.write_log(news)
        if work is None:
            return
        try:
            await self._host.workers.run(work)
        except NoSpace as error:
            log.warning("target %d: touches are not in its log: %s", target.target_id, error.message)
        except KvfsError as error:
            self._host.note_error(target, error)

    # --- gossip ------------------------------------------------------------------------------------------------------------------------

    def _followers(self, target: Target) -> list[int]:
        """Of a head, those that serve with it and can be reached."""
        view = target.replica.view
        if view is None or not may_evict(self._host, target):
            return []
        found = []
        for member in view.serving[1:]:
            try:
                self._host.addresses(member)
            except KvfsError:
                continue
            found.append(member)
        return found

    async def _gather(self, target: Target, news: News, parcels: dict[_Addresses, list[pb.KvTouch]]) -> None:
        replica = target.replica
        if replica.view is None or not replica.serving or len(replica.view.serving) < 2:
            return
        if replica.predecessor:
            receivers, messages = [replica.view.serving[0]], list(_messages(news.own))
        else:
            receivers, messages = self._followers(target), list(_messages(news.touched))
            if self._told_version.get(target.target_id) != replica.version:
                self._told_version[target.target_id] = replica.version
                messages = await self._whole_order(target)
        for receiver in receivers if messages else ():
            try:
                parcel = parcels.setdefault(self._host.addresses(receiver), [])
            except KvfsError:
                continue
            for inode, digests, idle_ms in messages:
                parcel.append(pb.KvTouch(target_id=receiver, inode=inode, digests=digests, from_target=target.target_id, idle_ms=idle_ms))

    async def _whole_order(self, target: Target) -> list[tuple[int, bytes, int]]:
        """Messages that put the blocks of a follower into the order that they have here, with about their times."""
        now_ms = target.retention.now_ms()
        messages: list[tuple[int, bytes, int]] = []
        for table in list(target.retention.tables.values()):
            run: list[bytes] = []
            since_ms = 0
            for digest, touched_ms in table.order():
                if run and (len(run) == TOUCHES_A_MESSAGE or touched_ms - since_ms > IDLE_STEP_MS):
                    messages.append((table.inode, b"".join(run), max(0, now_ms - since_ms)))
                    run = []
                    await trio.lowlevel.checkpoint()
                if not run:
                    since_ms = touched_ms
                run.append(digest)
            if run:
                messages.append((table.inode, b"".join(run), max(0, now_ms - since_ms)))
        return messages

    async def _tell(self, addresses: _Addresses, touches: list[pb.KvTouch]) -> None:
        try:
            for first in range(0, len(touches), MESSAGES_A_REQUEST):
                request = pb.KvTouchRequest(touches=touches[first : first + MESSAGES_A_REQUEST])
                await self._host.pool.call(addresses, KV_TOUCH, request, timeout_s=CALL_S)
        except KvfsError as error:
            log.debug("touches to %s: %s", addresses[-1], error.message)

    async def _ask(self, addresses: _Addresses, members: set[int]) -> None:
        """How full the other replicas are."""
        freed = {member: self._freed[member] for member in members}
        try:
            reply = await self._host.pool.call(addresses, STATUS, base.Empty(), timeout_s=CALL_S)
        except KvfsError as error:
            log.debug("status of %s: %s", addresses[-1], error.message)
            return
        for status in reply.targets:
            if status.target_id in members:
                self._members[status.target_id] = status.capacity_bytes, status.used_bytes
                self._freed[status.target_id] -= freed[status.target_id]

    # --- eviction ----------------------------------------------------------------------------------------------------------------------

    async def evict(self, target: Target) -> None:
        """The task of one target, until it is closed."""
        with target.tasks:
            await self._evict(target)

    async def _evict(self, target: Target) -> None:
        retention = target.retention
        while True:
            await retention.wake.wait()
            retention.wake = trio.Event()
            retention.evicting = True
            try:
                if may_evict(self._host, target):
                    await self._burst(target)
            except KvfsError as error:
                self._host.note_error(target, error)
                log.info("target %d: eviction stopped: %s", target.target_id, error.message)
            finally:
                retention.evicting = False
                retention.progressed()

    async def _burst(self, target: Target) -> None:
        """Remove what has to go, a batch at a time, until nothing has to."""
        retention = target.retention
        excess_bytes = self._excess(target)
        followers = self._followers(target)
        removed = 0
        while may_evict(self._host, target):
            victims = policy.choose(retention.tables.values(), retention.now_ms(), excess_bytes, BATCH, self._over_quota(target))
            if not victims:
                break
            gone = await remove(self._host, target, victims)
            removed += gone
            if gone:
                retention.evicted += gone
                retention.progressed()
            if gone < len(victims):
                break  # the chain is changing: the next tick goes on
            freed = sum(victim.space_bytes for victim in victims)
            excess_bytes -= freed
            for follower in followers:
                self._freed[follower] += freed
            await trio.lowlevel.checkpoint()
        if removed and target.engine.waiting_bytes() > max(WAITING_BYTES, target.engine.space().used_bytes // WAITING_SHARE):
            await target.sync(self._host.workers)

    def _over_quota(self, target: Target) -> dict[int, int]:
        """What of each space on this target is over the quota that it has at all heads of this process together. Wakes the others that must give."""
        heads = [each for each in self._targets() if may_evict(self._host, each)]
        over: dict[int, int] = {}
        for inode, table in target.retention.tables.items():
            if not table.policy.quota_bytes:
                continue
            sharing = [head for head in heads if inode in head.retention.tables and head.retention.tables[inode].policy.quota_bytes]
            for head, share in zip(sharing, policy.pooled([head.retention.tables[inode] for head in sharing], BATCH), strict=True):
                if head is target:
                    over[inode] = share
                elif share:
                    head.retention.wake.set()
        return over

    def _excess(self, target: Target) -> int:
        config, retention = self._host.config, target.retention
        space = target.engine.space()
        retention.grown_bytes, retention.grown_limit_bytes = 0, space.capacity_bytes // GROWTH_SHARE
        members = [(space.capacity_bytes, space.used_bytes)]
        for follower in self._followers(target):
            if follower in self._members:
                capacity, used = self._members[follower]
                members.append((capacity, used - self._freed[follower]))
        excess_bytes = policy.excess(members, config.kv_high_watermark, config.kv_low_watermark)
        if retention.pressed:
            # Refused before the high watermark was reached: what is free lies where it is of no use to blocks.
            retention.pressed = False
            excess_bytes = max(excess_bytes, int((config.kv_high_watermark - config.kv_low_watermark) * space.capacity_bytes))
        return excess_bytes


def _messages(touched: dict[int, dict[bytes, int]]) -> Iterator[tuple[int, bytes, int]]:
    """(inode, digests, idle_ms)"""
    for inode, queue in touched.items():
        for digests in _slices(queue):
            yield inode, digests, 0


def _slices(digests: Iterable[bytes]) -> Iterator[bytes]:
    joined = b"".join(digests)
    step = TOUCHES_A_MESSAGE * 16
    for first in range(0, len(joined), step):
        yield joined[first : first + step]
