"""The storage services, seen as chunks on chains.

Owns the face of the storage side: `read`, `write`, `sync` and the calls that look after chains and targets. Everything here is retried over
newer routing
until the deadline. How reads and writes go is in storage_reads.py and storage_writes.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import trio

from kvfs.client.config import ClientConfig
from kvfs.client.peers import Counters, Peers
from kvfs.client.place import Place
from kvfs.client.retry import Attempts
from kvfs.client.storage_blocks import BlockPath, Probe, Touch
from kvfs.client.storage_places import ChunkRange, PlacePath
from kvfs.client.storage_reads import ChunkRead, ReadDone, ReadPath
from kvfs.client.storage_writes import ChunkWrite, WriteDone, WritePath
from kvfs.client.tags import Channels
from kvfs.common.errors import KvfsError, NoServingTarget
from kvfs.common.routing import Routing
from kvfs.common.wire import base_pb2, cluster_pb2
from kvfs.common.wire import storage_pb2 as pb
from kvfs.common.wire.service import Method, method

SYNC = method("Storage", "Sync")
REMOVE_RANGE = method("Storage", "RemoveRange")
LAST_CHUNK = method("Storage", "LastChunk")
LIST_CHUNKS = method("Storage", "ListChunks")
CHECK_TARGET = method("Storage", "CheckTarget")
KV_EVICT = method("Storage", "KvEvict")
NO_END = 0


class StorageClient:
    def __init__(self, peers: Peers, config: ClientConfig, client_id: bytes, nursery: trio.Nursery) -> None:
        self._peers = peers
        self._config = config
        self._nursery = nursery
        self._refreshing = False
        self._channels = Channels(client_id, config.channels)
        self._reads = ReadPath(peers, config, self._refresh_in_background)
        self._writes = WritePath(peers, config, self._channels)
        self._blocks = BlockPath(peers, config, nursery, self._attempts)
        self._places = PlacePath(peers, config)

    @property
    def routing(self) -> Routing:
        return self._peers.routing

    @property
    def counters(self) -> Counters:
        return self._peers.counters

    async def read(self, reads: Sequence[ChunkRead], *, deadline_s: float | None = None) -> list[ReadDone]:
        """Verified bytes of every range, or an error. Holes have length 0. See storage_reads.py."""
        return await self._reads.read(reads, deadline_s=deadline_s)

    async def read_each(self, reads: Sequence[ChunkRead], *, deadline_s: float | None = None) -> list[ReadDone | KvfsError]:
        """The outcome of each; never raises for a failed read. A hole has found=False."""
        return await self._reads.read_each(reads, deadline_s=deadline_s)

    def nearby(self, chain_id: int) -> bool:
        """Whether the head of a chain is on this machine, so that the bytes of a write are fetched only if they are wanted."""
        try:
            return self._peers.where(self._peers.routing.head(chain_id)).here
        except KvfsError:
            return False

    async def probe(self, probes: Sequence[Probe], *, deadline_s: float | None = None) -> list[bytes | KvfsError]:
        """Which KV-cache blocks are there: a bitmap for each probe, or why it could not be asked. Never raises for one. See storage_blocks.py."""
        return await self._blocks.probe(probes, deadline_s=deadline_s)

    def touch(self, touches: Sequence[Touch]) -> None:
        """Blocks were used. Advice that nobody waits for: told a moment later, or not at all."""
        self._blocks.touch(touches)

    async def space_stats(self, inode: int = 0) -> list[pb.KvSpaceStats]:
        """What every target that can be asked tells of a space's blocks; inode 0: of all spaces."""
        return await self._blocks.space_stats(inode)

    async def evict(self, chain_id: int, inode: int, blocks: int) -> int:
        """Remove the least recently touched blocks of a space on one chain; gives how many went."""
        reply: pb.KvEvictReply = await self._at_head(
            chain_id, KV_EVICT, lambda chain, target: pb.KvEvictRequest(target_id=target, inode=inode, blocks=blocks)
        )
        return reply.evicted

    async def places(self, ranges: Sequence[ChunkRange], *, limit_s: float = inf) -> list[Place | None]:
        """Where bytes lie, as far as a service on this machine tells it; one attempt, no error. See storage_places.py."""
        return await self._places.places(ranges, limit_s)

    async def write(self, writes: Sequence[ChunkWrite], *, deadline_s: float | None = None) -> list[WriteDone]:
        """All acknowledged, or the error of one that was not (the others have been tried all the same)."""
        done = []
        for outcome in await self._writes.write_each(writes, deadline_s=deadline_s):
            if isinstance(outcome, KvfsError):
                raise outcome
            done.append(outcome)
        return done

    async def write_each(self, writes: Sequence[ChunkWrite], *, deadline_s: float | None = None) -> list[WriteDone | KvfsError]:
        """The outcome of each; never raises for a failed write."""
        return await self._writes.write_each(writes, deadline_s=deadline_s)

    def head_node(self, chain_id: int) -> int:
        """Who takes the chain's updates now; 0: nobody known."""
        routing = self._peers.routing
        try:
            return routing.node_of_target(routing.head(chain_id)).node_id
        except KvfsError:
            return 0

    async def sync(self, chain_ids: Sequence[int], *, deadline_s: float | None = None) -> dict[int, int]:
        """What was acknowledged on these chains before the call survives power loss after it: synced on every target that serves them now, and on
        those that are being brought up to date: one may serve, and be the last, before it syncs by itself what came while it was syncing. Gives each
        chain's `loss` then: where a write was acknowledged under a smaller one, it may have been gone already (`Unsynced`)."""
        losses: dict[int, int] = {}
        pending = set(chain_ids)
        attempts = self._attempts(deadline_s, self._config.write_attempt_s)
        while pending:
            routing = self._peers.routing
            failed: dict[int, KvfsError] = {}
            by_node: dict[int, tuple[tuple[str, ...], pb.SyncRequest]] = {}
            chains_of: dict[int, set[int]] = {}
            for chain in pending:
                try:
                    if not routing.serving(chain):
                        raise NoServingTarget(f"chain {chain} has no serving target")
                    losses[chain] = routing.chain(chain).loss  # a target that knows a newer version of the chain refuses
                    for target in routing.holding(chain):
                        node = routing.node_of_target(target)
                        request = by_node.setdefault(node.node_id, (tuple(node.addresses), pb.SyncRequest()))[1]
                        request.target_ids.append(target)
                        request.chain_versions.append(routing.chain(chain).version)
                        chains_of.setdefault(node.node_id, set()).add(chain)
                except KvfsError as error:
                    failed[chain] = error
            timeout_s = attempts.timeout_s()

            async def sync_node(
                node_id: int, addresses: tuple[str, ...], request: pb.SyncRequest, chains: set[int], timeout_s: float, failed: dict[int, KvfsError]
            ) -> None:
                try:
                    await self._peers.ask(addresses, SYNC, request, request.target_ids, timeout_s=timeout_s)
                except KvfsError as error:
                    self._peers.suspect(node_id, error)
                    failed.update(dict.fromkeys(chains, error))

            async with trio.open_nursery() as nursery:
                for node_id, (addresses, request) in by_node.items():
                    nursery.start_soon(sync_node, node_id, addresses, request, chains_of[node_id], timeout_s, failed)
            # A chain that changed meanwhile may have a member that was not asked, or one that failed and is out: look again.
            pending = {chain for chain in pending if chain in failed}
            if pending:
                await self._peers.refresh(min(attempts.left_s(), self._config.read_attempt_s))
                await attempts.wait(failed[next(iter(pending))])
        return losses

    async def remove_range(self, chain_id: int, inode: int, first: int, end: int = NO_END) -> tuple[int, int]:
        """Remove the chunks of an inode with first <= index < end on one chain; gives how many there were, and the chain's `loss` (see WriteDone)."""
        removed = 0
        losses: list[int] = []
        while True:
            [tag] = await self._channels.acquire(1)
            asked = 0

            def request(chain: cluster_pb2.Chain, target: int, tag: base_pb2.Tag = tag) -> pb.RemoveRangeRequest:
                nonlocal asked
                asked = chain.loss
                return pb.RemoveRangeRequest(
                    chain_id=chain_id, chain_version=chain.version, target_id=target, inode=inode, first_index=first, end_index=end, tag=tag
                )

            try:
                reply: pb.RemoveRangeReply = await self._at_head(chain_id, REMOVE_RANGE, request)
            finally:
                self._channels.release([tag])
            removed += reply.removed
            losses.append(asked)
            if not reply.more:
                return removed, min(losses)

    async def last_chunk(self, chain_id: int, inode: int) -> pb.LastChunkReply:
        """The highest chunk of an inode that a chain holds, and how much it holds of it altogether."""
        reply: pb.LastChunkReply = await self._at_head(
            chain_id, LAST_CHUNK, lambda chain, target: pb.LastChunkRequest(chain_id=chain_id, target_id=target, inode=inode)
        )
        return reply

    async def list_chunks(self, target_id: int, *, after: bytes = b"", limit: int = 0, inode: int = 0) -> pb.ListChunksReply:
        """One page of what a target holds, behind `after`."""
        reply: pb.ListChunksReply = await self._at_target(
            target_id, LIST_CHUNKS, pb.ListChunksRequest(target_id=target_id, after=after, limit=limit, inode=inode)
        )
        return reply

    async def list_chain(self, chain_id: int, *, after: bytes = b"", limit: int = 0, inode: int = 0) -> pb.ListChunksReply:
        """One page of what a chain holds, as its head tells it, or else the next target that serves."""
        peers, config = self._peers, self._config
        attempts = self._attempts(None, config.read_attempt_s)
        while True:
            error: KvfsError = NoServingTarget(f"chain {chain_id} has no serving target")
            try:
                where = [(peers.where(target), target) for target in peers.routing.serving(chain_id)]
            except KvfsError as unknown:
                where, error = [], unknown
            for place, target in sorted(where, key=lambda each: peers.suspected(each[0].node_id)):
                request = pb.ListChunksRequest(target_id=target, after=after, limit=limit, inode=inode)
                try:
                    reply: pb.ListChunksReply = await peers.caller.call(place.addresses, LIST_CHUNKS, request, timeout_s=attempts.timeout_s())
                    return reply
                except KvfsError as failed:
                    peers.suspect(place.node_id, failed)
                    error = failed
            await peers.refresh(min(max(attempts.left_s(), 0), config.read_attempt_s))
            await attempts.wait(error)

    async def check_target(self, target_id: int, *, read_data: bool = False, deadline_s: float = 600.0) -> pb.CheckTargetReply:
        """fsck of one target, by its service."""
        reply: pb.CheckTargetReply = await self._at_target(
            target_id, CHECK_TARGET, pb.CheckTargetRequest(target_id=target_id, read_data=read_data), deadline_s=deadline_s, attempt_s=deadline_s
        )
        return reply

    def _attempts(self, deadline_s: float | None, attempt_s: float) -> Attempts:
        config = self._config
        return Attempts(
            self._peers.clock,
            self._peers.random,
            deadline=self._peers.clock.monotonic() + (config.deadline_s if deadline_s is None else deadline_s),
            attempt_s=attempt_s,
            first_s=config.backoff_first_s,
            max_s=config.backoff_max_s,
        )

    async def _at_head(self, chain_id: int, what: Method, make: Callable[[cluster_pb2.Chain, int], Any]) -> Any:
        attempts = self._attempts(None, self._config.write_attempt_s)
        while True:
            try:
                routing = self._peers.routing
                target = routing.head(chain_id)
                request = make(routing.chain(chain_id), target)
                addresses = routing.addresses_of_target(target)
                return await self._peers.ask(addresses, what, request, (target,), heads=True, timeout_s=attempts.timeout_s())
            except KvfsError as error:
                await self._peers.refresh(min(max(attempts.left_s(), 0), self._config.read_attempt_s))
                await attempts.wait(error)

    async def _at_target(self, target_id: int, what: Method, request: Any, *, deadline_s: float | None = None, attempt_s: float | None = None) -> Any:
        attempts = self._attempts(deadline_s, attempt_s or self._config.write_attempt_s)
        while True:
            try:
                addresses = self._peers.routing.addresses_of_target(target_id)
                return await self._peers.caller.call(addresses, what, request, timeout_s=attempts.timeout_s())
            except KvfsError as error:
                await self._peers.refresh(min(max(attempts.left_s(), 0), self._config.read_attempt_s))
                await attempts.wait(error)

    def _refresh_in_background(self, limit_s: float) -> None:
        if not self._refreshing:
            self._refreshing = True
            self._nursery.start_soon(self._refresh_once, limit_s)

    async def _refresh_once(self, limit_s: float) -> None:
        try:
            await self._peers.refresh(limit_s)
        finally:
            self._refreshing = False
