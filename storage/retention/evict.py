"""Removing blocks: ordinary REMOVE updates at the head, so that all replicas agree, in bounded batches between which others get their turn.

What people save goes before a cache: a write of a file that finds no room waits here while blocks can go (`make_room`).
"""

from __future__ import annotations

from collections.abc import Sequence

import trio

from kvfs.common.errors import KvfsError
from kvfs.common.ids import block_id
from kvfs.common.wire import storage_pb2 as pb
from kvfs.storage.chain.messages import Incoming
from kvfs.storage.engine.requests import UpdateKind
from kvfs.storage.host import Host
from kvfs.storage.retention.policy import Victim
from kvfs.storage.target import Target
from kvfs.storage.updates import Item, Round

BATCH = 128
ROUND_S = 5.0


def may_evict(host: Host, target: Target) -> bool:
    """Only the head of a chain does."""
    replica = target.replica
    return target.opened and replica.serving and replica.predecessor == 0 and host.link.lease_valid()


async def remove(host: Host, target: Target, victims: Sequence[Victim]) -> int:
    """One round of at most BATCH removals; how many blocks are gone. What could not be removed is still in its table."""
    version = target.replica.version
    items = []
    for victim in victims:
        chunk_id = block_id(victim.inode, victim.digest)
        io = pb.WriteIO(chain_id=target.chain_id, chunk_id=chunk_id, kind=pb.REMOVE, chain_version=version, chunk_size=1)
        items.append(Item(target, chunk_id, Incoming(chunk_id, UpdateKind.REMOVE, version), io))
    target.retention.doom(victims)
    try:
        await Round(host, items, host.clock.monotonic() + ROUND_S).run()
    except KvfsError as error:
        host.note_error(target, error)
    finally:
        target.retention.spare(victims)
    return sum(item.result is not None and item.result.status == 0 for item in items)


async def make_room(host: Host, target: Target, until: float) -> bool:
    """For an update of a file that found no room: returns when blocks have gone since. False: none will by then. Whether the room is enough and where
    it is needed, the update finds out by being tried again."""
    for giver in _givers(host, target):
        if await _evicted(host, giver, until):
            if giver is not target:
                try:
                    await host.workers.run(giver.engine.give_back)
                except KvfsError as error:
                    host.note_error(giver, error)
            return True
    return False


def _givers(host: Host, target: Target) -> list[Target]:
    """Whose blocks are to go: the target's own, and when it has none those of others on its disk, unless it may not take their space."""
    if _has_blocks(host, target):
        return [target]
    if host.config.target_capacity_bytes:
        return []
    return [other for other in host.targets.values() if other.disk == target.disk and _has_blocks(host, other)]


def _has_blocks(host: Host, target: Target) -> bool:
    return may_evict(host, target) and any(map(len, target.retention.tables.values()))


async def _evicted(host: Host, target: Target, until: float) -> bool:
    retention = target.retention
    before, asked = retention.evicted, False
    while retention.evicted == before:
        if not retention.evicting:
            if asked:
                return False  # it had its turn, and nothing went: the chain is changing
            asked = True
            retention.press()
        with trio.move_on_after(until - host.clock.monotonic()) as waiting:
            await retention.progress()
        if waiting.cancelled_caught:
            return False
    return True
