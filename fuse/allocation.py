"""How many bytes of a file are really stored (st_blocks), so that `du` is right for sparse files.

The rule, chosen to be cheap: a file of at most one chunk counts its length (it is stored or it is not, and asking would cost each stat of a small
file a call). A longer one is asked of the storage: one LastChunk per chain of its layout, at once, whose answers are added. The sum is kept
as long as the file's
version stays the same; while somebody has it open for writing, for ASK_AGAIN_S. LastChunk takes as long as the file has chunks: when it
does not answer
within ASK_TIMEOUT_S there are very many of them (or a service is away), and the length is taken, for TRUST_LENGTH_S.
Invariants: at most KEPT_MAX sums are kept; a sum never comes from another version of the file. It must never
make a stat fail.
"""

from __future__ import annotations

from collections import OrderedDict

import trio

from kvfs.client import AsyncClient
from kvfs.common.errors import KvfsError
from kvfs.common.wire import meta_pb2 as pb
from kvfs.fuse.model import BLOCK_BYTES

KEPT_MAX = 65_536
ASK_AGAIN_S = 1.0
ASK_TIMEOUT_S = 0.5
TRUST_LENGTH_S = 60.0
ASKED_AT_ONCE = 16

Version = tuple[int, int, int, int]


class Allocation:
    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        # inode -> (version, blocks, asked at, how long that holds while somebody writes)
        self._kept: OrderedDict[int, tuple[Version, int, float, float]] = OrderedDict()

    @staticmethod
    def _version(inode: pb.Inode) -> Version:
        return inode.data_version, inode.truncate_version, inode.length, inode.mtime_ns

    def unsure(self, inode: pb.Inode) -> bool:
        """Must the storage be asked?"""
        return inode.type == pb.FILE and inode.length > inode.layout.chunk_size > 0 and self.known(inode) is None

    def known(self, inode: pb.Inode) -> int | None:
        kept = self._kept.get(inode.inode)
        if kept is None:
            return None
        version, blocks, asked_at, lasts_s = kept
        fresh = trio.current_time() - asked_at < lasts_s
        if inode.writers:
            return blocks if fresh else None  # its version changes with every report of a writer
        return blocks if version == self._version(inode) and (fresh or lasts_s == ASK_AGAIN_S) else None

    async def blocks(self, inode: pb.Inode, length: int) -> int:
        total: int | None = None
        try:
            with trio.move_on_after(ASK_TIMEOUT_S):
                total = await self._ask(inode)
        except* KvfsError:
            total = None
        blocks = -(-(length if total is None else total) // BLOCK_BYTES)
        self._kept[inode.inode] = (self._version(inode), blocks, trio.current_time(), TRUST_LENGTH_S if total is None else ASK_AGAIN_S)
        self._kept.move_to_end(inode.inode)
        if len(self._kept) > KEPT_MAX:
            self._kept.popitem(last=False)
        return blocks

    async def _ask(self, inode: pb.Inode) -> int:
        chains = list(dict.fromkeys(inode.layout.chain_ids))
        limit = trio.CapacityLimiter(ASKED_AT_ONCE)
        stored: list[int] = []

        async def ask(chain_id: int) -> None:
            async with limit:
                stored.append((await self._client.storage.last_chunk(chain_id, inode.inode)).bytes)

        async with trio.open_nursery() as nursery:
            for chain_id in chains:
                nursery.start_soon(ask, chain_id)
        return sum(stored)
