"""Updating chunks: at the head of the chain, with one tag over all attempts, until it is acknowledged or the time is up.

Owns the write path. Invariants:
  - an update keeps its tag, so that however often it is sent it is applied once;
  - it goes to the head of the chain under the newest routing known; a head that refuses or is lost means newer routing and another attempt;
  - checksums are of the bytes as they lie in the caller's memory at the first attempt: should they change under way, the head refuses them;
  - updates of one call may be applied in any order. A caller that cares about the order of two updates of a chunk waits for the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import trio

from kvfs.client.batch import Group, group_by_node
from kvfs.client.config import ClientConfig
from kvfs.client.peers import Buffer, Peers
from kvfs.client.retry import Attempts, worth_retrying
from kvfs.client.tags import Channels
from kvfs.common.checksum import checksums
from kvfs.common.errors import DataError, DeadlineExceeded, InputOutput, KvfsError, from_wire
from kvfs.common.ids import ChunkId
from kvfs.common.transport.region import Span
from kvfs.common.wire import base_pb2
from kvfs.common.wire import storage_pb2 as pb
from kvfs.common.wire.service import method

WRITE = method("Storage", "Write")
REFUSED_TIMES = 4
"""Bytes that arrive so often with a wrong checksum have changed in the caller's memory: sending them again will not mend that."""


@dataclass(slots=True)
class ChunkWrite:
    """An update of one chunk: WRITE and CREATE need `data`, of `length` bytes; TRUNCATE sets the chunk's length; REMOVE neither."""

    chain_id: int
    chunk_id: ChunkId
    offset: int
    length: int
    chunk_size: int
    data: Buffer | None = None
    kind: pb.UpdateKind = pb.WRITE
    slab_bytes: int = 0
    """CREATE: the size of the block on disk."""
    space: pb.KvSpace | None = None
    """CREATE: what the storage services are to know of the block's space."""
    checksums: bytes | None = None
    """Of the data, where they are known already."""


@dataclass(slots=True)
class WriteDone:
    version: int
    chunk_length: int
    loss: int = 0
    """The chain's (cluster.proto) when it was acknowledged. Not told of blocks that a line wrote: nobody syncs them."""


