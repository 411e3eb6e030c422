"""A whole cluster in one trio run: managers, metadata services, storage services and clients, each on its own simulated machine.

Owns the machines, the network between them and the stores that managers and metadata services share. All chance comes from the seed: who the machines
are, how long a message takes, in which order tasks run (scheduler.py).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import trio
from tests.sim.machine import Machine, Main, Process
from tests.sim.store import SharedStore, StoreFaults
from tests.sim.trace import Trace
from tests.sim.workers import SimWorkers

from kvfs.client.locate import ClusterAddress
from kvfs.common.boundary.random import SeededRandom
from kvfs.common.membership import ManagerLink
from kvfs.common.routing import Routing
from kvfs.common.sim.net import SimFabric
from kvfs.common.wire import cluster_pb2
from kvfs.common.wire.channel import ChannelPool
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.service import method
from kvfs.meta import server as meta_server
from kvfs.meta.cluster import server as manager_server
from kvfs.meta.cluster.config import ManagerConfig
from kvfs.meta.config import MetaConfig
from kvfs.meta.kv.memory import MemoryEngine
from kvfs.storage import server as storage_server
from kvfs.storage.config import StorageConfig
from kvfs.storage.engine.config import EngineConfig

CLUSTER = "sim"
KIB, MIB = 1 << 10, 1 << 20
LEASE_MS = 2000
ENGINE = EngineConfig(
    group_bytes=512 * KIB, keep_empty_bytes=MIB, files_per_class=2, journal_bytes=32 * KIB, overlay_entries=40, reserve_bytes=MIB, background=False
)
"""Small, so that checkpoints, group changes and full disks happen in a short run."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How large the cluster is."""

    managers: int = 2
    metas: int = 2
    storages: int = 3
    replicas: int = 3
    targets_per_disk: int = 1
    capacity_bytes: int = 64 * MIB
    resync_at_once: int = 4
    """Batches of a resync: with one of one chunk, bringing a target up to date takes as many messages as chunks differ."""
    resync_batch_bytes: int = 4 * MIB


