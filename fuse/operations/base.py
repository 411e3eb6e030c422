"""What every family of operations shares: the client, who asks, and attributes as a mount shows them.

Invariants: attributes carry this mount's own unreported writes (length, mtime); a lease is passed on only while revocations arrive; every cache
here is bounded. It must never know the kernel: invalidations go through the callable it is given.
"""

from __future__ import annotations

import stat
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol, TypeVar

import trio

from kvfs.client import AsyncClient, OpenFile, User
from kvfs.client.block_placement import BlockPlacement
from kvfs.client.file.block_file import BlockFile, BlockReader
from kvfs.client.user import ROOT
from kvfs.common.errors import AccessDenied, NotFound, NotPermitted
from kvfs.common.wire import meta_pb2 as pb
from kvfs.fuse.allocation import Allocation
from kvfs.fuse.block_table import BLOCK_BIT, BlockTable
from kvfs.fuse.entry_cache import EntryCache, EntryChange
from kvfs.fuse.groups import supplementary_groups
from kvfs.fuse.handles import DirectoryHandle, FileHandle, HandleTable
from kvfs.fuse.look_ahead import LookAhead
from kvfs.fuse.model import BLOCK_BYTES, TYPE_BITS, Attributes, Caller
from kvfs.fuse.names import KernelNames

T = TypeVar("T")

USERS_MAX = 1024
SEEN_MAX = 65_536
REMOVED_MAX = 4096
SYMLINK_BLOCK_BYTES = 4096


class Invalidate(Protocol):
    """Tells the kernel to forget; returns at once (the kernel is told from a thread)."""

    def attributes(self, inode: int) -> None: ...

    def data(self, inode: int) -> None: ...

    async def attributes_now(self, inode: int) -> None:
        """The same, and returns when the kernel has."""

    async def data_now(self, inode: int) -> None:
        """The same, and returns when the kernel has."""

    def all_names(self) -> None:
        """No name may be used without asking again. At once."""


Tick = tuple[int, float]
"""When a call was made, as EntryCache counts."""


class NoKernel:
    """Nothing caches: for operations without a mount."""

    def attributes(self, inode: int) -> None: ...

    def data(self, inode: int) -> None: ...

    async def attributes_now(self, inode: int) -> None: ...

    async def data_now(self, inode: int) -> None: ...

    def all_names(self) -> None: ...


