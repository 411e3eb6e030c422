"""A mini cluster with the client's own storage side over it, and short ways to put and get KV-cache blocks."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from mini_cluster import MiniCluster, mini_cluster

from kvfs.client.config import ClientConfig
from kvfs.client.peers import Peers
from kvfs.client.storage_blocks import Probe
from kvfs.client.storage_client import StorageClient
from kvfs.client.storage_reads import ChunkRead
from kvfs.client.storage_writes import ChunkWrite, WriteDone
from kvfs.common.boundary.clock import SystemClock
from kvfs.common.boundary.random import SystemRandom
from kvfs.common.errors import KvfsError
from kvfs.common.ids import SPACE_BIT, block_id
from kvfs.common.wire import storage_pb2 as pb

INODE = SPACE_BIT | 77
BLOCK_BYTES = 12_000
SLAB_BYTES = 12_288


def digest(key: int) -> bytes:
    return hashlib.blake2b(b"%d" % key, digest_size=16).digest()


def content(key: int, length: int = BLOCK_BYTES) -> bytes:
    return (digest(key) * (length // 16 + 1))[:length]


class Blocks:
    """One client and one space on one chain at a time."""

    def __init__(self, world: MiniCluster, client: StorageClient) -> None:
        self.world = world
        self.client = client
        self.space = pb.KvSpace(inode=INODE, version=1)
        self.slab_bytes = 0
        self.place = 0
        """Which of the chains."""
        self.sizes(BLOCK_BYTES)

    def sizes(self, block_bytes: int) -> None:
        """Of the blocks to come: before the first one."""
        self.space.block_bytes = block_bytes
        self.slab_bytes = -(-block_bytes // 4096) * 4096

    @property
    def chain(self) -> int:
        return list(self.world.routing.chains)[self.place].chain_id

    async def put(self, keys: Sequence[int], contents: Sequence[bytes] = ()) -> list[WriteDone | KvfsError]:
        datas = contents or [content(key) for key in keys]
        writes = [
            ChunkWrite(self.chain, block_id(INODE, digest(key)), 0, len(data), self.space.block_bytes, data, pb.CREATE, self.slab_bytes, self.space)
            for key, data in zip(keys, datas, strict=True)
        ]
        return await self.client.write_each(writes)

    async def get(self, keys: Sequence[int], length: int = BLOCK_BYTES) -> list[bytes | None]:
        """None: a miss."""
        buffers = [memoryview(bytearray(length)) for _ in keys]
        reads = [ChunkRead(self.chain, block_id(INODE, digest(key)), 0, length, buffer) for key, buffer in zip(keys, buffers, strict=True)]
        found: list[bytes | None] = []
        for done in await self.client.read_each(reads):
            if isinstance(done, KvfsError):
                raise done
            found.append(bytes(done.view[: done.length]) if done.found else None)
        return found

    async def present(self, keys: Sequence[int], *, touch: bool = False) -> list[bool]:
        [bits] = await self.client.probe([Probe(self.chain, INODE, b"".join(map(digest, keys)), touch)])
        if isinstance(bits, KvfsError):
            raise bits
        return [bool(bits[place // 8] >> place % 8 & 1) for place in range(len(keys))]

    def service_of(self, target: int) -> int:
        """The number of the service that has a target."""
        node = self.world.routing.target(target).node_id
        return next(number for number, started in self.world.started.items() if started["node_id"] == node)

    async def stats(self) -> dict[int, pb.KvSpaceStats]:
        return {stats.target_id: stats for stats in await self.client.space_stats(INODE)}


@asynccontextmanager
async def block_world(path: Path, *, replicas: int = 1, settings: dict[str, object] | None = None, targets: int = 1) -> AsyncIterator[Blocks]:
    """`targets`: on each disk."""
    async with mini_cluster(path) as world:
        world.settings.update(settings or {})
        for number in range(1, replicas + 1):
            await world.start(number)
        await world.create(replicas, replicas, targets)
        async with trio.open_nursery() as nursery:
            yield Blocks(world, client_of(world, nursery))
            nursery.cancel_scope.cancel()


def client_of(world: MiniCluster, nursery: trio.Nursery) -> StorageClient:
    """Another client, with tags of its own."""
    config = ClientConfig()
    peers = Peers(world.link, world.pool, SystemClock(), SystemRandom(), world.pool.identity.host_id, config.suspect_s)
    return StorageClient(peers, config, SystemRandom().bytes(16), nursery)
