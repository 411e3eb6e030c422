"""The chunk engine of one target: the face that the replica (storage/chain) and the storage service call.

Versions as in CRAQ: a chunk has a committed version v (0: none) and at most one pending version u = v + 1. `prepare` makes u, `commit` turns
it into the committed version, `drop_pending` forgets it; `apply` is prepare and commit in one (a chain of one); `replace` sets a chunk as a whole.
All calls block (disk) and may come from any thread; the caller keeps the updates of ONE chunk in order (one at a time): the engine
refuses with Busy when they are not. Reads need no order. The engine's lock is held for the index and the allocator, never for data I/O.

Durability: when prepare/commit/apply/... return, their effect survives the death of the process; after `sync()` it survives power loss.
An error of the disk (InputOutput) on a write or sync path makes the engine `failed`: every later change raises TargetOffline.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvfs.common.boundary.clock import Clock
from kvfs.common.boundary.disk import Disk
from kvfs.common.errors import Busy, ChunkNotFound, InvalidArgument, KvfsError, MissingUpdate, NoSpace
from kvfs.common.ids import chunk_id as chunk_id_of
from kvfs.common.ids import chunk_index
from kvfs.storage.engine import inspect, own_files, superblock
from kvfs.storage.engine.check import check_target
from kvfs.storage.engine.chunk import ChunkMeta, Content, PendingMeta
from kvfs.storage.engine.config import EngineConfig
from kvfs.storage.engine.inspect import Inspection
from kvfs.storage.engine.ledger import Change
from kvfs.storage.engine.reader import place_of, read_content
from kvfs.storage.engine.recovery import open_ledger
from kvfs.storage.engine.requests import CheckReport, LastChunk, Place, ReadOutcome, Space, Tag, Update, UpdateKind
from kvfs.storage.engine.staging import Staged, Stager
from kvfs.storage.engine.superblock import Superblock
from kvfs.storage.engine.upkeep import Upkeep

DEFAULTS = EngineConfig()
MAX_CHUNK_INDEX = (1 << 128) - 1
_PAGE_CHUNKS = 1000
Prepared = list[ChunkMeta | KvfsError]
Committed = list[ChunkMeta | None]
Applied = list[ChunkMeta | KvfsError | None]
Metas = list[ChunkMeta]
Tags = list[Tag]
Units = list[int]
Problems = list[str]


class ChunkEngine:
    """Construction opens (or makes) the target: lock, superblock, index, replay of the journal. It raises DirectoryInUse, WrongDataDirectory,
    FormatTooNew or IndexCorrupt and has then changed nothing."""

    def __init__(self, disk: Disk, clock: Clock, identity: Superblock, config: EngineConfig = DEFAULTS) -> None:
        disk.makedirs("")
        superblock.load(disk, identity)  # before the lock: a directory of someone else must not even get a lock file
        disk.lock()
        try:
            superblock.settle(disk, identity)
            self._ledger = open_ledger(disk, clock, config)
        except BaseException:
            disk.close()
            raise
        self._disk = disk
        self._closed = False
        self._stager = Stager(self._ledger, clock)
        self._upkeep = Upkeep(self._ledger, clock, background=config.background)
        self.superblock = identity

    @property
    def disk(self) -> Disk:
        """Of the target's directory, for what else is kept in it."""
        return self._disk

    @property
    def failed(self) -> KvfsError | None:
        """The error of the disk that took the target out of service: changes raise TargetOffline, reads go on as far as they can."""
        return self._ledger.failed

    # --- reading ---

    def get(self, chunk_id: bytes) -> ChunkMeta | None:
        """The chunk's meta; version 0 with a pending one when it was prepared but never committed; None: no such chunk. About 1 us."""
        with self._ledger.lock:
            return self._ledger.lookup(chunk_id)

    def read(self, chunk_id: bytes, offset: int, length: int, into: memoryview, *, version: int = 0, nowait: bool = False) -> ReadOutcome | None:
        """Place up to `length` bytes from `offset` at the start of `into`.

        version 0: the committed one; u: the pending version u (the tail said it is committed), or a later committed one. None: nowait and the
        bytes are not in the page cache (`into` may be partly written). ChunkNotFound: no committed version (a hole). ChecksumMismatch: the
        stored bytes are damaged. Whole units are passed on with their stored checksum (the reader verifies them); units that are read in part
        are verified here and get fresh checksums.
        """
        ledger = self._ledger
        with ledger.lock:
            meta = ledger.lookup(chunk_id)
            if meta is None:
                raise ChunkNotFound(f"no chunk {chunk_id.hex()}")
            found, content = _visible(meta, version)
            block = content.block
            if block is not None:
                ledger.allocator.pin(block)
        try:
            end = min(offset + length, content.length, offset + len(into))
            sums: bytes | None = b""
            if offset < end:
                sums = read_content(ledger.files, content, offset, end, into, nowait, chunk_id)
            if sums is None:
                return None
        finally:
            if block is not None:
                with ledger.lock:
                    ledger.allocator.unpin(block)
        return ReadOutcome(max(0, end - offset), sums, found, content.length, meta.pending.version if meta.pending is not None else 0)

    def place(self, chunk_id: bytes, offset: int, length: int) -> Place:
        """Where up to `length` committed bytes from `offset` lie. ChunkNotFound: no committed version (a hole). Does not touch the disk."""
        ledger = self._ledger
        with ledger.lock:
            meta = ledger.lookup(chunk_id)
            if meta is None:
                raise ChunkNotFound(f"no chunk {chunk_id.hex()}")
            version, content = _visible(meta, 0)
            # Under the lock, as nothing holds the block: its file could go with it.
            return place_of(ledger.files, content, offset, length, version, meta.pending.version if meta.pending is not None else 0)

    def tag(self, client_id: bytes, channel: int) -> Tag | None:
        """The last idempotency record of this channel, if it is still kept."""
        with self._ledger.lock:
            return self._ledger.tags.get(client_id, channel)

    def tags(self) -> Tags:
        """All kept idempotency records (for a target that is brought up to date)."""
        with self._ledger.lock:
            return self._ledger.tags.all()

    def list(self, *, after: bytes = b"", limit: int = 1000, inode: int = 0) -> tuple[Metas, bool]:
        """Metas in the order of their ids, behind `after`; inode 0: all. (metas, more). Chunks that are only pending are listed too."""
        begin, end = _inode_range(inode)
        begin = max(begin, after + b"\0" if after else b"")
        if end and begin >= end:
            return [], False
        with self._ledger.lock:
            found = self._ledger.metas(begin, end, limit + 1)
        return found[:limit], len(found) > limit

    def last_chunk(self, inode: int) -> LastChunk | None:
        """The last committed chunk of a file that is not empty, with the number of its chunks and bytes here."""
        begin, end = _inode_range(inode)
        index = length = chunks = total = 0
        while True:
            # In pages: a file may have a million chunks, and others want the lock too.
            with self._ledger.lock:
                page = self._ledger.metas(begin, end, _PAGE_CHUNKS, reverse=True)
            for meta in page:
                if meta.version and meta.length:
                    if not chunks:
                        index, length = chunk_index(meta.chunk_id), meta.length
                    chunks += 1
                    total += meta.length
            if len(page) < _PAGE_CHUNKS:
                return LastChunk(index, length, chunks, total) if chunks else None
            end = page[-1].chunk_id

    def space(self) -> Space:
        with self._ledger.lock:
            used, free = self._ledger.allocator.space()
            return Space(used + free, used, free, self._ledger.chunks)

    def waiting_bytes(self) -> int:
        """In blocks that were freed and cannot be used before a sync."""
        return self._ledger.allocator.quarantined_bytes

    def slab_space(self, block_bytes: int) -> tuple[int, int]:
        """Of the KV-cache blocks of one size: (bytes taken from the disk, blocks that chunks hold)."""
        with self._ledger.lock:
            return self._ledger.allocator.slab_space(block_bytes)

    def check(self, *, read_data: bool = False) -> CheckReport:
        """fsck: structure always; read_data reads every stored byte against its checksum. The engine stands still during the structural part."""
        return check_target(self._ledger, read_data)

    # --- scrub ---

    def inspect(self, chunk_id: bytes) -> Inspection | None:
        """Read a chunk's committed version from the disk, against its checksums. None: there is none."""
        return inspect.inspect(self._ledger, chunk_id)

    def repair(self, chunk_id: bytes, units: Mapping[int, memoryview]) -> Units:
        """Put bytes of a damaged chunk back, unit by unit, those that have the checksum that the index has for them. The units that are right now."""
        return inspect.repair(self._ledger, chunk_id, units)

    def repair_own_files(self) -> Problems:
        """Superblock and journal against what is known here; what is damaged is written anew. What was found, one sentence each."""
        return own_files.repair(self._ledger, self.superblock)

    def check_index(self) -> Iterator[int]:
        """Blocking, step by step: read the index as it lies on the disk; how many bytes each step read. IndexCorrupt."""
        return own_files.check_index(self._ledger)

    # --- changing ---

    def prepare(self, update: Update) -> ChunkMeta:
        """Make the pending version; the meta with it. An older pending version is replaced (the same write, forwarded again).

        The incoming bytes are verified against `update.checksums` (ChecksumMismatch). StaleUpdate: update_version is committed already or older;
        MissingUpdate: it skips one. NoSpace: refused before a byte was written. InvalidArgument: out of the limits. TRUNCATE to 0 of a chunk
        that has no committed version becomes REMOVE: nothing is left of it. A REPLACE makes the pending version whatever is committed (the bytes of
        the predecessor's, carried on down the chain), but takes the next number as any other.
        """
        meta: ChunkMeta = _only(self.prepare_many([update]))
        return meta

    def prepare_many(self, updates: Sequence[Update]) -> Prepared:
        """`prepare` of several chunks (no chunk twice: Busy) in one journal record; one outcome each, in order."""
        outcomes: list[ChunkMeta | KvfsError] = []
        batch: dict[bytes, tuple[Staged, Change]] = {}
        for update in updates:
            try:
                if update.chunk_id in batch:
                    raise Busy("a chunk can be prepared once in a batch")
                staged = self._stage(update, pending=True)
            except KvfsError as error:
                outcomes.append(error)
                continue
            change = staged.prepared()
            batch[update.chunk_id] = staged, change
            assert change.new is not None
            outcomes.append(change.new)
        self._record([*batch.values()])
        return outcomes

    def commit(self, chunk_ids: Iterable[bytes], chain_version: int, tags: Sequence[Tag] = ()) -> Committed:
        """The pending versions of these chunks become committed, with the tags, in one atomic record. A chunk without a pending version is left
        as it is. Returns the metas afterwards (None: removed). Empty chunk_ids: only the tags are recorded."""
        ledger = self._ledger
        metas: list[ChunkMeta | None] = []
        with ledger.lock:
            ledger.check_serving()
            changes = []
            for chunk_id in chunk_ids:
                old = ledger.lookup(chunk_id)
                new = old
                if old is not None and old.pending is not None:
                    new = _committed(old, old.pending, chain_version)
                    changes.append(Change(old, new))
                metas.append(new)
            ledger.record(changes, tags)
        self._upkeep.after_change()
        return metas

    def apply(self, update: Update, chain_version: int, tag: Tag | None = None) -> ChunkMeta | None:
        """prepare + commit in one record (chain of one). None: the chunk is gone."""
        meta: ChunkMeta | None = _only(self.apply_many([update], chain_version, [tag]))
        return meta

    def apply_many(self, updates: Sequence[Update], chain_version: int, tags: Sequence[Tag | None] = ()) -> Applied:
        """`apply` of several updates, as few records as can be; a chunk may come more than once. tags[i], where given, is recorded with
        update i and only if it succeeds."""
        outcomes: list[ChunkMeta | KvfsError | None] = []
        batch: dict[bytes, tuple[Staged, Change]] = {}
        batch_tags: list[Tag] = []
        for place, update in enumerate(updates):
            if update.chunk_id in batch:  # its next version builds on what is staged now
                self._record([*batch.values()], batch_tags)
                batch, batch_tags = {}, []
            try:
                staged = self._stage(update)
            except KvfsError as error:
                outcomes.append(error)
                continue
            change = staged.applied(update.chain_version if update.kind == UpdateKind.REPLACE else chain_version)
            batch[update.chunk_id] = staged, change
            outcomes.append(change.new)
            tag = tags[place] if place < len(tags) else None
            if tag is not None:
                batch_tags.append(tag)
        self._record([*batch.values()], batch_tags)
        return outcomes

    def drop_pending(self, chunk_ids: Iterable[bytes]) -> None:
        """Forget the pending versions; chunks without one are left as they are."""
        ledger = self._ledger
        with ledger.lock:
            ledger.check_serving()
            found = [ledger.lookup(chunk_id) for chunk_id in chunk_ids]
            pending = [meta for meta in found if meta is not None and meta.pending is not None]
            ledger.record([Change(meta, replace(meta, pending=None) if meta.version else None) for meta in pending])
        self._upkeep.after_change()

    def replace(self, update: Update, tags: Sequence[Tag] = ()) -> ChunkMeta:
        """Resync: the chunk becomes exactly `update.data`, committed at once as `update.update_version` with `update.chain_version`; a pending
        version is dropped. Any version is taken, also an older one than ours: the predecessor knows."""
        if update.kind != UpdateKind.REPLACE:
            raise InvalidArgument(f"replace was called with a {update.kind.name}")
        staged = self._stage(update)
        change = staged.applied(update.chain_version)
        assert change.new is not None
        self._record([(staged, change)], tags)
        return change.new

    def remove(self, chunk_ids: Iterable[bytes], tags: Sequence[Tag] = ()) -> int:
        """Resync: these chunks are gone, committed and pending version; nothing is left of them. How many there were."""
        ledger = self._ledger
        with ledger.lock:
            ledger.check_serving()
            found = [meta for meta in map(ledger.lookup, chunk_ids) if meta is not None]
            ledger.record([Change(meta, None) for meta in found], tags)
        self._upkeep.after_change()
        return len(found)

    def sync(self) -> None:
        """Everything that returned before this call survives power loss when it returns. Concurrent calls share one sync."""
        self._ledger.sync()

    def sync_removals(self) -> None:
        """The removals of chunks that returned before this call survive power loss when it returns. Nothing else need; it is quick."""
        self._ledger.check_serving()
        self._ledger.release_removed()

    def give_back(self) -> None:
        """Blocks that are free, or were freed before this call, go back to the disk, for others on it."""
        self._ledger.check_serving()
        self._ledger.give_back_all()

    def abandon(self, error: KvfsError) -> None:
        """Write nothing any more, neither now nor at the end: what is there cannot be trusted, or is given up."""
        self._ledger.failed = self._ledger.failed or error

    def close(self) -> None:
        """Sync, move the journal into the index, let go of the directory."""
        if self._closed:
            return
        self._closed = True
        self._upkeep.stop()
        try:
            self._ledger.close()
        finally:
            self._disk.close()

    # --- inside ---

    def _stage(self, update: Update, *, pending: bool = False) -> Staged:
        try:
            return self._stager.stage(update, pending=pending)
        except NoSpace:
            if self._ledger.index_full is None:
                raise
        # The index found no room once. Nothing else asks it again while all updates are refused, and by now there may be some.
        self._ledger.ask_index_again()
        return self._stager.stage(update, pending=pending)

    def _record(self, batch: Sequence[tuple[Staged, Change]], tags: Sequence[Tag] = ()) -> None:
        """Journal staged updates together; all of them are cancelled when that fails."""
        if not batch and not tags:
            return
        ledger, stager = self._ledger, self._stager
        with ledger.lock:
            try:
                ledger.check_serving()
                for staged, _ in batch:
                    stager.check_current(staged)
                ledger.record([change for _, change in batch], tags)
            except BaseException:
                for staged, _ in batch:
                    stager.cancel(staged)
                raise
            for staged, _ in batch:
                stager.recorded(staged)
        self._upkeep.after_change()


