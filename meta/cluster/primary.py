"""One reign of the primary manager: the cluster's records, what heartbeats say, and every change to them.

Invariants:
  - changes are made one at a time (`_lock`), each one fenced transaction, and shown to anyone only after its commit;
  - a commit whose outcome is not known ends the reign (`ended`): the next one loads what the store really holds;
  - a node that is about to be declared dead has no lease from before the commit on, so no heartbeat is answered that would let it go on serving;
  - heartbeats write nothing: they change memory, and wake the scan when a target's local state is news.
  - nodes that leave together, and those that come back together after a restart of the whole cluster, are taken out of service in one change, as if
    they had died in one moment: then each chain's tail is its last serving target, and the heads stay spread. One after another, the last one would
    head every chain.
It must never let a target of a node's earlier run stand as serving once a later run is registered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import trio

from kvfs.common.boundary.clock import Clock
from kvfs.common.boundary.random import Random
from kvfs.common.errors import BadRequest, Busy, InvalidArgument, KvfsError, LeaseExpired, NotRegistered, Overloaded, StaleIncarnation, TxnTooBig
from kvfs.common.ids import CLIENT_ID_BYTES
from kvfs.common.primary import not_primary
from kvfs.common.wire import cluster_pb2 as pb
from kvfs.meta.cluster import drains, joining, placing, routing
from kvfs.meta.cluster.lease import Holding, renew
from kvfs.meta.cluster.liveness import Leases
from kvfs.meta.cluster.registry import Change, Records, changed, fence, write_lease, writer
from kvfs.meta.cluster.states import Local, Public, advance, heard
from kvfs.meta.kv import Engine, Transaction

log = logging.getLogger(__name__)

MAX_NODES = 10_000
MAX_CLIENTS = 50_000
GATHER = 0.3
GATHER_S_MAX = 1.0
"""The first registrations of a reign wait for each other for a part of a lease (a node gives up its own after half of one), at most that long."""
LEAVING_S = 0.1
"""For so long a target that says it is offline may still stand in its chain, should others say so too."""
REPORT_GRACE_S = 10.0
"""A living node that says nothing of a target for this long (or five leases) does not have it."""


@dataclass(frozen=True, slots=True)
class Times:
    lease_s: float
    client_lease_s: float

    @property
    def scan_s(self) -> float:
        return self.lease_s / 10


class Primary:
    def __init__(self, engine: Engine, clock: Clock, random: Random, times: Times, holding: Holding, records: Records) -> None:
        self._engine = engine
        self._clock = clock
        self._random = random
        self._times = times
        self.holding = holding
        self.records = records
        self.ended = False
        self._lock = trio.Lock()
        self._changed = trio.Event()
        self._scan_wanted = trio.Event()
        self._news = True
        """Something that target states depend on has changed since they were last looked at."""
        self._hold_until_s = float("-inf")
        """Until then, who leaves is waited for."""
        self._reports: dict[int, pb.TargetReport] = {}
        self._silent_since_s: dict[int, float] = {}
        self._message: pb.RoutingInfo | None = None
        self._client_seen_ns: dict[bytes, int] = {}
        self._arriving: set[int] = set()
        """Nodes of which a later run is being registered."""
        self._unheard = {node.node_id for node in records.nodes.values() if node.alive and records.targets_of_node(node.node_id)}
        """Nodes that serve as far as the records know, and have not said anything in this reign: as many as the first registrations wait for."""
        self._all_heard = trio.Event()
        # Everyone alive in the records has one full lease to find this manager.
        now_s = clock.monotonic()
        self._nodes: Leases[int] = Leases(times.lease_s, stall_s=times.lease_s / 4)
        self._clients: Leases[bytes] = Leases(times.client_lease_s, stall_s=times.client_lease_s / 4)
        for node in records.nodes.values():
            if node.alive and node.role != pb.ROLE_MANAGER:
                self._nodes.grant(node.node_id, now_s)
        for client_id in records.clients:
            self._clients.grant(client_id, now_s)

    def end(self) -> None:
        """No longer the primary: whoever waits is told."""
        self.ended = True
        self._changed.set()
        self._all_heard.set()
        self._scan_wanted.set()

    async def enter(self, change: Change) -> None:
        """The reign's first change: who is the manager now."""
        async with self._lock:
            await self._commit(change)

    async def renew(self) -> None:
        """Prolong the lease. Belief counts from before the transaction: a slow commit must not lengthen it."""
        async with self._lock:
            begun_s = self._clock.monotonic()
            longer = renew(self.holding.lease)

            def body(txn: Transaction) -> None:
                fence(txn, self.holding.lease)
                write_lease(txn, longer)

            try:
                with trio.CancelScope(shield=True):
                    await self._engine.transact(body)
            except KvfsError:
                self.end()
                raise
            self.holding = Holding(longer, begun_s)

    # --- routing ---------------------------------------------------------------------------------------------------------------------

    def routing(self, *, fresh: bool = False) -> pb.RoutingInfo:
        """The message of the current version; `fresh`: with the newest figures for space."""
        if fresh or self._message is None or self._message.version != self.records.version:
            self._message = routing.build(self.records, self._reports)
        return self._message

    async def routing_above(self, known_version: int, wait_s: float) -> pb.RoutingInfo | None:
        """The routing as soon as its version is above the one known; None when the wait is over."""
        with trio.move_on_after(wait_s):
            while self.records.version <= known_version and not self.ended:
                await self._changed.wait()
        if self.ended:
            raise not_primary("")
        return self.routing(fresh=known_version == 0) if self.records.version > known_version else None

    # --- nodes -----------------------------------------------------------------------------------------------------------------------

    async def register(self, request: pb.RegisterRequest) -> pb.RegisterReply:
        known = self.records.node_of_uuid(request.node_uuid)
        if known is None or not self.records.targets_of_node(known.node_id):
            return await self._register(request)
        self._arriving.add(known.node_id)
        try:
            self._heard_of(known.node_id)
            with trio.move_on_after(min(GATHER * self._times.lease_s, GATHER_S_MAX)):
                await self._all_heard.wait()
            self._stop_gathering()
            return await self._register(request)
        finally:
            self._arriving.discard(known.node_id)

    def _heard_of(self, node_id: int) -> None:
        self._unheard.discard(node_id)
        if not self._unheard:
            self._all_heard.set()

    def _stop_gathering(self) -> None:
        self._unheard.clear()
        self._all_heard.set()

    async def _register(self, request: pb.RegisterRequest) -> pb.RegisterReply:
        async with self._lock:
            change, node = joining.plan(self.records, request)
            if len(self.records.nodes) >= MAX_NODES and node.node_id not in self.records.nodes:
                raise Overloaded(f"the cluster has {MAX_NODES} nodes, the most that it can have")
            # The run before is over, whatever it last said; its targets must come back through recovery.
            self._nodes.drop(node.node_id)
            for node_id in self._arriving | {node.node_id}:
                for target in self.records.targets_of_node(node_id):
                    failed = self._failed(target.target_id)
                    self._reports[target.target_id] = pb.TargetReport(target_id=target.target_id, local_state=pb.LOCAL_OFFLINE, failed=failed)
                    self._silent_since_s.pop(target.target_id, None)
            self._plan_chains(change, now_s=self._clock.monotonic())
            await self._commit(change)
            self._nodes.grant(node.node_id, self._clock.monotonic())
            self._news = True
            log.info("node %d (%s, pid %d) registered, incarnation %d", node.node_id, pb.NodeRole.Name(node.role), node.pid, node.incarnation)
        info = self.routing()
        return pb.RegisterReply(
            node_id=node.node_id,
            incarnation=node.incarnation,
            cluster_id=self.records.cluster_id,
            lease_ms=int(self._times.lease_s * 1000),
            targets=routing.targets_of_node(info, node.node_id),
            routing=info,
        )

    def heartbeat(self, request: pb.HeartbeatRequest) -> pb.HeartbeatReply:
        node = self.records.nodes.get(request.node_id)
        if node is None:
            raise NotRegistered(f"node {request.node_id} is not known here: register first")
        if request.incarnation < node.incarnation:
            raise StaleIncarnation(f"node {node.node_id} runs again as incarnation {node.incarnation}: this run ({request.incarnation}) must exit")
        if request.incarnation > node.incarnation:
            raise NotRegistered(f"incarnation {request.incarnation} of node {node.node_id} is not known here: register first")
        if node.node_id in self._arriving:
            raise Busy(f"node {node.node_id} is registering: its targets are being taken out of service")
        if not node.alive or node.node_id not in self._nodes:
            raise LeaseExpired(f"node {node.node_id} was declared dead after {self._times.lease_s:g} s of silence: it must register again")
        reply = pb.HeartbeatReply(lease_ms=int(self._times.lease_s * 1000))
        self._heard_of(node.node_id)
        if self._nodes.renew(node.node_id, self._clock.monotonic(), request.sequence):
            for report in request.targets:
                self._take_report(node, report)
        if request.routing_version < self.records.version:
            info = self.routing()
            reply.routing.CopyFrom(info)
            reply.targets.extend(routing.targets_of_node(info, node.node_id))
        return reply

    def _take_report(self, node: pb.Node, report: pb.TargetReport) -> None:
        target = self.records.targets.get(report.target_id)
        if target is None or target.node_id != node.node_id or report.local_state == pb.LOCAL_INVALID:
            return
        before = self._reports.get(report.target_id)
        self._reports[report.target_id] = report
        self._silent_since_s.pop(report.target_id, None)
        if before is None or before.local_state != report.local_state or before.chain_version != report.chain_version:
            now_s = self._clock.monotonic()
            leaving = report.local_state == pb.LOCAL_OFFLINE and before is not None and before.local_state != pb.LOCAL_OFFLINE
            if leaving and now_s >= self._hold_until_s:
                self._hold_until_s = now_s + LEAVING_S
            self._tell_scan()

    def _tell_scan(self) -> None:
        self._news = True
        self._scan_wanted.set()

    def _local(self, target: pb.Target, public: Public, chain_version: int, now_s: float) -> Local:
        """What the manager holds for the target's local state now."""
        node = self.records.nodes.get(target.node_id)
        if node is None or not node.alive or target.node_id not in self._nodes:
            return Local.OFFLINE
        report = self._reports.get(target.target_id)
        if report is None:
            since_s = self._silent_since_s.setdefault(target.target_id, now_s)
            return Local.OFFLINE if now_s - since_s > max(REPORT_GRACE_S, 5 * self._times.lease_s) else Local.UNKNOWN
        return heard(Local(report.local_state), public, blank=target.blank, told_version=report.chain_version, chain_version=chain_version)

    def _failed(self, target_id: int) -> bool:
        return target_id in self._reports and self._reports[target_id].failed

    def _boot(self, target_id: int) -> str:
        """In which boot of its machine the target was heard last, before any change that is being planned; "": it can not be trusted to have kept
        anything that was not synced."""
        return "" if self._failed(target_id) else self.records.nodes[self.records.targets[target_id].node_id].host_id

    # --- the scan --------------------------------------------------------------------------------------------------------------------

    async def scan(self) -> None:
        """Declare the silent dead, move target states. Called every `scan_s`, and at once when a heartbeat brings news."""
        async with self._lock:
            now_s = self._clock.monotonic()
            change = Change()
            for node_id in self._nodes.expired(now_s):
                self._nodes.drop(node_id)
                change.nodes[node_id] = dead = changed(self.records.nodes[node_id], alive=False)
                for target in self.records.targets_of_node(node_id):
                    self._silent_since_s.pop(target.target_id, None)
                log.warning("node %d (pid %d) has been silent for %g s: declared dead", node_id, dead.pid, self._times.lease_s)
            for client_id in self._clients.expired(now_s):
                self._clients.drop(client_id)
                change.clients[client_id] = None
                log.info("client %s is gone", client_id.hex())
            # Without news only time can change a state: that of a node that is silent, or silent about one of its targets.
            if change.nodes or ((self._news or self._silent_since_s) and now_s >= self._hold_until_s):
                self._news = False
                self._plan_births(change)
                self._plan_chains(change, now_s)
            if self.records.drains and now_s >= self._hold_until_s:
                drains.advance(self.records, self._reports, change)
            if change:
                await self._commit(change)
                # One row of the table a scan: a target that has just become waiting may go on to syncing.
                if change.chains:
                    self._tell_scan()

    async def scan_wanted(self) -> None:
        """Return when the next scan is due: after `scan_s`, or at once when wanted."""
        hold_s = self._hold_until_s - self._clock.monotonic()
        with trio.move_on_after(min(hold_s, self._times.scan_s) if hold_s > 0 else self._times.scan_s):
            await self._scan_wanted.wait()
        self._scan_wanted = trio.Event()

    def _plan_births(self, change: Change) -> None:
        """Remember for ever that a target has been there: from now on its absence means lost data."""
        for target_id, report in self._reports.items():
            target = self.records.targets[target_id]
            if not target.born and report.local_state in (pb.UPTODATE, pb.ONLINE):
                change.targets[target_id] = changed(change.targets.get(target_id, target), born=True)

    def _plan_chains(self, change: Change, now_s: float) -> None:
        for chain in self.records.chains.values():
            locals_ = {
                member.target_id: self._local(self.records.targets[member.target_id], member.state, chain.version, now_s) for member in chain.members
            }
            after = advance(chain, locals_, {target_id: self._boot(target_id) for target_id in locals_})
            if after is chain:
                continue
            change.chains[chain.chain_id] = after
            log.info(
                "chain %d version %d: %s", after.chain_id, after.version, ", ".join(f"{m.target_id} {m.state.name.lower()}" for m in after.members)
            )
            if after.loss != chain.loss:
                log.warning("chain %d goes on from what was synced: all its replicas lost power, or failed", chain.chain_id)
            for member in after.members:
                target = change.targets.get(member.target_id, self.records.targets[member.target_id])
                if member.state is Public.SERVING and target.blank:
                    change.targets[member.target_id] = changed(target, blank=False)

    # --- what operators and nodes ask for ---------------------------------------------------------------------------------------------

    @property
    def reports(self) -> Mapping[int, pb.TargetReport]:
        """The newest of each target."""
        return self._reports

    async def change(self, plan: Callable[[Records], Change]) -> None:
        """Make the change that `plan` decides on from the records as they are now; what it raises changes nothing."""
        async with self._lock:
            change = plan(self.records)
            if change:
                await self._commit(change)
                self._tell_scan()

    # --- chain tables ----------------------------------------------------------------------------------------------------------------

    async def create_targets(self, request: pb.CreateTargetsRequest, wait_s: float) -> pb.CreateTargetsReply:
        """Make the table as soon as the expected nodes are there; the same again is answered with what there is."""
        with trio.move_on_after(wait_s):
            while (
                not self.ended and len(placing.storage_nodes(self.records)) < request.expected_nodes and request.table_id not in self.records.tables
            ):
                await self._changed.wait()
        if self.ended:
            raise not_primary("")
        async with self._lock:
            if (reply := placing.existing(self.records, request)) is not None:
                return reply
            change, reply = placing.plan(self.records, request, self._random)
            await self._commit(change)
            self._news = True
            log.info("chain table %d: %d chains of %d replicas", request.table_id, len(reply.table.chain_ids), reply.table.replicas)
            return reply

    # --- clients and configuration ---------------------------------------------------------------------------------------------------

    async def client_heartbeat(self, request: pb.ClientHeartbeatRequest) -> pb.ClientHeartbeatReply:
        client_id = request.client.client_id
        if len(client_id) != CLIENT_ID_BYTES:
            raise BadRequest(f"a client id of {len(client_id)} bytes: it has {CLIENT_ID_BYTES}")
        now_s, now_ns = self._clock.monotonic(), self._clock.wall_ns()
        if request.leaving or not self._clients.renew(client_id, now_s):
            async with self._lock:
                await self._change_client(request, now_s, now_ns)
        if not request.leaving:
            self._client_seen_ns[client_id] = now_ns
        return pb.ClientHeartbeatReply(lease_ms=int(self._times.client_lease_s * 1000), routing_version=self.records.version)

    async def _change_client(self, request: pb.ClientHeartbeatRequest, now_s: float, now_ns: int) -> None:
        client_id = request.client.client_id
        known = client_id in self.records.clients
        if request.leaving:
            if known:
                await self._commit(Change(clients={client_id: None}))
            self._clients.drop(client_id)
            self._client_seen_ns.pop(client_id, None)
        elif not known:
            if len(self.records.clients) >= MAX_CLIENTS:
                raise Overloaded(f"the cluster has {MAX_CLIENTS} clients, the most that it can have")
            info = changed(request.client, since_ns=request.client.since_ns or now_ns, seen_ns=0)
            await self._commit(Change(clients={client_id: info}))
            self._clients.grant(client_id, now_s)
        else:
            self._clients.grant(client_id, now_s)

    def list_clients(self) -> pb.ListClientsReply:
        reply = pb.ListClientsReply()
        for client_id in sorted(self.records.clients):
            info = reply.clients.add()
            info.CopyFrom(self.records.clients[client_id])
            info.seen_ns = self._client_seen_ns.get(client_id, info.since_ns)
        return reply

    async def set_config(self, request: pb.ConfigBlob) -> pb.ConfigBlob:
        """Version 0 replaces whatever is there; another version must be the current one."""
        if not request.name or len(request.name) > 100:
            raise BadRequest("a configuration's name has 1 to 100 characters")
        async with self._lock:
            current = self.records.configs.get(request.name)
            version = current.version if current else 0
            if request.version and request.version != version:
                raise InvalidArgument(f"configuration {request.name!r} is at version {version}, not {request.version}: read it again")
            blob = pb.ConfigBlob(name=request.name, version=version + 1, toml=request.toml)
            await self._commit(Change(configs={request.name: blob}))
            return blob

    # --- commit ----------------------------------------------------------------------------------------------------------------------

    async def _commit(self, change: Change) -> None:
        """Durable and shown when it returns. The caller holds the lock. Not to be cancelled: a commit half waited for is one of unknown outcome."""
        if self.ended:
            raise not_primary("")
        try:
            with trio.CancelScope(shield=True):
                await self._engine.transact(writer(self.holding.lease, self.records, change))
        except TxnTooBig as error:
            # Whoever asked wrote more into a field than a record holds. It was refused before anything was written: this reign knows what is there.
            raise BadRequest(f"a record of the cluster would be too large: {error.message}") from None
        except KvfsError as error:
            log.error("a change of the cluster's records was not committed, this reign ends: %s", error.message)
            self.end()
            raise
        self.records.take(change)
        if change.routes:
            changed, self._changed = self._changed, trio.Event()
            changed.set()
