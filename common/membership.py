"""A process's membership in the cluster: finding the primary manager, registration, heartbeats, and routing kept fresh.

Owns the one `ManagerLink` of a process (storage, meta, client). Invariants:
  - `routing` only ever moves to a higher version;
  - the lease is counted from the moment a heartbeat was SENT and only for half its length (craq.md: a node cut off from the manager is silent before
    anyone takes its place), on the monotonic clock, so that neither a slow answer nor a clock step lengthens it;
  - between two answers of the manager at most one heartbeat is under way, and each carries a higher sequence number;
  - `run` ends with an error only when this node must not go on as it is: StaleIncarnation (a newer run of it is registered), LeaseExpired (the
    manager has declared it dead), NotRegistered. A manager that is merely away suspends the lease (`lease_valid()` is False, `check_lease()` raises);
    it comes back with the manager if that still knows this run as alive.
It must never serve stale routing as fresh after `refresh()`, and never let a caller's cancellation stop another caller's refresh.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import trio

from kvfs.common.boundary.clock import Clock
from kvfs.common.boundary.random import Random
from kvfs.common.errors import (
    Busy,
    DeadlineExceeded,
    KvfsError,
    LeaseExpired,
    NotRegistered,
    StaleIncarnation,
)
from kvfs.common.primary import BACKOFF_FIRST_S, BACKOFF_LAST_S, ELSEWHERE, TRY_S, Managers
from kvfs.common.routing import Routing
from kvfs.common.wire import cluster_pb2 as pb
from kvfs.common.wire.channel import ChannelPool
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.service import Method, method

log = logging.getLogger(__name__)

GET_ROUTING: Final = method("Manager", "GetRouting")
REGISTER: Final = method("Manager", "Register")
HEARTBEAT: Final = method("Manager", "Heartbeat")
CLIENT_HEARTBEAT: Final = method("Manager", "ClientHeartbeat")

LONG_POLL_S: Final = 5.0
POLL_SLACK_S: Final = 2.0
"""How much later than asked a long poll may be answered before its manager is given up."""
DEFAULT_LEASE_S: Final = 2.0
BUSY_PAUSE_S: Final = 0.5


class _Flight:
    """One refresh under way, and those who wait for it."""

    __slots__ = ("done", "succeeded")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.succeeded = False


class ManagerLink:
    """Use: make it over an entered ChannelPool, `await nursery.start(link.run)`, then register (services) or start_client_heartbeats (clients)."""

    def __init__(
        self,
        pool: ChannelPool,
        clock: Clock,
        random: Random,
        managers: Sequence[str],
        identity: Identity,
        *,
        rejoin: bool = False,
        exit_when_lost: bool = False,
    ) -> None:
        """`managers`: one address each. `rejoin`: a node declared dead registers again by itself (meta: it has no targets) instead of ending `run`.
        `exit_when_lost`: end `run` with LeaseExpired as soon as half a lease passes without a renewal."""
        self._managers = Managers(pool, clock, random, managers)
        self._clock = clock
        self._identity = identity
        self._rejoin = rejoin
        self._exit_when_lost = exit_when_lost
        self._routing = Routing(pb.RoutingInfo())
        self._changed = trio.Event()
        self._callbacks: list[Callable[[Routing], None]] = []
        self._flight: _Flight | None = None
        # the node's side
        self._registration: pb.RegisterRequest | None = None
        self._report: Callable[[], Iterable[pb.TargetReport]] | None = None
        self._report_wanted = trio.Event()
        self._heartbeats_wanted = trio.Event()
        self._sequence = 0
        self._lease_s = DEFAULT_LEASE_S
        self._lease_end_s = float("-inf")
        self._targets: list[pb.Target] = []
        self.node_id = 0
        self.incarnation = 0
        # the client's side
        self._client_info: pb.ClientInfo | None = None
        self._client_wanted = trio.Event()
        self._fatal: KvfsError | None = None

    # --- routing ---------------------------------------------------------------------------------------------------------------------

    @property
    def routing(self) -> Routing:
        """The newest known; version 0 and empty before the first answer of a manager."""
        return self._routing

    @property
    def targets(self) -> Sequence[pb.Target]:
        """The targets that this node must have (those it lacks it creates), as of the newest answer that named them."""
        return self._targets

    def on_routing(self, callback: Callable[[Routing], None]) -> Callable[[], None]:
        """Call `callback(routing)` inline after every change; the answer stops that. It must be quick and must not raise."""
        self._callbacks.append(callback)

        def stop() -> None:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

        return stop

    async def wait_routing(self, newer_than: int, *, timeout_s: float | None = None) -> Routing:
        """The first routing known here whose version is above `newer_than`."""
        with trio.move_on_after(float("inf") if timeout_s is None else max(0.0, timeout_s)):
            while self._routing.version <= newer_than:
                await self._changed.wait()
        if self._routing.version <= newer_than:
            raise DeadlineExceeded(
                f"routing is still version {self._routing.version} after {timeout_s} s: do managers run at {', '.join(self._managers.addresses)}?"
            )
        return self._routing

    async def refresh(self, *, timeout_s: float = 5.0) -> Routing:
        """Ask the primary now. Callers that come while one asks share its answer."""
        deadline_s = self._clock.monotonic() + timeout_s
        while (flight := self._flight) is not None:
            with trio.move_on_after(max(0.0, deadline_s - self._clock.monotonic())) as scope:
                await flight.done.wait()
            if scope.cancelled_caught:
                raise DeadlineExceeded(f"no manager answered within {timeout_s:g} s")
            if flight.succeeded:
                return self._routing
        flight = self._flight = _Flight()
        try:
            request = pb.GetRoutingRequest(known_version=self._routing.version)
            reply: pb.GetRoutingReply = await self.call(GET_ROUTING, request, timeout_s=max(0.001, deadline_s - self._clock.monotonic()))
            self._take_routing(reply.routing)
            flight.succeeded = True
        finally:
            self._flight = None
            flight.done.set()
        return self._routing

    def _take_routing(self, info: pb.RoutingInfo) -> None:
        if info.version <= self._routing.version:
            return
        self._routing = Routing(info)
        changed, self._changed = self._changed, trio.Event()
        changed.set()
        if self.node_id:
            self._targets = self._routing.targets_of_node(self.node_id)
        for callback in list(self._callbacks):
            try:
                callback(self._routing)
            except Exception:
                # A fault of the callback's owner must not end heartbeats, or the fetch that someone else waits for.
                log.exception("a routing callback failed at version %d", self._routing.version)

    async def call(self, what: Method, request: Any, *, timeout_s: float, try_s: float = TRY_S) -> Any:
        """Ask the primary manager, looking for it among all known addresses until the time is up."""
        return await self._managers.call(what, request, timeout_s=timeout_s, try_s=try_s)

    # --- registration and heartbeats of a service ------------------------------------------------------------------------------------

    async def register(
        self,
        *,
        role: pb.NodeRole,
        node_uuid: str,
        addresses: Sequence[str],
        disks: Sequence[pb.DiskInfo] = (),
        node_id: int = 0,
        timeout_s: float = 30.0,
    ) -> pb.RegisterReply:
        """Make this process known. When it returns, routing shows every target of the node as offline or lastsrv: earlier runs are out of service."""
        self._registration = pb.RegisterRequest(
            node_uuid=node_uuid,
            role=role,
            addresses=addresses,
            host_id=self._identity.host_id,
            hostname=self._identity.hostname,
            pid=self._identity.pid,
            software=self._identity.software,
            disks=disks,
            node_id=node_id,
        )
        deadline_s = self._clock.monotonic() + timeout_s
        while True:
            try:
                return await self._register(max(0.001, deadline_s - self._clock.monotonic()))
            except Busy as error:
                # The id belongs to a node with another data directory. If that is this node before its disk was replaced, it is dead in a moment.
                if self._clock.monotonic() + BUSY_PAUSE_S > deadline_s:
                    raise
                log.info("registering: %s", error.message)
                await self._clock.sleep(BUSY_PAUSE_S)

    async def _register(self, timeout_s: float) -> pb.RegisterReply:
        assert self._registration is not None
        sent_s = self._clock.monotonic()
        reply: pb.RegisterReply = await self.call(REGISTER, self._registration, timeout_s=timeout_s)
        self.node_id = reply.node_id
        self.incarnation = reply.incarnation
        self._registration.node_id = reply.node_id
        self._sequence = 0
        self._renewed(sent_s, reply.lease_ms)
        self._take_routing(reply.routing)
        # Also when a poll was faster with a routing that is newer than the reply's.
        self._targets = self._routing.targets_of_node(self.node_id)
        return reply

    def start_heartbeats(self, report: Callable[[], Iterable[pb.TargetReport]] = tuple) -> None:
        """From now on `run` sends heartbeats, each with what `report()` says of the node's targets at that moment."""
        if self._registration is None:
            raise NotRegistered("register before sending heartbeats")
        self._report = report
        self._heartbeats_wanted.set()

    def report_now(self) -> None:
        """Something changed that the manager should hear before the next heartbeat is due."""
        self._report_wanted.set()

    @property
    def lease_s(self) -> float:
        return self._lease_s

    def lease_valid(self) -> bool:
        """Whether this node may serve: half a lease has not passed since it sent the last heartbeat that was answered."""
        return self._clock.monotonic() < self._lease_end_s

    def lease_left_s(self) -> float:
        return max(0.0, self._lease_end_s - self._clock.monotonic())

    def check_lease(self) -> None:
        """Raise LeaseExpired unless this node may serve."""
        if not self.lease_valid():
            raise LeaseExpired(
                f"node {self.node_id} has not reached a manager for half a lease ({self._lease_s / 2:g} s): it does not serve until it does"
            )

    def _renewed(self, sent_s: float, lease_ms: int) -> None:
        if lease_ms:
            self._lease_s = lease_ms / 1000
        self._lease_end_s = max(self._lease_end_s, sent_s + self._lease_s / 2)

    async def _heartbeats(self) -> None:
        await self._heartbeats_wanted.wait()
        was_valid = True
        while True:
            self._report_wanted = trio.Event()
            sent_s = self._clock.monotonic()
            pause_s = self._lease_s / 4
            try:
                await self._heartbeat(sent_s)
            except (NotRegistered, LeaseExpired) as error:
                self._lease_end_s = float("-inf")
                if not self._rejoin:
                    raise
                log.warning("node %d: %s; registering again", self.node_id, error.message)
                await self._register_again()
            except StaleIncarnation:
                self._lease_end_s = float("-inf")
                raise
            except KvfsError as error:
                pause_s = self._lease_s / 16
                if was_valid and not self.lease_valid():
                    log.warning("node %d: no manager answers (%s); not serving until one does", self.node_id, error.message)
                if self._exit_when_lost:
                    self.check_lease()
            if self.lease_valid() and not was_valid:
                log.warning("node %d: the manager answers again", self.node_id)
            was_valid = self.lease_valid()
            wait_s = sent_s + pause_s - self._clock.monotonic()
            if wait_s > 0:
                with trio.move_on_after(wait_s):
                    await self._report_wanted.wait()
            else:
                await trio.lowlevel.checkpoint()

    async def _heartbeat(self, sent_s: float) -> None:
        assert self._report is not None
        self._sequence += 1
        request = pb.HeartbeatRequest(
            node_id=self.node_id,
            incarnation=self.incarnation,
            targets=self._report(),
            routing_version=self._routing.version,
            sequence=self._sequence,
        )
        # Shorter than what is left of the lease's half, so that a silent manager leaves time to ask another.
        reply: pb.HeartbeatReply = await self.call(HEARTBEAT, request, timeout_s=self._lease_s / 2, try_s=self._lease_s / 4)
        self._renewed(sent_s, reply.lease_ms)
        self._take_routing(reply.routing)

    async def _register_again(self) -> None:
        while True:
            try:
                await self._register(timeout_s=self._lease_s)
                return
            except ELSEWHERE as error:
                log.info("registering again: %s", error.message)
                await self._clock.sleep(self._lease_s / 4)

    # --- clients ---------------------------------------------------------------------------------------------------------------------

    def start_client_heartbeats(self, *, description: str = "") -> None:
        """Keep this process in the manager's client list (an absent client's open files are closed for it)."""
        self._client_info = pb.ClientInfo(
            client_id=self._identity.client_id,
            role=self._identity.role,
            hostname=self._identity.hostname,
            pid=self._identity.pid,
            description=description,
        )
        self._client_wanted.set()

    async def client_heartbeat(self, *, leaving: bool = False, timeout_s: float = 2.0) -> pb.ClientHeartbeatReply:
        assert self._client_info is not None, "start_client_heartbeats first"
        request = pb.ClientHeartbeatRequest(client=self._client_info, leaving=leaving)
        reply: pb.ClientHeartbeatReply = await self.call(CLIENT_HEARTBEAT, request, timeout_s=timeout_s)
        return reply

    async def leave(self, *, timeout_s: float = 1.0) -> None:
        """Take this client off the list; best effort, since the manager also notices its silence."""
        if self._client_info is None:
            return
        try:
            await self.client_heartbeat(leaving=True, timeout_s=timeout_s)
        except KvfsError as error:
            log.debug("leaving: %s", error.message)

    async def _client_heartbeats(self) -> None:
        await self._client_wanted.wait()
        pause_s = self._lease_s / 4
        while True:
            try:
                reply = await self.client_heartbeat()
                pause_s = reply.lease_ms / 4000 if reply.lease_ms else pause_s
                if reply.routing_version > self._routing.version:
                    await self.refresh()
                await self._clock.sleep(pause_s)
            except ELSEWHERE as error:
                log.debug("client heartbeat: %s", error.message)
                await self._clock.sleep(min(pause_s, 0.5))

    # --- the task --------------------------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled: follow the routing, send the heartbeats asked for. Raises the plain KvfsError for which this node must stop."""
        async with trio.open_nursery() as nursery:
            for task in (self._follow_routing, self._heartbeats, self._client_heartbeats):
                nursery.start_soon(self._guarded, task, nursery.cancel_scope)
            task_status.started()
        if self._fatal is not None:
            raise self._fatal

    async def _guarded(self, task: Callable[[], Any], scope: trio.CancelScope) -> None:
        """A task whose KvfsError ends `run` as itself, not inside an exception group."""
        try:
            await task()
        except KvfsError as error:
            self._fatal = self._fatal or error
            scope.cancel()

    async def _follow_routing(self) -> None:
        backoff_s = BACKOFF_FIRST_S
        while True:
            request = pb.GetRoutingRequest(known_version=self._routing.version, wait_ms=int(LONG_POLL_S * 1000))
            try:
                reply: pb.GetRoutingReply = await self.call(
                    GET_ROUTING, request, timeout_s=LONG_POLL_S + POLL_SLACK_S, try_s=LONG_POLL_S + POLL_SLACK_S
                )
            except ELSEWHERE as error:
                log.debug("routing: %s", error.message)
                await self._clock.sleep(backoff_s)
                backoff_s = min(backoff_s * 2, BACKOFF_LAST_S)
            else:
                backoff_s = BACKOFF_FIRST_S
                self._take_routing(reply.routing)
