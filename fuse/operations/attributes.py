"""getattr, setattr, access, statfs.

Invariant: a truncate goes through the client's shared state of the file, so that every open handle of this mount sees the cut in its place among
its writes.
"""

from __future__ import annotations

import stat

from kvfs.client import User
from kvfs.common.errors import AccessDenied, NotPermitted
from kvfs.common.wire import meta_pb2 as pb
from kvfs.fuse.block_table import BLOCK_BIT
from kvfs.fuse.model import Attributes, Caller, Changes, Statistics
from kvfs.fuse.operations.spaces import SpaceOperations


class AttributeOperations(SpaceOperations):
    async def getattr(self, inode: int, caller: Caller) -> Attributes:
        kept = self.kept_attributes(inode)
        if kept is not None:
            return kept
        if inode & BLOCK_BIT:
            return await self._getattr_block(inode)
        return await self._present(*await self._ask(inode))

    async def setattr(self, inode: int, changes: Changes, handle: int | None, caller: Caller) -> Attributes:
        self._check_no_block(inode)
        started_s = self._cache.tick()[1]
        begun = self._cache.changing(inode), started_s
        try:
            result = await self._set(inode, changes, handle, caller)
        finally:
            since = self._cache.changed(inode, begun)
        return await self._present(result, self._lease(result, since) if since else 0.0)

    async def _set(self, inode: int, changes: Changes, handle: int | None, caller: Caller) -> pb.Inode:
        result: pb.Inode | None = None
        if changes.length is not None:
            result = await self._truncate(inode, changes.length, handle, caller)
            # truncate(2) sets the times itself, where the length is set; the kernel sends "now" along with it.
            # A mode in the same request is its clearing of setuid and setgid for a writer, which the service has done with the cut.
            changes = Changes(mode=changes.mode if changes.mode != result.mode else None, uid=changes.uid, gid=changes.gid)
        if changes != Changes():
            result = await self._change(inode, changes, caller)
        return result if result is not None else await self._stat(inode)

    async def _truncate(self, inode: int, length: int, handle: int | None, caller: Caller) -> pb.Inode:
        if handle is not None:
            opened = self._files.get(handle)
            return await self._client.truncate_inode(inode, length, user=opened.user, session=opened.file.session)
        return await self._as(caller, lambda user: self._client.truncate_inode(inode, length, user=user))

    async def _change(self, inode: int, changes: Changes, caller: Caller) -> pb.Inode:
        async def change(user: User) -> pb.Inode:
            return await self._meta.set_attr(
                inode,
                user=user,
                mode=changes.mode,
                uid=changes.uid,
                gid=changes.gid,
                atime_ns=changes.atime_ns,
                mtime_ns=changes.mtime_ns,
            )

        if changes.mtime_ns is not None:
            # Unreported writes carry the time at which they were made: reported later, they would undo the time that is set now.
            for opened in self._writing.get(inode, ())[:1]:
                await opened.file.report()
        if changes.mode is not None and changes.mode & stat.S_ISGID and caller.uid != 0:
            # Whether the bit may stay is a question of membership: without the groups the service would clear it.
            return await change(self._user_with_groups(caller))
        try:
            return await self._as(caller, change)
        except (AccessDenied, NotPermitted):
            only_times = changes.mode is None and changes.uid is None and changes.gid is None
            if not (only_times and changes.times_are_now):
                raise
        return await self._as(
            caller,
            lambda user: self._meta.set_attr(inode, user=user, atime_now=changes.atime_ns is not None, mtime_now=changes.mtime_ns is not None),
        )

    async def access(self, inode: int, mask: int, caller: Caller) -> bool:
        """Not called under default_permissions; here for mounts without."""
        if inode & BLOCK_BIT:
            return not mask & ~(await self._getattr_block(inode)).mode & 0o7
        found = await self._stat(inode)
        if caller.uid == 0:
            return not mask & 1 or found.type == pb.DIRECTORY or bool(found.mode & 0o111)
        if caller.uid == found.uid:
            bits = found.mode >> 6
        elif caller.gid == found.gid or found.gid in self._user_with_groups(caller).groups:
            bits = found.mode >> 3
        else:
            bits = found.mode
        return bits & mask & 7 == mask & 7

    async def statfs(self, caller: Caller) -> Statistics:
        found = await self._meta.stat_fs(user=self._user(caller))
        size = found.block_size or 4096
        return Statistics(
            block_size=size,
            blocks=found.capacity_bytes // size,
            blocks_free=found.free_bytes // size,
            files=found.files + found.free_files,
            files_free=found.free_files,
        )
