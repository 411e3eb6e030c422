"""A KV-cache space as anyone may look at it: its parameters and statistics as text, and its blocks one after another.

Owns the two virtual attributes of a space's directory, and the order in which blocks are listed: that of their digests, over all chains of the space,
page by page. Invariants: memory is bounded by a page, whatever the space holds; a block that is there from the beginning of a listing to its end is
listed once; a chain that cannot be asked is an error, never a gap. Engines need none of this: kvcache never lists.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import trio

from kvfs.client.storage_client import StorageClient
from kvfs.common.errors import InputOutput, KvfsError, NoAttribute, NotFound
from kvfs.common.ids import CHUNK_ID_BYTES, block_id
from kvfs.common.wire import meta_pb2, storage_pb2

SPACE_XATTR = b"user.kvfs.space"
STATS_XATTR = b"user.kvfs.stats"
SPACE_XATTRS = (SPACE_XATTR, STATS_XATTR)

CHAIN_PAGE_MIN = 32
CHAIN_PAGE_MAX = 1000
CALLS_MAX = 32
"""Chains asked side by side."""

_OF_HEADS = ("blocks", "bytes", "block_space", "allocated_bytes")
_OF_ALL = ("hits", "misses", "stored", "present", "evicted", "expired", "removed")


class Block(NamedTuple):
    """A block that is there."""

    digest: bytes
    length: int
    checksum: int
    """Of its checksums: with the length it tells one content from another."""
    mtime_ns: int
    """When it was put."""
    allocated_bytes: int

    def same_content(self, other: Block | None) -> bool:
        return other is not None and (self.digest, self.length, self.checksum) == (other.digest, other.length, other.checksum)


# --- attributes ----------------------------------------------------------------------------------------------------------------------------


async def space_attribute(storage: StorageClient, inode: meta_pb2.Inode, name: bytes) -> bytes:
    """The value of one of SPACE_XATTRS, JSON text. NoAttribute for what is no space."""
    if not inode.HasField("space"):
        raise NoAttribute(f"{name.decode()} is an attribute of KV-cache spaces only")
    if not inode.nlink:
        raise NotFound("the space was dropped")
    value = space_parameters(inode) if name == SPACE_XATTR else space_statistics(inode, await storage.space_stats(inode.inode))
    return json.dumps(value).encode()


def space_parameters(inode: meta_pb2.Inode) -> dict[str, Any]:
    space = inode.space
    return {
        "inode": inode.inode,
        "block_tokens": space.block_tokens,
        "block_bytes": space.block_bytes,
        "format": dict(sorted(space.format.items())),
        "digest": space.digest.hex(),
        "replication": space.replication,
        "table": space.table_id,
        "chains": list(space.chain_ids),
        **_limits(space),
    }


def space_statistics(inode: meta_pb2.Inode, told: Iterable[storage_pb2.KvSpaceStats]) -> dict[str, Any]:
    return {**space_sums(told), **_limits(inode.space)}


def space_sums(told: Iterable[storage_pb2.KvSpaceStats]) -> dict[str, int]:
    """What the targets tell, together: blocks are counted once however many replicas they have, events wherever they happened. `targets`: so many
    could be asked and hold blocks of the space."""
    rows = list(told)
    heads = [row for row in rows if row.head]
    sums = {name: sum(getattr(row, name) for row in heads) for name in _OF_HEADS}
    return sums | {name: sum(getattr(row, name) for row in rows) for name in _OF_ALL} | {"targets": len(rows)}


def _limits(space: meta_pb2.Space) -> dict[str, Any]:
    return {"quota_bytes": space.quota_bytes or None, "ttl_s": space.ttl_ms / 1000 if space.ttl_ms else None}


# --- blocks --------------------------------------------------------------------------------------------------------------------------------


async def list_blocks(
    storage: StorageClient, space: meta_pb2.Inode, *, after: bytes = b"", limit: int = CHAIN_PAGE_MAX
) -> tuple[list[Block], bytes | None]:
    """About `limit` blocks whose digests come after `after`, in order (possibly none), and the `after` of the next page; None: there is none.

    Every chain is asked for its next few. What lies behind the end of the shortest answer waits for the next page: another chain may have blocks
    in between.
    """
    number, chains = space.inode, space.space.chain_ids
    if not chains:
        raise InputOutput("the space has no chains: its record is damaged")
    each = min(CHAIN_PAGE_MAX, max(CHAIN_PAGE_MIN, -(-limit // len(chains))))
    begin = block_id(number, after) if after else b""
    pages: list[storage_pb2.ListChunksReply] = []
    errors: list[KvfsError] = []
    places = trio.CapacityLimiter(CALLS_MAX)

    async def ask(chain: int) -> None:
        try:
            async with places:
                if not errors:
                    pages.append(await storage.list_chain(chain, after=begin, limit=each, inode=number))
        except KvfsError as error:
            errors.append(error)

    async with trio.open_nursery() as nursery:
        for chain in chains:
            nursery.start_soon(ask, chain)
    if errors:
        raise errors[0]
    last = min((bytes(page.chunks[-1].chunk_id) for page in pages if page.more and page.chunks), default=None)
    found = [_block(chunk) for page in pages for chunk in page.chunks if chunk.version and (last is None or chunk.chunk_id <= last)]
    return sorted(found), None if last is None else last[8:]


async def find_block(storage: StorageClient, space: int, chain_id: int, digest: bytes) -> Block | None:
    """The block, if it is there now. Does not count as a use of it."""
    wanted = block_id(space, digest)
    before = (int.from_bytes(wanted, "big") - 1).to_bytes(CHUNK_ID_BYTES, "big")
    reply = await storage.list_chain(chain_id, after=before, limit=1, inode=space)
    for chunk in reply.chunks:
        if chunk.chunk_id == wanted and chunk.version:
            return _block(chunk)
    return None


def _block(chunk: storage_pb2.ChunkInfo) -> Block:
    return Block(chunk.chunk_id[8:], chunk.length, chunk.checksum, chunk.mtime_ns, chunk.allocated)
