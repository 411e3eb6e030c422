"""A chunk's meta: what the index says about it, and its encoding (docs/format.md, "Index value").

Invariants, checked whenever one is made from bytes and by fsck:
- `version` is the committed one (0: none yet); at most one pending version, and it is version + 1;
- one checksum per started 32 KiB unit of `length`; the last one covers the bytes up to `length` only;
- bytes at and after `stored` (and below `length`) were never written and are zeros; `stored` fits the block; no block: stored == 0;
- committed and pending may share a block (append in place, cut); nothing else ever shares one.
A meta is a value: a change makes a new one. This module never touches a disk.
"""

from __future__ import annotations

import struct

from kvfs.common.checksum import CHECKSUM_BYTES, CHECKSUM_UNIT_BYTES, xxh3_64
from kvfs.common.errors import IndexCorrupt
from kvfs.common.values import value
from kvfs.storage.engine.classes import BLOCK_ALIGNMENT_BYTES, Block
from kvfs.storage.engine.requests import Tag, UpdateKind


@value
class Content:
    """The bytes of one version: how many, where, and their checksums."""

    length: int
    stored: int
    block: Block | None
    checksums: bytes
    sealed: bool
    """The block holds, at or after `length`, bytes of an older version that a reader or a power loss may still need: never append in place."""


EMPTY = Content(length=0, stored=0, block=None, checksums=b"", sealed=False)


@value
class PendingMeta:
    """A version that was prepared and neither committed nor dropped."""

    version: int
    kind: UpdateKind
    content: Content
    mtime_ns: int
    tag: Tag | None = None
    """Whose update it is; its result is not kept."""

    @property
    def length(self) -> int:
        return self.content.length

    @property
    def checksums(self) -> bytes:
        return self.content.checksums

    @property
    def checksum_of_list(self) -> int:
        """What replicas compare before they commit."""
        return xxh3_64(self.content.checksums)


@value
class ChunkMeta:
    chunk_id: bytes
    version: int
    chain_version: int
    mtime_ns: int
    content: Content
    pending: PendingMeta | None

    @property
    def length(self) -> int:
        return self.content.length

    @property
    def block(self) -> Block | None:
        return self.content.block

    @property
    def checksums(self) -> bytes:
        return self.content.checksums

    @property
    def checksum_of_list(self) -> int:
        return xxh3_64(self.content.checksums)

    @property
    def allocated_bytes(self) -> int:
        """Of the blocks of both versions."""
        return sum(block.block_bytes for block in self.blocks())

    def blocks(self) -> set[Block]:
        """Every block that this chunk holds, committed and pending."""
        found = set()
        if self.content.block is not None:
            found.add(self.content.block)
        if self.pending is not None and self.pending.content.block is not None:
            found.add(self.pending.content.block)
        return found


def units_of(length: int) -> int:
    """How many checksum units a chunk of this length has."""
    return -(-length // CHECKSUM_UNIT_BYTES)


# --- encoding ------------------------------------------------------------------------------------------------------------------------

_FORMAT = 1
_HAS_BLOCK, _HAS_PENDING, _SEALED, _PENDING_HAS_BLOCK, _PENDING_SEALED, _PENDING_TAGGED = 1, 2, 4, 8, 16, 32
_HEAD = struct.Struct("<BBBxI")  # format, flags, pending kind, check: the low 32 bits of XXH3-64 over the key and everything but the check
_CHECKED_HEAD_BYTES = 4
_FIXED = struct.Struct("<QQqIIIHxxI")  # version, chain version, mtime_ns, length, stored, block's 4 KiB pages, file, index
_PENDING = struct.Struct("<QqIIIHxxI")  # version, mtime_ns, length, stored, block's 4 KiB pages, file, index
_TAG = struct.Struct("<16sIQ")  # client id, channel, sequence
_NO_BLOCK = Block(0, 0, 0)


def encode(meta: ChunkMeta) -> bytes:
    """The index value of a meta."""
    content, pending = meta.content, meta.pending
    block = content.block or _NO_BLOCK
    flags = (_HAS_BLOCK if content.block else 0) | (_SEALED if content.sealed else 0)
    pages = block.block_bytes // BLOCK_ALIGNMENT_BYTES
    body = _FIXED.pack(meta.version, meta.chain_version, meta.mtime_ns, content.length, content.stored, pages, block.file, block.number)
    body += content.checksums
    kind = 0
    if pending is not None:
        kind, content = pending.kind, pending.content
        block = content.block or _NO_BLOCK
        flags |= _HAS_PENDING | (_PENDING_HAS_BLOCK if content.block else 0) | (_PENDING_SEALED if content.sealed else 0)
        pages = block.block_bytes // BLOCK_ALIGNMENT_BYTES
        body += _PENDING.pack(pending.version, pending.mtime_ns, content.length, content.stored, pages, block.file, block.number)
        body += content.checksums
        if pending.tag is not None:
            flags |= _PENDING_TAGGED
            body += _TAG.pack(pending.tag.client_id, pending.tag.channel, pending.tag.sequence)
    head = bytes((_FORMAT, flags, kind, 0))
    return head + (xxh3_64(meta.chunk_id + head + body) & 0xFFFFFFFF).to_bytes(4, "little") + body


def decode(chunk_id: bytes, value: bytes) -> ChunkMeta:
    """The meta of an index value; IndexCorrupt when it is not one, whatever the bytes are."""
    try:
        form, flags, kind, check = _HEAD.unpack_from(value)
        if form != _FORMAT or check != xxh3_64(chunk_id + value[:_CHECKED_HEAD_BYTES] + value[_HEAD.size :]) & 0xFFFFFFFF:
            raise IndexCorrupt(f"the index entry of chunk {chunk_id.hex()} is damaged")
        at = _HEAD.size
        version, chain_version, mtime_ns, length, stored, pages, file, index = _FIXED.unpack_from(value, at)
        at += _FIXED.size
        end = at + CHECKSUM_BYTES * units_of(length)
        block = Block(pages * BLOCK_ALIGNMENT_BYTES, file, index) if flags & _HAS_BLOCK else None
        content = Content(length, stored, block, value[at:end], bool(flags & _SEALED))
        pending = None
        if flags & _HAS_PENDING:
            p_version, p_mtime_ns, length, stored, pages, file, index = _PENDING.unpack_from(value, end)
            at = end + _PENDING.size
            end = at + CHECKSUM_BYTES * units_of(length)
            block = Block(pages * BLOCK_ALIGNMENT_BYTES, file, index) if flags & _PENDING_HAS_BLOCK else None
            p_content = Content(length, stored, block, value[at:end], bool(flags & _PENDING_SEALED))
            tag = None
            if flags & _PENDING_TAGGED:
                tag = Tag(*_TAG.unpack_from(value, end))
                end += _TAG.size
            pending = PendingMeta(p_version, UpdateKind(kind), p_content, p_mtime_ns, tag)
    except (struct.error, ValueError) as error:
        raise IndexCorrupt(f"the index entry of chunk {chunk_id.hex()} is damaged: {error}") from error
    if end != len(value):
        raise IndexCorrupt(f"the index entry of chunk {chunk_id.hex()} has {len(value)} bytes instead of {end}")
    return ChunkMeta(chunk_id, version, chain_version, mtime_ns, content, pending)
