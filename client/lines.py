"""New chunks written from the calling thread, over a connection of its own, when the head of their chain is on this machine.

Owns the lines (common/wire/line.py), as many as threads write at once, and a picture of where heads are. Invariants: any thread may call; one attempt
is made, and whatever else must be done (newer routing, another try, waiting for a manager) is the business of the ordinary way, storage_writes.py,
where the caller goes when this one gives None; what is sent here is a CREATE, so an attempt that was made without its answer arriving is found by
the next one and not made twice, and needs no tag; bytes are sent from registered memory only.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import NamedTuple

from kvfs.client.config import ClientConfig
from kvfs.client.peers import Peers
from kvfs.client.storage_writes import WRITE, WriteDone
from kvfs.common.boundary.net import Net
from kvfs.common.errors import KvfsError, from_wire
from kvfs.common.transport.region import Span
from kvfs.common.wire import storage_pb2 as pb
from kvfs.common.wire.frame import Limits
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.line import Line, unix_address

LINES_MAX = 16
"""More threads at once share the client's channels."""
CONNECT_S = 1.0


class Head(NamedTuple):
    """Of a chain, on this machine."""

    chain_version: int
    target_id: int
    node_id: int
    path: str
    server: str


class _Picture:
    """Under one routing. Replaced as a whole: threads that still write into an old one do no harm."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.heads: dict[int, Head | None] = {}


class Lines:
    def __init__(self, net: Net, identity: Identity, peers: Peers, config: ClientConfig, limits: Limits = Limits()) -> None:  # noqa: B008
        self._net = net
        self._identity = identity
        self._peers = peers
        self._config = config
        self._limits = limits
        self._gate = threading.Lock()
        """Of the next three."""
        self._idle: dict[str, deque[Line]] = {}
        self._open = 0
        self._closed = False
        self._picture = _Picture(-1)

    def create(self, chain_id: int, write: pb.WriteIO, space: pb.KvSpace, span: Span, limit_s: float) -> WriteDone | KvfsError | None:
        """Write a new chunk. `write` lacks what routing says. None: not here, not now, or nobody knows what became of it: go the ordinary way."""
        head = self._head(chain_id)
        if head is None or self._peers.suspected(head.node_id):
            return None
        line = self._take(head)
        if line is None:
            return None
        write.chain_id, write.chain_version, write.target_id = chain_id, head.chain_version, head.target_id
        counters = self._peers.counters
        counters.writes += 1
        counters.write_requests += 1
        try:
            request = pb.WriteRequest(writes=[write], spaces=[space])
            reply = line.call(WRITE, request, span, timeout_s=min(limit_s, self._config.write_attempt_s))
        except KvfsError:
            return None
        finally:
            self._give(head, line)
        if len(reply.results) != 1:
            return None
        result = reply.results[0]
        if result.status:
            return from_wire(result.status, result.message)
        counters.written_bytes += span.length
        return WriteDone(result.version, result.chunk_length)

    def close(self) -> None:
        """Lines in use are closed by who uses them."""
        with self._gate:
            self._closed = True
            idle, self._idle = self._idle, {}
        for lines in idle.values():
            for line in lines:
                line.close()

    # --- where to ---

    def _head(self, chain_id: int) -> Head | None:
        routing = self._peers.routing
        picture = self._picture
        if picture.version != routing.version:
            picture = self._picture = _Picture(routing.version)
        if chain_id not in picture.heads:
            picture.heads[chain_id] = self._look(chain_id)
        return picture.heads[chain_id]

    def _look(self, chain_id: int) -> Head | None:
        routing = self._peers.routing
        try:
            target = routing.head(chain_id)
            node = routing.node_of_target(target)
            found = unix_address(node.addresses, self._identity) if self._peers.host_id else None
            return Head(routing.chain(chain_id).version, target, node.node_id, *found) if found is not None else None
        except KvfsError:
            return None

    # --- lines ---

    def _take(self, head: Head) -> Line | None:
        old: Line | None = None
        with self._gate:
            if self._closed:
                return None
            lines = self._idle.get(head.server)
            if lines:
                line = lines.pop()
                if self._peers.clock.monotonic() - line.used_s < self._limits.idle_s * 2 / 3:
                    return line
                old = line
            elif self._open < LINES_MAX:
                self._open += 1
            else:  # perhaps one to a service that is no more
                lines = next((each for each in self._idle.values() if each), None)
                if lines is None:
                    return None
                old = lines.popleft()
        if old is not None:
            old.close()
        try:
            return Line.open(self._net, self._identity, head.path, head.server, timeout_s=CONNECT_S, limits=self._limits)
        except KvfsError:
            with self._gate:
                self._open -= 1
            return None

    def _give(self, head: Head, line: Line) -> None:
        line.used_s = self._peers.clock.monotonic()
        with self._gate:
            if not self._closed and not line.broken:
                self._idle.setdefault(head.server, deque()).append(line)
                return
            self._open -= 1
        line.close()
