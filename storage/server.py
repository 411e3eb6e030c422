"""The storage process: its data directories, its targets, its place in the cluster, and the Storage service within.

Invariants: every directory is locked and found to be ours before anything is opened; targets of an earlier run are open before the manager hears of
this one; a target takes part only as its replica core says. It ends with a typed error when the cluster went on without it (a newer run of the node,
a lease declared dead, a target listed as offline that thinks it serves). What is opened is closed in reverse order, also when cancelled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import trio

from kvfs.common.boundary.clock import Clock
from kvfs.common.boundary.net import Net
from kvfs.common.boundary.random import Random
from kvfs.common.boundary.real_disk import RealDisk
from kvfs.common.boundary.world import Boundaries
from kvfs.common.errors import ConfigError, IndexCorrupt, KvfsError, LeaseExpired, NoSpace
from kvfs.common.membership import ManagerLink
from kvfs.common.routing import Routing
from kvfs.common.transport.region import BufferPool
from kvfs.common.wire import cluster_pb2 as cluster
from kvfs.common.wire.channel import ChannelPool
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.server import RpcServer
from kvfs.storage.chain import messages as m
from kvfs.storage.chain.replica import Replica
from kvfs.storage.chain.view import ChainView
from kvfs.storage.config import StorageConfig
from kvfs.storage.disks import DataDirectory, Disks, OpenDisk, infos, openable
from kvfs.storage.engine.config import EngineConfig
from kvfs.storage.engine.engine import DEFAULTS, ChunkEngine
from kvfs.storage.host import Host
from kvfs.storage.renewals import Renewals
from kvfs.storage.resync import Resync
from kvfs.storage.retention.keeper import Keeper
from kvfs.storage.retention.retention import Retention
from kvfs.storage.scrub.scrubber import Scrubber
from kvfs.storage.scrub.state import ScrubState
from kvfs.storage.service import StorageService
from kvfs.storage.target import Target
from kvfs.storage.updates import carry_on
from kvfs.storage.workers import WorkerPool, Workers

log = logging.getLogger("kvfs.storage")

RECOVER_CHUNKS = 256
CREATE_RETRY_S = 1.0
REOPEN_S = 5.0
LEAVE_S = 0.5
"""How long a process that is told to stop waits for the cluster to take notice."""


@dataclass(frozen=True, slots=True)
class World(Boundaries):
    """`open_disk`: None, the real one. `workers`: makes those of the process, so many at once."""

    open_disk: OpenDisk | None = None
    workers: Callable[[int], Workers] = WorkerPool
    engine: EngineConfig = DEFAULTS


async def serve(config: StorageConfig, *, world: World = World(), task_status: trio.TaskStatus[dict[str, Any]] = trio.TASK_STATUS_IGNORED) -> None:
    """Until cancelled. Starts with {"addresses", "node_id", "cluster_id"}. Raises a KvfsError that says what to do."""
    if not config.data:
        raise ConfigError("storage.data is empty: give one directory per disk")
    clock, random = world.clock, world.random
    disks = Disks(config, clock, random, world.open_disk or RealDisk, world.engine)
    workers = world.workers(config.threads)
    try:
        process = _Process(config, clock, random, world.net, disks, workers)
        try:
            await process.run(task_status)
        except BaseExceptionGroup as group:
            raise _plain(group) from None
        finally:
            process.close()
    finally:
        workers.close()
        disks.close()


def _plain(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one typed error that ended the process, instead of the nurseries' group around it."""
    found, others = group.split(KvfsError)
    error: BaseException | None = found
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error if error is not None and others is None else group


