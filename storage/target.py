"""One target of this process: its engine, its replica core, and what the service knows of it besides.

Owns the pairing of engine and core. Everything here runs in trio's thread; the engine's slow calls are made by others, through the workers.
Invariants: `stored()` is asked under the chunk's lock; a target whose disk failed never serves again in this process.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from kvfs.common.errors import ChunkLost, ChunkNotFound, IndexCorrupt, KvfsError, TargetOffline
from kvfs.common.wire import cluster_pb2 as cluster
from kvfs.common.wire import storage_pb2 as pb
from kvfs.storage.chain.member import Phase
from kvfs.storage.chain.messages import ABSENT, Stored, TagKey, newer, record_of
from kvfs.storage.chain.replica import Replica
from kvfs.storage.chain.view import LocalState, PublicState
from kvfs.storage.engine.engine import ChunkEngine
from kvfs.storage.engine.requests import Space, Tag, UpdateKind
from kvfs.storage.retention.retention import Retention
from kvfs.storage.scrub.state import ScrubState
from kvfs.storage.workers import Workers

log = logging.getLogger("kvfs.storage")

LOCAL = {state: cluster.LocalState.Name(int(state)) for state in LocalState}
PUBLIC = {state: cluster.PublicState.Name(int(state)) for state in PublicState}
OVERLAP_RESERVE_BYTES = 256 << 20
"""With less room than this an update is written here before it is forwarded: a refusal for lack of space must come before anyone holds it."""


@dataclass(slots=True)
class Progress:
    """Of the resync that this target drives."""

    successor: int = 0
    done_chunks: int = 0
    total_chunks: int = 0


class Target:
    def __init__(
        self,
        target_id: int,
        chain_id: int,
        disk: int,
        path: str,
        engine: ChunkEngine | None,
        replica: Replica,
        retention: Retention,
        scrub: ScrubState,
    ) -> None:
        self.target_id = target_id
        self.chain_id = chain_id
        self.disk = disk
        self.path = path
        self._engine = engine
        """None: it could not be opened; the replica is failed then."""
        self.replica = replica
        self.retention = retention
        self.scrub = scrub
        self.moved = trio.Event()
        """Set, and replaced, at every change of the chain."""
        self.forwards: dict[trio.CancelScope, int] = {}
        """Forwards under way, and to which target."""
        self.progress = Progress()
        self.tasks = trio.CancelScope()
        """Of the task that runs for it as long as it is here."""
        self.space = Space(0, 0, 0, 0)
        self.failed = False
        """Its disk did, in this run: what could not be written may be gone from memory too when it is opened again."""
        self._credit_bytes = 0
        self._syncs = _SharedRuns()
        self._removal_syncs = _SharedRuns()

    @property
    def engine(self) -> ChunkEngine:
        if self._engine is None:
            raise TargetOffline(self.replica.problem or f"target {self.target_id} is closed")
        return self._engine

    def close_door(self) -> ChunkEngine | None:
        """No one gets at the engine any more; the caller closes it when nobody uses it."""
        engine, self._engine = self._engine, None
        return engine

    def absent(self, chunk_id: bytes, error: ChunkNotFound) -> KvfsError:
        """What a chunk that is not there is: a hole, or lost with the rest of its chain."""
        view = self.replica.view
        if view is not None and view.lost(chunk_id):
            return ChunkLost(f"chunk {chunk_id.hex()} is gone: the data of chain {self.chain_id} was lost, and the loss accepted")
        return error

    @property
    def opened(self) -> bool:
        return self._engine is not None

    def stored(self, chunk_id: bytes, tag: TagKey | None) -> Stored:
        meta = self.engine.get(chunk_id)
        record = self.engine.tag(tag.client_id, tag.channel) if tag is not None else None
        if meta is None and record is None:
            return ABSENT
        sequence, result = (record.sequence, record.result) if record is not None else (-1, b"")
        if meta is None:
            return Stored(tag_sequence=sequence, tag_result=result)
        pending = meta.pending
        if pending is None:
            return Stored(meta.version, meta.length, meta.checksum_of_list, tag_sequence=sequence, tag_result=result)
        removes = pending.kind is UpdateKind.REMOVE
        return Stored(
            meta.version,
            meta.length,
            meta.checksum_of_list if meta.version else 0,
            pending.version,
            pending.length,
            0 if removes else pending.checksum_of_list,
            removes,
            sequence,
            result,
        )

    def record(self, tag: TagKey | None, update_version: int) -> Tag | None:
        """The idempotency record to write with an update; None when a later one of the channel is there already."""
        if tag is None:
            return None
        known = self.engine.tag(tag.client_id, tag.channel)
        if known is not None and not newer(tag, known.sequence):
            return None
        return Tag(tag.client_id, tag.channel, tag.sequence, record_of(update_version))

    def pending_tag(self, chunk_id: bytes) -> TagKey | None:
        """Whose update the pending version is: it may be of an earlier run of this process."""
        meta = self.engine.get(chunk_id)
        tag = meta.pending.tag if meta is not None and meta.pending is not None else None
        return TagKey(tag.client_id, tag.channel, tag.sequence) if tag is not None else None

    def pending_mtime_ns(self, chunk_id: bytes) -> int:
        meta = self.engine.get(chunk_id)
        return meta.pending.mtime_ns if meta is not None and meta.pending is not None else 0

    def slab_bytes(self, chunk_id: bytes) -> int:
        """The block class of a chunk's newest version; 0: it has no block."""
        meta = self.engine.get(chunk_id)
        block = None
        if meta is not None:
            block = meta.pending.content.block if meta.pending is not None else meta.block
        return block.block_bytes if block is not None else 0

    # --- space -----------------------------------------------------------------------------------------------------------------------

    def refresh_space(self) -> None:
        """Called at every heartbeat."""
        if self._engine is None:
            return
        try:
            self.space = self._engine.space()
        except KvfsError as error:
            self.fail(error)
            return
        self._credit_bytes = self.space.free_bytes - OVERLAP_RESERVE_BYTES

    def take_room(self, length: int) -> bool:
        """Whether the disk surely has room for this update, whatever else is under way."""
        self._credit_bytes -= 2 * length
        return self._credit_bytes > 0

    # --- state -----------------------------------------------------------------------------------------------------------------------

    def fail(self, error: KvfsError) -> None:
        """The disk failed. The others of this process go on."""
        self.failed = True
        if isinstance(error, IndexCorrupt) and self._engine is not None:
            # What is committed into a damaged map is lost with it, and the journal that has it would be gone: with the last copy, for good.
            self._engine.abandon(error)
        if self.replica.phase is not Phase.FAILED:
            log.error("target %d (%s) is out of service: %s", self.target_id, self.path, error.message)
            self.replica.fail(error.message)
            self.wake()

    def wake(self) -> None:
        moved, self.moved = self.moved, trio.Event()
        moved.set()

    def on_successor(self) -> None:
        """The chain changed: forwards to whom is no longer the successor are hopeless."""
        successor = self.replica.successor
        for scope, target_id in list(self.forwards.items()):
            if successor is None or successor.target_id != target_id:
                scope.cancel()

    def pending_chunks(self) -> list[bytes]:
        """Blocking: all chunks with a pending version."""
        found: list[bytes] = []
        after, more = b"", True
        while more:
            metas, more = self.engine.list(after=after, limit=4096)
            found += [meta.chunk_id for meta in metas if meta.pending is not None]
            after = metas[-1].chunk_id if metas else after
        return found

    def report(self) -> cluster.TargetReport:
        return cluster.TargetReport(
            target_id=self.target_id,
            local_state=LOCAL[self.replica.local_state],
            chain_version=self.replica.version,
            capacity_bytes=self.space.capacity_bytes,
            used_bytes=self.space.used_bytes,
            free_bytes=self.space.free_bytes,
            failed=self.failed,
        )

    def status(self) -> pb.TargetStatus:
        self.refresh_space()
        return pb.TargetStatus(
            target_id=self.target_id,
            chain_id=self.chain_id,
            chain_version=self.replica.version,
            public_state=PUBLIC[self.replica.public],
            local_state=LOCAL[self.replica.local_state],
            chunks=self.space.chunks,
            capacity_bytes=self.space.capacity_bytes,
            used_bytes=self.space.used_bytes,
            free_bytes=self.space.free_bytes,
            path=self.path,
            problem=self.replica.problem,
            sync_done_chunks=self.progress.done_chunks,
            sync_total_chunks=self.progress.total_chunks,
            scrub=self.scrub.status(self.space.chunks),
        )

    async def sync(self, workers: Workers, *, removals: bool = False) -> None:
        """Everything acknowledged before this call survives power loss after it; `removals`: the removals of chunks do."""
        if removals:
            await self._removal_syncs.run(lambda: workers.run(self.engine.sync_removals))
        else:
            await self._syncs.run(lambda: workers.run(self.engine.sync))


class _SharedRuns:
    """One run at a time of what covers all that came before it began; who comes meanwhile shares the next."""

    def __init__(self) -> None:
        self._now: _Run | None = None
        self._next: _Run | None = None

    async def run(self, work: Callable[[], Awaitable[None]]) -> None:
        run = self._next
        if run is not None:
            await run.done.wait()
        else:
            run = self._next = _Run()
            with trio.CancelScope(shield=True):  # others wait for it
                await self._begin(run, work)
        if run.error is not None:
            raise run.error

    async def _begin(self, run: _Run, work: Callable[[], Awaitable[None]]) -> None:
        if self._now is not None:
            await self._now.done.wait()
        self._now, self._next = run, None
        try:
            await work()
        except KvfsError as error:
            run.error = error
        finally:
            self._now = None
            run.done.set()


class _Run:
    __slots__ = ("done", "error")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: KvfsError | None = None
