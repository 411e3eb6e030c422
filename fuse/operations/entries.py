"""lookup, mknod, mkdir, symlink, link, unlink, rmdir, rename, readlink: the names.

Invariants: each is one transaction of the metadata service; nothing about names is remembered here, so another mount's change is seen by the next
call.
"""

from __future__ import annotations

import stat

from kvfs.client import User
from kvfs.common.errors import InvalidArgument, NotFound
from kvfs.common.wire import meta_pb2 as pb
from kvfs.fuse.model import TYPE_OF_BITS, Attributes, Caller
from kvfs.fuse.operations.base import Base

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2


class EntryOperations(Base):
    async def lookup(self, parent: int, name: bytes, caller: Caller) -> Attributes:
        async def look(user: User) -> pb.LookupReply:
            return await self._meta.lookup(parent, (name,), user=user)

        reply = await self._as(caller, look)
        if not reply.inodes:
            raise NotFound("no such entry")
        return await self._present(reply.inodes[0])

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
        inode = await self._as(caller, lambda user: self._meta.make(parent, name, kind, mode, user=user, rdev=rdev, symlink=symlink))
        return await self._present(inode)

    async def link(self, inode: int, new_parent: int, new_name: bytes, caller: Caller) -> Attributes:
        return await self._present(await self._as(caller, lambda user: self._meta.link(inode, new_parent, new_name, user=user)))

    async def unlink(self, parent: int, name: bytes, caller: Caller) -> None:
        await self._as(caller, lambda user: self._meta.remove(parent, name, user=user))

    async def rmdir(self, parent: int, name: bytes, caller: Caller) -> None:
        await self._as(caller, lambda user: self._meta.remove(parent, name, user=user, directory=True))

    async def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, caller: Caller) -> None:
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE) or flags == RENAME_NOREPLACE | RENAME_EXCHANGE:
            raise InvalidArgument(f"rename flags {flags:#x} are not known")
        await self._as(
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

    async def readlink(self, inode: int, caller: Caller) -> bytes:
        found = (await self._meta.get_attr([inode], user=self._user(caller)))[0]
        if found.type == pb.TYPE_INVALID:
            raise NotFound(f"inode {inode} is gone")
        if found.type != pb.SYMLINK:
            raise InvalidArgument("not a symbolic link")
        return found.symlink
