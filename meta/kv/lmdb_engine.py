"""The embedded engine: LMDB for what is settled, a synced journal in front of it for what was just committed.

A commit is durable once its batch is one synced record in the journal (one flush; LMDB's own synced commit needs two). All commits that come while a
batch is being synced form the next one. Now and then, in a thread of its own, a checkpoint moves what the journal holds into LMDB with one synced
commit; then the journal's segments are used again. Opening replays the journal into LMDB.

Invariants: LMDB holds exactly the state of its VERSION key; the journal holds every durable commit after that; a segment is used again only when LMDB
holds all of it. A failed sync ends the engine (nobody knows what the disk holds): only reopening, which reads what is there, may go on.
"""

from __future__ import annotations

import contextlib
import logging
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import trio
import xxhash

from kvfs.common.boundary.disk import Disk, DiskFile
from kvfs.common.boundary.random import Random, SystemRandom
from kvfs.common.errors import FormatTooNew, IndexCorrupt, InputOutput, KvfsError, NoSpace, TxnMaybeCommitted, TxnThrottled
from kvfs.meta.kv.journal import Record, encode_changes, encode_record, read_segment, replay
from kvfs.meta.kv.limits import MAX_KEY_BYTES
from kvfs.meta.kv.local import Changes, LocalEngine, Receipt
from kvfs.meta.kv.transaction import Row
from kvfs.meta.kv.worker import InlineWorker, ThreadWorker, Worker

log = logging.getLogger(__name__)

FORMAT: Final = 1
MAP_BYTES: Final = 256 << 30
"""Address space of the map, not disk space: far above what one metadata service will ever hold."""
SEGMENT_BYTES: Final = 16 << 20
MAX_SEGMENTS: Final = 8
CHECKPOINT_COMMITS: Final = 2000
"""A checkpoint is due after this many commits, or when a segment is full."""
FORGET_COMMITS: Final = 4
"""How many commits' recent versions are dropped at a time, so that dropping a checkpoint's never holds up the loop."""
CHECKPOINT_RETRY_S: Final = 1.0
QUICK_SYNC_S: Final = 0.001
AT_ONCE_COMMITS: Final = 16
"""So many commits in a row may be synced in the trio thread itself, after one by the writer's thread was quick and found nobody else committing:
waking two threads costs as much as a sync here. The next goes through the writer's thread again, to see whether that still holds."""

HEADER_KEY: Final = b"\xff" * (MAX_KEY_BYTES + 2)
"""The engine's own key, beside the users' keys: longer than any key or bound that a user can name, and behind all of them."""
_HEADER: Final = struct.Struct("<I8sQ")
"""Format, seed of all checksums, version up to which the map is complete. The place of the format never changes."""
_CHECKSUM_BYTES: Final = 8

_SCAN_ROWS: Final = 256
_ZEROS: Final = bytes(1 << 20)


@dataclass(slots=True)
class _Segment:
    name: str
    file: DiskFile | None
    end_bytes: int = 0
    last_version: int = 0


class _Batch(Receipt):
    """Commits that are written and synced together."""

    __slots__ = ("at_once", "changes", "commits", "count", "last_version", "started_s")

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[bytes] = []
        self.commits = 0
        self.count = 0
        self.at_once = False
        self.started_s = 0.0
        self.last_version = 0


