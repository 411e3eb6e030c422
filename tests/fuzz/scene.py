"""A real cluster under attack: files that must stay as they are, facts and recorded requests for the mutator, and what to check at the end.

Owns the choice of what is protected. What the attacker may validly harm lies elsewhere and is removed at the end, so that fsck of the whole cluster
must then be clean.
"""

from __future__ import annotations

import os
import random
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from kvfs.client.async_client import AsyncClient, open_client
from kvfs.client.config import ClientConfig
from kvfs.client.locate import ClusterAddress
from kvfs.client.user import User
from kvfs.common.boundary.clock import SystemClock
from kvfs.common.boundary.random import SystemRandom
from kvfs.common.boundary.system_net import SystemNet
from kvfs.common.errors import KvfsError
from kvfs.common.ids import chunk_inode, is_space
from kvfs.common.wire import cluster_pb2, meta_pb2, storage_pb2
from kvfs.common.wire.channel import ChannelPool
from kvfs.common.wire.frame import Kind, encode
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.service import METHODS, SERVICES, Method, method

from .facts import Facts, chunk_ids
from .mutate import Corpus
from .recording import Recording, RecordingNet

CONFIG = ClientConfig(buffer_pool_bytes=32 << 20, shared_memory=False, deadline_s=30)
FILES = {"/kept/small": 1000, "/kept/chunks": 2_500_000, "/kept/empty": 0}
PEOPLE = User(0, 0)
PAYLOAD_MAX = 70_000
"""Longer requests are not kept: frames are many, and what is wrong with them is in their beginning."""


@dataclass(slots=True)
class Door:
    """One address of one service."""

    node: int
    address: str
    service: str
    methods: list[Method] = field(default_factory=list)

    @property
    def carries_fds(self) -> bool:
        return self.address.startswith("unix://")


def content(name: str) -> bytes:
    return random.Random(name).randbytes(FILES[name])


@dataclass(slots=True)
class Scene:
    cluster: ClusterAddress
    facts: Facts
    corpus: Corpus
    chains: list[int]
    """Those of before the attack."""
    doors: list[Door]

    def hello(self, chance: random.Random) -> bytes:
        identity = Identity(self.cluster.cluster_id, chance.randbytes(16), chance.choice(("client", "storage", "meta", "admin", "mount")))
        return encode(Kind.HELLO, 0, identity.hello())


async def prepare(cluster: ClusterAddress, nodes: list[dict[str, Any]]) -> Scene:
    """`nodes`: the processes, as `kvfs status` shows them."""
    async with open_client(cluster, user=PEOPLE, config=CONFIG) as client:
        await client.mkdir("/kept", 0o700)
        for name in FILES:
            await client.write_bytes(name, content(name))
        kept = [inode.inode for _, inode in await client.scandir("/kept")] + [(await client.stat("/kept")).inode]
        await client.mkdir("/gap")
        for number in range(300):  # so that no small change of an inode number leads to a protected one
            await client.mkdir(f"/gap/{number}")
    recording = Recording()
    async with open_client(cluster, user=PEOPLE, config=CONFIG, net=RecordingNet(recording)) as client:
        facts = await _traffic(client)
        chains = [chain.chain_id for chain in client.routing.chains]
    facts.protected = frozenset(kept)
    doors = []
    node_at: dict[str, int] = {}
    for node in nodes:
        service = {"manager": "Manager", "meta": "Meta", "storage": "Storage"}[node["role"]]
        for address in (full.partition("?")[0] for full in node["addresses"]):
            node_at[address] = node["node_id"]
            doors.append(Door(node["node_id"], address, service, list(SERVICES[service].values())))
    facts.nodes = frozenset(node_at.values())
    corpus: Corpus = defaultdict(list)
    for address, frame in recording.requests():
        known = METHODS[frame.header.method]
        if len(frame.payload) <= PAYLOAD_MAX and not facts.harms(known.request.FromString(frame.message)):
            corpus[node_at[address], known.key].append(frame)
    return Scene(cluster, facts, dict(corpus), chains, doors)


