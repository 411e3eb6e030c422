"""A manager and storage services in one trio run, over real sockets and directories, and a client that speaks the wire."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from kvfs.common.boundary.clock import SystemClock
from kvfs.common.boundary.random import SystemRandom
from kvfs.common.boundary.system_net import SystemNet
from kvfs.common.checksum import checksums
from kvfs.common.errors import ConnectionLost, KvfsError, from_wire
from kvfs.common.ids import chunk_id
from kvfs.common.membership import ManagerLink
from kvfs.common.routing import Routing
from kvfs.common.transport.region import BufferPool
from kvfs.common.wire import cluster_pb2 as cluster
from kvfs.common.wire import storage_pb2 as pb
from kvfs.common.wire.channel import ChannelPool
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.service import method
from kvfs.meta.cluster import server as manager_server
from kvfs.meta.cluster.config import ManagerConfig
from kvfs.storage import server
from kvfs.storage.config import StorageConfig

READ = method("Storage", "Read")
WRITE = method("Storage", "Write")
CHUNK_SIZE = 1 << 20


class MiniCluster:
    def __init__(self, path: Path, nursery: trio.Nursery, manager: str, pool: ChannelPool, link: ManagerLink, shared: bool) -> None:
        self.path = path
        self.nursery = nursery
        self.manager = manager
        self.pool = pool
        self.link = link
        self.shared = shared
        self.services = server.World()
        self.settings: dict[str, object] = {}
        self.scopes: dict[int, trio.CancelScope] = {}
        self.ended: dict[int, BaseException | None] = {}
        self.over: dict[int, trio.Event] = {}
        self.started: dict[int, dict[str, Any]] = {}
        self.buffers = BufferPool(64 << 20)
        self._sequence = itertools.count(1)
        self._channel = itertools.count(1)

    async def start(self, number: int, *, disks: int = 1) -> None:
        if number in self.over:
            with trio.fail_after(20):
                await self.over[number].wait()
        data = tuple(str(self.path / f"storage-{number}" / f"disk-{disk}") for disk in range(disks))
        listen = ["tcp://127.0.0.1:0"]
        if self.shared:
            listen.append(f"unix://{self.path}/s{number}.sock")
        config = StorageConfig(data=data, listen=tuple(listen), cluster_id="test", managers=(self.manager,), threads=2, **self.settings)  # type: ignore[arg-type]
        self.started[number] = await self.nursery.start(self._run, number, config)

    async def _run(self, number: int, config: StorageConfig, *, task_status: trio.TaskStatus[object]) -> None:
        with trio.CancelScope() as scope:
            self.scopes[number] = scope
            self.ended[number] = None
            self.over[number] = trio.Event()
            try:
                await server.serve(config, world=self.services, task_status=task_status)
            except KvfsError as error:
                self.ended[number] = error
        self.over[number].set()

    def stop(self, number: int) -> None:
        self.scopes.pop(number).cancel()

    async def create(self, replicas: int, nodes: int, targets_per_disk: int = 1) -> None:
        request = cluster.CreateTargetsRequest(table_id=1, replicas=replicas, expected_nodes=nodes, targets_per_disk=targets_per_disk)
        await self.link.call(method("Manager", "CreateTargets"), request, timeout_s=10)
        await self.link.refresh()
        await self.settled(replicas)

    async def one_chain(self, replicas: int) -> int:
        """So many services, and one chain over them that serves: its id."""
        for number in range(1, replicas + 1):
            await self.start(number)
        await self.create(replicas, replicas)
        (chain,) = self.routing.chains
        return chain.chain_id

    @property
    def routing(self) -> Routing:
        return self.link.routing

    async def settled(self, replicas: int, timeout_s: float = 30) -> None:
        """Every chain serves with so many replicas, and they answer."""
        with trio.fail_after(timeout_s):
            while True:
                chains = list(self.routing.chains)
                if chains and all(len(self.routing.serving(chain.chain_id)) == replicas for chain in chains):
                    try:
                        for chain in chains:
                            for target in self.routing.serving(chain.chain_id):
                                await self.read(chain.chain_id, chunk_id(1, 1 << 40), 0, 16, target=target)
                        return
                    except KvfsError:
                        pass
                await trio.sleep(0.02)

    def tag(self) -> tuple[bytes, int, int]:
        return self.pool.identity.client_id, next(self._channel), 1

    async def write_once(self, chain_id: int, ios: Sequence[pb.WriteIO], data: Sequence[object], timeout_s: float = 5) -> list[pb.WriteResult]:
        chain = self.routing.chain(chain_id)
        head = self.routing.head(chain_id)
        for io in ios:
            io.chain_id, io.chain_version, io.target_id = chain_id, chain.version, head
        replies: list[pb.WriteReply] = []
        failed: KvfsError | None = None
        # A service that is cancelled in its process does not lose its connections as a killed one does: give a head up that is no longer one.
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                while self.routing.serving(chain_id)[:1] == [head]:
                    await self.link.wait_routing(self.routing.version)
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            try:
                request = pb.WriteRequest(writes=ios)
                replies.append(await self.pool.call(self.routing.addresses_of_target(head), WRITE, request, timeout_s=timeout_s, send=data))
            except KvfsError as error:
                failed = error
            nursery.cancel_scope.cancel()
        if not replies:
            raise failed or ConnectionLost("the head died")
        return list(replies[0].results)

    async def write(
        self, chain_id: int, chunk: bytes, data: bytes, offset: int = 0, kind: int = pb.WRITE, length: int = 0, timeout_s: float = 30
    ) -> pb.WriteResult:
        """As a client does: the same tag until it is answered."""
        client_id, channel, sequence = self.tag()
        with trio.fail_after(timeout_s):
            while True:
                io = pb.WriteIO(
                    chunk_id=chunk, kind=kind, offset=offset, length=len(data) or length, chunk_size=CHUNK_SIZE, checksums=checksums(data, offset)
                )  # type: ignore[arg-type]
                io.tag.client_id, io.tag.channel, io.tag.sequence = client_id, channel, sequence
                try:
                    (result,) = await self.write_once(chain_id, [io], [data] if data else [])
                    if result.status == 0:
                        return result
                    error = from_wire(result.status, result.message)
                except KvfsError as failed:
                    error = failed
                if not error.retryable and error.errno != 110:
                    raise error
                await trio.sleep(0.05)

    async def read(self, chain_id: int, chunk: bytes, offset: int, length: int, *, target: int = 0) -> bytes:
        """A hole is empty."""
        target = target or self.routing.tail(chain_id)
        into = bytearray(length)
        io = pb.ReadIO(chain_id=chain_id, target_id=target, chunk_id=chunk, offset=offset, length=length)
        reply = await self.pool.call(
            self.routing.addresses_of_target(target), READ, pb.ReadRequest(reads=[io]), timeout_s=5, receive=[memoryview(into)]
        )
        result = reply.results[0]
        if result.status == 409:
            return b""
        if result.status:
            raise from_wire(result.status, "")
        data = bytes(into[: result.length])
        assert checksums(data, offset) == result.checksums
        return data

    async def listing(self, target: int) -> list[pb.ChunkInfo]:
        found: list[pb.ChunkInfo] = []
        more = True
        while more:
            request = pb.ListChunksRequest(target_id=target, after=found[-1].chunk_id if found else b"", limit=1000)
            reply = await self.pool.call(self.routing.addresses_of_target(target), method("Storage", "ListChunks"), request, timeout_s=10)
            found += reply.chunks
            more = reply.more
        return found

    async def assert_identical(self, chain_id: int) -> int:
        """All serving replicas hold the same chunks, byte for byte. How many."""
        targets = self.routing.serving(chain_id)
        lists = [await self.listing(target) for target in targets]
        plain = [[(c.chunk_id, c.version, c.pending_version, c.length, c.checksum, c.mtime_ns) for c in listed] for listed in lists]
        for other in plain[1:]:
            assert other == plain[0]
        for info in lists[0]:
            contents = {await self.read(chain_id, info.chunk_id, 0, info.length, target=target) for target in targets}
            assert len(contents) == 1, info.chunk_id.hex()
        for target in targets:
            request = pb.CheckTargetRequest(target_id=target, read_data=True)
            reply = await self.pool.call(self.routing.addresses_of_target(target), method("Storage", "CheckTarget"), request, timeout_s=30)
            assert list(reply.problems) == []
        return len(plain[0])


@asynccontextmanager
async def mini_cluster(path: Path, *, lease_ms: int = 600, shared: bool = True) -> AsyncIterator[MiniCluster]:
    async with trio.open_nursery() as nursery:
        config = ManagerConfig(data=str(path / "manager"), listen=("tcp://127.0.0.1:0",), cluster_id="test", lease_ms=lease_ms, kv="memory")
        started = await nursery.start(manager_server.serve, config)
        identity = Identity(cluster_id="test", client_id=SystemRandom().bytes(16), role="client")
        clock, random = SystemClock(), SystemRandom()
        async with ChannelPool(SystemNet(), clock, identity, shared_memory=shared) as pool:
            link = ManagerLink(pool, clock, random, started["addresses"], identity)
            await nursery.start(link.run)
            yield MiniCluster(path, nursery, started["addresses"][0], pool, link, shared)
            nursery.cancel_scope.cancel()