class LmdbEngine(LocalEngine):
    """Takes the directory for itself. Opening blocks: the journal is replayed."""

    def __init__(
        self,
        disk: Disk,
        *,
        now: Callable[[], float] = trio.current_time,
        random: Random | None = None,
        worker: Callable[[str], Worker] = ThreadWorker,
        segment_bytes: int = SEGMENT_BYTES,
        map_bytes: int = MAP_BYTES,
    ) -> None:
        self._disk = disk
        self._segment_bytes = segment_bytes
        disk.lock()
        try:
            self._map = disk.open_map("map", size_bytes=map_bytes)
            try:
                version = self._open(random or SystemRandom())
            except BaseException:
                self._map.close()
                raise
        except BaseException:
            disk.close()
            raise
        super().__init__(version, now)
        self._base_version = version
        self._written_version = version
        self._pending = _Batch()
        self._in_flight: _Batch | None = None
        self._failure: KvfsError | None = None
        self._checkpointing = False
        self._checkpoint_error: KvfsError | None = None
        self._checkpoint_not_before_s = 0.0
        self._short_of_space = False
        self._at_once = 0
        self._writer = worker("kv-journal")
        self._inline = InlineWorker()
        self._checkpointer = worker("kv-checkpoint")

    # --- opening

    def _open(self, random: Random) -> int:
        """Check the format, replay the journal; the version of the store. Changes nothing before everything has been read and found good."""
        names = [name for name in self._disk.list() if name.startswith("journal-")]
        header = self._map.get(HEADER_KEY)
        if header is None and not names and not self._map.count():
            header = _seal(HEADER_KEY, _HEADER.pack(FORMAT, random.bytes(8), 0), 0)
            fresh = True
        else:
            fresh = False
        if header is None or len(header) < _CHECKSUM_BYTES + 4:
            raise IndexCorrupt("the metadata store has lost its header. Nothing was changed; restore this directory from a copy")
        found_format = int.from_bytes(header[_CHECKSUM_BYTES : _CHECKSUM_BYTES + 4], "little")
        if found_format > FORMAT:
            raise FormatTooNew(f"the metadata store has format {found_format}, this kvfs knows {FORMAT}: upgrade kvfs. Nothing was changed")
        _, self._seed_bytes, base = _HEADER.unpack(_unseal(HEADER_KEY, header, 0))
        self._seed = int.from_bytes(self._seed_bytes, "little")
        self._free = [_Segment(name, None) for name in names]
        self._sealed: list[_Segment] = []
        try:
            records: list[Record] = []
            for segment in self._free:
                segment.file = self._disk.open(segment.name)
                data = memoryview(bytearray(segment.file.size()))
                segment.file.read_into([data], 0)
                records += read_segment(segment.name, data, base, self._seed)
            version, changes = replay(records, base)
            if fresh or version > base:
                self._checkpoint(version, changes)
            if not self._free:
                self._free.append(self._new_segment())
                self._fill(self._free[0])
        except BaseException:
            self._close_segments(self._free)
            raise
        self._current = self._free.pop()
        return version

    def _new_segment(self) -> _Segment:
        taken = {segment.name for segment in (*self._free, *self._sealed)}
        return _Segment(next(name for name in (f"journal-{number}" for number in range(MAX_SEGMENTS + 1)) if name not in taken), None)

    def _close_segments(self, segments: list[_Segment]) -> None:
        for segment in segments:
            if segment.file is not None:
                segment.file.close()

    def _fill(self, segment: _Segment) -> DiskFile:
        """Make the segment's file, written full of zeros so that a synced write in it needs no change of the file's own metadata."""
        file = self._disk.open(segment.name, create=True)
        try:
            for at in range(0, self._segment_bytes, len(_ZEROS)):
                file.write([_ZEROS[: self._segment_bytes - at]], at)
            file.sync()
            self._disk.sync_directory()
        except BaseException:
            file.close()
            with contextlib.suppress(KvfsError):
                self._disk.unlink(segment.name)  # a part of a segment would keep from the map what little space is left
            raise
        segment.file = file
        return file

    # --- reads of the base

    def base_get(self, key: bytes) -> bytes | None:
        sealed = self._map.get(key)
        return None if sealed is None else _unseal(key, sealed, self._seed)

    def base_scan(self, begin: bytes, end: bytes, *, reverse: bool, hint: int) -> Iterator[Row]:
        # In parts: the merge above may drop rows, and a whole directory must not be read for one entry.
        limit = max(1, min(hint, _SCAN_ROWS))
        while True:
            rows = self._map.range(begin, end, limit=limit, reverse=reverse)
            for key, sealed in rows:
                yield key, _unseal(key, sealed, self._seed)
            if len(rows) < limit:
                return
            if reverse:
                end = rows[-1][0]
            else:
                begin = rows[-1][0] + b"\0"
            limit = _SCAN_ROWS

    # --- commits

    def _check_open(self) -> None:
        super()._check_open()
        if self._failure is not None:
            raise self._failure

    def _room_error(self) -> KvfsError | None:
        if len(self._sealed) + 1 >= MAX_SEGMENTS:
            return self._checkpoint_error or TxnThrottled("the journal is full: checkpoints cannot keep up, or a transaction stays open for long")
        return super()._room_error()

    def _accepted(self, version: int, changes: Changes) -> Receipt:
        batch = self._pending
        batch.changes.append(encode_changes(changes))
        batch.commits += 1
        batch.count += len(changes)
        batch.last_version = version
        if self._in_flight is None:
            self._write_batch()
        return batch

    def _receipt(self, version: int) -> Receipt:
        in_flight = self._in_flight
        return in_flight if in_flight is not None and version <= in_flight.last_version else self._pending

    def _write_batch(self) -> None:
        batch, self._pending = self._pending, _Batch()
        self._in_flight = batch
        record = encode_record(self._written_version, batch.last_version, batch.count, b"".join(batch.changes), self._seed)
        segment = self._current
        if segment.end_bytes and segment.end_bytes + len(record) > self._segment_bytes:
            self._sealed.append(segment)
            segment = self._current = self._free.pop() if self._free else self._new_segment()
        batch.at_once = batch.commits == 1 and self._at_once > 0 and segment.file is not None
        batch.started_s = 0.0 if self._closed else self.now()
        writer = self._inline if batch.at_once else self._writer
        writer.start(partial(self._write, segment, record), partial(self._batch_written, batch, segment, len(record)))

    def _write(self, segment: _Segment, record: bytes) -> None:
        """In the writer's thread."""
        file = segment.file or self._fill(segment)
        file.write([record], segment.end_bytes)
        try:
            file.sync()
        except KvfsError as error:
            raise _SyncFailed(error.message) from error

    def _batch_written(self, batch: _Batch, segment: _Segment, size_bytes: int, error: Exception | None) -> None:
        """In the trio thread."""
        self._in_flight = None
        if error is None:
            segment.end_bytes += size_bytes
            segment.last_version = batch.last_version
            self._written_version = self._durable = batch.last_version
            batch.done.set()
            self._judge(batch)
            if self._pending.commits:
                self._write_batch()
            return
        following, self._pending = self._pending, _Batch()
        if isinstance(error, NoSpace):
            batch.error = following.error = error
            self._short_of_space = True
            if segment.file is None and self._sealed:
                self._current = self._sealed.pop()  # by the next commit a checkpoint may have freed a segment
        else:
            log.error("the metadata journal failed: %s", error)
            self._failure = InputOutput(f"the metadata store's disk failed ({error}): restart the service when it is repaired")
            batch.error = TxnMaybeCommitted(f"the metadata journal could not be synced: {error}")
            following.error = self._failure
        self._undo()
        batch.done.set()
        following.done.set()

    def _judge(self, batch: _Batch) -> None:
        """Whether the next commits may be synced in the trio thread."""
        if self._closed or self.now() - batch.started_s > QUICK_SYNC_S:
            self._at_once = 0
        elif batch.at_once:
            self._at_once -= 1
        else:
            self._at_once = AT_ONCE_COMMITS if batch.commits == 1 and not self._pending.commits else 0

    # --- checkpoints

    def _advance_base(self, version: int) -> None:
        self.recent.forget(self._base_version, limit=FORGET_COMMITS)
        if self._checkpointing or version <= self._base_version:
            return
        commits = version - self._base_version
        due = commits >= CHECKPOINT_COMMITS or self._short_of_space or (self._sealed and self._sealed[0].last_version <= version)
        if due and self.now() >= self._checkpoint_not_before_s:
            self._checkpointing = True
            self._short_of_space = False
            changes = self.recent.changes_until(version, since=self._base_version)
            self._checkpointer.start(partial(self._checkpoint, version, changes), partial(self._checkpoint_done, version))

    def _checkpoint(self, version: int, changes: Changes) -> None:
        """In the checkpointer's thread."""
        seed = self._seed
        writes = {key: None if value is None else _seal(key, value, seed) for key, value in changes.items()}
        writes[HEADER_KEY] = _seal(HEADER_KEY, _HEADER.pack(FORMAT, self._seed_bytes, version), 0)
        self._map.commit(writes)

    def _checkpoint_done(self, version: int, error: Exception | None) -> None:
        """In the trio thread."""
        self._checkpointing = False
        if error is None:
            self._checkpoint_error = None
            self._base_version = version
            while self._sealed and self._sealed[0].last_version <= version:
                segment = self._sealed.pop(0)
                segment.end_bytes = 0
                self._free.append(segment)
        elif isinstance(error, NoSpace):
            # The journal can go on until its segments are used up: try again later.
            log.warning("the metadata checkpoint found no space: %s", error)
            self._checkpoint_error = error
            if not self._closed:  # `close` may be called when the loop, and its clock, are gone
                self._checkpoint_not_before_s = self.now() + CHECKPOINT_RETRY_S
        else:
            log.error("the metadata checkpoint failed: %s", error)
            self._failure = error if isinstance(error, KvfsError) else InputOutput(f"the metadata checkpoint failed: {error}")

    # --- end

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._writer.close()
        self._checkpointer.close()
        for snapshot in list(self._live.values()):
            self.close_snapshot(snapshot)
        if self._failure is None and self._durable > self._base_version:
            # Not needed for safety: the journal has it all. It makes the next opening quick.
            try:
                self._checkpoint(self._durable, self.recent.changes_until(self._durable, since=self._base_version))
            except KvfsError as error:
                log.warning("no checkpoint at the end, the next start will replay the journal: %s", error)
        self._close_segments([*self._free, *self._sealed, self._current])
        self._map.close()
        self._disk.close()


def _seal(key: bytes, value: bytes, seed: int) -> bytes:
    """A value as the map holds it: LMDB has no checksums, so each value carries one of itself and its key."""
    return xxhash.xxh3_64_digest(key + value, seed) + value


def _unseal(key: bytes, sealed: bytes, seed: int) -> bytes:
    value = sealed[_CHECKSUM_BYTES:]
    if xxhash.xxh3_64_digest(key + value, seed) != sealed[:_CHECKSUM_BYTES]:
        raise IndexCorrupt(f"the metadata store is damaged at key {key[:32]!r}. Nothing was changed; restore its directory from a copy")
    return value


class _SyncFailed(Exception):
    """Not known what the disk holds: the engine ends."""
