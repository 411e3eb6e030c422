"""Calls to the cluster manager and to storage services from commands that need no full client: routing, clients, chain tables, targets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio

from kvfs.cli.context import Options
from kvfs.cli.process import run_command
from kvfs.client.locate import locate
from kvfs.common.boundary.clock import SystemClock
from kvfs.common.boundary.random import SystemRandom
from kvfs.common.boundary.system_net import SystemNet
from kvfs.common.errors import NotPrimary, TransportError, Unreachable
from kvfs.common.wire import base_pb2, cluster_pb2, storage_pb2
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


def ask(options: Options, name: str, request: Any) -> Any:
    """One question to the manager of the cluster that a command means."""

    async def call() -> Any:
        managers, cluster_id = manager_addresses(options.cluster_spec())
        async with manager_calls(managers, cluster_id) as manager:
            return await manager.call(name, request)

    return run_command(call)


def routing_of(options: Options) -> cluster_pb2.RoutingInfo:
    routing: cluster_pb2.RoutingInfo = ask(options, "GetRouting", cluster_pb2.GetRoutingRequest()).routing
    return routing


async def target_statuses(pool: ChannelPool, routing: cluster_pb2.RoutingInfo, *, timeout_s: float = 2.0) -> dict[int, storage_pb2.TargetStatus]:
    """What the living storage services say of their targets. One that does not answer is left out."""
    found: dict[int, storage_pb2.TargetStatus] = {}

    async def of(node: cluster_pb2.Node) -> None:
        try:
            reply = await pool.call(list(node.addresses), method("Storage", "Status"), base_pb2.Empty(), timeout_s=timeout_s)
        except TransportError:
            return
        found.update((target.target_id, target) for target in reply.targets)

    async with trio.open_nursery() as nursery:
        for node in routing.nodes:
            if node.role == cluster_pb2.ROLE_STORAGE and node.alive:
                nursery.start_soon(of, node)
    return found
