"""opendir, readdir, releasedir, fsyncdir.

Invariants: entries come in the byte order of names, page by page; a position given to the kernel stays right whatever is created or removed
meanwhile: an entry that is there from beginning to end is listed once.
"""

from __future__ import annotations

import stat

from kvfs.client.user import ROOT
from kvfs.common.errors import NotFound
from kvfs.common.ids import SPACE_BIT
from kvfs.common.wire import meta_pb2 as pb
from kvfs.fuse.handles import DirectoryHandle
from kvfs.fuse.model import TYPE_BITS, Attributes, Caller
from kvfs.fuse.operations.spaces import Emit, SpaceOperations

PAGE_ENTRIES = 1024
PAGE_ENTRIES_FIRST = 128
"""A small first page: most directories are small, and some programs read only the start."""
DOT, DOT_DOT = 1, 2


class DirectoryOperations(SpaceOperations):
    async def opendir(self, inode: int, caller: Caller) -> int:
        """Local: the kernel has checked the permission, and the first page finds a directory that is gone."""
        return self._directories.add(DirectoryHandle(inode, self._user(caller)))

    async def readdir(self, handle: int, position: int, emit: Emit, *, attributes: bool = True) -> None:
        """`attributes`: the kernel takes them along, as of a lookup of every entry but the dots."""
        directory = self._directories.get(handle)
        if position == 0:
            directory.rewind()
        if directory.inode & SPACE_BIT:
            emit = self._emit_blocks(emit)
        try:
            if position < DOT_DOT and not await self._dots(directory, position, emit):
                return
            await self._list(directory, max(position, DOT_DOT), emit, attributes)
        except NotFound:
            return  # removed while it was open: an empty listing, without the dots

    async def _list(self, directory: DirectoryHandle, position: int, emit: Emit, with_attributes: bool) -> None:
        if position != directory.page_position:
            directory.page, directory.page_position, directory.page_more = [], position, True
        while True:
            if not directory.page:
                if not directory.page_more:
                    return
                await self._next_page(directory, position)
                continue
            taken = 0
            for entry in directory.page:
                shown = self._shown(directory.inode, entry) if with_attributes else None
                if not emit(entry.name, entry.inode, TYPE_BITS.get(entry.type, 0), shown, position + 1):
                    break
                position += 1
                taken += 1
                directory.handed_out(position, entry.name)
            full = taken < len(directory.page)
            del directory.page[:taken]
            directory.page_position = position
            if full:
                return

    def _shown(self, parent: int, entry: pb.DirEntry) -> Attributes | None:
        """The page may be older than what is known now: it counts only without a lease."""
        kept = self.kept_entry(parent, entry.name)
        if kept is not None and kept.inode == entry.inode:
            return kept
        return self._attributes(entry.attributes, 0.0) if entry.HasField("attributes") else None

    async def _dots(self, directory: DirectoryHandle, position: int, emit: Emit) -> bool:
        if directory.self_inode is None or directory.parent_inode is None:
            since = self._cache.tick()
            found = (await self._meta.get_attr([directory.inode], user=ROOT))[0]
            if found.type == pb.TYPE_INVALID:
                raise NotFound("the directory is gone")
            self._lease(found, since)
            directory.self_inode = found
            directory.parent_inode = pb.Inode(inode=found.parent or found.inode, type=pb.DIRECTORY)
        if position < DOT and not emit(b".", directory.self_inode.inode, stat.S_IFDIR, None, DOT):
            return False
        return emit(b"..", directory.parent_inode.inode, stat.S_IFDIR, None, DOT_DOT)

    async def _next_page(self, directory: DirectoryHandle, position: int) -> None:
        limit = PAGE_ENTRIES if position > DOT_DOT else PAGE_ENTRIES_FIRST
        if directory.inode & SPACE_BIT:
            reply = await self._block_page(directory, directory.name_before(position), limit)
            directory.page, directory.page_more, directory.page_position = list(reply.entries), reply.more, position
            return
        # As root: the right to list was checked at opendir, and lasts as long as the handle.
        since = self._cache.tick()
        reply = await self._meta.read_dir(directory.inode, user=ROOT, after=directory.name_before(position), limit=limit, attributes=True)
        directory.page = list(reply.entries)
        self._learn(directory.inode, directory.page, since)
        directory.page_more = reply.more
        directory.page_position = position

    async def releasedir(self, handle: int) -> None:
        self._directories.remove(handle)

    async def fsyncdir(self, handle: int, datasync: bool) -> None:
        """Nothing to do: a change of a directory is acknowledged only when the metadata service has synced it."""
        self._directories.get(handle)
