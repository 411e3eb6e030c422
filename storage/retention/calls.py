"""The RPCs about KV-cache blocks: probes, touches, statistics.

Owns the way of their bytes: digests stay one string of 16 bytes each, and no message is made for a key. What belongs to one entry of a batch is
answered as its status. Anything large is done in slices, so that other requests get their turn.
"""

from __future__ import annotations

from collections.abc import Awaitable

import trio

from kvfs.common.errors import ChunkNotFound, InvalidArgument, KvfsError, NotChainHead, TargetNotServing
from kvfs.common.ids import DIGEST_BYTES, is_block, is_space
from kvfs.common.wire import base_pb2 as base
from kvfs.common.wire import storage_pb2 as pb
from kvfs.common.wire.server import Call
from kvfs.storage.host import Host
from kvfs.storage.retention import policy
from kvfs.storage.retention.evict import BATCH, may_evict, remove
from kvfs.storage.retention.table import pack_bits
from kvfs.storage.target import Target

EVICT_MARGIN_S = 0.2
"""An eviction ends this much before its caller's deadline, with what it has done."""
SLICE_BYTES = 8192 * DIGEST_BYTES
"""Digests looked at in one go: about a millisecond."""


class RetentionCalls:
    def __init__(self, host: Host) -> None:
        self._host = host

    def probe(self, request: pb.KvProbeRequest, call: Call) -> pb.KvProbeReply | Awaitable[pb.KvProbeReply]:
        """At any serving target: what was acknowledged is on all of them."""
        if sum(len(probe.digests) for probe in request.probes) > SLICE_BYTES:
            return self._probe_slowly(request)
        return pb.KvProbeReply(results=[self._probe(probe) for probe in request.probes])

    async def _probe_slowly(self, request: pb.KvProbeRequest) -> pb.KvProbeReply:
        reply = pb.KvProbeReply()
        for probe in request.probes:
            starts = range(0, max(1, len(probe.digests)), SLICE_BYTES)
            parts: dict[int, bytes] = {}
            for start in reversed(starts) if probe.touch else starts:  # the last digest is touched first
                part = pb.KvProbe(target_id=probe.target_id, inode=probe.inode, digests=probe.digests[start : start + SLICE_BYTES], touch=probe.touch)
                result = self._probe(part)
                parts[start] = result.present
                if result.status:
                    parts.clear()
                    break
                await trio.lowlevel.checkpoint()
            reply.results.add(status=result.status, present=b"".join(parts[start] for start in sorted(parts)))
        return reply

    def _probe(self, probe: pb.KvProbe) -> pb.KvProbeResult:
        try:
            target = self._serving(probe.target_id)
            _check(probe.inode, probe.digests)
        except KvfsError as error:
            return pb.KvProbeResult(status=error.code)
        return pb.KvProbeResult(present=pack_bits(target.retention.probe(probe.inode, probe.digests, touch=probe.touch)))

    def _serving(self, target_id: int) -> Target:
        target = self._host.usable(target_id)
        if not target.replica.serving or not self._host.link.lease_valid():
            raise TargetNotServing(f"target {target_id} is {target.replica.public.name.lower()}, {target.replica.phase.value}")
        return target

    async def touch(self, request: pb.KvTouchRequest, call: Call) -> base.Empty:
        """Touches of targets that are not here or not known are void: they are advice."""
        for touch in request.touches:
            _check(touch.inode, touch.digests)
            target = self._host.targets.get(touch.target_id)
            if target is None or not target.opened:
                continue
            if not touch.from_target:
                target.retention.count_hits(touch.inode, touch.hits)
            for start in range(0, len(touch.digests), SLICE_BYTES):
                part = touch.digests[start : start + SLICE_BYTES]
                if touch.from_target:
                    target.retention.touch(touch.inode, part, told=True, idle_ms=touch.idle_ms)
                else:
                    target.retention.touch(touch.inode, part)
                await trio.lowlevel.checkpoint()
        return base.Empty()

    def stats(self, request: pb.KvStatsRequest, call: Call) -> pb.KvStatsReply:
        reply = pb.KvStatsReply()
        for target_id, target in sorted(self._host.targets.items()):
            if not target.opened:
                continue
            tables = target.retention.tables
            for inode in [request.inode] if request.inode else sorted(tables):
                if inode in tables:
                    reply.spaces.append(_stats(target_id, target, inode))
        return reply

    async def evict(self, request: pb.KvEvictRequest, call: Call) -> pb.KvEvictReply:
        """At the head: the least recently touched blocks of a space, as many as are asked and there."""
        target = self._host.usable(request.target_id)
        if not may_evict(self._host, target):
            raise NotChainHead(f"target {request.target_id} is not the head of its chain: refresh the routing")
        evicted = 0
        table = target.retention.tables.get(request.inode)
        while table is not None and evicted < request.blocks and call.remaining_s() > EVICT_MARGIN_S:
            victims = policy.oldest(table, min(BATCH, request.blocks - evicted))
            gone = await remove(self._host, target, victims)
            evicted += gone
            if not victims or gone < len(victims):
                break
        return pb.KvEvictReply(evicted=evicted)