class _Process:
    def __init__(self, config: StorageConfig, clock: Clock, random: Random, net: Net, disks: Disks, workers: Workers) -> None:
        self._config = config
        self._clock = clock
        self._random = random
        self._net = net
        self._disks = disks
        self._workers = workers
        self._engines: list[ChunkEngine] = []
        self._host: Host | None = None
        self._failure: KvfsError | None = None
        self._resyncs: dict[int, Resync] = {}
        self._making: set[int] = set()
        self._cluster_id = disks.cluster_id
        self._stopping = trio.Event()
        self._serving = trio.CancelScope()
        self._served = trio.Event()

    @property
    def host(self) -> Host:
        assert self._host is not None
        return self._host

    async def run(self, task_status: trio.TaskStatus[dict[str, Any]]) -> None:
        """Until cancelled; then the process leaves in order, with its connections still alive to do so."""
        async with trio.open_nursery() as outside:

            async def inside() -> None:
                with trio.CancelScope(shield=True):
                    await self._run(task_status)
                outside.cancel_scope.cancel()

            outside.start_soon(inside)
            try:
                await trio.sleep_forever()
            finally:
                self._stopping.set()
        if self._failure is not None:
            raise self._failure

    async def _run(self, task_status: trio.TaskStatus[dict[str, Any]]) -> None:
        config = self._config
        identity = Identity.of(self._net, cluster_id=self._cluster_id, client_id=self._random.bytes(16), role="storage")
        buffers = BufferPool(config.buffer_bytes, name="kvfs-forward")
        try:
            async with ChannelPool(self._net, self._clock, identity) as pool, trio.open_nursery() as nursery:
                link = ManagerLink(pool, self._clock, self._random, config.managers, identity, exit_when_lost=config.exit_when_lease_lost)
                self._host = host = Host(config, self._clock, pool, link, self._workers, buffers, nursery)
                self._renewals = Renewals(host, self._disks, self._open_again)
                host.on_damage = self._renewals.begin
                self._keeper = Keeper(host)
                nursery.start_soon(self._keeper.run)
                self._scrubber = scrubber = Scrubber(host, self._disks.repair_node_files)
                nursery.start_soon(self._leave)
                for directory in self._disks.directories:
                    for target_id in directory.target_ids:
                        await self._open(directory, target_id, 0, fresh=False)
                server = RpcServer(self._net, self._clock, identity, lends_files=config.direct_reads)
                server.add("Storage", StorageService(host, scrubber))
                await nursery.start(self._follow, link)
                addresses = await nursery.start(self._serve, server)
                registered = await link.register(
                    role=cluster.ROLE_STORAGE,
                    node_uuid=self._disks.node.node_uuid,
                    addresses=addresses,
                    disks=infos(self._disks.directories),
                    node_id=config.node_id,
                )
                self._cluster_id = self._cluster_id or registered.cluster_id
                link.on_routing(self._on_routing)
                self._on_routing(link.routing)
                link.start_heartbeats(self._report)
                for directory in self._disks.directories:
                    nursery.start_soon(scrubber.run, directory.number)
                log.info("storage node %d of cluster %s serves at %s", registered.node_id, registered.cluster_id, ", ".join(addresses))
                task_status.started({"addresses": addresses, "node_id": registered.node_id, "cluster_id": registered.cluster_id})
        finally:
            buffers.close()

    async def _serve(self, server: RpcServer, *, task_status: trio.TaskStatus[list[str]]) -> None:
        with self._serving:
            await server.serve(self._config.listen, task_status=task_status)
        self._served.set()

    async def _leave(self) -> None:
        """Told to stop: the targets leave their chains at once instead of being missed, then the server ends, then all else."""
        await self._stopping.wait()
        host = self.host
        for target in host.targets.values():
            target.replica.fail("the service is stopping")
            target.wake()
        if host.link.lease_valid() and any(target.replica.view is not None for target in host.targets.values()):
            host.link.report_now()
            try:
                await host.link.wait_routing(host.link.routing.version, timeout_s=LEAVE_S)
            except KvfsError as error:
                log.debug("leaving: %s", error.message)
        self._serving.cancel()
        with trio.move_on_after(LEAVE_S):
            await self._served.wait()
        host.nursery.cancel_scope.cancel()

    def close(self) -> None:
        for engine in list(self._engines):
            self._let_go(engine)

    def _let_go(self, engine: ChunkEngine) -> None:
        self._engines.remove(engine)
        try:
            engine.close()
        except KvfsError as error:
            log.error("closing a target: %s", error.message)

    async def _follow(self, link: ManagerLink, *, task_status: trio.TaskStatus[None]) -> None:
        try:
            await link.run(task_status=task_status)
        except KvfsError as error:
            self._end(error)

    def _end(self, error: KvfsError) -> None:
        log.error("ending: %s", error.message)
        self._failure = self._failure or error
        self.host.nursery.cancel_scope.cancel()

    def _report(self) -> Iterable[cluster.TargetReport]:
        for target in self.host.targets.values():
            target.refresh_space()
        return [target.report() for target in self.host.targets.values()]

    # --- targets ---------------------------------------------------------------------------------------------------------------------

    async def _open(self, directory: DataDirectory, target_id: int, chain_id: int, *, fresh: bool) -> Target:
        replica = Replica(target_id, fresh=fresh)
        engine: ChunkEngine | None = None
        opened: ChunkEngine | None = None
        damaged = False
        retention = Retention(self._clock, None)
        scrub = ScrubState(self._clock, None)
        try:
            opened = await self._workers.run(lambda: self._disks.open_target(directory, target_id, self._cluster_id))
            self._engines.append(opened)
            retention = Retention(self._clock, opened)
            await self._workers.run(retention.load)
            scrub = ScrubState(self._clock, opened)
            await self._workers.run(scrub.load)
            engine = opened
        except KvfsError as error:
            if not openable(error):
                raise
            log.error("target %d cannot be opened and stays out of service: %s", target_id, error.message)
            replica.fail(error.message)
            if isinstance(error, NoSpace):
                if opened is not None:
                    self._let_go(opened)
                self.host.nursery.start_soon(self._open_later, directory, target_id)
            damaged = isinstance(error, IndexCorrupt)
        target = Target(target_id, chain_id, directory.number, self._disks.path_of(directory, target_id), engine, replica, retention, scrub)
        target.refresh_space()
        self.host.targets[target_id] = target
        if engine is not None:
            self.host.nursery.start_soon(self._keeper.evict, target)
            self._renewals.watch(target)
        elif damaged:
            self._renewals.begin(target)
        return target

    async def _open_again(self, directory: DataDirectory, target_id: int, chain_id: int) -> Target:
        """A target that this process had open before."""
        target = await self._open(directory, target_id, chain_id, fresh=False)
        self._show(target, self.host.link.routing)
        return target

    async def _open_later(self, directory: DataDirectory, target_id: int) -> None:
        """A full disk may have room again; a failed one is looked at by people, who then start the process anew."""
        await self._clock.sleep(REOPEN_S)
        await self._open(directory, target_id, self.host.targets[target_id].chain_id, fresh=False)
        self._on_routing(self.host.link.routing)
        self.host.link.report_now()

    async def _make(self, wanted: cluster.Target) -> None:
        """A target that the manager says this node must have."""
        try:
            directory = self._disks.directories[wanted.disk]
            # Registration takes everything that this node ever had out of service: what serves and is not here has never held anything.
            chain = self.host.link.routing.chain(wanted.chain_id)
            fresh = any(member.target_id == wanted.target_id and member.state == cluster.SERVING for member in chain.targets)
            await self._open(directory, wanted.target_id, wanted.chain_id, fresh=fresh)
        except (KvfsError, IndexError) as error:
            log.error("target %d cannot be made: %s", wanted.target_id, error)
            await self._clock.sleep(CREATE_RETRY_S)
        finally:
            self._making.discard(wanted.target_id)
        self._on_routing(self.host.link.routing)
        self.host.link.report_now()

    # --- routing ---------------------------------------------------------------------------------------------------------------------

    def _on_routing(self, routing: Routing) -> None:
        host = self.host
        for wanted in host.link.targets:
            target = host.targets.get(wanted.target_id)
            if target is None:
                if wanted.chain_id and wanted.target_id not in self._making and not _is_missed(wanted, routing):
                    self._making.add(wanted.target_id)
                    host.nursery.start_soon(self._make, wanted)
                continue
            for effect in target.replica.retire() if wanted.retiring else target.replica.return_to_work():
                self._effect(target, effect)
            if wanted.chain_id:
                target.chain_id = wanted.chain_id
                self._show(target, routing)
            elif wanted.retiring:
                self._renewals.discard(target)

    def _show(self, target: Target, routing: Routing) -> None:
        try:
            chain = routing.chain(target.chain_id)
        except KvfsError:
            return
        replica = target.replica
        before = replica.version
        view = ChainView.of(chain.chain_id, chain.version, [(member.target_id, member.state) for member in chain.targets], chain.lost_below)
        for effect in replica.on_chain(view):
            self._effect(target, effect)
        if replica.version != before:
            target.on_successor()
            target.wake()
            self._scrubber.look()

    def _effect(self, target: Target, effect: m.TargetEffect) -> None:
        host = self.host
        if isinstance(effect, m.Report):
            host.link.report_now()
        elif isinstance(effect, m.ResolveLeftovers):
            host.nursery.start_soon(self._resolve, target)
        elif isinstance(effect, m.StartResync):
            self._stop_resync(target)
            resync = self._resyncs[target.target_id] = Resync(host, target, effect.target_id, effect.chain_version)
            host.nursery.start_soon(resync.run)
        elif isinstance(effect, m.StopResync):
            self._stop_resync(target)
        elif isinstance(effect, m.Exit):
            self._end(LeaseExpired(effect.reason))

    def _stop_resync(self, target: Target) -> None:
        resync = self._resyncs.pop(target.target_id, None)
        if resync is not None:
            resync.scope.cancel()

    async def _resolve(self, target: Target) -> None:
        """Pending versions that a former shape of the chain left behind."""
        try:
            chunks = await self._workers.run(target.pending_chunks)
        except KvfsError as error:
            self.host.note_error(target, error)
            return
        chunks = [chunk for chunk in chunks if chunk not in target.replica.flights]
        for first in range(0, len(chunks), RECOVER_CHUNKS):
            await carry_on(self.host, target, chunks[first : first + RECOVER_CHUNKS])


def _is_missed(wanted: cluster.Target, routing: Routing) -> bool:
    """A target that was here, is gone, and was the last one serving. An empty one in its place would be of no use, and in the way of the old one if
    its disk is only not mounted: the chain waits for it, or for `kvfs admin accept-loss`."""
    members = [member for chain in routing.chains if chain.chain_id == wanted.chain_id for member in chain.targets]
    return wanted.blank and any(member.target_id == wanted.target_id and member.state == cluster.LASTSRV for member in members)