class Base:
    def __init__(
        self,
        client: AsyncClient,
        *,
        invalidate: Invalidate | None = None,
        names: KernelNames | None = None,
        attr_cache: bool = True,
        data_cache: bool = True,
    ) -> None:
        """`names`: the kernel can be made to forget names, and so may keep them."""
        self._client = client
        self._meta = client.meta
        self._invalidate = invalidate or NoKernel()
        self._cache = EntryCache(trio.current_time, enabled=attr_cache and client.config.watch)
        self._names = names
        self._data_cache = data_cache
        self._users: dict[tuple[int, int], User] = {}
        self._files: HandleTable[FileHandle] = HandleTable()
        self._directories: HandleTable[DirectoryHandle] = HandleTable()
        self._allocation = Allocation(client)
        self._ahead = LookAhead(trio.current_time)
        self._blocks = BlockTable(trio.current_time)
        self._block_reader = BlockReader(client.storage, client.memory)
        self._placements: OrderedDict[int, BlockPlacement] = OrderedDict()
        """Of the spaces looked into lately."""
        self._removed: OrderedDict[int, pb.Inode] = OrderedDict()
        """Directories that this mount removed and the kernel still knows: somebody may stand in one."""
        self._writing: dict[int, list[FileHandle]] = {}
        """Handles open for writing, by inode."""
        self._cached_opens: dict[int, int] = {}
        """Open handles that go through the kernel's page cache, by inode."""
        self._seen: OrderedDict[int, int] = OrderedDict()
        """inode -> data_version that the kernel's cached pages stand for, at this mount's last open."""

    def _user(self, caller: Caller) -> User:
        key = (caller.uid, caller.gid)
        user = self._users.get(key)
        if user is None:
            if len(self._users) >= USERS_MAX:
                self._users.clear()
            user = self._users[key] = User(caller.uid, caller.gid)
        return user

    def _user_with_groups(self, caller: Caller) -> User:
        groups = supplementary_groups(caller.pid)
        return User(caller.uid, caller.gid, groups) if groups else self._user(caller)

    async def _as(self, caller: Caller, call: Callable[[User], Awaitable[T]]) -> T:
        """Make the call as the caller; a refusal is asked again with the caller's supplementary groups, when it has any."""
        user = self._user(caller)
        try:
            return await call(user)
        except (AccessDenied, NotPermitted):
            if caller.uid == 0:
                raise
            with_groups = self._user_with_groups(caller)
            if not with_groups.groups:
                raise
        return await call(with_groups)

    async def revoked(self, inode: int, name: bytes) -> None:
        """Another client has changed the inode: this is heard before the change is acknowledged to it."""
        self._cache.revoked(inode)

    async def lost(self) -> None:
        """The metadata service has restarted: no lease holds, and what the kernel has cached of open files is unsure too."""
        self._cache.lose_all()
        self._seen.clear()
        if self._names is not None and self._names.lose_all():
            self._invalidate.all_names()
        for inode in {opened.inode for opened in self._files}:
            self._invalidate.data(inode)

    def _learn(self, parent: int, entries: Iterable[pb.DirEntry], since: Tick) -> None:
        """Take in a page of a directory, listed at `since`: the lookups that follow a listing find it here."""
        for entry in entries:
            if entry.HasField("attributes") and entry.inode not in self._writing and self._cache.heard(entry.attributes, since):
                self._cache.entered(parent, entry.name, entry.inode, since)

    def _lease(self, inode: pb.Inode, since: Tick) -> float:
        """Take in attributes that a call made at `since` has brought; the seconds that the kernel may keep them, too."""
        if inode.inode in self._writing:
            # Its length and times change here without a call. The kernel, through which those writes come, asks again after each of them.
            return self._cache.lease(inode, since)
        return self._cache.heard(inode, since)

    def kept_entry(self, parent: int, name: bytes) -> Attributes | None:
        """lookup without a call, when what is known suffices; None: call it."""
        kept = self._kept(self._cache.lookup(parent, name))
        return None if kept is None else self._named(parent, name, kept)

    def known_absent(self, parent: int, name: bytes) -> float:
        """For how long the kernel may take it that there is no such entry; negative: nobody knows."""
        left_s = self._cache.absent(parent, name)
        if left_s <= 0 or self._cache.ending(parent):
            return -1.0  # `lookup` renews the lease, or the creation that may follow would end it
        return 0.0 if self._names is None else self._names.grant(parent, name, left_s, is_directory=False)

    def _begin_entry(self, parent: int, name: bytes) -> EntryChange:
        if self._names is not None:
            self._names.changing(parent)
        return self._cache.begin_entry(parent, name)

    def _named(self, parent: int, name: bytes, shown: Attributes) -> Attributes:
        """With the time for which the kernel may keep the name, if what is known of it says so. The kernel is answered with this at once."""
        if self._names is not None:
            left_s = self._cache.names_last(parent) if self._cache.entry(parent, name) == shown.inode else 0.0
            shown.entry_lease_s = self._names.grant(parent, name, left_s, is_directory=stat.S_ISDIR(shown.mode))
        return shown

    def kept_attributes(self, inode: int) -> Attributes | None:
        """getattr without a call, when what is known suffices; None: call it."""
        return self._kept(self._cache.attributes(inode))

    def _kept(self, kept: tuple[pb.Inode, float] | None) -> Attributes | None:
        if kept is None or kept[0].inode in self._writing or self._allocation.unsure(kept[0]):
            return None
        return self._attributes(*kept)

    async def _ask(self, inode: int) -> tuple[pb.Inode, float]:
        """Attributes from the service, and their lease."""
        since = self._cache.tick()
        found = await self._stat(inode)
        return found, self._lease(found, since)

    async def _stat(self, inode: int) -> pb.Inode:
        """As root: fstat needs no permission, and the kernel has checked the path."""
        found = (await self._meta.get_attr([inode], user=ROOT))[0]
        if found.type == pb.TYPE_INVALID:
            removed = self._removed.get(inode)
            if removed is not None:
                return removed
            raise NotFound(f"inode {inode} is gone")
        return found

    async def _present(self, inode: pb.Inode, lease_s: float) -> Attributes:
        """Attributes as this mount shows them, with the bytes really stored (asked of the storage only for files of more than one chunk)."""
        attributes = self._attributes(inode, lease_s)
        if self._allocation.unsure(inode):
            attributes.blocks = await self._allocation.blocks(inode, attributes.length)
        return attributes

    def _attributes(self, answered: pb.Inode, lease_s: float) -> Attributes:
        """The same without a call: the blocks of a large file are those last known, and its lease is none when they are not."""
        inode = self._client.local_view(answered)
        kind = inode.type
        length = inode.length
        block_size = 4096
        if kind == pb.FILE:
            block_size = inode.layout.chunk_size or 1 << 20
            blocks = (length + BLOCK_BYTES - 1) // BLOCK_BYTES
            if length > block_size:
                known = self._allocation.known(inode)
                if known is None:
                    lease_s = 0.0
                else:
                    blocks = known
        elif kind == pb.DIRECTORY:
            length, blocks = max(length, SYMLINK_BLOCK_BYTES), SYMLINK_BLOCK_BYTES // BLOCK_BYTES
        else:
            blocks = 0
        return Attributes(
            inode=inode.inode,
            mode=TYPE_BITS.get(kind, 0) | inode.mode,
            nlink=inode.nlink,
            uid=inode.uid,
            gid=inode.gid,
            rdev=inode.rdev,
            length=length,
            blocks=blocks,
            block_size=block_size,
            atime_ns=inode.atime_ns,
            mtime_ns=inode.mtime_ns,
            ctime_ns=inode.ctime_ns,
            lease_s=lease_s,
        )

    def _file(self, handle: int) -> OpenFile | BlockFile:
        return self._files.get(handle).file

    def forget(self, forgotten: Iterable[tuple[int, int]]) -> None:
        """The kernel dropped these inodes, and its pages of them: (inode, how often it was given it). The count matters for blocks only: nothing else
        is kept by inode."""
        for inode, lookups in forgotten:
            if inode & BLOCK_BIT:
                self._blocks.forget(inode, lookups)
                continue
            self._seen.pop(inode, None)
            self._removed.pop(inode, None)
