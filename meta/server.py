"""The meta process: its data directory, its store, its place in the cluster, and the Meta service within.

Invariants: the directory is locked and found to be ours before the store is opened; requests are served only once the store's format is known and the
manager has this node registered; what is closed is closed in the reverse order of opening, also when cancelled.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import trio

from kvfs.common.boundary.disk import Disk
from kvfs.common.boundary.real_disk import RealDisk
from kvfs.common.boundary.world import Boundaries
from kvfs.common.errors import ConfigError, KvfsError
from kvfs.common.membership import ManagerLink
from kvfs.common.node_file import NodeFile, open_node_file
from kvfs.common.wire import base_pb2, cluster_pb2
from kvfs.common.wire.channel import ChannelPool
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.server import RpcServer
from kvfs.common.wire.service import method
from kvfs.meta.config import MetaConfig
from kvfs.meta.gc import housekeeping
from kvfs.meta.gc.chunks import Chunks, StorageChunks
from kvfs.meta.gc.prune import Pruner
from kvfs.meta.kv import Engine, open_engine
from kvfs.meta.namespace import store
from kvfs.meta.service import MetaService

log = logging.getLogger(__name__)

LIST_CLIENTS: Final = method("Manager", "ListClients")
LAST_FLUSH_S = 2.0


@dataclass(frozen=True, slots=True)
class World(Boundaries):
    """`disk`: None, the real one. `engine`: a store that outlives this service. `chunks`: instead of storage services."""

    disk: Disk | None = None
    engine: Engine | None = None
    chunks: Chunks | None = None


async def serve(config: MetaConfig, *, world: World = World(), task_status: trio.TaskStatus[dict[str, Any]] = trio.TASK_STATUS_IGNORED) -> None:
    """Until cancelled. Starts with {"addresses", "node_id", "cluster_id", "grpc_address"}. Raises a KvfsError that says what to do."""
    if not config.data and world.disk is None:
        raise ConfigError("meta.data is not set: name the directory in which the meta service keeps its identity and its store")
    random = world.random
    disk = world.disk or RealDisk(config.data)
    disk.makedirs("")
    disk.lock()
    try:
        node = open_node_file(disk, random, where=config.data, role="meta", cluster_id=config.cluster_id)
        engine = world.engine or open_engine(config.kv_url)
        try:
            await _serve(config, replace(world, random=random), engine, node, task_status)
        finally:
            if world.engine is None:
                engine.close()
    finally:
        disk.close()


async def _serve(config: MetaConfig, world: World, engine: Engine, node: NodeFile, task_status: trio.TaskStatus[dict[str, Any]]) -> None:
    clock, random, net = world.clock, world.random, world.net
    made_now = await engine.transact(
        lambda txn: store.prepare(txn, clock.wall_ns(), config.chunk_size_bytes, uid=config.root_uid, gid=config.root_gid)
    )
    identity = Identity.of(net, cluster_id=config.cluster_id or node.cluster_id, client_id=random.bytes(16), role="meta")
    failure: KvfsError | None = None
    async with ChannelPool(net, clock, identity) as pool, trio.open_nursery() as nursery:
        link = ManagerLink(pool, clock, random, config.managers, identity, rejoin=True)

        async def guarded_link(*, task_status: trio.TaskStatus[None]) -> None:
            nonlocal failure
            try:
                await link.run(task_status=task_status)
            except KvfsError as error:
                failure = error
                nursery.cancel_scope.cancel()

        chunks = world.chunks or StorageChunks(link, pool, clock, random, identity.client_id)
        service = MetaService(
            engine,
            clock,
            random,
            chunks,
            lambda: link.routing,
            attr_lease_ms=config.attr_lease_ms,
            gc_delay_s=config.gc_delay_s,
            engine_name=config.kv_url.partition(":")[0],
        )
        if not made_now:
            service.changes.hold(config.attr_lease_ms / 1000)
        await service.numbers.ensure()
        server = RpcServer(net, clock, identity)
        server.add("Meta", service)
        await nursery.start(guarded_link)
        addresses = await nursery.start(server.serve, config.listen)
        registered = await link.register(role=cluster_pb2.ROLE_META, node_uuid=node.node_uuid, addresses=addresses)
        link.start_heartbeats()
        pruner = make_pruner(service, partial(list_clients, link), grace_s=config.prune_grace_s)
        nursery.start_soon(housekeeping.run, service, pruner)
        grpc_address = ""
        if config.grpc_listen:
            from kvfs.common.wire.grpc_adapter import serve_grpc

            grpc_address = await nursery.start(serve_grpc, server, config.grpc_listen)
        log.info("meta node %d of cluster %s serves at %s", registered.node_id, registered.cluster_id, ", ".join(addresses))
        task_status.started(
            {"addresses": list(addresses), "node_id": registered.node_id, "cluster_id": registered.cluster_id, "grpc_address": grpc_address}
        )
        try:
            await trio.sleep_forever()
        finally:
            with trio.move_on_after(LAST_FLUSH_S, shield=True):
                try:
                    while await service.clear_closed():
                        pass
                except KvfsError as error:
                    log.warning("last clearing of sessions: %s", error.message)
    if failure is not None:
        raise failure


async def list_clients(link: ManagerLink) -> set[bytes]:
    """The clients that live, as the manager knows them."""
    reply = await link.call(LIST_CLIENTS, base_pb2.Empty(), timeout_s=2.0)
    return {client.client_id for client in reply.clients}


def make_pruner(service: MetaService, clients: Callable[[], Awaitable[set[bytes]]], *, grace_s: float) -> Pruner:
    return Pruner(
        service.engine,
        service.cuts,
        service.clock,
        service.open_files,
        service.changes.root_step,
        clients,
        service.changes.committed,
        grace_s=grace_s,
    )