async def _traffic(client: AsyncClient) -> Facts:
    """What a client does in a life: most methods of all services. Returns what it met."""
    await client.mkdir("/wild", 0o777)
    await client.write_bytes("/wild/a", b"a" * 3000)
    await client.write_bytes("/wild/b", os.urandom(2_100_000))
    for number in range(8):  # heads on every node
        await client.write_bytes(f"/wild/small{number}", os.urandom(500))
    async with await client.open("/wild/a", "r+b") as file:
        await file.read(100)
        await file.write(b"over")
        await file.fsync()
        await file.truncate(500)
    async with await client.open("/wild/a", "ab") as file:
        await file.write(b"more")
    await client.read_bytes("/wild/b")
    await client.mkdir("/wild/d")
    await client.symlink("a", "/wild/s")
    await client.link("/wild/a", "/wild/l")
    await client.rename("/wild/l", "/wild/m")
    await client.setxattr("/wild/a", "user.x", b"1")
    await client.getxattr("/wild/a", "user.x")
    await client.listxattr("/wild/a")
    await client.removexattr("/wild/a", "user.x")
    await client.chmod("/wild/a", 0o640)
    await client.utimens("/wild/a", 1, 2)
    await client.truncate("/wild/b", 100_000)
    await client.listdir("/wild")
    await client.statfs()
    await client.unlink("/wild/m")
    await client.rmdir("/wild/d")
    root = (await client.stat("/")).inode
    kvcache = (await client.stat("/kvcache") if await client.exists("/kvcache") else await client.mkdir("/kvcache")).inode
    parameters = meta_pb2.Space(block_tokens=16, block_bytes=1 << 20, digest=bytes(16))
    space = (await client.meta.make(kvcache, b"wild", meta_pb2.DIRECTORY, 0o755, space=parameters)).inode
    await client.storage.space_stats(space)
    await client.meta.status()
    await client.meta.collect_garbage()
    await client.meta.fsck(limit=5)
    await client.meta.set_layout((await client.stat("/wild")).inode, meta_pb2.Layout(table_id=1, chunk_size=1 << 16, stripe=1))
    inodes = [root, kvcache, space]
    sessions = [os.urandom(16) for _ in range(4)]
    for name in ("/wild", "/wild/a", "/wild/b"):
        inodes.append((await client.stat(name)).inode)
    digests = [bytes([number]) * 16 for number in range(6)]
    files = [number for number in inodes if number > 1]
    return _facts_of(client, inodes, files, space, sessions, digests)


def _facts_of(client: AsyncClient, inodes: list[int], files: list[int], space: int, sessions: list[bytes], digests: list[bytes]) -> Facts:
    routing = client.routing
    facts = Facts(targets=frozenset(target.target_id for target in routing.targets))
    for chain in routing.chains:
        before = 0
        for member in chain.targets:
            scene = {"chain_id": chain.chain_id, "chain_version": chain.version, "target_id": member.target_id, "target_ids": member.target_id}
            node = routing.target(member.target_id).node_id
            facts.scenes.setdefault(node, []).extend([{**scene, "from_target": before}, {**scene, "from_target": 0}])
            before = member.target_id
    chunks = [*chunk_ids(files), *(space.to_bytes(8, "big") + digest for digest in digests)]
    names = [b"a", b"b", b"new", b"wild", b"s", b".", b"..", b"user.x"]
    facts.values = {
        **dict.fromkeys(("inode", "inodes", "parent", "new_parent"), inodes),
        **dict.fromkeys(("name", "new_name", "names", "path"), names),
        **dict.fromkeys(("chunk_id", "chunk_ids"), chunks),
        "after": [b"", *chunks],
        "session": sessions,
        "digests": [*digests, b"".join(digests)],
        "client_id": [client.client_id, *sessions],
        "request_id": sessions,
        "uid": [0, 0, 0, 1000],
        "gid": [0, 0, 1000],
        "mode": [0o644, 0o755, 0o7777],
        "node_id": [900, 901],
        "node_uuid": ["fuzz-1", "fuzz-2", "fuzz-3"],
        "addresses": ["tcp://127.0.0.1:1"],
        "table_id": [1, 1, 2],
        "chunk_size": [1 << 20, 1 << 16],
        "wait_ms": [0, 10, 100],
        "update_version": [1, 2, 3],
        "length": [0, 1, 100, 4096],
        "offset": [0, 0, 1, 100, 32768],
        "type": [meta_pb2.FILE, meta_pb2.DIRECTORY],
        "toml": ["", "[client]\ndeadline_s = 3\n"],
        "expected_nodes": [0, 1],
        "replicas": [1, 3],
    }
    return facts


