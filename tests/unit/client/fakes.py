"""Small services for the client's tests: chunks in a dict, inodes in a dict, served over the real RPC on loopback sockets.

They hold what the contracts say and no more: no replication inside (each fake target is written by the one head), faults on demand.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio

from kvfs.client.async_client import AsyncClient
from kvfs.client.config import ClientConfig
from kvfs.client.user import User
from kvfs.common.boundary.clock import SystemClock
from kvfs.common.boundary.random import SeededRandom
from kvfs.common.boundary.system_net import SystemNet
from kvfs.common.checksum import checksums, verify
from kvfs.common.errors import ChecksumMismatch, ChunkNotFound, KvfsError, NotFound
from kvfs.common.routing import Routing
from kvfs.common.wire import base_pb2, cluster_pb2, meta_pb2, storage_pb2
from kvfs.common.wire.channel import ChannelPool
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.server import Call, RpcServer

CHUNK = 64 * 1024


class FakeStorage:
    """One node. `chunks` is shared by all nodes of a test: replication is instant here."""

    def __init__(self, node_id: int, chunks: dict[bytes, bytearray]) -> None:
        self.node_id = node_id
        self.chunks = chunks
        self.tags: dict[tuple[bytes, int, int], storage_pb2.WriteResult] = {}
        self.reads: list[storage_pb2.ReadRequest] = []
        self.writes: list[storage_pb2.WriteRequest] = []
        self.synced: list[int] = []
        self.touches: list[storage_pb2.KvTouchRequest] = []
        self.applied = 0
        self.fail_reads: KvfsError | None = None
        self.fail_writes: list[KvfsError] = []
        self.corrupt = False
        self.silent = False
        self.cut_reply = False
        self.mangle = False
        self.forget_reply = 0
        """Carry that many writes out, and then lose the connection instead of answering."""
        self.hold: trio.Event | None = None
        self.hold_answers: trio.Event | None = None
        """What was written is there, and its answer is on its way until then."""
        self.drop: Callable[[], None] = lambda: None

    async def read(self, request: storage_pb2.ReadRequest, call: Call) -> storage_pb2.ReadReply:
        self.reads.append(request)
        if self.silent:
            await trio.sleep_forever()
        if self.hold is not None:
            await self.hold.wait()
        if self.fail_reads is not None:
            raise self.fail_reads
        reply = storage_pb2.ReadReply()
        placed = []
        for io, view in zip(request.reads, call.bulk.sink(), strict=True):
            chunk = self.chunks.get(io.chunk_id)
            if chunk is None:
                reply.results.add(status=ChunkNotFound.code)
                placed.append(0)
                continue
            data = bytes(chunk[io.offset : io.offset + io.length - self.cut_reply])
            view[: len(data)] = data
            reply.results.add(length=len(data), checksums=checksums(data, io.offset), version=1, chunk_length=len(chunk))
            if self.corrupt and data:
                view[0] ^= 0xFF
            placed.append(len(data))
        call.bulk.placed(placed)
        return reply

    async def write(self, request: storage_pb2.WriteRequest, call: Call) -> storage_pb2.WriteReply:
        self.writes.append(request)
        if self.silent:
            await trio.sleep_forever()
        if self.hold is not None:
            await self.hold.wait()
        reply = storage_pb2.WriteReply()
        views = iter(await call.bulk.source())
        failure = self.fail_writes.pop(0) if self.fail_writes else None
        for io in request.writes:
            view = next(views) if io.kind in (storage_pb2.WRITE, storage_pb2.CREATE) else None
            if failure is not None:
                reply.results.add(status=failure.code, message=failure.message)
                continue
            tag = (io.tag.client_id, io.tag.channel, io.tag.sequence)
            if self.mangle:
                reply.results.add(status=ChecksumMismatch.code)
                continue
            if tag not in self.tags:
                self.tags[tag] = self._apply(io, view)
            reply.results.append(self.tags[tag])
        if self.hold_answers is not None:
            await self.hold_answers.wait()
        if self.forget_reply:
            self.forget_reply -= 1
            self.drop()
            await trio.sleep_forever()
        return reply

    def _apply(self, io: storage_pb2.WriteIO, view: memoryview | None) -> storage_pb2.WriteResult:
        self.applied += 1
        if view is not None:
            data = bytes(view)
            if not verify(data, io.offset, io.checksums):
                return storage_pb2.WriteResult(status=ChecksumMismatch.code)
            chunk = self.chunks.setdefault(io.chunk_id, bytearray())
            if len(chunk) < io.offset:
                chunk.extend(bytes(io.offset - len(chunk)))
            chunk[io.offset : io.offset + len(data)] = data
            return storage_pb2.WriteResult(version=1, chunk_length=len(chunk))
        return storage_pb2.WriteResult(version=1)

    def kv_touch(self, request: storage_pb2.KvTouchRequest, call: Call) -> base_pb2.Empty:
        self.touches.append(request)
        return base_pb2.Empty()

    def remove_range(self, request: storage_pb2.RemoveRangeRequest, call: Call) -> storage_pb2.RemoveRangeReply:
        """Here all chains have their chunks in one place."""
        first, end = request.first_index, request.end_index or 1 << 60
        inode = request.inode.to_bytes(8, "big")
        keys = [key for key in self.chunks if key[:8] == inode and first <= int.from_bytes(key[8:], "big") < end]
        for key in keys:
            del self.chunks[key]
        return storage_pb2.RemoveRangeReply(removed=len(keys))

    async def sync(self, request: storage_pb2.SyncRequest, call: Call) -> storage_pb2.SyncReply:
        if self.silent:
            await trio.sleep_forever()
        self.synced += request.target_ids
        return storage_pb2.SyncReply()


class FakeMeta:
    def __init__(self, chunks: dict[bytes, bytearray], chains: list[int]) -> None:
        self.chunks = chunks
        self.chains = chains
        self.inodes: dict[int, meta_pb2.Inode] = {}
        self.lease_ms = 1000
        self.closes: list[meta_pb2.CloseRequest] = []
        self.ended: list[tuple[int, bytes]] = []
        """Sessions that ended with nothing to report, as requests told."""
        self.end_requests = 0
        self.cut_fails: KvfsError | None = None
        self.cuts_left: dict[int, int] = {}
        """Lengths of truncations that failed and wait to be carried out."""
        self.fail_ends: KvfsError | None = None
        self.asked = 0
        self.hold_answers: trio.Event | None = None
        """Answers to GetAttr and Close are on their way until then."""
        self.events: dict[bytes, list[int]] = {}
        self.sequence: dict[bytes, int] = {}
        self.acknowledged: dict[bytes, int] = {}
        self.epoch = 1
        self.changed = trio.Event()

    def make(self, number: int, *, chunk_size: int = CHUNK, length: int = 0) -> meta_pb2.Inode:
        inode = meta_pb2.Inode(inode=number, type=meta_pb2.FILE, mode=0o644, nlink=1, length=length, attr_lease_ms=self.lease_ms)
        inode.layout.chunk_size = chunk_size
        inode.layout.chain_ids.extend(self.chains)
        self.inodes[number] = inode
        return self.copy(number)

    def copy(self, number: int) -> meta_pb2.Inode:
        inode = meta_pb2.Inode()
        if number in self.inodes:
            inode.CopyFrom(self.inodes[number])
            inode.attr_lease_ms = self.lease_ms
        return inode

    def end_sessions(self, request: meta_pb2.EndSessionsRequest, call: Call) -> base_pb2.Empty:
        self.end_requests += 1
        if self.fail_ends is not None:
            raise self.fail_ends
        self.hear(request.context)
        return base_pb2.Empty()

    def hear(self, context: meta_pb2.Context) -> None:
        self.ended += [(each.inode, each.session) for each in context.ended]

    async def get_attr(self, request: meta_pb2.GetAttrRequest, call: Call) -> meta_pb2.GetAttrReply:
        self.hear(request.context)
        self.asked += 1
        reply = meta_pb2.GetAttrReply(inodes=[self.copy(number) for number in request.inodes])
        if self.hold_answers is not None:
            await self.hold_answers.wait()
        return reply

    def open(self, request: meta_pb2.OpenRequest, call: Call) -> meta_pb2.InodeReply:
        if request.inode not in self.inodes:
            raise NotFound("no such inode")
        return meta_pb2.InodeReply(inode=self.copy(request.inode))

    async def close(self, request: meta_pb2.CloseRequest, call: Call) -> meta_pb2.InodeReply:
        self.closes.append(request)
        if request.inode not in self.inodes:
            return meta_pb2.InodeReply(inode=self.copy(request.inode))
        inode = self.inodes[request.inode]
        if request.wrote:
            inode.data_version += 1
            if request.truncate_version == inode.truncate_version:
                inode.length = max(inode.length, request.length)
            if request.uncertain or request.truncate_version != inode.truncate_version:
                self.finish_cut(request.inode)
                inode.length = max(inode.length, self.measure(request.inode))
        reply = meta_pb2.InodeReply(inode=self.copy(request.inode))
        if self.hold_answers is not None:
            await self.hold_answers.wait()
        return reply

    def append(self, request: meta_pb2.AppendRequest, call: Call) -> meta_pb2.AppendReply:
        inode = self.inodes[request.inode]
        self.finish_cut(request.inode)
        offset = inode.length
        inode.length += request.length
        inode.data_version += 1
        return meta_pb2.AppendReply(offset=offset, inode=self.copy(request.inode))

    def set_attr(self, request: meta_pb2.SetAttrRequest, call: Call) -> meta_pb2.InodeReply:
        inode = self.inodes[request.inode]
        if request.HasField("length"):
            self.cut(request.inode, request.length)
        return meta_pb2.InodeReply(inode=self.copy(inode.inode))

    def cut(self, number: int, length: int) -> None:
        inode = self.inodes[number]
        self.cuts_left[number] = length
        inode.truncate_version += 1
        inode.length = length
        inode.data_version += 1
        self.finish_cut(number)

    def measure(self, number: int) -> int:
        size = self.inodes[number].layout.chunk_size
        chunks = {key[8:]: len(chunk) for key, chunk in self.chunks.items() if chunk and key[:8] == number.to_bytes(8, "big")}
        return max((int.from_bytes(index, "big") * size + length for index, length in chunks.items()), default=0)

    def finish_cut(self, number: int) -> None:
        length = self.cuts_left.get(number)
        if length is None:
            return
        if self.cut_fails is not None:
            raise self.cut_fails
        del self.cuts_left[number]
        size = self.inodes[number].layout.chunk_size
        for chunk_id in [key for key in self.chunks if key[:8] == number.to_bytes(8, "big")]:
            start = int.from_bytes(chunk_id[8:], "big") * size
            if start >= length:
                del self.chunks[chunk_id]
            else:
                del self.chunks[chunk_id][length - start :]

    async def watch(self, request: meta_pb2.WatchRequest, call: Call) -> meta_pb2.WatchReply:
        who = call.peer.client_id
        events = self.events.setdefault(who, [])
        self.acknowledged[who] = request.acknowledged
        with trio.move_on_after(request.wait_ms / 1000):
            while not events and request.epoch == self.epoch:
                await self.changed.wait()
        inodes = list(events)
        events.clear()
        self.sequence[who] = self.sequence.get(who, 0) + bool(inodes)
        return meta_pb2.WatchReply(sequence=self.sequence[who], inodes=inodes, epoch=self.epoch)

    async def revoke(self, number: int) -> None:
        """Tell all clients, and wait until they have acknowledged."""
        for events in self.events.values():
            events.append(number)
        self.wake()
        while any(self.events.values()) or self.acknowledged != self.sequence:
            await trio.sleep(0.002)

    def wake(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


class FakeRouting:
    """A manager's place: routing that tests change."""

    def __init__(self) -> None:
        self.message = cluster_pb2.RoutingInfo(version=1, cluster_id="fake")
        self.routing = Routing(self.message)
        self.refreshes = 0
        self.on_refresh: Callable[[], None] = lambda: None
        self.callbacks: list[Callable[[Routing], None]] = []

    def update(self) -> None:
        self.message.version += 1
        copy = cluster_pb2.RoutingInfo()
        copy.CopyFrom(self.message)
        self.routing = Routing(copy)
        for callback in self.callbacks:
            callback(self.routing)

    def on_routing(self, callback: Callable[[Routing], None]) -> None:
        self.callbacks.append(callback)

    async def refresh(self, *, timeout_s: float = 5.0) -> Routing:
        self.refreshes += 1
        self.on_refresh()
        return self.routing


