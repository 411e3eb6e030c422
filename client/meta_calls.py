"""One request to the metadata service, over as many attempts as it takes.

Owns the choice of the metadata service (the one that answered last, else the next alive in the routing) and the retries. A change carries
its request id in
its context, so that an attempt which was carried out unheard is answered, not repeated.
"""

from __future__ import annotations

from typing import Any

from kvfs.client.config import ClientConfig
from kvfs.client.peers import Peers
from kvfs.client.retry import Attempts, worth_retrying
from kvfs.common.errors import KvfsError, TransportError, Unreachable
from kvfs.common.wire.cluster_pb2 import ROLE_META
from kvfs.common.wire.service import SERVICES


class MetaCalls:
    def __init__(self, peers: Peers, config: ClientConfig) -> None:
        self._peers = peers
        self._config = config
        self._methods = SERVICES["Meta"]
        self._turn = 0
        self._version = -1
        self._services: list[tuple[str, ...]] = []

    async def __call__(self, name: str, request: Any, *, deadline_s: float | None = None) -> Any:
        what = self._methods[name]
        peers, config = self._peers, self._config
        limit_s = config.deadline_s if deadline_s is None else deadline_s
        attempts = Attempts(
            peers.clock,
            peers.random,
            deadline=peers.clock.monotonic() + limit_s,
            attempt_s=config.meta_attempt_s if deadline_s is None else deadline_s,
            first_s=config.backoff_first_s,
            max_s=config.backoff_max_s,
        )
        peers.counters.meta_calls += 1
        while True:
            turn = self._turn
            try:
                return await peers.caller.call(self._addresses(), what, request, timeout_s=attempts.timeout_s())
            except KvfsError as error:
                if not worth_retrying(error):
                    raise
                last = error
            elsewhere = isinstance(last, TransportError)
            if elsewhere and turn == self._turn:
                self._turn += 1
            await attempts.wait(last)
            peers.counters.meta_retries += 1
            if elsewhere:
                await peers.refresh(min(max(attempts.left_s(), 0), config.read_attempt_s))

    def _addresses(self) -> tuple[str, ...]:
        routing = self._peers.routing
        if routing.version != self._version:
            nodes = routing.nodes_with_role(ROLE_META, alive=True) or routing.nodes_with_role(ROLE_META)
            self._services = [tuple(node.addresses) for node in nodes]
            self._version = routing.version
        if not self._services:
            raise Unreachable("no metadata service is known to the manager: is `kvfs meta` running?")
        return self._services[self._turn % len(self._services)]
