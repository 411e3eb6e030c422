"""Identifiers that cross module and process borders.

A chunk id is 24 bytes: the inode (8, big-endian) and 16 bytes that are the chunk's index in a file (big-endian) or a KV-cache block's key digest.
Big-endian, so that the byte order of ids is the order of a file's chunks, and a range of ids is a range of chunks.
"""

from __future__ import annotations

from typing import NewType

InodeId = NewType("InodeId", int)
"""64 bits. 0 is no inode, 1 the root directory; the top four bits are zero (3FS tools take those for virtual inodes)."""
ChainId = NewType("ChainId", int)
TargetId = NewType("TargetId", int)
NodeId = NewType("NodeId", int)
ClientId = NewType("ClientId", bytes)
"""CLIENT_ID_BYTES random bytes, one per client process."""
ChunkId = NewType("ChunkId", bytes)

ROOT_INODE = InodeId(1)
TARGETS_OF_NODE = 1_000_000
"""Target ids are node * TARGETS_OF_NODE + what meta/cluster/placing.py adds; a node's own number is smaller."""
CHUNK_ID_BYTES = 24
CLIENT_ID_BYTES = 16
SPACE_BIT = 1 << 59
"""Set in the inode of a KV-cache space, whose chunks are blocks."""
DIGEST_BYTES = 16
"""Of a block's key: the end of its chunk id."""
CHUNK_BYTES_MIN = 64 << 10
CHUNK_BYTES_MAX = 64 << 20
"""A file's chunk size is a power of two between these."""


def chunk_id(inode: int, index: int) -> ChunkId:
    """The id of chunk `index` (from 0) of a file."""
    return ChunkId(inode.to_bytes(8, "big") + index.to_bytes(16, "big"))


def block_id(inode: int, digest: bytes) -> ChunkId:
    """The id of a KV-cache block."""
    return ChunkId(inode.to_bytes(8, "big") + digest)


def is_space(inode: int) -> bool:
    return inode & SPACE_BIT != 0


def is_block(chunk: bytes) -> bool:
    """Whether a chunk is a KV-cache block. (An id that came from outside may be anything, also empty.)"""
    return chunk != b"" and chunk[0] & (SPACE_BIT >> 56) != 0


def chunk_inode(chunk: bytes) -> InodeId:
    return InodeId(int.from_bytes(chunk[:8], "big"))


def chunk_index(chunk: bytes) -> int:
    return int.from_bytes(chunk[8:24], "big")
