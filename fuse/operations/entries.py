"""lookup, mknod, mkdir, symlink, link, unlink, rmdir, rename, readlink: the names.

Invariants: each is one transaction of the metadata service; what is remembered of names is true under a lease (entry_cache.py), also where the kernel
remembers it (names.py), so another mount's change is seen by the next call.
"""

from __future__ import annotations

import stat

from kvfs.client import User
from kvfs.client.user import ROOT
from kvfs.common.errors import InvalidArgument, KvfsError, NotFound
from kvfs.common.ids import SPACE_BIT
from kvfs.common.wire import meta_pb2 as pb
from kvfs.fuse.look_ahead import PAGE_ENTRIES
from kvfs.fuse.model import TYPE_OF_BITS, Attributes, Caller
from kvfs.fuse.operations.base import REMOVED_MAX
from kvfs.fuse.operations.spaces import SpaceOperations

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2


class EntryOperations(SpaceOperations):
    async def lookup(self, parent: int, name: bytes, caller: Caller) -> Attributes:
        kept = self.kept_entry(parent, name)
        if kept is not None:
            return kept
        if parent & SPACE_BIT:
            return await self._lookup_block(parent, name)
        if self._cache.ending(parent):
            await self._ask(parent)
        if self._cache.absent(parent, name):
            raise NotFound("no such entry")
        since = self._cache.tick()

        async def look(user: User) -> pb.LookupReply:
            return await self._meta.lookup(parent, (name,), user=user)

        reply = await self._as(caller, look)
        if not reply.inodes:
            self._cache.entered(parent, name, 0, since)
            raise NotFound("no such entry")
        found = reply.inodes[0]
        lease_s = self._lease(found, since)
        self._cache.entered(parent, name, found.inode, since)
        after = self._ahead.missed(parent)
        if after is not None:
            await self._look_ahead(parent, after)
        return self._named(parent, name, await self._present(found, lease_s))

    async def _look_ahead(self, parent: int, after: bytes) -> None:
        """Somebody looks at one entry of the directory after another: fetch a page of them in one call."""
        try:
            since = self._cache.tick()
            reply = await self._meta.read_dir(parent, user=ROOT, after=after, limit=PAGE_ENTRIES, attributes=True)
        except KvfsError:
            return  # a guess that failed: whoever needs the entries asks for them
        self._learn(parent, reply.entries, since)
        if reply.entries:
            self._ahead.listed(parent, reply.entries[-1].name, reply.more)

    async def mknod(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Attributes:
        kind = TYPE_OF_BITS.get(stat.S_IFMT(mode) or stat.S_IFREG)
        if kind is None:
            raise InvalidArgument(f"mode {mode:o} names no file type")
        return await self._make(parent, name, kind, stat.S_IMODE(mode), caller, rdev=rdev)

    async def mkdir(self, parent: int, name: bytes, mode: int, caller: Caller) -> Attributes:
        return await self._make(parent, name, pb.DIRECTORY, stat.S_IMODE(mode), caller)

    async def symlink(self, parent: int, name: bytes, target: bytes, caller: Caller) -> Attributes:
        return await self._make(parent, name, pb.SYMLINK, 0o777, caller, symlink=target)

    async def _make(
        self, parent: int, name: bytes, kind: pb.InodeType, mode: int, caller: Caller, *, rdev: int = 0, symlink: bytes = b""
    ) -> Attributes:
        since = self._cache.tick()
        change = self._begin_entry(parent, name)
        made: pb.Inode | None = None
        try:
            made = await self._as(caller, lambda user: self._meta.make(parent, name, kind, mode, user=user, rdev=rdev, symlink=symlink))
        finally:
            if made is not None:
                self._cache.end_entry(change, entry=made.inode, at_ns=made.ctime_ns, links=int(kind == pb.DIRECTORY))
            else:
                self._cache.end_entry(change)
        lease_s = self._lease(made, since)
        if kind == pb.DIRECTORY:
            self._cache.made(made, since)
        return self._named(parent, name, await self._present(made, lease_s))

    async def link(self, inode: int, new_parent: int, new_name: bytes, caller: Caller) -> Attributes:
        self._check_no_block(inode)
        change = self._begin_entry(new_parent, new_name)
        begun = self._cache.changing(inode), change.begun[1]
        found: pb.Inode | None = None
        try:
            found = await self._as(caller, lambda user: self._meta.link(inode, new_parent, new_name, user=user))
        finally:
            self._cache.end_entry(change, entry=found.inode if found else None, at_ns=found.ctime_ns if found else 0)
            since = self._cache.changed(inode, begun)
        return self._named(new_parent, new_name, await self._present(found, self._lease(found, since) if since else 0.0))

    async def unlink(self, parent: int, name: bytes, caller: Caller) -> None:
        self._check_not_in_space(parent)
        await self._remove(parent, name, caller, directory=False)

    async def rmdir(self, parent: int, name: bytes, caller: Caller) -> None:
        await self._remove(parent, name, caller, directory=True)

    async def _remove(self, parent: int, name: bytes, caller: Caller, *, directory: bool) -> None:
        change = self._begin_entry(parent, name)
        removed: pb.Inode | None = None
        try:
            removed = await self._as(caller, lambda user: self._meta.remove(parent, name, user=user, directory=directory))
        finally:
            # What loses a name has its ctime set with the directory's; a removed directory has not.
            self._cache.end_entry(change, entry=0 if removed else None, at_ns=removed.ctime_ns if removed and not directory else 0)
        self._cache.revoked(removed.inode)
        if directory:
            removed.nlink = 0
            self._removed[removed.inode] = removed
            if len(self._removed) > REMOVED_MAX:
                self._removed.popitem(last=False)

    async def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, caller: Caller) -> None:
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE) or flags == RENAME_NOREPLACE | RENAME_EXCHANGE:
            raise InvalidArgument(f"rename flags {flags:#x} are not known")
        self._check_not_in_space(parent | new_parent)
        changes = self._begin_entry(parent, name), self._begin_entry(new_parent, new_name)
        try:
            reply = await self._as(
                caller,
                lambda user: self._meta.rename(
                    parent,
                    name,
                    new_parent,
                    new_name,
                    user=user,
                    no_replace=bool(flags & RENAME_NOREPLACE),
                    exchange=bool(flags & RENAME_EXCHANGE),
                ),
            )
        finally:
            for change in changes:
                self._cache.end_entry(change)
        if self._names is not None:
            self._names.moved(parent, name, new_parent, new_name, exchanged=bool(flags & RENAME_EXCHANGE))
        for moved in (reply.moved.inode, reply.replaced.inode):
            self._cache.revoked(moved)

    async def readlink(self, inode: int, caller: Caller) -> bytes:
        found = (await self._meta.get_attr([inode], user=self._user(caller)))[0]
        if found.type == pb.TYPE_INVALID:
            raise NotFound(f"inode {inode} is gone")
        if found.type != pb.SYMLINK:
            raise InvalidArgument("not a symbolic link")
        return found.symlink
