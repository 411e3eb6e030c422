"""Bringing a returning target up to date: the predecessor's side.

Owns one task per target whose successor is syncing. It begins when the chain says so, ends with SyncDone, and starts again after any loss or
change of the chain. Meanwhile ordinary updates pass to the successor as whole chunks (the core sees to that).
Invariants: nothing is compared before every update that was under way when the successor came has ended, since those do not pass to it; what is sent
is what is committed here at that moment, under the chunk's lock; "remove there" is decided under the lock too, so a removed chunk cannot come back
and a new one is never removed. Work and memory are bounded by the configured batches.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import trio

from kvfs.common.checksum import checksums
from kvfs.common.errors import ChainError, ChecksumMismatch, KvfsError, from_wire
from kvfs.common.ids import is_block
from kvfs.common.transport.region import Span
from kvfs.common.wire import storage_pb2 as pb
from kvfs.common.wire.channel import Buffer
from kvfs.common.wire.service import method
from kvfs.storage.chain.compare import Listed, Side, take_differences
from kvfs.storage.host import Host
from kvfs.storage.target import Progress, Target

log = logging.getLogger("kvfs.storage")

WRITE = method("Storage", "Write")
LIST_CHUNKS = method("Storage", "ListChunks")
SYNC_START = method("Storage", "SyncStart")
SYNC_DONE = method("Storage", "SyncDone")

PAGE = 2048
BATCH_CHUNKS = 256
CALL_S = 30.0
LOCK_S = 120.0
PAUSE_S = 0.1
PAUSE_MAX_S = 2.0
TAGS_MAX = 40_000
"""So that they fit one message."""
MAX_CHUNK_BYTES = 64 << 20


class Resync:
    def __init__(self, host: Host, target: Target, successor: int, chain_version: int) -> None:
        self._host = host
        self._target = target
        self._successor = successor
        self._chain_version = chain_version
        self.scope = trio.CancelScope()

    async def run(self) -> None:
        """Until the successor is up to date, or `scope` is cancelled."""
        pause_s = PAUSE_S
        with self.scope:
            await self._drain()
            while self._current():
                try:
                    await self._attempt()
                    return
                except KvfsError as error:
                    log.info("target %d: resync of target %d starts again: %s", self._target.target_id, self._successor, error.message)
                await self._host.clock.sleep(pause_s)
                pause_s = min(2 * pause_s, PAUSE_MAX_S)

    def _current(self) -> bool:
        replica = self._target.replica
        return replica.serving and replica.version == self._chain_version

    async def _drain(self) -> None:
        """Wait for the updates that began before the successor was there."""
        before = list(self._target.replica.flights.values())
        while any(not flight.done for flight in before):
            await self._host.clock.sleep(0.005)

    async def _attempt(self) -> None:
        began_s = self._host.clock.monotonic()
        progress = self._target.progress = Progress(self._successor)
        start = pb.SyncStartRequest(
            chain_id=self._target.chain_id, chain_version=self._chain_version, target_id=self._successor, from_target=self._target.target_id
        )
        await self._call(SYNC_START, start)
        progress.total_chunks = self._target.engine.space().chunks
        sent = 0
        local, remote = Side.empty(), Side.empty()
        limiter = trio.Semaphore(self._host.config.resync_concurrency)
        errors: list[KvfsError] = []

        async def send(batch: list[bytes]) -> None:
            try:
                await self._send(batch)
            except KvfsError as error:
                errors.append(error)
            finally:
                limiter.release()

        async with trio.open_nursery() as nursery:
            while local.more or remote.more:
                if local.more and (not remote.more or local.known <= remote.known):
                    await self._list_local(local)
                else:
                    await self._list_remote(remote)
                differing, compared = take_differences(local, remote)
                progress.done_chunks += compared - len(differing)
                for batch in self._batches(differing):
                    await limiter.acquire()
                    if errors:
                        raise errors[0]
                    sent += len(batch)
                    nursery.start_soon(send, batch)
        if errors:
            raise errors[0]
        done = pb.SyncDoneRequest(
            chain_id=self._target.chain_id, chain_version=self._chain_version, target_id=self._successor, from_target=self._target.target_id
        )
        for tag in self._target.engine.tags()[-TAGS_MAX:]:
            record = done.tags.add(result=tag.result)
            record.tag.client_id, record.tag.channel, record.tag.sequence = tag.client_id, tag.channel, tag.sequence
        await self._call(SYNC_DONE, done)
        log.info(
            "target %d: target %d is up to date: %d chunks sent in %.1f s",
            self._target.target_id,
            self._successor,
            sent,
            self._host.clock.monotonic() - began_s,
        )

    async def _call(self, what: object, request: object, send: Sequence[Buffer] = ()) -> pb.ListChunksReply:
        reply: pb.ListChunksReply = await self._host.pool.call(
            self._host.addresses(self._successor),
            what,  # type: ignore[arg-type]
            request,
            timeout_s=CALL_S,
            send=send,
        )
        return reply

    # --- the two lists ---------------------------------------------------------------------------------------------------------------

    async def _list_local(self, side: Side) -> None:
        metas, more = await self._host.workers.run(lambda: self._target.engine.list(after=side.known, limit=PAGE))
        # One that is only pending is not a chunk yet: its update passes to the successor by itself.
        side.add_page([Listed(meta.chunk_id, meta.version, meta.length, meta.checksum_of_list) for meta in metas if meta.version], more)
        if metas:
            side.known = metas[-1].chunk_id

    async def _list_remote(self, side: Side) -> None:
        reply = await self._call(LIST_CHUNKS, pb.ListChunksRequest(target_id=self._successor, after=side.known, limit=PAGE))
        chunks = reply.chunks
        side.add_page([Listed(chunk.chunk_id, chunk.version, chunk.length, chunk.checksum) for chunk in chunks if chunk.version], reply.more)
        if chunks:
            side.known = chunks[-1].chunk_id

    def _batches(self, differing: Sequence[bytes]) -> list[list[bytes]]:
        batches: list[list[bytes]] = []
        room = 0
        for chunk in differing:
            meta = self._target.engine.get(chunk)
            length = meta.length if meta is not None else 0
            if not batches or length > room or len(batches[-1]) >= BATCH_CHUNKS:
                batches.append([])
                room = self._host.config.resync_batch_bytes
            batches[-1].append(chunk)
            room -= length
        return batches

    # --- sending ---------------------------------------------------------------------------------------------------------------------

    async def _send(self, chunks: Sequence[bytes]) -> None:
        """Make these chunks there what they are here now."""
        host, target = self._host, self._target
        ticket = await host.lock([(target.target_id, chunk) for chunk in chunks], host.clock.monotonic() + LOCK_S)
        borrowed: list[Span] = []
        try:
            writes: list[pb.WriteIO] = []
            spaces: dict[int, pb.KvSpace] = {}
            for chunk in chunks:
                meta = target.engine.get(chunk)
                write = pb.WriteIO(
                    chain_id=target.chain_id,
                    chain_version=self._chain_version,
                    chunk_id=chunk,
                    kind=pb.REMOVE,
                    chunk_size=MAX_CHUNK_BYTES,
                    target_id=self._successor,
                    from_target=target.target_id,
                    sequence=target.replica.next_sequence(),
                    syncing=True,
                )
                if meta is not None and meta.version:
                    write.kind, write.update_version, write.length = pb.REPLACE, meta.version, meta.length
                    write.mtime_ns = meta.mtime_ns
                    if is_block(chunk):
                        write.slab_bytes = target.slab_bytes(chunk)
                        target.retention.tell_space(chunk, spaces)
                    if meta.length:
                        borrowed.append(await host.buffers.acquire(meta.length))
                writes.append(write)
            await host.workers.run(lambda: self._read(writes, borrowed))
            request = pb.WriteRequest(writes=writes, from_target=target.target_id, spaces=spaces.values())
            reply = await host.pool.call(host.addresses(self._successor), WRITE, request, timeout_s=CALL_S, send=borrowed)
            if len(reply.results) != len(writes):
                raise ChainError(f"target {self._successor} answered {len(reply.results)} of {len(writes)} writes")
            for result in reply.results:
                if result.status:
                    raise from_wire(result.status, result.message)
            target.progress.done_chunks += len(chunks)
        finally:
            for span in borrowed:
                host.buffers.release(span)
            host.unlock(ticket)

    def _read(self, writes: Sequence[pb.WriteIO], spans: Sequence[Span]) -> None:
        """In a worker thread: the committed bytes into the spans, verified, with their checksums."""
        place = 0
        for write in writes:
            if write.kind != pb.REPLACE or not write.length:
                continue
            view = spans[place].view
            place += 1
            outcome = self._target.engine.read(write.chunk_id, 0, write.length, view)
            assert outcome is not None
            if outcome.version != write.update_version or outcome.length != write.length or checksums(view, 0) != outcome.checksums:
                raise ChecksumMismatch(f"chunk {write.chunk_id.hex()} of target {self._target.target_id} is damaged: it cannot be copied")
            write.checksums = outcome.checksums
