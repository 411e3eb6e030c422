"""Calls to the cluster manager from commands that need no full client: routing, clients, chain tables."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from kvfs.client.locate import locate
from kvfs.common.boundary.clock import SystemClock
from kvfs.common.boundary.net import SystemNet
from kvfs.common.boundary.random import SystemRandom
from kvfs.common.errors import NotPrimary, TransportError, Unreachable
from kvfs.common.wire.channel import ChannelPool
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.service import method

CALL_TIMEOUT_S = 5.0


class ManagerCalls:
    """Asks each manager in turn until the primary answers."""

    def __init__(self, pool: ChannelPool, managers: Sequence[str]) -> None:
        self._pool, self._managers = pool, list(managers)

    async def call(self, name: str, request: Any, *, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Raises Unreachable with every address when none answers."""
        last: Exception | None = None
        for address in self._managers:
            try:
                return await self._pool.call([address], method("Manager", name), request, timeout_s=timeout_s)
            except (NotPrimary, TransportError) as error:
                last = error
        raise Unreachable(
            f"no manager answers at {', '.join(self._managers)} ({last}): is the cluster up? `kvfs status` shows its processes"
        ) from last


@asynccontextmanager
async def channel_pool(cluster_id: str = "") -> AsyncIterator[ChannelPool]:
    identity = Identity(cluster_id=cluster_id, client_id=SystemRandom().bytes(16), role="admin")
    async with ChannelPool(SystemNet(), SystemClock(), identity) as pool:
        yield pool


@asynccontextmanager
async def manager_calls(managers: Sequence[str], cluster_id: str = "") -> AsyncIterator[ManagerCalls]:
    async with channel_pool(cluster_id) as pool:
        yield ManagerCalls(pool, managers)


def manager_addresses(spec: str) -> tuple[tuple[str, ...], str]:
    """(manager addresses, cluster id or "") of a cluster as --cluster names it."""
    found = locate(spec)
    return tuple(found.managers), found.cluster_id
