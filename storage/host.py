"""What the parts of one storage process share: its targets, locks, workers, buffers, peers and configuration.

Owns nothing but the bundle and a few steps that every part needs. One trio thread uses it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from kvfs.common.boundary.clock import Clock
from kvfs.common.errors import DeadlineExceeded, IndexCorrupt, InputOutput, KvfsError, TargetOffline, UnknownTarget
from kvfs.common.membership import ManagerLink
from kvfs.common.transport.region import BufferPool
from kvfs.common.wire.channel import ChannelPool
from kvfs.storage.chain.locks import ChunkKey, ChunkLocks, Ticket
from kvfs.storage.config import StorageConfig
from kvfs.storage.target import Target
from kvfs.storage.workers import Workers

log = logging.getLogger("kvfs.storage")

MARGIN_S = 0.05
"""An update ends this much before its caller's deadline, so that the answer still arrives."""


@dataclass(slots=True)
class Host:
    config: StorageConfig
    clock: Clock
    pool: ChannelPool
    link: ManagerLink
    workers: Workers
    buffers: BufferPool
    nursery: trio.Nursery
    """Of work that outlives the request it came with."""
    targets: dict[int, Target] = field(default_factory=dict)
    locks: ChunkLocks = field(default_factory=ChunkLocks)
    on_damage: Callable[[Target], None] = lambda target: None
    """Called when the index of a target is found damaged, and the target out of service for it."""

    def target(self, target_id: int) -> Target:
        target = self.targets.get(target_id)
        if target is None:
            raise UnknownTarget(f"target {target_id} is not on node {self.link.node_id}: refresh the routing")
        return target

    def usable(self, target_id: int) -> Target:
        """A target with an engine."""
        target = self.target(target_id)
        if not target.opened:
            raise TargetOffline(target.replica.problem)
        return target

    async def lock(self, keys: list[ChunkKey], deadline: float) -> Ticket:
        """First come, first served, each chunk for itself. Raises DeadlineExceeded."""
        ticket = self.locks.join(keys)
        if not ticket.ready:
            ready = trio.Event()
            ticket.on_ready = ready.set
            try:
                with trio.move_on_after(max(0.0, deadline - self.clock.monotonic())):
                    await ready.wait()
            except BaseException:
                self.unlock(ticket)
                raise
            if not ticket.ready:
                self.unlock(ticket)
                raise DeadlineExceeded(f"{len(keys)} chunks are being written by others")
        return ticket

    def unlock(self, ticket: Ticket) -> None:
        for ready in self.locks.leave(ticket):
            if ready.on_ready is not None:
                ready.on_ready()

    def addresses(self, target_id: int) -> tuple[str, ...]:
        return self.link.routing.addresses_of_target(target_id)

    async def know_chain(self, target: Target, chain_version: int) -> None:
        """A sender that knows a newer chain than this node does: ask before refusing it."""
        if target.replica.version < chain_version:
            try:
                await self.link.refresh(timeout_s=1.0)
            except KvfsError as error:
                log.debug("refreshing the routing: %s", error.message)

    def note_error(self, target: Target, error: KvfsError) -> None:
        """What the engine raised may mean that its disk is gone."""
        if isinstance(error, InputOutput | TargetOffline | IndexCorrupt):
            target.fail(error)
            self.link.report_now()
            if isinstance(error, IndexCorrupt):
                self.on_damage(target)
