"""A manager: tries to be the primary, and while it is, keeps its lease and scans.

Owns the election loop over the KV store. Invariants: at most one `Primary` at a time, made only after this manager's claim was committed, from
records read after it; nothing is answered as primary once belief in the lease has run out (lease.py).
It must never write anything but the lease itself.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import trio

from kvfs.common.boundary.clock import Clock
from kvfs.common.boundary.random import Random
from kvfs.common.errors import KvfsError, NotPrimary, SetupError
from kvfs.common.primary import not_primary
from kvfs.common.wire import cluster_pb2 as pb
from kvfs.meta.cluster import registry
from kvfs.meta.cluster.lease import Holding, Lease, Watch, claim, may_take, observe
from kvfs.meta.cluster.primary import Primary, Times
from kvfs.meta.cluster.registry import Change
from kvfs.meta.kv import Engine, Transaction

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Self:
    """This manager as others see it."""

    uuid: str
    cluster_id: str
    """Empty: whatever the store says."""
    host_id: str = ""
    hostname: str = ""
    pid: int = 0
    software: str = ""


class Manager:
    def __init__(self, engine: Engine, clock: Clock, random: Random, me: Self, *, lease_ms: int, client_lease_ms: int, primary_lease_ms: int) -> None:
        self._engine = engine
        self._clock = clock
        self._random = random
        self._me = me
        self._times = Times(lease_ms / 1000, client_lease_ms / 1000)
        self._primary_lease_ms = primary_lease_ms
        self._primary: Primary | None = None
        self._watch: Watch | None = None
        self.cluster_id = ""
        """That of the store, from `open_store` on."""
        self.addresses: tuple[str, ...] = ()
        """Where this manager listens: set before `run`."""

    # --- for the service -------------------------------------------------------------------------------------------------------------

    def primary(self) -> Primary:
        """The reign of this manager, or the refusal that names the primary."""
        reign = self._primary
        if reign is None or reign.ended or not reign.holding.believed(self._clock.monotonic()):
            raise not_primary(self.primary_address())
        return reign

    def is_primary(self) -> bool:
        try:
            self.primary()
        except NotPrimary:
            return False
        return True

    def primary_address(self) -> str:
        """As far as known; '' when it is this one and it does not believe in its lease any more."""
        lease = self._watch.lease if self._watch else None
        if lease is None or lease.manager_uuid == self._me.uuid:
            return ""
        return lease.address

    def status(self) -> pb.ManagerStatusReply:
        if not self.is_primary():
            return pb.ManagerStatusReply(primary=False, primary_address=self.primary_address())
        reign = self.primary()
        node = reign.records.node_of_uuid(self._me.uuid)
        left_s = reign.holding.begun_s + reign.holding.lease.duration_ms / 1000 - self._clock.monotonic()
        return pb.ManagerStatusReply(
            primary=True,
            primary_node=node.node_id if node else 0,
            primary_address=reign.holding.lease.address,
            routing_version=reign.records.version,
            lease_left_ms=int(left_s * 1000),
        )

    def wall_ns(self) -> int:
        """For times that people see."""
        return self._clock.wall_ns()

    # --- the task --------------------------------------------------------------------------------------------------------------------

    async def open_store(self) -> str:
        """Check or initialise the store; the cluster's id. Setup errors mean that this is not our store: nothing was touched."""
        new_id = self._random.bytes(8).hex()
        self.cluster_id = await self._engine.transact(lambda txn: registry.open_store(txn, self._me.cluster_id, new_id))
        return self.cluster_id

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled: be the primary, or wait to become it. Started once it is either."""
        if not self.cluster_id:
            await self.open_store()
        started = False
        while True:
            try:
                reign = await self._try_to_rise()
            except SetupError:
                raise
            except KvfsError as error:
                log.warning("manager election: %s", error.message)
                reign = None
            if not started:
                started = True
                task_status.started()
            if reign is None:
                await self._clock.sleep(self._primary_lease_ms / 1000 / 10 * self._random.uniform(0.8, 1.2))
                continue
            log.info("this manager is the primary, epoch %d", reign.holding.lease.epoch)
            self._primary = reign
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._keep_lease, reign, nursery.cancel_scope)
                    nursery.start_soon(self._scan, reign, nursery.cancel_scope)
            finally:
                reign.end()
                self._primary = None
            log.warning("this manager is no longer the primary")

    async def _try_to_rise(self) -> Primary | None:
        """One look at the lease record, and a claim if it may be made."""

        def look(txn: Transaction) -> tuple[Lease | None, bool]:
            current = registry.read_lease(txn)
            watch = observe(self._watch, current, self._clock.monotonic())
            if not may_take(watch, self._me.uuid, self._clock.monotonic()):
                return current, False
            mine = claim(current, self._me.uuid, self.addresses[0], self._primary_lease_ms)
            registry.write_lease(txn, mine)
            return mine, True

        begun_s = self._clock.monotonic()
        lease, risen = await self._engine.transact(look)
        self._watch = observe(self._watch, lease, begun_s)
        if not risen or lease is None:
            return None
        records = await self._engine.transact(lambda txn: registry.load(txn, self.cluster_id))
        reign = Primary(self._engine, self._clock, self._random, self._times, Holding(lease, begun_s), records)
        await reign.enter(self._own_node(records))
        return reign

    def _own_node(self, records: registry.Records) -> Change:
        """This manager as an alive node of the cluster, the managers before it as dead ones."""
        change = Change()
        for node in records.nodes.values():
            if node.role == pb.ROLE_MANAGER and node.alive and node.node_uuid != self._me.uuid:
                change.nodes[node.node_id] = registry.changed(node, alive=False)
        before = records.node_of_uuid(self._me.uuid)
        node_id = before.node_id if before else max(records.nodes, default=0) + 1
        change.nodes[node_id] = pb.Node(
            node_id=node_id,
            role=pb.ROLE_MANAGER,
            addresses=self.addresses,
            host_id=self._me.host_id,
            hostname=self._me.hostname,
            pid=self._me.pid,
            incarnation=(before.incarnation if before else 0) + 1,
            alive=True,
            software=self._me.software,
            node_uuid=self._me.uuid,
        )
        return change

    async def _keep_lease(self, reign: Primary, scope: trio.CancelScope) -> None:
        while not reign.ended:
            await self._clock.sleep(max(0.0, reign.holding.renew_at_s() - self._clock.monotonic()))
            try:
                await reign.renew()
            except KvfsError as error:
                log.error("the primary's lease was not renewed: %s", error.message)
                break
        scope.cancel()

    async def _scan(self, reign: Primary, scope: trio.CancelScope) -> None:
        while not reign.ended:
            await reign.scan_wanted()
            try:
                await reign.scan()
            except KvfsError as error:
                # A failed commit has ended the reign; nothing else raises here.
                log.error("scan: %s", error.message)
        scope.cancel()
