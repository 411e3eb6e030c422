"""KV-cache spaces: a directory of blocks, which are files that can be read and nothing else.

Neither names nor attributes of blocks are anything the metadata service knows: they are asked of the storage services, and the kernel is never let to
keep them. Invariants: whatever is shown of a block, its space was there, as far as the metadata service's lease on the space's attributes says: a
dropped space is empty at once; a name is the block's digest in hex; a block's number stands for one content (block_table.py), and reading it gives
that content or an error. A space is dropped by rmdir; nothing else changes in it through a mount. The other families ask here only about inodes with
SPACE_BIT or BLOCK_BIT, and only where they would have to make a call.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from kvfs.client.block_placement import BlockPlacement
from kvfs.client.spaces import find_block, list_blocks
from kvfs.common.errors import NameTooLong, NotFound, NotPermitted, ReadOnly, StaleHandle
from kvfs.common.ids import DIGEST_BYTES, SPACE_BIT
from kvfs.common.wire import meta_pb2 as pb
from kvfs.fuse.block_table import BLOCK_BIT, KnownBlock
from kvfs.fuse.handles import DirectoryHandle, FileHandle
from kvfs.fuse.model import BLOCK_BYTES, Attributes, Caller, Opened
from kvfs.fuse.operations.base import Base

Emit = Callable[[bytes, int, int, Attributes | None, int], bool]
"""(name, inode, mode, attributes if asked for and known, position after it) -> False when the kernel's buffer is full and it was not taken."""

BLOCK_MODE = 0o444
IO_BYTES = 1 << 20
"""What programs should read at a time."""
PLACEMENTS_MAX = 64
NAME_BYTES_MAX = 255
_HEX = frozenset(b"0123456789abcdef")


class SpaceOperations(Base):
    async def _space(self, number: int) -> pb.Inode:
        """The space's inode; NotFound once it was dropped. Mostly without a call."""
        kept = self._cache.attributes(number)
        found = kept[0] if kept is not None else (await self._ask(number))[0]
        if not found.nlink or not found.HasField("space"):
            raise NotFound("the space was dropped")
        return found

    async def _find_block(self, space: pb.Inode, digest: bytes) -> KnownBlock | None:
        """Asks."""
        placement = self._placement(space)
        block = await find_block(self._client.storage, space.inode, placement.chain(digest), digest)
        if block is None:
            self._blocks.gone(space.inode, digest)
            return None
        return self._blocks.heard(space, block)

    def _placement(self, space: pb.Inode) -> BlockPlacement:
        placement = self._placements.get(space.inode)
        if placement is None:
            placement = self._placements[space.inode] = BlockPlacement(space.space.chain_ids)
            if len(self._placements) > PLACEMENTS_MAX:
                self._placements.popitem(last=False)
        return placement

    async def _same_block(self, number: int, *, recent: bool) -> tuple[KnownBlock, pb.Inode]:
        """What the number stands for and its space, if both are still there; StaleHandle if not. `recent`: seeing it a moment ago is enough."""
        known = self._blocks.get(number)
        if known is None:
            raise StaleHandle(f"block {number} was forgotten")
        space = await self._space(known.space)
        if recent and self._blocks.recent(known):
            return known, space
        found = await self._find_block(space, known.block.digest)
        if found is None or found.number != number:
            raise StaleHandle(f"block {known.block.digest.hex()} was removed")
        return found, space

    # --- names -------------------------------------------------------------------------------------------------------------------------------

    async def _lookup_block(self, parent: int, name: bytes) -> Attributes:
        if len(name) > NAME_BYTES_MAX:
            raise NameTooLong(f"a name of {len(name)} bytes")
        digest = _digest(name)
        space = await self._space(parent)
        if digest is None:
            raise NotFound("a block's name is the digest of its key, 32 hexadecimal digits")
        known = self._blocks.named(parent, digest) or await self._find_block(space, digest)
        if known is None:
            raise NotFound("no such block")
        known.lookups += 1
        return self._show(known)

    @staticmethod
    def _check_not_in_space(directory: int) -> None:
        """As the metadata service answers who would make an entry in a space."""
        if directory & SPACE_BIT:
            raise NotPermitted("a KV-cache space holds blocks: they come by put and go by eviction, or with the space (rmdir)")

    @staticmethod
    def _check_no_block(inode: int) -> None:
        if inode & BLOCK_BIT:
            raise ReadOnly("a KV-cache block can only be read")

    # --- attributes --------------------------------------------------------------------------------------------------------------------------

    async def _getattr_block(self, number: int) -> Attributes:
        return self._show((await self._same_block(number, recent=True))[0])

    @staticmethod
    def _show(known: KnownBlock) -> Attributes:
        block = known.block
        return Attributes(
            inode=known.number,
            mode=stat.S_IFREG | BLOCK_MODE,
            nlink=1,
            uid=known.uid,
            gid=known.gid,
            rdev=0,
            length=block.length,
            blocks=block.allocated_bytes // BLOCK_BYTES,
            block_size=IO_BYTES,
            atime_ns=block.mtime_ns,
            mtime_ns=block.mtime_ns,
            ctime_ns=block.mtime_ns,
            lease_s=0.0,
        )

    # --- content -----------------------------------------------------------------------------------------------------------------------------

    async def _open_block(self, number: int, flags: int, caller: Caller) -> Opened:
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            raise ReadOnly("a KV-cache block can only be read")
        known, space = await self._same_block(number, recent=False)
        chain = self._placement(space).chain(known.block.digest)
        handle = FileHandle(number, flags, self._user(caller), self._block_reader.open(known.space, chain, known.block), strip_privileges=False)
        known.opens += 1
        if not handle.direct:
            self._cached_opens[number] = self._cached_opens.get(number, 0) + 1
        # The number stands for this content for ever: pages of it are never wrong.
        return Opened(self._files.add(handle), keep_cache=self._data_cache, direct_io=handle.direct, flush=False)

    def _closed_block(self, number: int) -> None:
        known = self._blocks.get(number)
        if known is not None:
            known.opens -= 1
            self._blocks.forget(number, 0)

    # --- listing -----------------------------------------------------------------------------------------------------------------------------

    async def _block_page(self, directory: DirectoryHandle, after: bytes, limit: int) -> pb.ReadDirReply:
        """As the metadata service would answer for a directory; of attributes only that there are some."""
        space = await self._space(directory.inode)
        begin: bytes | None = _digest(after) or b""
        reply = pb.ReadDirReply()
        while begin is not None and not reply.entries:
            blocks, begin = await list_blocks(self._client.storage, space, after=begin, limit=limit)
            for block in blocks:
                number = self._blocks.heard(space, block).number
                reply.entries.add(name=block.digest.hex().encode(), inode=number, type=pb.FILE, attributes=pb.Inode(inode=number, type=pb.FILE))
        reply.more = begin is not None
        return reply

    def _emit_blocks(self, emit: Emit) -> Emit:
        """With the attributes of blocks; what the kernel takes along counts as looked up."""

        def emit_block(name: bytes, inode: int, mode: int, attributes: Attributes | None, after: int) -> bool:
            known = self._blocks.get(inode) if attributes is not None else None
            taken = emit(name, inode, mode, None if known is None else self._show(known), after)
            if taken and known is not None:
                known.lookups += 1
            return taken

        return emit_block


def _digest(name: bytes) -> bytes | None:
    return bytes.fromhex(name.decode()) if len(name) == 2 * DIGEST_BYTES and _HEX.issuperset(name) else None
