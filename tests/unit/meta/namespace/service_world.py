"""The Meta service without a network: handlers called directly, chunks kept in a dictionary, time under the test's control."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import trio
import trio.testing

from kvfs.common.boundary.clock import Clock
from kvfs.common.boundary.random import SeededRandom
from kvfs.common.errors import NoServingTarget
from kvfs.common.routing import Routing
from kvfs.common.wire import cluster_pb2
from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.gc.chunks import Chunks, LastChunk, Turn
from kvfs.meta.kv import Engine
from kvfs.meta.kv.memory import MemoryEngine
from kvfs.meta.namespace import fsck, store
from kvfs.meta.service import MetaService

CHAINS = (11, 12, 13, 14)
SIZE = 1 << 20
_REQUESTS = itertools.count(1)
A, B, C = b"a" * 16, b"b" * 16, b"c" * 16


class TestClock(Clock):
    __test__ = False
    wrong_s = 0

    def monotonic(self) -> float:
        return trio.current_time()

    def wall_ns(self) -> int:
        return 10**18 + int((trio.current_time() + self.wrong_s) * 1e9)

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)


class FakeChunks(Chunks):
    """Chunks by chain, inode and index: their lengths. `failing`: chains that refuse."""

    def __init__(self) -> None:
        self.lengths: dict[tuple[int, int, int], int] = {}
        self.failing: set[int] = set()
        self.calls: list[tuple[str, int, int]] = []
        self.delay_s = 0.0

    def write(self, inode: pb.Inode, end: int) -> None:
        """As a client does that writes [0, end)."""
        for index in range(-(-end // inode.layout.chunk_size)):
            chain = inode.layout.chain_ids[index % len(inode.layout.chain_ids)]
            self.lengths[chain, inode.inode, index] = min(inode.layout.chunk_size, end - index * inode.layout.chunk_size)

    def of(self, inode: int) -> dict[int, int]:
        return {index: length for (_, number, index), length in sorted(self.lengths.items()) if number == inode}

    async def _called(self, what: str, chain_id: int, inode: int) -> None:
        self.calls.append((what, chain_id, inode))
        await trio.sleep(self.delay_s)
        if chain_id in self.failing:
            raise NoServingTarget(f"chain {chain_id} fails")

    async def remove(self, chain_id: int, inode: int, first_index: int, turn: Turn | None = None) -> None:
        await self._called("remove", chain_id, inode)
        for key in [key for key in self.lengths if key[:2] == (chain_id, inode) and key[2] >= first_index]:
            del self.lengths[key]

    async def cut(self, chain_id: int, inode: int, index: int, length: int, chunk_size: int, turn: Turn) -> None:
        await self._called("cut", chain_id, inode)
        key = (chain_id, inode, index)
        if key in self.lengths:
            self.lengths[key] = min(self.lengths[key], length)

    async def last(self, chain_id: int, inode: int) -> LastChunk | None:
        await self._called("last", chain_id, inode)
        found = [(index, length) for (chain, number, index), length in self.lengths.items() if (chain, number) == (chain_id, inode)]
        return LastChunk(*max(found)) if found else None


class _Peer:
    def __init__(self, client_id: bytes) -> None:
        self.client_id = client_id


class FakeCall:
    def __init__(self, client_id: bytes) -> None:
        self.peer = _Peer(client_id)

    def remaining_s(self) -> float:
        return 60.0


def routing(metas: int = 1) -> Routing:
    table = cluster_pb2.ChainTable(table_id=1, chain_ids=CHAINS, replicas=2)
    targets = [cluster_pb2.Target(target_id=n, node_id=n, disk=0, used_bytes=400 if n > 1 else 300, free_bytes=600) for n in range(1, 5)]
    targets.append(cluster_pb2.Target(target_id=9, node_id=1, disk=0, used_bytes=100, free_bytes=600))
    nodes = [cluster_pb2.Node(node_id=n + 50, role=cluster_pb2.ROLE_META, alive=True) for n in range(metas)]
    return Routing(cluster_pb2.RoutingInfo(version=1, tables=[table], targets=targets, nodes=nodes))


class Service:
    """One run of the service; several may follow each other on one engine."""

    def __init__(self, engine: Engine | None = None, chunks: FakeChunks | None = None, *, seed: int = 7, **settings: Any) -> None:
        self.engine = engine or MemoryEngine()
        self.chunks = chunks or FakeChunks()
        self.routing = routing()
        self.clock = TestClock()
        settings.setdefault("gc_delay_s", 0.0)
        self.meta = MetaService(self.engine, self.clock, SeededRandom(seed), self.chunks, lambda: self.routing, **settings)

    async def start(self) -> Service:
        made = await self.engine.transact(lambda txn: store.prepare(txn, self.clock.wall_ns()))
        if not made:
            self.meta.changes.hold(self.meta.leases.lease_ms / 1000)
        await self.meta.numbers.ensure()
        return self

    def new_request_id(self) -> bytes:
        return next(_REQUESTS).to_bytes(16, "big")

    async def call(self, method: str, request: Any, client: bytes = A, *, request_id: bytes | None = None) -> Any:
        if hasattr(request, "context"):
            request.context.request_id = self.new_request_id() if request_id is None else request_id
        reply = getattr(self.meta, method)(request, FakeCall(client))
        return await reply if isinstance(reply, Awaitable) else reply

    async def create(self, name: bytes, client: bytes = A, **fields: Any) -> pb.Inode:
        fields.setdefault("mode", 0o644)
        reply = await self.call("create", pb.CreateRequest(parent=fields.pop("parent", 1), name=name, **fields), client)
        found: pb.Inode = reply.inode
        return found

    async def stat(self, inode: int, client: bytes = A) -> pb.Inode:
        reply = await self.call("get_attr", pb.GetAttrRequest(inodes=[inode]), client)
        found: pb.Inode = reply.inodes[0]
        return found

    async def write(self, inode: pb.Inode, end: int, client: bytes = A, **fields: Any) -> pb.Inode:
        self.chunks.write(inode, end)
        reply = await self.call(
            "close", pb.CloseRequest(inode=inode.inode, wrote=True, length=end, truncate_version=inode.truncate_version, **fields), client
        )
        found: pb.Inode = reply.inode
        return found

    async def remove(self, name: bytes, client: bytes = A, **fields: Any) -> pb.Inode:
        reply = await self.call("remove", pb.RemoveRequest(parent=1, name=name, **fields), client)
        found: pb.Inode = reply.inode
        return found

    async def check(self) -> None:
        assert await fsck.check_all(self.engine) == []


def run(test: Callable[[], Awaitable[None]]) -> None:
    """On a clock that jumps over every wait."""
    trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))
