"""The manager process: its data directory, its store, its listeners, and the Manager within.

Invariants: the directory is locked and found to be ours before the store is opened; a standby listens too (and refuses with the primary's address);
what is closed is closed in the reverse order of opening, also when cancelled.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import trio

from kvfs.common.boundary.clock import Clock
from kvfs.common.boundary.disk import Disk
from kvfs.common.boundary.net import Net
from kvfs.common.boundary.random import Random
from kvfs.common.boundary.real_disk import RealDisk
from kvfs.common.boundary.world import Boundaries
from kvfs.common.errors import ConfigError, KvfsError
from kvfs.common.node_file import open_node_file
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.server import RpcServer
from kvfs.meta.cluster.config import ManagerConfig
from kvfs.meta.cluster.manager import Manager, Self
from kvfs.meta.cluster.service import ManagerService
from kvfs.meta.kv import Engine, open_engine

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class World(Boundaries):
    """`disk`: None, the real one. `engine`: a store shared with other managers, closed by whoever made it."""

    disk: Disk | None = None
    engine: Engine | None = None


async def serve(config: ManagerConfig, *, world: World = World(), task_status: trio.TaskStatus[dict[str, Any]] = trio.TASK_STATUS_IGNORED) -> None:
    """Until cancelled. Starts with {"addresses", "cluster_id", "node_uuid", "grpc_address"}. Raises a KvfsError that says what to do."""
    if not config.data and world.disk is None:
        raise ConfigError("manager.data is not set: name the directory in which the manager keeps the cluster's records")
    clock, random, net = world.clock, world.random, world.net
    disk = world.disk or RealDisk(config.data)
    disk.makedirs("")
    disk.lock()
    try:
        node = open_node_file(disk, random, where=config.data, role="manager", cluster_id=config.cluster_id)
        engine = world.engine or open_engine(config.kv or f"lmdb:{config.data}/kv")
        try:
            await _serve(config, engine, clock, random, net, node.node_uuid, config.cluster_id or node.cluster_id, task_status)
        finally:
            if world.engine is None:
                engine.close()
    finally:
        disk.close()


async def _serve(
    config: ManagerConfig,
    engine: Engine,
    clock: Clock,
    random: Random,
    net: Net,
    node_uuid: str,
    cluster_id: str,
    task_status: trio.TaskStatus[dict[str, Any]],
) -> None:
    failure: KvfsError | None = None
    identity = Identity.of(net, cluster_id=cluster_id, client_id=random.bytes(16), role="manager")
    me = Self(node_uuid, cluster_id, identity.host_id, identity.hostname, identity.pid, identity.software)
    manager = Manager(
        engine, clock, random, me, lease_ms=config.lease_ms, client_lease_ms=config.client_lease_ms, primary_lease_ms=config.primary_lease_ms
    )
    # The store's cluster id must be known before anyone shakes hands, and the real ports before the lease names an address.
    identity = replace(identity, cluster_id=await manager.open_store())
    server = RpcServer(net, clock, identity)
    server.add("Manager", ManagerService(manager))
    async with trio.open_nursery() as nursery:
        try:
            manager.addresses = tuple(await nursery.start(server.serve, config.listen))
            await nursery.start(manager.run)
            grpc_address = ""
            if config.grpc_listen:
                from kvfs.common.wire.grpc_adapter import serve_grpc

                grpc_address = await nursery.start(serve_grpc, server, config.grpc_listen)
            log.info("manager %s of cluster %s serves at %s", node_uuid, manager.cluster_id, ", ".join(manager.addresses))
            task_status.started(
                {"addresses": list(manager.addresses), "cluster_id": manager.cluster_id, "node_uuid": node_uuid, "grpc_address": grpc_address}
            )
        except KvfsError as error:
            # Out of the nursery as itself, not inside an exception group.
            failure = error
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