def check_block(io: pb.WriteIO, from_client: bool) -> None:
    """A KV-cache block is made whole, and never changed."""
    if io.kind == pb.CREATE:
        if not is_block(io.chunk_id):
            raise InvalidArgument("CREATE is for the blocks of KV-cache spaces")
        if io.offset or not io.length:
            raise InvalidArgument(f"a block is made whole and is not empty: offset {io.offset}, length {io.length}")
        if not io.slab_bytes:
            raise InvalidArgument("a block comes with the size of its blocks on disk (slab_bytes), so that it lies among them")
    elif from_client and io.kind != pb.REMOVE and is_block(io.chunk_id):
        raise InvalidArgument(f"a block of a KV-cache space is never changed: {pb.UpdateKind.Name(io.kind)} refused")


def note_blocks(host: Host, request: pb.ReadRequest, reply: pb.ReadReply | Awaitable[pb.ReadReply]) -> pb.ReadReply | Awaitable[pb.ReadReply]:
    """What is read of blocks counts as touched. A request is one of blocks if its first read is: nobody mixes them with chunks of files."""
    if not request.reads or not is_block(request.reads[0].chunk_id):
        return reply
    if not isinstance(reply, pb.ReadReply):
        return _note_later(host, request, reply)
    _note(host, request, reply)
    return reply


async def _note_later(host: Host, request: pb.ReadRequest, answering: Awaitable[pb.ReadReply]) -> pb.ReadReply:
    reply = await answering
    _note(host, request, reply)
    return reply


def _note(host: Host, request: pb.ReadRequest, reply: pb.ReadReply) -> None:
    found: dict[int, list[bytes]] = {}
    missed: dict[int, list[bytes]] = {}
    for io, result in zip(request.reads, reply.results, strict=True):
        chunk_id, status = io.chunk_id, result.status
        if is_block(chunk_id) and not io.counted:
            if status == 0:
                found.setdefault(io.target_id, []).append(chunk_id)
            elif status == ChunkNotFound.code:
                missed.setdefault(io.target_id, []).append(chunk_id)
    for target_id in found.keys() | missed.keys():
        target = host.targets.get(target_id)
        if target is not None:
            target.retention.note_reads(found.get(target_id, ()), missed.get(target_id, ()))


def _check(inode: int, digests: bytes) -> None:
    if not is_space(inode):
        raise InvalidArgument(f"inode {inode} is no KV-cache space")
    if len(digests) % DIGEST_BYTES:
        raise InvalidArgument(f"{len(digests)} bytes of digests: {DIGEST_BYTES} each")


def _stats(target_id: int, target: Target, inode: int) -> pb.KvSpaceStats:
    table = target.retention.tables[inode]
    replica = target.replica
    taken_bytes, used_blocks = target.engine.slab_space(table.slab_bytes)
    counts = table.counts
    return pb.KvSpaceStats(
        target_id=target_id,
        inode=inode,
        head=replica.serving and replica.predecessor == 0,
        blocks=len(table),
        bytes=table.bytes,
        block_space=table.block_space,
        # Spaces with blocks of one size share their slabs: each counts its part.
        allocated_bytes=taken_bytes * len(table) // used_blocks if used_blocks else table.block_space,
        hits=counts.hits,
        misses=counts.misses,
        stored=counts.stored,
        present=counts.present,
        evicted=counts.evicted,
        expired=counts.expired,
        removed=counts.removed,
        quota_bytes=table.policy.quota_bytes,
        ttl_ms=table.policy.ttl_ms,
    )
