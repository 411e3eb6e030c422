"""Inode numbers of KV-cache blocks: which block stands behind a number that the kernel knows.

A number is computed from the space, the digest and the content's checksum, so that a block has the same one in every mount and for ever, and a block
that was evicted and put anew with other bytes is another file: no page of the one is ever shown as the other's. Invariants: a number stands for one
block while it is in the table (the next free one is taken where two would meet); what is open stays; what the kernel knows stays until it forgets, as
far as the table's bound allows, and beyond that answers ESTALE: the kernel looks the name up again. This module must never do I/O.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

from kvfs.client.spaces import Block
from kvfs.common.ids import block_id
from kvfs.common.wire import meta_pb2 as pb

BLOCK_BIT = 1 << 62
"""Set in the numbers of blocks and in no inode of the metadata service (common/ids.py)."""
_MASK = BLOCK_BIT - 1
BLOCKS_MAX = 65_536
RECENT_S = 1.0
"""A block that was listed or looked up so long ago is shown without asking again: ls -l, find, du and cp look at each entry of a listing."""


@dataclass(slots=True, eq=False)
class KnownBlock:
    number: int
    space: int
    uid: int
    gid: int
    """The space's owner."""
    block: Block
    heard_s: float
    lookups: int = 0
    """How often the kernel was given it."""
    opens: int = 0


class BlockTable:
    def __init__(self, now: Callable[[], float], limit: int = BLOCKS_MAX) -> None:
        self._now = now
        self._limit = limit
        self._known: OrderedDict[int, KnownBlock] = OrderedDict()
        self._newest: dict[bytes, int] = {}
        """Chunk id -> number of the content that was seen last."""

    def __len__(self) -> int:
        return len(self._known)

    def heard(self, space: pb.Inode, block: Block) -> KnownBlock:
        """The block is there now."""
        chunk = block_id(space.inode, block.digest)
        number = BLOCK_BIT | xxh3_64_intdigest(chunk + block.length.to_bytes(4, "little") + block.checksum.to_bytes(8, "little")) & _MASK
        known = self._known.get(number)
        while known is not None and not (known.space == space.inode and known.block.same_content(block)):
            number = BLOCK_BIT | (number + 1) & _MASK
            known = self._known.get(number)
        if known is None:
            known = self._known[number] = KnownBlock(number, space.inode, space.uid, space.gid, block, self._now())
        else:
            known.uid, known.gid, known.block, known.heard_s = space.uid, space.gid, block, self._now()
            self._known.move_to_end(number)
        self._newest[chunk] = number
        if len(self._known) > self._limit:
            self._make_room()
        return known

    def get(self, number: int) -> KnownBlock | None:
        return self._known.get(number)

    def recent(self, known: KnownBlock) -> bool:
        return self._now() - known.heard_s < RECENT_S

    def named(self, space: int, digest: bytes) -> KnownBlock | None:
        """The block of that name, if it was seen a moment ago."""
        known = self._known.get(self._newest.get(block_id(space, digest), 0))
        return known if known is not None and self.recent(known) else None

    def gone(self, space: int, digest: bytes) -> None:
        """It is not there any more: the name stands for nothing. The number stays while the kernel knows it."""
        self._newest.pop(block_id(space, digest), None)

    def forget(self, number: int, lookups: int) -> None:
        """The kernel has forgotten what it was given so many times."""
        known = self._known.get(number)
        if known is None:
            return
        known.lookups -= lookups
        if known.lookups <= 0 and not known.opens:
            self._drop(known)

    def _make_room(self) -> None:
        for _ in range(len(self._known) - self._limit):
            oldest = next((known for known in self._known.values() if not known.opens), None)
            if oldest is None:
                return  # all are held open: bounded by what programs may hold open
            self._drop(oldest)

    def _drop(self, known: KnownBlock) -> None:
        del self._known[known.number]
        chunk = block_id(known.space, known.block.digest)
        if self._newest.get(chunk) == known.number:
            del self._newest[chunk]