class WritePath:
    def __init__(self, peers: Peers, config: ClientConfig, channels: Channels) -> None:
        self._peers = peers
        self._config = config
        self._channels = channels

    async def write_each(self, writes: Sequence[ChunkWrite], *, deadline_s: float | None = None) -> list[WriteDone | KvfsError]:
        """The outcome of each, in order. Never raises for a failed write."""
        outcomes: list[WriteDone | KvfsError] = []
        step = self._config.batch_max_ios
        end_s = self._peers.clock.monotonic() + (self._config.deadline_s if deadline_s is None else deadline_s)
        for start in range(0, len(writes), step):
            left_s = end_s - self._peers.clock.monotonic()
            if left_s <= 0:
                outcomes += [DeadlineExceeded("no time was left to send it")] * (len(writes) - start)
                break
            outcomes += await self._write_some(writes[start : start + step], left_s)
        return outcomes

    async def _write_some(self, writes: Sequence[ChunkWrite], limit_s: float) -> list[WriteDone | KvfsError]:
        config, peers = self._config, self._peers
        attempts = Attempts(
            peers.clock,
            peers.random,
            deadline=peers.clock.monotonic() + limit_s,
            attempt_s=config.write_attempt_s,
            first_s=config.backoff_first_s,
            max_s=config.backoff_max_s,
        )
        peers.counters.writes += len(writes)
        with trio.move_on_after(limit_s) as scope:
            tags = await self._channels.acquire(len(writes))
        if scope.cancelled_caught:
            return [DeadlineExceeded(f"no channel came free within {limit_s:g} s") for _ in writes]
        try:
            run = _Run(writes, tags)
            while True:
                await self._attempt(run, attempts)
                run.pending = [index for index in run.pending if not run.settled(index)]
                if not run.pending:
                    break
                error = run.errors[run.pending[0]]
                peers.counters.write_retries += 1
                await peers.refresh(min(max(attempts.left_s(), 0), config.read_attempt_s))
                try:
                    await attempts.wait(error)
                except KvfsError as last:
                    for index in run.pending:
                        run.errors[index] = last
                    break
            return [run.outcome(index) for index in range(len(writes))]
        finally:
            self._channels.release(tags)

    async def _attempt(self, run: _Run, attempts: Attempts) -> None:
        routing = self._peers.routing
        operations = []
        for index in run.pending:
            write = run.writes[index]
            try:
                chain = routing.chain(write.chain_id)
                target = routing.head(write.chain_id)
                where = self._peers.where(target)
                run.chain_versions[index] = chain.version
                run.losses[index] = chain.loss  # a head in another version of the chain refuses
            except KvfsError as error:
                run.errors[index] = error
                continue
            operations.append((index, target, where.node_id, where.addresses, write.length))
        groups = group_by_node(operations, max_ios=self._config.batch_max_ios, max_bytes=self._config.batch_max_bytes)
        try:
            timeout_s = attempts.timeout_s()
        except DeadlineExceeded as error:
            for index in run.pending:
                run.errors.setdefault(index, error)
            return
        if len(groups) == 1:
            await self._ask(run, groups[0], timeout_s)
        else:
            async with trio.open_nursery() as nursery:
                for group in groups:
                    nursery.start_soon(self._ask, run, group, timeout_s)

    async def _ask(self, run: _Run, group: Group, timeout_s: float) -> None:
        counters = self._peers.counters
        counters.write_requests += 1
        request = pb.WriteRequest()
        memory: list[Buffer] = []
        spaces: dict[int, pb.KvSpace] = {}
        add = request.writes.add
        for index, target in zip(group.indexes, group.targets, strict=True):
            write = run.writes[index]
            add(
                chain_id=write.chain_id,
                chain_version=run.chain_versions[index],
                chunk_id=write.chunk_id,
                kind=write.kind,
                offset=write.offset,
                length=write.length,
                chunk_size=write.chunk_size,
                checksums=run.checksums(index),
                tag=run.tags[index],
                target_id=target,
                slab_bytes=write.slab_bytes,
            )
            if write.space is not None:
                spaces[write.space.inode] = write.space
            if write.data is not None:
                memory.append(write.data)
        request.spaces.extend(spaces.values())
        try:
            reply = await self._peers.ask(group.addresses, WRITE, request, group.targets, heads=True, timeout_s=timeout_s, send=memory)
        except KvfsError as error:
            self._peers.suspect(group.node_id, error)
            for index in group.indexes:
                run.errors[index] = error
            return
        if len(reply.results) != len(group.indexes):
            for index in group.indexes:
                run.errors[index] = InputOutput(f"a reply with {len(reply.results)} results for {len(group.indexes)} writes")
            return
        self._peers.trust(group.node_id)
        for index, result in zip(group.indexes, reply.results, strict=True):
            if result.status == 0:
                run.done[index] = WriteDone(result.version, result.chunk_length, run.losses[index])
                counters.written_bytes += run.writes[index].length
            else:
                run.errors[index] = from_wire(result.status, result.message)


class _Run:
    """The state of one batch of updates over its attempts."""

    __slots__ = ("_checksums", "chain_versions", "done", "errors", "losses", "pending", "refused", "tags", "writes")

    def __init__(self, writes: Sequence[ChunkWrite], tags: Sequence[base_pb2.Tag]) -> None:
        self.writes = writes
        self.tags = tags
        self.done: list[WriteDone | None] = [None] * len(writes)
        self.errors: dict[int, KvfsError] = {}
        self.pending = list(range(len(writes)))
        self.chain_versions = [0] * len(writes)
        self.losses = [0] * len(writes)
        self._checksums: list[bytes | None] = [None] * len(writes)
        self.refused: dict[int, int] = {}

    def checksums(self, index: int) -> bytes:
        known = self._checksums[index]
        if known is None:
            write = self.writes[index]
            data = write.data
            known = write.checksums
            if known is None:
                known = b"" if data is None else checksums(data.view if isinstance(data, Span) else data, write.offset)
            self._checksums[index] = known
        return known

    def settled(self, index: int) -> bool:
        """Done, or failed for good."""
        if self.done[index] is not None:
            return True
        error = self.errors[index]
        if isinstance(error, DataError):
            self.refused[index] = self.refused.get(index, 0) + 1
            return self.refused[index] >= REFUSED_TIMES
        return not worth_retrying(error)

    def outcome(self, index: int) -> WriteDone | KvfsError:
        return self.done[index] or self.errors[index]
