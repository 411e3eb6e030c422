"""The chunk engine of one target: the face that the replica (storage/chain) and the storage service call.

Versions as in CRAQ: a chunk has a committed version v (0: none) and at most one pending version u = v + 1. `prepare` makes u, `commit` turns
it into the committed version, `drop_pending` forgets it; `apply` is prepare and commit in one (a chain of one); `replace` sets a chunk as a whole.
All calls block (disk) and may come from any thread; the caller keeps the updates of ONE chunk in order (one at a time): the engine
refuses with Busy when they are not. Reads need no order. The engine's lock is held for the index and the allocator, never for data I/O.

Durability: when prepare/commit/apply/... return, their effect survives the death of the process; after `sync()` it survives power loss.
An error of the disk (InputOutput) on a write or sync path makes the engine `failed`: every later change raises TargetOffline.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvfs.common.boundary.clock import Clock
from kvfs.common.boundary.disk import Disk
from kvfs.common.errors import KvfsError
from kvfs.storage.engine.chunk import ChunkMeta
from kvfs.storage.engine.config import EngineConfig
from kvfs.storage.engine.requests import CheckReport, LastChunk, ReadOutcome, RemovedRange, Space, Tag, Update
from kvfs.storage.engine.superblock import Superblock


class ChunkEngine:
    """Construction opens (or makes) the target: lock, superblock, index, replay of the journal. It raises DirectoryInUse, WrongDataDirectory,
    FormatTooNew or IndexCorrupt and has then changed nothing."""

    def __init__(self, disk: Disk, clock: Clock, superblock: Superblock, config: EngineConfig = EngineConfig()) -> None:  # noqa: B008
        raise NotImplementedError

    # --- reading ---

    def get(self, chunk_id: bytes) -> ChunkMeta | None:
        """The chunk's meta; version 0 with a pending one when it was prepared but never committed; None: no such chunk. About 1 us."""
        raise NotImplementedError

    def read(self, chunk_id: bytes, offset: int, length: int, into: memoryview, *, version: int = 0, nowait: bool = False) -> ReadOutcome | None:
        """Place up to `length` bytes from `offset` at the start of `into`.

        version 0: the committed one; u: the pending version u (the tail said it is committed), or a later committed one. None: nowait and the
        bytes are not in the page cache (`into` may be partly written). ChunkNotFound: no committed version (a hole). ChecksumMismatch: the
        stored bytes are damaged. Whole units are passed on with their stored checksum (the reader verifies them); units that are read in part
        are verified here and get fresh checksums.
        """
        raise NotImplementedError

    def tag(self, client_id: bytes, channel: int) -> Tag | None:
        """The last idempotency record of this channel, if it is still kept."""
        raise NotImplementedError

    def tags(self) -> list[Tag]:
        """All kept idempotency records (for a target that is brought up to date)."""
        raise NotImplementedError

    def list(self, *, after: bytes = b"", limit: int = 1000, inode: int = 0) -> tuple[Sequence[ChunkMeta], bool]:
        """Metas in the order of their ids, behind `after`; inode 0: all. (metas, more). Chunks that are only pending are listed too."""
        raise NotImplementedError

    def last_chunk(self, inode: int) -> LastChunk | None:
        """The last committed chunk of a file that is not empty, with the number of its chunks and bytes here."""
        raise NotImplementedError

    def space(self) -> Space:
        raise NotImplementedError

    def check(self, *, read_data: bool = False) -> CheckReport:
        """fsck: structure always; read_data reads every stored byte against its checksum. The engine stands still during the structural part."""
        raise NotImplementedError

    # --- changing ---

    def prepare(self, update: Update) -> ChunkMeta:
        """Make the pending version; the meta with it. An older pending version is replaced (the same write, forwarded again).

        The incoming bytes are verified against `update.checksums` (ChecksumMismatch). StaleUpdate: update_version is committed already or older;
        MissingUpdate: it skips one. NoSpace: refused before a byte was written. InvalidArgument: out of the limits. TRUNCATE to 0 of a chunk
        that has no committed version becomes REMOVE: nothing is left of it.
        """
        raise NotImplementedError

    def prepare_many(self, updates: Sequence[Update]) -> list[ChunkMeta | KvfsError]:
        """`prepare` of several chunks (no chunk twice: Busy) in one journal record; one outcome each, in order."""
        raise NotImplementedError

    def commit(self, chunk_ids: Iterable[bytes], chain_version: int, tags: Sequence[Tag] = ()) -> list[ChunkMeta | None]:
        """The pending versions of these chunks become committed, with the tags, in one atomic record. A chunk without a pending version is left
        as it is. Returns the metas afterwards (None: removed). Empty chunk_ids: only the tags are recorded."""
        raise NotImplementedError

    def apply(self, update: Update, chain_version: int, tags: Sequence[Tag] = ()) -> ChunkMeta | None:
        """prepare + commit in one record (chain of one). None: the chunk is gone."""
        raise NotImplementedError

    def apply_many(self, updates: Sequence[Update], chain_version: int, tags: Sequence[Tag | None] = ()) -> list[ChunkMeta | None | KvfsError]:
        """`apply` of several updates, as few records as can be; a chunk may come more than once. tags[i], where given, is recorded with
        update i and only if it succeeds."""
        raise NotImplementedError

    def drop_pending(self, chunk_ids: Iterable[bytes]) -> None:
        """Forget the pending versions; chunks without one are left as they are."""
        raise NotImplementedError

    def replace(self, update: Update, tags: Sequence[Tag] = ()) -> ChunkMeta:
        """Resync: the chunk becomes exactly `update.data`, committed at once as `update.update_version` with `update.chain_version`; a pending
        version is dropped. Any version is taken, also an older one than ours: the predecessor knows."""
        raise NotImplementedError

    def remove(self, chunk_ids: Iterable[bytes], tags: Sequence[Tag] = ()) -> int:
        """Resync: these chunks are gone, committed and pending version; nothing is left of them. How many there were."""
        raise NotImplementedError

    def remove_range(self, inode: int, first: int, end: int = 0, *, limit: int = 4096, tags: Sequence[Tag] = ()) -> RemovedRange:
        """Remove the chunks of an inode with first <= index < end (end 0: no end), at most `limit`, committed and pending, in one record."""
        raise NotImplementedError

    def sync(self) -> None:
        """Everything that returned before this call survives power loss when it returns. Concurrent calls share one sync."""
        raise NotImplementedError

    def close(self) -> None:
        """Sync, move the journal into the index, let go of the directory."""
        raise NotImplementedError
