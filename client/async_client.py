"""The client on trio: everything of one process's connection to a cluster.

Owns the wiring: manager link, channels, registered memory, metadata and storage clients, the table of open files, the watcher, and their
order of start
and end. Invariants: a client has one random id, new for each; on the way out, files that were left open are closed with what they hold, before the
connections go. Everything here belongs to one trio thread; threads use `sync_client.Client`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio

from kvfs.client.config import ClientConfig
from kvfs.client.file.memory import Memory, RegisteredBuffer
from kvfs.client.file.open_file import OpenFile
from kvfs.client.file.places import PlaceTable
from kvfs.client.file.readahead import ReadAhead
from kvfs.client.file.state import Shared
from kvfs.client.file.table import FileTable
from kvfs.client.file.writeback import WriteBack
from kvfs.client.lines import Lines
from kvfs.client.locate import ClusterAddress, locate
from kvfs.client.meta_calls import MetaCalls
from kvfs.client.meta_client import MetaClient
from kvfs.client.paths import PathOperations
from kvfs.client.peers import Caller, Counters, Peers, RoutingSource
from kvfs.client.storage_client import StorageClient
from kvfs.client.user import User
from kvfs.client.watch import OnLost, OnRevoked, Watcher
from kvfs.common.boundary.clock import Clock, SystemClock
from kvfs.common.boundary.net import Net
from kvfs.common.boundary.random import Random, SystemRandom
from kvfs.common.boundary.system_net import SystemNet
from kvfs.common.config import load
from kvfs.common.errors import KvfsError
from kvfs.common.membership import ManagerLink
from kvfs.common.routing import Routing
from kvfs.common.transport.region import BufferPool, Region
from kvfs.common.wire import meta_pb2 as pb
from kvfs.common.wire.channel import ChannelPool
from kvfs.common.wire.identity import Identity

log = logging.getLogger("kvfs.client")

REVOKE_FLUSH_S = 0.5
"""How long the acknowledgement of a revocation waits for unsent bytes: less than a lease."""
LEAVE_S = 1.0


class AsyncClient(PathOperations):
    """Made by `open_client`. Path operations (stat, open, rename, ...) are in paths.py; `meta` and `storage` are the services themselves."""

    def __init__(
        self,
        *,
        source: RoutingSource,
        caller: Caller,
        clock: Clock,
        random: Random,
        identity: Identity,
        user: User,
        config: ClientConfig,
        nursery: trio.Nursery,
        region: Region | None = None,
        net: Net | None = None,
        managers: tuple[str, ...] = (),
    ) -> None:
        self.config = config
        self.managers = managers
        """Addresses by which this client found the cluster."""
        self.user = user
        self.client_id = identity.client_id
        self.clock = clock
        self._random = random
        self._source = source
        self._nursery = nursery
        self.umask = _umask()
        peers = Peers(source, caller, clock, random, identity.host_id if config.shared_memory else "", config.suspect_s)
        self.counters: Counters = peers.counters
        source.on_routing(peers.routing_changed)
        self.meta = MetaClient(MetaCalls(peers, config), clock, random, user)
        self.storage = StorageClient(peers, config, identity.client_id, nursery)
        self.lines = Lines(net, identity, peers, config) if net is not None else None
        """For threads that write blocks by themselves; None: there are none."""
        self.memory = Memory(BufferPool(config.buffer_pool_bytes, region=region, name="kvfs-client"), peers.counters)
        self.pool = self.memory.pool
        back = WriteBack(self.storage, self.memory, config, clock, nursery)
        ahead = ReadAhead(self.storage, self.memory, config, peers.counters, nursery)
        places = PlaceTable(self.storage, clock, peers.counters)
        self.files = FileTable(Shared(self.meta, self.storage, self.memory, ahead, places, back, clock, config))
        self.watcher = Watcher(self.meta, config, clock)
        self.watcher.on_revoked(self._revoked)
        self.watcher.on_lost(self._lost)
        self._back = back

    @property
    def routing(self) -> Routing:
        return self._source.routing

    def new_session(self) -> bytes:
        """16 random bytes: the name of an open file at the metadata service."""
        return self._random.bytes(16)

    def open_file(
        self, inode: pb.Inode, *, session: bytes = b"", read: bool = True, write: bool = False, append: bool = False, user: User | None = None
    ) -> OpenFile:
        """A handle over an inode that meta.open or meta.create answered just now (no call is made here). `session`: the one given there,
        for writing."""
        return self.files.open(inode, session=session, read=read, write=write, append=append, user=user or self.user)

    def local_view(self, inode: pb.Inode) -> pb.Inode:
        """The attributes as this client sees them: with the length and mtime of its own unreported writes."""
        return self.files.view(inode)

    async def truncate_inode(self, inode: int, length: int, *, user: User | None = None, session: bytes = b"") -> pb.Inode:
        """Truncate or extend by number, in step with whatever files of this client are open on it."""
        return await self.files.truncate(inode, length, session=session, user=user or self.user)

    def on_revoked(self, callback: OnRevoked) -> None:
        """Call with (inode, name) when cached attributes (name empty) or an entry of that directory are no longer true. The revocation is
        acknowledged
        when all callbacks have returned: they must be quick and must not fail."""
        self.watcher.on_revoked(callback)

    def on_lost(self, callback: OnLost) -> None:
        """Call when the metadata service has restarted: nothing cached is true any more."""
        self.watcher.on_lost(callback)

    def register(self, size_bytes: int) -> RegisteredBuffer:
        """Memory that storage services on this host read and write directly, for OpenFile.pread_into and pwrite."""
        return RegisteredBuffer(size_bytes)

    def in_background(self, function: Callable[..., Awaitable[object]], *arguments: Any) -> None:
        """Run it beside everything else, for as long as the client lives. It must not raise."""
        self._nursery.start_soon(function, *arguments)

    async def _revoked(self, inode: int, name: bytes) -> None:
        if not name:
            await self.files.revoke(inode, REVOKE_FLUSH_S)

    async def _lost(self) -> None:
        self.files.lose_all()

    def start(self) -> None:
        """The tasks of a living client."""
        self._nursery.start_soon(self._back.flush_old)
        self._nursery.start_soon(self.meta.keep_telling_ends, self.config.session_end_s)
        self._nursery.start_soon(self.files.finish_closes)
        if self.config.length_hint_s:
            self._nursery.start_soon(self.files.hint_lengths)
        if self.config.watch:
            self._nursery.start_soon(self.watcher.run)

    async def aclose(self) -> None:
        """Close what was left open. The tasks end with the nursery."""
        if self.lines is not None:
            self.lines.close()
        try:
            await self.files.close_all()
        finally:
            self.memory.reclaim()
            try:
                await self.meta.tell_ends(deadline_s=LEAVE_S)
            except KvfsError as error:
                log.debug("sessions of closed files end with this client: %s", error.message)


@asynccontextmanager
async def open_client(
    cluster: str | os.PathLike[str] | ClusterAddress | None = None,
    *,
    user: User | None = None,
    role: str = "client",
    description: str = "",
    config: ClientConfig | None = None,
    net: Net | None = None,
    clock: Clock | None = None,
    random: Random | None = None,
) -> AsyncIterator[AsyncClient]:
    """A client of the cluster (a directory of `kvfs up`, or "host:port,..."; KVFS_CLUSTER without either); lives as long as the block.

    Without `config`: the defaults, and what KVFS_CLIENT__... in the environment says. Raises ClusterNotFound, or Unreachable when no manager
    answers within the deadline. An exception of the block comes out as it is.
    """
    address = cluster if isinstance(cluster, ClusterAddress) else locate(cluster)
    config = config or load(ClientConfig, None, os.environ, "client")
    clock = clock or SystemClock()
    random = random or SystemRandom()
    net = net or SystemNet()
    identity = Identity.of(net, cluster_id=address.cluster_id, client_id=random.bytes(16), role=role)
    failure: BaseException | None = None
    channel_pool = ChannelPool(net, clock, identity, shared_memory=config.shared_memory)
    async with channel_pool as channels, trio.open_nursery() as nursery:
        try:
            link = ManagerLink(channels, clock, random, address.managers, identity)
            await link.refresh(timeout_s=config.deadline_s)
            nursery.start_soon(_follow, link)
            if config.client_heartbeat:
                link.start_client_heartbeats(description=description)
            client = AsyncClient(
                source=link,
                caller=channels,
                clock=clock,
                random=random,
                identity=identity,
                user=user or User.current(),
                config=config,
                nursery=nursery,
                net=channel_pool.net,
                managers=address.managers,
            )
            try:
                client.start()
                try:
                    yield client
                finally:
                    with trio.CancelScope(deadline=trio.current_time() + config.deadline_s, shield=True):
                        await client.aclose()
                    client.memory.close()
            finally:
                if config.client_heartbeat:
                    with trio.CancelScope(deadline=trio.current_time() + LEAVE_S, shield=True):
                        await link.leave(timeout_s=LEAVE_S)
        except trio.Cancelled:
            raise
        except BaseException as error:
            failure = error  # out of the nurseries first: they would wrap it into a group
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _follow(link: ManagerLink) -> None:
    """Routing and heartbeats. Should the manager turn this client away, files still work over the routing known."""
    try:
        await link.run()
    except KvfsError as error:
        log.warning("no longer following the manager: %s", error.message)


def _umask() -> int:
    """This process's umask, without changing it for a moment as os.umask would."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("Umask:"):
                    return int(line.split()[1], 8)
    except (OSError, ValueError):
        pass
    return 0o022


__all__ = ["AsyncClient", "KvfsError", "open_client"]