def _only(outcomes: list[Any]) -> Any:
    """The outcome of a batch of one."""
    if isinstance(outcomes[0], KvfsError):
        raise outcomes[0]
    return outcomes[0]


def _committed(old: ChunkMeta, pending: PendingMeta, chain_version: int) -> ChunkMeta | None:
    if pending.kind == UpdateKind.REMOVE:
        return None
    return ChunkMeta(old.chunk_id, pending.version, chain_version, pending.mtime_ns, pending.content, None)


def _visible(meta: ChunkMeta, version: int) -> tuple[int, Content]:
    """(version, content) that a reader of `version` (0: the committed one) is to see."""
    pending = meta.pending
    if version > meta.version:
        if pending is None or pending.version != version:
            raise MissingUpdate(f"chunk {meta.chunk_id.hex()} has no version {version} here")
        if pending.kind == UpdateKind.REMOVE:
            raise ChunkNotFound(f"chunk {meta.chunk_id.hex()} was removed")
        return version, pending.content
    if not meta.version:
        raise ChunkNotFound(f"no chunk {meta.chunk_id.hex()}")
    return meta.version, meta.content


def _inode_range(inode: int) -> tuple[bytes, bytes]:
    """[begin, end) of the chunk ids of an inode; 0: of all."""
    if not inode:
        return b"", b""
    return chunk_id_of(inode, 0), chunk_id_of(inode, MAX_CHUNK_INDEX) + b"\0"
