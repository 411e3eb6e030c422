"""What goes into the chunk engine and what comes out of it, apart from chunk metas (chunk.py).

Plain values: none of them holds a lock, a file or a buffer that outlives the call it is passed to.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from kvfs.common.boundary.disk import DiskFile
from kvfs.common.values import value


class UpdateKind(enum.IntEnum):
    """The numbers are those of `UpdateKind` in common/wire/storage.proto, and stand in the index: never renumber."""

    WRITE = 0
    """Bytes at an offset; past the end, the gap reads as zeros."""
    TRUNCATE = 1
    """The chunk gets `length` bytes: cut, or extended with zeros."""
    REMOVE = 2
    REPLACE = 3
    """The whole chunk, with its versions, as the predecessor has it."""
    CREATE = 4
    """A WRITE of the whole chunk, only if it is not there. Of the chain's head alone: it makes a WRITE of it, so the engine never meets one."""


@value
class Tag:
    """An idempotency record: the last update of (client, channel) had this sequence number and this result (opaque bytes, at most 1 KiB)."""

    client_id: bytes
    channel: int
    sequence: int
    result: bytes = b""


@value
class Update:
    """One change of one chunk.

    `update_version` is the version the chunk has once committed: its committed version + 1 (0: the engine takes exactly that; only the head
    of a chain may). `checksums` are of `data`, one per fragment (common/checksum.py); for WRITE and REPLACE `length` is len(data).
    `chunk_size` bounds the chunk's length.
    """

    chunk_id: bytes
    kind: UpdateKind = UpdateKind.WRITE
    offset: int = 0
    length: int = 0
    data: memoryview | None = None
    checksums: bytes = b""
    update_version: int = 0
    chunk_size: int = 1 << 20
    chain_version: int = 0
    """REPLACE only: the chain version that goes with `update_version` (others get it at commit)."""
    mtime_ns: int = 0
    """0: the engine's clock."""
    slab_bytes: int = 0
    """The block class of a KV-cache block; 0: by length."""
    damaged: bool = False
    """REPLACE only: the bytes do not have the checksums, and are kept as they are, so that what is wrong with them stays visible."""
    tag: Tag | None = None
    """Prepare only: whose update it is, kept with the pending version (without the result), so that a commit after a restart can record it."""
    waited_for: bool = False
    """The last of its chain: everybody waits for this copy, so threads may help with a large one. Elsewhere they would only take processors."""


@value
class ReadOutcome:
    """A read that was served. `length` bytes lie at the start of the caller's buffer; less than asked at the chunk's end (beyond is a hole)."""

    length: int
    checksums: bytes
    """8 bytes per fragment of [offset, offset + length), as common/checksum.py cuts it."""
    version: int
    """The version whose bytes these are."""
    chunk_length: int
    pending_version: int
    """0: none was pending when the read began; else the reader may have to ask the tail which version is the committed one."""


class Place(NamedTuple):
    """Where the bytes of a range lie, for a reader who fetches them himself. Nothing holds them there: a reader who comes late finds other bytes,
    which do not have the checksums. (A tuple: hundreds are made for one request.)"""

    length: int
    """Bytes of the range asked for; less than asked at the chunk's end."""
    checksums: bytes
    """As stored: one per unit of the range widened to whole units."""
    version: int
    chunk_length: int
    pending_version: int
    file: DiskFile | None
    """None: nothing is stored of the range."""
    file_offset: int
    """Of the widened range's first byte."""
    stored: int
    """Bytes of the widened range that lie there; the rest are zeros."""


@value
class LastChunk:
    index: int
    length: int
    chunks: int
    bytes: int


@value
class Space:
    capacity_bytes: int
    used_bytes: int
    """In blocks that chunks hold."""
    free_bytes: int
    """What new blocks may still take; capacity = used + free, the reserve taken off."""
    chunks: int


@value
class CheckReport:
    """fsck of one target: every problem is a sentence that names the chunk or the block."""

    chunks: int
    bytes: int
    problems: list[str]
