"""Opening a target: from what lies in its directory to a ledger, after a clean stop, a killed process or a power loss.

1. Read the journal from where the index map ends (nothing is written before everything that can be wrong was looked at).
2. Records whose data is known to be synced are taken as they are. Of the later ones a chunk's newest state stands whose bytes have their
   checksums; when none has, the state before them stands. A tag is kept only if everything in its record stands, or a later state does.
3. Every pending version that is left must have its bytes too, else it is dropped: it was never acknowledged.
4. The allocator learns all blocks.
5. What was judged otherwise than the journal has it goes into the journal: the record of the checkpoint's sync, which says that all data before it
   is settled, must not make the next opening believe what this one found missing.
6. A checkpoint: data files synced, rows into the index map, old journal segments removed. Doing all this again after a crash in between
   gives the same result.
7. Only now are places without a chunk given back to the disk: what a killed process left need not be synced, and a loss of power in the middle of
   all this brings back the state before, with the blocks that it had.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from kvfs.common.boundary.clock import Clock
from kvfs.common.boundary.disk import Disk
from kvfs.common.errors import IndexCorrupt
from kvfs.storage.engine import chunk, tags
from kvfs.storage.engine.allocator import Allocator
from kvfs.storage.engine.chunk import ChunkMeta, Content
from kvfs.storage.engine.config import EngineConfig
from kvfs.storage.engine.files import DataFiles
from kvfs.storage.engine.index import Index
from kvfs.storage.engine.journal import Journal, Record, remove_segments_behind, replay, segments
from kvfs.storage.engine.ledger import CHUNK_PREFIX, CHUNKS_END, Ledger
from kvfs.storage.engine.reader import damaged_units

Rows = dict[bytes, bytes | None]


def open_ledger(disk: Disk, clock: Clock, config: EngineConfig) -> Ledger:
    files = DataFiles(disk)
    index = Index(disk.open_map("index", size_bytes=config.index_bytes))
    try:
        _check_complete(disk, index)
        records, next_sequence = replay(disk, index.floor)
        settled = max((record.settled for record in records), default=0)
        for record in records:
            if record.sequence < settled:
                index.put(record.rows)
        judge = _Judge(files)
        tail = [record for record in records if record.sequence >= settled]
        standing = _standing_rows(tail, judge)
        corrections = _corrections(tail, standing, index)
        index.put(standing)
        allocator = Allocator(disk, files, config)
        kept_tags = tags.Tags(clock, config.tags, config.tag_age_s)
        for key, value in index.scan(tags.PREFIX, tags.PREFIX + b"\xff" * 21):
            kept_tags.load(key, value)
        chunks, dropped = _load_chunks(index, allocator, judge)
        corrections.update(dropped)
        unused, short = allocator.load_done()
    except BaseException:
        index.close()
        files.close()
        raise
    # From here on the directory changes.
    files.sync_names()
    allocator.allocate_again(short)
    remove_segments_behind(disk, next_sequence)
    journal = Journal(disk, next_sequence, config.journal_bytes)
    if corrections:
        journal.append(corrections, 0, 0)
    files.dirty = set(files.existing())
    ledger = Ledger(disk, files, config, index, journal, allocator, kept_tags, chunks)
    ledger.checkpoint()
    allocator.give_back(unused)
    allocator.remove_vacant()
    return ledger


def _check_complete(disk: Disk, index: Index) -> None:
    """The journal goes on where the index map ends. A target that was opened before has a segment; one that never was has neither."""
    first = min((segment for segment in segments(disk) if segment >= index.floor), default=None)
    if first is None and index.floor > 1:
        raise IndexCorrupt(f"the journal of the target is gone, its index needs it from record {index.floor} on. {IndexCorrupt.ADVICE}")
    if first is not None and first > index.floor:
        raise IndexCorrupt(f"the target's index ends at record {index.floor}, its journal begins at {first}: rows are missing. {IndexCorrupt.ADVICE}")


class _Judge:
    """Whether the bytes of a content have their checksums; every content is read once."""

    def __init__(self, files: DataFiles) -> None:
        self._files = files
        self._whole: dict[Content, bool] = {}

    def whole(self, content: Content) -> bool:
        found = self._whole.get(content)
        if found is None:
            found = self._whole[content] = self._read(content)
        return found

    def _read(self, content: Content) -> bool:
        if content.block is None:
            return True
        # An error of the disk is not an answer: what cannot be read now may be whole, and what is judged torn is given up for good.
        return next(damaged_units(self._files, content), None) is None

    def standing(self, meta: ChunkMeta) -> ChunkMeta | None:
        """The meta without a pending version whose bytes are not there; None: nothing is left of it."""
        if meta.pending is None or self.whole(meta.pending.content):
            return meta
        return replace(meta, pending=None) if meta.version else None


def _corrections(tail: list[Record], standing: Rows, index: Index) -> Rows:
    """The rows that stand otherwise than the last record of the tail has them. `index`: as it is before the tail."""
    newest: Rows = {}
    for record in tail:
        newest.update(record.rows)
    found = {key: standing[key] if key in standing else index.get(key) for key in newest}
    return {key: value for key, value in found.items() if value != newest[key]}


def _standing_rows(tail: list[Record], judge: _Judge) -> Rows:
    """What stands of records whose data may not have been synced."""
    states: dict[bytes, list[tuple[int, bytes | None]]] = defaultdict(list)
    for record in tail:
        for key, value in record.rows.items():
            if key.startswith(CHUNK_PREFIX):
                states[key].append((record.sequence, value))
    rows: Rows = {}
    stands_at: dict[bytes, int] = {}
    for key, history in states.items():
        for sequence, value in reversed(history):
            meta = chunk.decode(key[1:], value) if value is not None else None
            if meta is None or judge.whole(meta.content):
                left = judge.standing(meta) if meta is not None else None
                rows[key] = chunk.encode(left) if left is not None else None
                stands_at[key] = sequence
                break
    for record in tail:
        whole = all(stands_at.get(key, -1) >= record.sequence for key in record.rows if key.startswith(CHUNK_PREFIX))
        for key, value in record.rows.items():
            if key.startswith(tags.PREFIX) and (whole or value is None):
                rows[key] = value
    return rows


def _load_chunks(index: Index, allocator: Allocator, judge: _Judge) -> tuple[int, Rows]:
    """Teach the allocator every block that is held. (How many chunks there are, rows of pending versions that were dropped.)"""
    chunks = 0
    dropped: Rows = {}
    for key, value in index.scan(CHUNK_PREFIX, CHUNKS_END):
        meta: ChunkMeta | None = chunk.decode(key[1:], value)
        assert meta is not None
        if meta.pending is not None:
            left = judge.standing(meta)
            if left is not meta:
                dropped[key] = chunk.encode(left) if left is not None else None
                meta = left
        if meta is not None:
            chunks += 1
            for block in meta.blocks():
                allocator.load_used(block)
    index.put(dropped)
    return chunks, dropped
