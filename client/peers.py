"""The other side: where requests go, over which routing, and who is not to be asked first just now.

Owns the newest routing known, the table of suspects (storage nodes that just lost a connection) and the counters. It makes single attempts;
whether and where to try again is the business of its callers. Invariant: an attempt ends as soon as the routing says that its target is not the one
to ask any more: a service that hangs costs no more than the time until the cluster has noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import trio

from kvfs.common.boundary.clock import Clock
from kvfs.common.boundary.random import Random
from kvfs.common.errors import KvfsError, TargetNotServing, TransportError
from kvfs.common.routing import Routing
from kvfs.common.transport.region import Span
from kvfs.common.wire.calls import Arrivals
from kvfs.common.wire.lending import BorrowedFiles
from kvfs.common.wire.service import Method

Buffer = Span | memoryview | bytes | bytearray


class RoutingSource(Protocol):
    """What this client needs of common/membership.ManagerLink."""

    @property
    def routing(self) -> Routing: ...

    async def refresh(self, *, timeout_s: float = ...) -> Any: ...

    def on_routing(self, callback: Callable[[Routing], None]) -> Any: ...


class Caller(Protocol):
    """What this client needs of common/wire's ChannelPool."""

    async def call(
        self,
        addresses: Sequence[str],
        method: Method,
        request: Any,
        *,
        timeout_s: float,
        send: Sequence[Buffer] = (),
        receive: Sequence[Buffer] = (),
        arrivals: Arrivals | None = None,
    ) -> Any: ...

    async def borrowed(self, addresses: Sequence[str], *, timeout_s: float) -> BorrowedFiles | None: ...


class Where(NamedTuple):
    """How to reach a target."""

    node_id: int
    addresses: tuple[str, ...]
    here: bool
    """On this machine."""


@dataclass(slots=True)
class Counters:
    """What happened, for tests, status and curiosity."""

    reads: int = 0
    read_bytes: int = 0
    read_requests: int = 0
    read_failovers: int = 0
    checksum_mismatches: int = 0
    holes: int = 0
    writes: int = 0
    written_bytes: int = 0
    write_requests: int = 0
    write_retries: int = 0
    touches_dropped: int = 0
    meta_calls: int = 0
    meta_retries: int = 0
    routing_refreshes: int = 0
    window_hits: int = 0
    window_fetches: int = 0
    heap_blocks: int = 0
    place_requests: int = 0
    places_stale: int = 0
    """Places where other bytes were found: the service was asked for the bytes."""
    direct_bytes: int = 0
    """Read from the places told. Counted by any thread, without a lock."""


class _Asked(NamedTuple):
    targets: Sequence[int]
    heads: bool
    """Asked as the heads of their chains."""

    def stands(self, routing: Routing) -> bool:
        """Whether they are still the ones to ask."""
        try:
            for target in self.targets:
                chain = routing.target(target).chain_id
                if target not in (routing.serving(chain)[:1] if self.heads else routing.holding(chain)):
                    return False
        except KvfsError:
            return False
        return True


@dataclass(slots=True)
class Peers:
    source: RoutingSource
    caller: Caller
    clock: Clock
    random: Random
    host_id: str
    """Of this machine; empty: share memory with nobody."""
    suspect_s: float
    counters: Counters = field(default_factory=Counters)
    _suspects: dict[int, float] = field(default_factory=dict)
    _where: dict[int, Where] = field(default_factory=dict)
    _where_version: int = -1
    _asking: dict[trio.CancelScope, _Asked] = field(default_factory=dict)
    """Attempts under way."""

    @property
    def routing(self) -> Routing:
        return self.source.routing

    def where(self, target_id: int) -> Where:
        """Of a target, under the newest routing. Raises UnknownTarget, ChainError."""
        routing = self.source.routing
        if routing.version != self._where_version:
            self._where = {}
            self._where_version = routing.version
        known = self._where.get(target_id)
        if known is None:
            node = routing.node_of_target(target_id)
            known = self._where[target_id] = Where(node.node_id, tuple(node.addresses), bool(self.host_id) and node.host_id == self.host_id)
        return known

    async def ask(
        self,
        addresses: Sequence[str],
        method: Method,
        request: Any,
        targets: Sequence[int],
        *,
        heads: bool = False,
        timeout_s: float,
        send: Sequence[Buffer] = (),
        receive: Sequence[Buffer] = (),
        arrivals: Arrivals | None = None,
    ) -> Any:
        """One attempt at targets of one node. TargetNotServing when one of them left its chain meanwhile (or, with `heads`, is its head no more):
        as after any attempt without an answer, the service may still use the memory it was given."""
        asked = self.source.routing.version
        with trio.CancelScope() as scope:
            self._asking[scope] = _Asked(targets, heads)
            try:
                return await self.caller.call(addresses, method, request, timeout_s=timeout_s, send=send, receive=receive, arrivals=arrivals)
            finally:
                del self._asking[scope]
        raise TargetNotServing(f"a target left its chain while it was asked (routing version {asked} to {self.source.routing.version})")

    def routing_changed(self, routing: Routing) -> None:
        """To be called with every newer routing."""
        for scope, asked in self._asking.items():
            if not asked.stands(routing):
                scope.cancel()

    def suspect(self, node_id: int, error: KvfsError) -> None:
        """A request to the node failed: ask others first for a while, if it was the connection that failed."""
        if isinstance(error, TransportError):
            self._suspects[node_id] = self.clock.monotonic() + self.suspect_s

    def trust(self, node_id: int) -> None:
        if self._suspects:
            self._suspects.pop(node_id, None)

    def suspected(self, node_id: int) -> bool:
        until = self._suspects.get(node_id)
        if until is None:
            return False
        if self.clock.monotonic() < until:
            return True
        self._suspects.pop(node_id, None)  # threads look too
        return False

    async def refresh(self, limit_s: float) -> None:
        """Ask the manager for newer routing; failing that, carry on with what is known (the next attempt will tell)."""
        self.counters.routing_refreshes += 1
        try:
            await self.source.refresh(timeout_s=max(limit_s, 0.001))
        except KvfsError:
            pass  # the manager is away: data still flows over the routing known, and the caller's next attempt asks again
