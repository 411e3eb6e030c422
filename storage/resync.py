"""Bringing a returning target up to date: the predecessor's side.

Owns one task per target whose successor is syncing. It begins when the chain says so, ends with SyncDone, and starts again after any loss or
change of the chain. Meanwhile ordinary updates pass to the successor as whole chunks (the replica core sees to that). What is asked, listed and sent
when is the core's to say (chain/copying.py); this module carries it out.
Invariants: what is sent is what is committed here at that moment, under the chunk's lock; "remove there" is decided under the lock too, so a removed
chunk cannot come back and a new one is never removed. Work and memory are bounded by the configured batches.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import trio

from kvfs.common.checksum import checksums
from kvfs.common.errors import ChainError, ChecksumMismatch, KvfsError, from_wire
from kvfs.common.ids import is_block
from kvfs.common.transport.region import Span
from kvfs.common.wire import storage_pb2 as pb
from kvfs.common.wire.channel import Buffer
from kvfs.common.wire.service import method
from kvfs.storage.chain.compare import Listed
from kvfs.storage.chain.copying import AskStart, CopyEffect, Copying, ListPage, Send, drained, sent_as
from kvfs.storage.engine.requests import UpdateKind
from kvfs.storage.forwards import KINDS
from kvfs.storage.host import Host
from kvfs.storage.scrub.mend import mend
from kvfs.storage.target import Progress, Target

log = logging.getLogger("kvfs.storage")

WRITE = method("Storage", "Write")
LIST_CHUNKS = method("Storage", "ListChunks")
SYNC_START = method("Storage", "SyncStart")
SYNC_DONE = method("Storage", "SyncDone")

PAGE = 2048
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
        before = list(self._target.replica.flights.values())
        while not drained(before):
            await self._host.clock.sleep(0.005)

    async def _attempt(self) -> None:
        """Carries out what the core says, all at once. Raises what any part of it raised."""
        config, began_s = self._host.config, self._host.clock.monotonic()
        copying = Copying(at_once=config.resync_concurrency, batch_bytes=config.resync_batch_bytes)
        self._target.progress = progress = Progress(self._successor)
        errors: list[KvfsError] = []

        async def perform(effect: CopyEffect) -> None:
            try:
                more = await self._perform(copying, effect)
            except KvfsError as error:
                errors.append(error)
                nursery.cancel_scope.cancel()
                return
            progress.done_chunks = copying.chunks_done
            for following in more:
                nursery.start_soon(perform, following)

        async with trio.open_nursery() as nursery:
            for effect in copying.begin():
                nursery.start_soon(perform, effect)
        if errors:
            raise errors[0]
        took_s = self._host.clock.monotonic() - began_s
        log.info("target %d: target %d is up to date: %d chunks sent in %.1f s", self._target.target_id, self._successor, copying.chunks_sent, took_s)

    async def _perform(self, copying: Copying, effect: CopyEffect) -> list[CopyEffect]:
        chain_id, version, source = self._target.chain_id, self._chain_version, self._target.target_id
        if isinstance(effect, AskStart):
            start = pb.SyncStartRequest(chain_id=chain_id, chain_version=version, target_id=self._successor, from_target=source)
            await self._call(SYNC_START, start)
            self._target.progress.total_chunks = self._target.engine.space().chunks
            return copying.started()
        if isinstance(effect, ListPage):
            return await (self._list_local if effect.here else self._list_remote)(copying, effect)
        if isinstance(effect, Send):
            await self._send(effect.chunks)
            return copying.sent(effect.chunks)
        done = pb.SyncDoneRequest(chain_id=chain_id, chain_version=version, target_id=self._successor, from_target=source)
        for tag in self._target.engine.tags()[-TAGS_MAX:]:
            record = done.tags.add(result=tag.result)
            record.tag.client_id, record.tag.channel, record.tag.sequence = tag.client_id, tag.channel, tag.sequence
        await self._call(SYNC_DONE, done)
        return copying.done()

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

    async def _list_local(self, copying: Copying, page: ListPage) -> list[CopyEffect]:
        metas, more = await self._host.workers.run(lambda: self._target.engine.list(after=page.after, limit=PAGE))
        chunks = [Listed(meta.chunk_id, meta.version, meta.length, meta.checksum_of_list) for meta in metas if meta.version]
        return copying.page(True, chunks, metas[-1].chunk_id if metas else b"", more)

    async def _list_remote(self, copying: Copying, page: ListPage) -> list[CopyEffect]:
        reply = await self._call(LIST_CHUNKS, pb.ListChunksRequest(target_id=self._successor, after=page.after, limit=PAGE))
        chunks = [Listed(chunk.chunk_id, chunk.version, chunk.length, chunk.checksum) for chunk in reply.chunks if chunk.version]
        return copying.page(False, chunks, reply.chunks[-1].chunk_id if reply.chunks else b"", reply.more)

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
                kind = sent_as(meta.version if meta is not None else 0)
                write = pb.WriteIO(
                    chain_id=target.chain_id,
                    chain_version=self._chain_version,
                    chunk_id=chunk,
                    kind=KINDS[kind],
                    chunk_size=MAX_CHUNK_BYTES,
                    target_id=self._successor,
                    from_target=target.target_id,
                    sequence=target.replica.next_sequence(),
                    syncing=True,
                )
                if meta is not None and kind is UpdateKind.REPLACE:
                    write.update_version, write.length = meta.version, meta.length
                    write.mtime_ns = meta.mtime_ns
                    if is_block(chunk):
                        write.slab_bytes = target.slab_bytes(chunk)
                        target.retention.tell_space(chunk, spaces)
                    if meta.length:
                        borrowed.append(await host.buffers.acquire(meta.length))
                writes.append(write)
            await host.workers.run(lambda: self._read(writes, borrowed))
            if damaged := [write.chunk_id for write in writes if write.damaged]:
                await self._mend(damaged)
                await host.workers.run(lambda: self._read(writes, borrowed))
            request = pb.WriteRequest(writes=writes, from_target=target.target_id, spaces=spaces.values())
            reply = await host.pool.call(host.addresses(self._successor), WRITE, request, timeout_s=CALL_S, send=borrowed)
            if len(reply.results) != len(writes):
                raise ChainError(f"target {self._successor} answered {len(reply.results)} of {len(writes)} writes")
            for result in reply.results:
                if result.status:
                    raise from_wire(result.status, result.message)
        finally:
            for span in borrowed:
                host.buffers.release(span)
            host.unlock(ticket)

    async def _mend(self, chunks: Sequence[bytes]) -> None:
        """What another replica has whole is copied whole. What nobody has is copied as it lies here: without it the successor would have a hole, and
        zeros are not what was written."""
        host, target = self._host, self._target
        for chunk in chunks:
            inspection = await host.workers.run(partial(target.engine.inspect, chunk))
            if inspection is not None and inspection.damaged and not await mend(host, target, inspection):
                log.error("target %d: chunk %s is copied with its damage: no replica has it whole", target.target_id, chunk.hex())

    def _read(self, writes: Sequence[pb.WriteIO], spans: Sequence[Span]) -> None:
        """In a worker thread: the committed bytes into the spans, looked at, with their checksums."""
        place = 0
        for write in writes:
            if write.kind != pb.REPLACE or not write.length:
                continue
            view = spans[place].view
            place += 1
            outcome = self._target.engine.read(write.chunk_id, 0, write.length, view)
            assert outcome is not None
            if outcome.version != write.update_version or outcome.length != write.length:
                raise ChecksumMismatch(f"chunk {write.chunk_id.hex()} of target {self._target.target_id} is not what its index says")
            write.checksums, write.damaged = outcome.checksums, checksums(view, 0) != outcome.checksums