class World:
    def __init__(self) -> None:
        self.chunks: dict[bytes, bytearray] = {}
        self.routing = FakeRouting()
        self.storage: list[FakeStorage] = []
        self.meta: FakeMeta
        self.clients: list[AsyncClient] = []
        self.scopes: list[trio.CancelScope] = []
        self.client: AsyncClient
        self.numbers = itertools.count(100)

    def content(self, number: int) -> bytes:
        """What a file holds according to the services alone."""
        inode = self.meta.inodes[number]
        size = inode.layout.chunk_size
        data = bytearray(inode.length)
        for chunk_id, chunk in self.chunks.items():
            if chunk_id[:8] == number.to_bytes(8, "big"):
                start = int.from_bytes(chunk_id[8:], "big") * size
                part = chunk[: max(0, inode.length - start)]
                data[start : start + len(part)] = part
        return bytes(data)

    def head_only(self, place: int) -> None:
        """The manager drops node `place` from all chains."""
        for chain in self.routing.message.chains:
            for member in chain.targets:
                if member.target_id == 1000 * (place + 1) + chain.chain_id:
                    member.state = cluster_pb2.PUBLIC_OFFLINE
            members = sorted(chain.targets, key=lambda member: member.state != cluster_pb2.SERVING)
            copies = [cluster_pb2.ChainTarget(target_id=member.target_id, state=member.state) for member in members]
            del chain.targets[:]
            chain.targets.extend(copies)
            chain.version += 1
        self.routing.update()