async def tidy(scene: Scene) -> None:
    """Removes all that is not protected, by the services' own calls."""
    cluster, kept = scene.cluster, scene.facts.protected
    async with open_client(cluster, user=PEOPLE, config=CONFIG) as client:
        for name, inode in await client.scandir("/"):
            if inode.inode in kept or name in ("kvcache",):
                continue
            await (client.rmtree(f"/{name}") if inode.type == meta_pb2.DIRECTORY else client.unlink(f"/{name}"))
        for name, inode in await client.scandir("/kvcache"):
            if inode.type == meta_pb2.DIRECTORY:
                await (client.rmdir(f"/kvcache/{name}") if is_space(inode.inode) else client.rmtree(f"/kvcache/{name}"))
            else:
                await client.unlink(f"/kvcache/{name}")
        identity = Identity(cluster.cluster_id, SystemRandom().bytes(16), "admin")
        async with ChannelPool(SystemNet(), SystemClock(), identity) as pool:
            await settled(client, scene.chains)
            for chain in client.routing.chains:
                if client.routing.serving(chain.chain_id):  # not one of targets that a mutated registration made up
                    await _remove_strays(pool, client, chain, kept)


async def settled(client: AsyncClient, chain_ids: list[int], timeout_s: float = 60) -> None:
    """Every replica serves."""
    with trio.fail_after(timeout_s):
        while True:
            chains = [client.routing.chain(chain_id) for chain_id in chain_ids]
            if all(member.state == cluster_pb2.SERVING for chain in chains for member in chain.targets):
                return
            await trio.sleep(0.1)


async def _remove_strays(pool: ChannelPool, client: AsyncClient, chain: cluster_pb2.Chain, kept: frozenset[int]) -> None:
    routing = client.routing
    head = routing.head(chain.chain_id)
    where = routing.addresses_of_target(head)
    inodes: set[int] = set()
    more, after = True, b""
    while more:
        listed = await pool.call(where, method("Storage", "ListChunks"), storage_pb2.ListChunksRequest(target_id=head, after=after), timeout_s=30)
        inodes.update(chunk_inode(chunk.chunk_id) for chunk in listed.chunks)
        more, after = listed.more, listed.chunks[-1].chunk_id if listed.chunks else after
    for inode in inodes - kept:
        while True:
            request = storage_pb2.RemoveRangeRequest(chain_id=chain.chain_id, chain_version=chain.version, target_id=head, inode=inode)
            if not (await pool.call(where, method("Storage", "RemoveRange"), request, timeout_s=30)).more:
                break


async def check_kept(cluster: ClusterAddress) -> None:
    """The protected files are what they were."""
    async with open_client(cluster, user=PEOPLE, config=CONFIG) as client:
        for name in FILES:
            assert await client.read_bytes(name) == content(name), f"{name} is not what was written"
        await client.write_bytes("/kept/new", b"written after the attack")
        assert await client.read_bytes("/kept/new") == b"written after the attack"


def process_facts(pid: int, data: Path) -> tuple[int, int]:
    """Resident KiB; open descriptors that are not of files under `data`."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    count = 0
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            count += not os.readlink(f"/proc/{pid}/fd/{fd}").startswith(str(data))
        except FileNotFoundError:
            pass  # closed meanwhile
    return resident, count


__all__ = ["Door", "KvfsError", "Scene", "check_kept", "prepare", "process_facts", "settled", "tidy"]
