"""What a target knows about its chunks, kept consistent: index, journal, allocator and tags, under one lock.

Every change goes through `record`: first the journal, then memory, so an error leaves both as they were. Blocks that a change leaves behind go
into quarantine with the change's sequence number. Three steps make things safe, in this order: data files synced, then the journal (with a
record that says so), then quarantined blocks may be used again. For the blocks of a removed chunk the journal is enough: once the removal cannot be
undone, nothing refers to them, whatever else is lost. A checkpoint does the same and then moves the overlay into the index map.
`lock` guards everything; methods marked "locked" expect it to be held. No data I/O happens under it; journal writes do (they go to the page
cache, and their order is the order of the changes).
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from kvfs.common.boundary.disk import Disk
from kvfs.common.errors import InternalError, KvfsError, NoSpace, TargetOffline
from kvfs.storage.engine import chunk
from kvfs.storage.engine.allocator import Allocator
from kvfs.storage.engine.chunk import ChunkMeta
from kvfs.storage.engine.classes import Block, Stretch
from kvfs.storage.engine.config import EngineConfig
from kvfs.storage.engine.files import DataFiles
from kvfs.storage.engine.index import Index
from kvfs.storage.engine.journal import Journal
from kvfs.storage.engine.requests import Tag
from kvfs.storage.engine.tags import Tags

CHUNK_PREFIX = b"c"
CHUNKS_END = b"d"
_BACKLOG_FACTOR = 4
"""Writers wait for the checkpoint when the overlay or the journal is this many times over its limit."""
_SMALL_QUARANTINE_BYTES = 64 << 20
"""Above this, a sync is due when a quarter of the taken space waits: blocks that are still in the page cache are several times cheaper to write
again than fresh ones (170 us against 2-4 ms a MiB on a VM whose memory was never touched), so a small target should get its own back soon."""
_log = logging.getLogger(__name__)


class Change(NamedTuple):
    """A chunk from one meta to another (None: not there); at least one is not None."""

    old: ChunkMeta | None
    new: ChunkMeta | None


class Ledger:
    def __init__(
        self, disk: Disk, files: DataFiles, config: EngineConfig, index: Index, journal: Journal, allocator: Allocator, tags: Tags, chunks: int
    ) -> None:
        self.lock = threading.Lock()
        self.disk = disk
        self.files = files
        self.config = config
        self.index = index
        self.journal = journal
        self.allocator = allocator
        self.tags = tags
        self.chunks = chunks
        self.failed: KvfsError | None = None
        """The error of the disk that took the target out of service."""
        self.index_full: NoSpace | None = None
        """The last checkpoint found no room: until one succeeds, what adds to the index is refused, or the journal would grow without end."""
        self._cache: OrderedDict[bytes, ChunkMeta] = OrderedDict()
        self._settled = 0
        self._durable = 0
        self._synced_to = 0
        """next_sequence after the last sync: equal to the journal's means that there is nothing to sync."""
        self.unsynced_bytes = 0
        self._syncing = threading.Condition()
        self._syncs_started = 0
        self._syncs_done = 0
        self._sync_error: KvfsError | None = None
        self._sync_work = threading.Lock()
        """Held while journal files are synced or removed."""
        self._checkpoint_work = threading.Lock()

    # --- chunks ---

    def lookup(self, chunk_id: bytes) -> ChunkMeta | None:
        """Locked. The meta of a chunk, through the cache."""
        cache = self._cache
        meta = cache.get(chunk_id)
        if meta is not None:
            cache.move_to_end(chunk_id)
            return meta
        value = self.index.get(CHUNK_PREFIX + chunk_id)
        if value is None:
            return None
        meta = chunk.decode(chunk_id, value)
        self._remember(meta)
        return meta

    def _remember(self, meta: ChunkMeta) -> None:
        cache = self._cache
        cache[meta.chunk_id] = meta
        cache.move_to_end(meta.chunk_id)
        if len(cache) > self.config.cached_metas:
            cache.popitem(last=False)

    def metas(self, begin: bytes, end: bytes, limit: int, *, reverse: bool = False) -> list[ChunkMeta]:
        """Locked. Metas with begin <= chunk id < end."""
        found = []
        for key, value in self.index.scan(CHUNK_PREFIX + begin, CHUNK_PREFIX + end if end else CHUNKS_END, reverse=reverse, wanted=limit):
            found.append(chunk.decode(key[1:], value))
            if len(found) == limit:
                break
        return found

    def check_serving(self) -> None:
        if self.failed is not None:
            raise TargetOffline(f"the target is out of service after an error of its disk: {self.failed.message}")

    def record(self, changes: Sequence[Change], tags: Sequence[Tag] = ()) -> None:
        """Locked. Make the changes, in one journal record; they survive the process from here on."""
        rows: dict[bytes, bytes | None] = {}
        for old, new in changes:
            if new is not None:
                rows[CHUNK_PREFIX + new.chunk_id] = chunk.encode(new)
            elif old is not None:
                rows[CHUNK_PREFIX + old.chunk_id] = None
        tag_rows = self.tags.rows(list(tags)) if tags else {}
        rows.update(tag_rows)
        if not rows:
            return
        sequence = self._append(rows)
        self.index.put(rows)
        self.tags.put(tag_rows)
        for old, new in changes:
            if new is not None:
                self._remember(new)
                self.chunks += old is None
                self._settle_new(new)
            elif old is not None:
                self._cache.pop(old.chunk_id, None)
                self.chunks -= 1
            if old is not None:
                self._quarantine_left(old, new, sequence)

    def _settle_new(self, new: ChunkMeta) -> None:
        in_flight = self.allocator.in_flight
        if in_flight:
            in_flight.discard(new.content.block)
            if new.pending is not None:
                in_flight.discard(new.pending.content.block)

    def _quarantine_left(self, old: ChunkMeta, new: ChunkMeta | None, sequence: int) -> None:
        left = old.blocks()
        if left and new is not None:
            left -= new.blocks()
        for block in left:
            self.allocator.quarantine(block, sequence, removed=new is None)

    def _append(self, rows: dict[bytes, bytes | None]) -> int:
        try:
            return self.journal.append(rows, self._settled, self._durable)
        except NoSpace:
            raise
        except KvfsError as error:
            self.failed = error
            raise

    def written(self, block: Block, length: int) -> None:
        """Locked. Bytes of this block were written: the next sync has to cover its file."""
        self.files.dirty.add((block.block_bytes, block.file))
        self.unsynced_bytes += length

    # --- blocks ---

    def make_room_and_allocate(self, block_bytes: int, *, slab: bool) -> Block:
        """Not locked. For when there is no free block: first what waits in quarantine is made free, then empty groups of other classes."""
        self.sync()
        try:
            with self.lock:
                return self.allocator.allocate(block_bytes, slab=slab)
        except NoSpace:
            self._give_back(everything=True)
        with self.lock:
            return self.allocator.allocate(block_bytes, slab=slab)

    def _give_back(self, *, everything: bool = False) -> None:
        with self.lock:
            taken = self.allocator.take_empty_groups(all_of_them=everything)
        self._punch(taken)

    def _punch(self, taken: list[Stretch]) -> None:
        if taken:
            self.allocator.give_back(taken)
            with self.lock:
                self.allocator.forget(taken)

    # --- sync ---

    def sync(self) -> None:
        """Not locked. Group commit: one thread syncs for all that came before it began; the others wait for it."""
        with self._syncing:
            wanted = self._syncs_started + 1
            while self._syncs_done < wanted and self._syncs_started > self._syncs_done:
                self._syncing.wait()
            if self._syncs_done >= wanted:
                if self._sync_error is not None:
                    raise TargetOffline(f"the target could not be synced: {self._sync_error.message}")
                return
            self._syncs_started += 1
        error: KvfsError | None = None
        try:
            self.check_serving()
            self._sync_once()
        except BaseException as caught:
            # Whatever it was: those who wait must not take it for a success.
            error = caught if isinstance(caught, KvfsError) else InternalError(f"sync ended with {caught!r}")
            raise
        finally:
            with self._syncing:
                self._syncs_done += 1
                self._sync_error = error
                self._syncing.notify_all()

    def _sync_once(self) -> None:
        with self._sync_work:
            with self.lock:
                below = self.journal.next_sequence
                if below == self._synced_to:
                    return
                dirty, self.files.dirty = self.files.dirty, set()
                self.unsynced_bytes = 0
            try:
                for key in sorted(dirty):
                    file = self.files.opened(key)
                    if file is not None:  # else its blocks have gone meanwhile, and it with them
                        file.sync()
                with self.lock:
                    self._settled = below
                    self._append({})
                    after = self.journal.next_sequence
                    journal_files = self.journal.files()
                for file in journal_files:
                    file.sync()
            except KvfsError as error:
                # What a failed fsync lost cannot be known, and a second one would claim success: the target is out of service.
                with self.lock:
                    self.files.dirty |= dirty
                    self.failed = self.failed or error
                raise
            with self.lock:
                opening, self._durable = not self._durable, after
                if not opening:  # then segments of an earlier run are still there, and not synced
                    self._note_durable()
                self._synced_to = self.journal.next_sequence
                self.allocator.release(below)
        self._give_back()

    def release_removed(self) -> None:
        """Not locked. Sync the journal alone, which makes the blocks of removed chunks free: the next writes find them still in the page cache."""
        with self._sync_work:
            with self.lock:
                below = self.journal.next_sequence
                journal_files = self.journal.files()
            try:
                for file in journal_files:
                    file.sync()
            except KvfsError as error:
                with self.lock:
                    self.failed = self.failed or error
                raise
            with self.lock:
                self._durable = max(self._durable, below)
                self._note_durable()
                self.allocator.release_removed(below)

    def _note_durable(self) -> None:
        """Locked. A record that says what is synced: else a record that is damaged before the next one comes could be what a loss of power left."""
        with suppress(NoSpace):
            self._append({})

    # --- checkpoint ---

    def checkpoint(self) -> None:
        """Not locked. Sync, then move what the journal holds so far into the index map, and drop those segments."""
        with self._checkpoint_work:
            with self.lock:
                expired = self.tags.expired()
                if expired:
                    self._append(expired)
                    self.index.put(expired)
                    self.tags.put(expired)
                first = self.journal.rotate()
                self.index.freeze()
            self.sync()
            self.index.write_frozen(first)
            with self.lock:
                self.index.drop_frozen()
                self.index_full = None
            with self._sync_work:
                self.journal.remove_before(first)

    def wants_checkpoint(self, factor: int = 1) -> bool:
        return len(self.index) > factor * self.config.overlay_entries or self.journal.position > factor * self.config.journal_bytes

    def wants_sync(self) -> bool:
        waiting = self.allocator.quarantined_bytes
        if waiting > _SMALL_QUARANTINE_BYTES and waiting * 4 > self.allocator.used_bytes:
            return True
        return self.unsynced_bytes > self.config.unsynced_bytes or waiting > self.config.quarantine_bytes

    def wants_release(self) -> bool:
        return self.allocator.wants_release()

    def maintain(self) -> None:
        """Not locked. Do what the limits ask for."""
        with self._in_the_background():
            if self.failed is None and self.wants_release():
                self.release_removed()
            if self.failed is None and self.wants_checkpoint():
                self.checkpoint()
            if self.failed is None and self.wants_sync():
                self.sync()

    def ask_index_again(self) -> None:
        """Not locked. After a checkpoint that found no room."""
        with self._in_the_background():
            if self.failed is None:
                self.checkpoint()

    def tidy(self) -> None:
        """Not locked. What KV-cache blocks left behind goes back to the disk, but for a few free places: called once a second while there is some."""
        with self._in_the_background():
            if self.failed is None:
                if self.allocator.removed_slab_bytes:
                    self.release_removed()
                with self.lock:
                    taken = self.allocator.take_spare_slabs()
                self._punch(taken)

    def rest(self, seen: int) -> int:
        """Not locked. Called now and then with what it gave the last time: when nothing was changed since, freed blocks and all empty groups go
        back to the disk. What was kept for the next writes is of no use to them any more."""
        with self._in_the_background():
            if self.failed is None and seen == self.journal.next_sequence:
                self.give_back_all()
        return self.journal.next_sequence

    def give_back_all(self) -> None:
        """Not locked. What nothing is in goes back to the disk."""
        self.sync()
        self._give_back(everything=True)

    @contextmanager
    def _in_the_background(self) -> Iterator[None]:
        """Errors have marked the target as failed, or will come back at the next change."""
        try:
            yield
        except NoSpace as error:
            self.index_full = error
            _log.error("the journal of the target cannot be moved into its index: %s", error.message)
        except Exception as error:
            # Also a fault of ours (an assertion): going on could lose data.
            _log.exception("the upkeep of the target failed, it goes out of service")
            self.failed = self.failed or (error if isinstance(error, KvfsError) else InternalError(repr(error)))

    def backlogged(self) -> bool:
        return self.wants_checkpoint(_BACKLOG_FACTOR)

    def close(self) -> None:
        """Not locked."""
        try:
            if self.failed is None:
                self.checkpoint()
        finally:
            self.journal.close()
            self.index.close()
            self.files.close()