class World:
    def __init__(self, seed: int, trace: Trace, nursery: trio.Nursery, shape: Shape) -> None:
        self.seed = seed
        self.trace = trace
        self.nursery = nursery
        self.shape = shape
        self.random = SeededRandom(seed)
        self.fabric = SimFabric(self.fork(), latency_s=(0.0002, 0.002))
        self.store_faults = StoreFaults()
        self.machines: dict[str, Machine] = {}
        self.striking = 0
        """Faults at work."""
        self.mended_s = float("-inf")
        """When the last of those that are over ended."""
        self.fragile = False
        """Another loss now would be more than the cluster promises to bear."""
        self.pool: ChannelPool
        self.link: ManagerLink
        """Of someone who has no faults: what the managers say."""
        self._cluster_store = MemoryEngine()
        self._namespace_store = MemoryEngine()
        for number in range(1, shape.managers + 1):
            self.add(f"m{number}", self._manager)
        for number in range(1, shape.metas + 1):
            self.add(f"n{number}", self._meta)
        for number in range(1, shape.storages + 1):
            self.add(f"s{number}", self._storage).capacity_bytes = shape.capacity_bytes

    def fork(self) -> SeededRandom:
        """A source of chance of one's own: what is drawn elsewhere does not change it."""
        return SeededRandom(self.random.randrange(1 << 62))

    def add(self, name: str, main: Main) -> Machine:
        machine = self.machines[name] = Machine(name, main, self.fabric, self.trace, self.fork(), self.nursery)
        return machine

    def of_kind(self, kind: str) -> list[Machine]:
        """m: managers, n: metadata (names), s: storage, c: clients."""
        return [machine for name, machine in self.machines.items() if name[0] == kind]

    @property
    def managers(self) -> tuple[str, ...]:
        return tuple(f"tcp://m{number}:7001" for number in range(1, self.shape.managers + 1))

    @property
    def address(self) -> ClusterAddress:
        return ClusterAddress(self.managers, CLUSTER)

    # --- processes -------------------------------------------------------------------------------------------------------------------

    def _shared(self, process: Process, inner: MemoryEngine) -> SharedStore:
        store = SharedStore(inner, process.random, self.store_faults)
        process.stores.append(store)
        return store

    async def _manager(self, process: Process, started: Callable[[], None]) -> None:
        name = process.machine.name
        config = ManagerConfig(
            data="/m", listen=(f"tcp://{name}:7001",), cluster_id=CLUSTER, lease_ms=LEASE_MS, client_lease_ms=5000, primary_lease_ms=4000
        )
        boundaries = manager_server.World(
            process.clock, process.random, process.net, disk=process.open_disk("/m"), engine=self._shared(process, self._cluster_store)
        )
        await self._serve(manager_server.serve, started, config, boundaries)

    async def _meta(self, process: Process, started: Callable[[], None]) -> None:
        name = process.machine.name
        config = MetaConfig(
            data="/n",
            cluster_id=CLUSTER,
            managers=self.managers,
            listen=(f"tcp://{name}:7002",),
            chunk_size_bytes=64 * KIB,
            gc_delay_s=0.5,
            prune_grace_s=3.0,
        )
        boundaries = meta_server.World(
            process.clock, process.random, process.net, disk=process.open_disk("/n"), engine=self._shared(process, self._namespace_store)
        )
        await self._serve(meta_server.serve, started, config, boundaries)

    async def _storage(self, process: Process, started: Callable[[], None]) -> None:
        machine = process.machine
        config = StorageConfig(
            data=("/d",),
            node_id=machine.node_id,
            listen=(f"tcp://{machine.name}:7003",),
            cluster_id=CLUSTER,
            managers=self.managers,
            direct_reads=False,
            inline_read_bytes=0,
            scrub_interval_s=0,
            forward_timeout_ms=3000,
            buffer_bytes=64 * MIB,
            resync_concurrency=self.shape.resync_at_once,
            resync_batch_bytes=self.shape.resync_batch_bytes,
        )
        boundaries = storage_server.World(
            process.clock,
            process.random,
            process.net,
            open_disk=process.open_disk,
            workers=lambda _: SimWorkers(process.nursery, process.random, lambda: machine.slow_s),
            engine=ENGINE,
        )

        def joined(facts: dict[str, Any]) -> None:
            machine.node_id = facts["node_id"]

        await self._serve(storage_server.serve, started, config, boundaries, joined)

    async def _serve(
        self,
        serve: Callable[..., Any],
        started: Callable[[], None],
        config: Any,
        boundaries: Any,
        told: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        class Status:
            def started(self, value: dict[str, Any]) -> None:
                told(value)
                started()

        await serve(config, world=boundaries, task_status=Status())

    # --- the cluster -----------------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """All services, and the chains."""
        for kind in "mns":
            async with trio.open_nursery() as nursery:
                for machine in self.of_kind(kind):
                    nursery.start_soon(machine.start)
        shape = self.shape
        async with self.admin() as link:
            request = cluster_pb2.CreateTargetsRequest(
                table_id=1, replicas=shape.replicas, expected_nodes=shape.storages, targets_per_disk=shape.targets_per_disk
            )
            await link.call(method("Manager", "CreateTargets"), request, timeout_s=30)
            await self.settled(link)

    @asynccontextmanager
    async def admin(self) -> AsyncIterator[ManagerLink]:
        """Someone who looks at the cluster from a machine without faults."""
        random = self.fork()
        net = self.fabric.host("admin")
        identity = Identity.of(net, cluster_id=CLUSTER, client_id=random.bytes(16), role="admin")
        clock = next(iter(self.machines.values())).clock
        async with ChannelPool(net, clock, identity, shared_memory=False) as pool:
            link = ManagerLink(pool, clock, random, self.managers, identity)
            self.pool = pool
            async with trio.open_nursery() as nursery:
                await nursery.start(link.run)
                yield link
                nursery.cancel_scope.cancel()

    async def settled(self, link: ManagerLink, timeout_s: float = 120.0) -> Routing:
        """Until every target serves."""
        with trio.move_on_after(timeout_s):
            while True:
                routing = link.routing
                if list(routing.chains) and all(member.state == cluster_pb2.SERVING for chain in routing.chains for member in chain.targets):
                    return routing
                await trio.sleep(0.1)
        raise AssertionError(f"targets that do not serve after {timeout_s:g} s: " + "; ".join(describe(link.routing)))


def describe(routing: Routing) -> Iterator[str]:
    """Chains with a target that does not serve."""
    for chain in routing.chains:
        states = [f"{member.target_id} {cluster_pb2.PublicState.Name(member.state).lower()}" for member in chain.targets]
        if any(member.state != cluster_pb2.SERVING for member in chain.targets):
            yield f"chain {chain.chain_id} version {chain.version}: {', '.join(states)}"
