"""Servers and clients for the wire tests, on every transport: TCP, shared memory, and both of them simulated."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio
import trio.testing

from kvfs.common.boundary.clock import Clock, SystemClock
from kvfs.common.boundary.net import Net
from kvfs.common.boundary.random import SeededRandom
from kvfs.common.boundary.system_net import SystemNet
from kvfs.common.sim.clock import SimClock
from kvfs.common.sim.net import SimFabric
from kvfs.common.transport.region import BufferPool
from kvfs.common.wire import base_pb2, storage_pb2
from kvfs.common.wire.channel import ChannelPool
from kvfs.common.wire.frame import Limits
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.server import RpcServer
from kvfs.common.wire.service import method

READ = method("Storage", "Read")
WRITE = method("Storage", "Write")
VERSION = method("Storage", "Version")
LAST = method("Storage", "LastChunk")
LIST = method("Storage", "ListChunks")
SYNC = method("Storage", "Sync")

TRANSPORTS = ("tcp", "shm", "sim-tcp", "sim-shm")


class World:
    """One test's network."""

    def __init__(self, transport: str, folder: str) -> None:
        self.transport = transport
        self.shares_memory = transport.endswith("shm")
        self.fabric = SimFabric(SeededRandom(7), latency_s=(0.0, 0.002)) if transport.startswith("sim") else None
        self.folder = folder
        self.net: Net = self.fabric.host("here") if self.fabric else SystemNet()
        self.clock: Clock = SimClock() if self.fabric else SystemClock()
        self._count = 0

    def address(self) -> str:
        self._count += 1
        if self.shares_memory:
            return f"unix://{self.folder}/{self._count}.sock"
        return "tcp://here:0" if self.fabric else "tcp://127.0.0.1:0"

    def identity(self, role: str = "client", cluster: str = "c1") -> Identity:
        return Identity(cluster, os.urandom(16), role)

    @asynccontextmanager
    async def serve(
        self,
        handler: object,
        *,
        limits: Limits = Limits(),  # noqa: B008
        cluster: str = "c1",
        lends_files: bool = False,
    ) -> AsyncIterator[list[str]]:
        server = RpcServer(self.net, self.clock, self.identity("storage", cluster), limits=limits, lends_files=lends_files)
        server.add("Storage", handler)
        async with trio.open_nursery() as nursery:
            addresses: list[str] = await nursery.start(server.serve, [self.address()])
            yield addresses
            nursery.cancel_scope.cancel()

    def pool(self, **more: Any) -> ChannelPool:
        return ChannelPool(self.net, self.clock, self.identity(), **more)


def on_transport(transport: str, test: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(60), tempfile.TemporaryDirectory() as folder:
            await test(World(transport, folder))

    if transport.startswith("sim"):
        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    else:
        trio.run(main)


class Store:
    """A handler that keeps named byte strings: WRITE stores the spans, READ gives them back. What it waits for is in the test's hands."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.data: list[bytes] = []
        self.running = 0
        self.most_running = 0
        self.finished = 0
        self.gate = trio.Event()
        self.entered = trio.Event()
        self.callers: list[Identity] = []

    def version(self, request: Any, call: Any) -> Any:
        self.callers.append(call.peer)
        return storage_pb2.VersionReply(versions=[request.chain_id, call.bulk.count])

    async def last_chunk(self, request: Any, call: Any) -> Any:
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            await self.world.clock.sleep(request.inode / 1000)
            return storage_pb2.LastChunkReply(found=True, index=request.target_id)
        finally:
            self.running -= 1
            self.finished += 1

    async def write(self, request: Any, call: Any) -> Any:
        self.data = [bytes(view) for view in await call.bulk.source()]
        return storage_pb2.WriteReply()

    def read(self, request: Any, call: Any) -> Any:
        sizes = []
        for view, part in zip(call.bulk.sink(), self.data, strict=True):
            size = min(len(view), len(part))
            view[:size] = part[:size]
            sizes.append(size)
        if sizes != call.bulk.lengths:
            call.bulk.placed(sizes)
        return storage_pb2.ReadReply(results=[storage_pb2.ReadResult(length=size) for size in sizes])

    async def list_chunks(self, request: Any, call: Any) -> Any:
        self.entered.set()
        await self.gate.wait()
        return storage_pb2.ListChunksReply()


def version(number: int = 1) -> Any:
    return storage_pb2.VersionRequest(chain_id=number)


def sleep_ms(duration_ms: int, number: int = 0) -> Any:
    return storage_pb2.LastChunkRequest(inode=duration_ms, target_id=number)


def read() -> Any:
    return storage_pb2.ReadRequest()


def write() -> Any:
    return storage_pb2.WriteRequest()


Empty = base_pb2.Empty


def buffers(total: int = 16 << 20) -> BufferPool:
    return BufferPool(total)