@asynccontextmanager
async def world(
    *, nodes: int = 2, chains: int = 2, config: ClientConfig | None = None, shared_memory: bool = True, clients: int = 1
) -> AsyncIterator[World]:
    """`nodes` fake storage services, every chain on all of them (heads rotate), one fake meta, one client or more."""
    made = World()
    clock, net = SystemClock(), SystemNet()
    here = Identity().host_id
    numbers = list(range(1, chains + 1))
    made.meta = FakeMeta(made.chunks, numbers)
    with tempfile.TemporaryDirectory() as folder:
        async with trio.open_nursery() as services:

            async def serve(service: str, handler: Any, node_id: int, task_status: Any) -> None:
                with trio.CancelScope() as scope:
                    made.scopes.append(scope)
                    server = RpcServer(
                        net, clock, Identity(cluster_id="fake", client_id=SeededRandom(node_id).bytes(16), role=service.lower(), node_id=node_id)
                    )
                    server.add(service, handler)
                    await server.serve(
                        ["tcp://127.0.0.1:0"] + ([f"unix://{folder}/{node_id}.sock"] if shared_memory else []), task_status=task_status
                    )

            for place in range(nodes):
                fake = FakeStorage(place + 1, made.chunks)
                made.storage.append(fake)
                addresses = await services.start(lambda task_status, fake=fake, place=place: serve("Storage", fake, place + 1, task_status))
                made.routing.message.nodes.add(node_id=place + 1, role=cluster_pb2.ROLE_STORAGE, addresses=addresses, host_id=here, alive=True)
            addresses = await services.start(lambda task_status: serve("Meta", made.meta, 50, task_status))
            made.routing.message.nodes.add(node_id=50, role=cluster_pb2.ROLE_META, addresses=addresses, host_id=here, alive=True)
            for chain in numbers:
                members = []
                for place in range(nodes):
                    node = (place + chain) % nodes + 1
                    target = 1000 * node + chain
                    made.routing.message.targets.add(target_id=target, node_id=node, chain_id=chain)
                    members.append(cluster_pb2.ChainTarget(target_id=target, state=cluster_pb2.SERVING))
                made.routing.message.chains.add(chain_id=chain, version=1, targets=members)
            made.routing.update()
            config = config or ClientConfig(buffer_pool_bytes=32 << 20)
            for number in range(clients):
                random = SeededRandom(1 + number)
                identity = Identity(cluster_id="fake", client_id=random.bytes(16))
                pool = await services.start(_hold_pool, net, clock, identity, shared_memory)
                client = AsyncClient(
                    source=made.routing,
                    caller=pool,
                    clock=clock,
                    random=random,
                    identity=identity,
                    user=User(0, 0),
                    config=config,
                    nursery=services,
                )
                client.start()
                made.clients.append(client)
            made.client = made.clients[0]
            while not all(client.watcher.epoch for client in made.clients):
                await trio.sleep(0.002)
            for fake, scope in zip(made.storage, made.scopes, strict=False):
                fake.drop = scope.cancel
            try:
                yield made
            finally:
                services.cancel_scope.cancel()
        for client in made.clients:
            client.memory.close()


async def _hold_pool(net: Any, clock: Any, identity: Identity, shared_memory: bool, *, task_status: Any) -> None:
    async with ChannelPool(net, clock, identity, shared_memory=shared_memory) as pool:
        task_status.started(pool)
        await trio.sleep_forever()


EMPTY = base_pb2.Empty()


def run(test: Callable[..., Any], limit_s: float = 20.0) -> None:
    """trio.run with a limit, and an exception of the test itself instead of a group around it."""

    async def main() -> None:
        with trio.fail_after(limit_s):
            await test()

    try:
        trio.run(main)
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        raise error from None
