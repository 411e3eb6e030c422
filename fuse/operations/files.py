"""open, create, read, write, flush, fsync, release.

Invariants: a write returns once the client has it (write-behind); flush, which is close(2), returns when every replica has it and the metadata
service knows the length, so that another mount sees it; an error of write-behind comes out of the next write, flush or fsync of the file.
Pages stay in the kernel from one open to the next only when the file's data_version is the one they were read at.
Handles for writing only, and O_APPEND ones, bypass the page cache. The former because a page is copied and allocated for nothing there
(nobody can map
or read it through such a handle; it takes 0.5 ms less CPU a MiB); the latter because the kernel places appended bytes where it believes the
end to be,
and only the service knows where that is. What other handles of this mount have cached of the file is invalidated before such a write returns.
"""

from __future__ import annotations

import os
import stat

import trio

from kvfs.client import OpenFile, User
from kvfs.client.user import ROOT
from kvfs.common.errors import DeadlineExceeded, KvfsError
from kvfs.common.wire import meta_pb2 as pb
from kvfs.fuse.block_table import BLOCK_BIT
from kvfs.fuse.handles import FileHandle
from kvfs.fuse.model import Attributes, Caller, Opened
from kvfs.fuse.operations.base import SEEN_MAX
from kvfs.fuse.operations.spaces import SpaceOperations

FMODE_EXEC = 0x20
"""The kernel opens a program to run it: execute permission suffices, which it has checked."""


ASKED_AGAIN_S = 0.25
"""After a read that failed, the kernel's read-ahead mostly, the kernel asks once more before read(2) returns: that must not take another deadline."""


class FileOperations(SpaceOperations):
    async def open(self, inode: int, flags: int, caller: Caller) -> Opened:
        if inode & BLOCK_BIT:
            return await self._open_block(inode, flags, caller)
        read, write = _modes(flags)
        session = self._client.new_session()
        # One step at the service, but for a file that is being written here: then the cut must find its place among those writes.
        truncate = bool(flags & os.O_TRUNC)
        cut_after = truncate and inode in self._writing

        async def opening(user: User) -> tuple[User, pb.Inode]:
            return user, await self._meta.open(inode, user=user, session=session, read=read, write=write, truncate=truncate and not cut_after)

        since = self._cache.tick()
        if write or truncate:
            self._cache.changing(inode)
        try:
            user, found = await opening(ROOT) if flags & FMODE_EXEC else await self._as(caller, opening)
        finally:
            if write or truncate:
                self._cache.changing(inode)
        self._lease(found, since)
        file = self._client.open_file(found, session=session, read=read, write=write, append=bool(flags & os.O_APPEND), user=user)
        opened = self._opened(found, file, flags, user)
        if cut_after:
            try:
                await self._client.truncate_inode(inode, 0, user=user, session=session if write else b"")
            except BaseException:
                await self.release(opened.handle)
                raise
        return opened

    async def create(self, parent: int, name: bytes, mode: int, flags: int, caller: Caller) -> tuple[Opened, Attributes]:
        read, write = _modes(flags)
        session = self._client.new_session()

        async def creating(user: User) -> tuple[User, pb.CreateReply]:
            return user, await self._meta.create(
                parent, name, stat.S_IMODE(mode), user=user, session=session, read=read, write=write, exclusive=bool(flags & os.O_EXCL)
            )

        since = self._cache.tick()
        change = self._begin_entry(parent, name)
        done: tuple[User, pb.CreateReply] | None = None
        try:
            done = await self._as(caller, creating)
        finally:
            if done is not None:
                self._cache.end_entry(change, entry=done[1].inode.inode, at_ns=done[1].inode.ctime_ns if done[1].created else 0)
            else:
                self._cache.end_entry(change)
        user, reply = done
        inode = reply.inode
        file = self._client.open_file(inode, session=session, read=read, write=write, append=bool(flags & os.O_APPEND), user=user)
        opened = self._opened(inode, file, flags, user)
        if not reply.created and flags & os.O_TRUNC:  # somebody made it since the kernel looked
            try:
                inode = await self._client.truncate_inode(inode.inode, 0, user=user, session=session if write else b"")
            except BaseException:
                await self.release(opened.handle)
                raise
        return opened, self._named(parent, name, await self._present(inode, self._lease(inode, since)))

    def _opened(self, inode: pb.Inode, file: OpenFile, flags: int, user: User) -> Opened:
        privileged = inode.mode & stat.S_ISUID or inode.mode & (stat.S_ISGID | stat.S_IXGRP) == stat.S_ISGID | stat.S_IXGRP
        handle = FileHandle(inode.inode, flags, user, file, strip_privileges=bool(privileged) and user.uid != 0)
        if handle.writable:
            self._writing.setdefault(inode.inode, []).append(handle)
        if not handle.direct:
            self._cached_opens[handle.inode] = self._cached_opens.get(handle.inode, 0) + 1
        return Opened(self._files.add(handle), keep_cache=self._keep_cache(inode), direct_io=handle.direct, flush=handle.writable)

    def _keep_cache(self, inode: pb.Inode) -> bool:
        same = self._seen.get(inode.inode) == inode.data_version
        self._seen[inode.inode] = inode.data_version
        self._seen.move_to_end(inode.inode)
        if len(self._seen) > SEEN_MAX:
            self._seen.popitem(last=False)
        return same and self._data_cache

    async def read(self, handle: int, offset: int, size: int) -> memoryview:
        """Exactly `size` bytes, fewer only at the end of the file: the kernel takes a short answer for the end."""
        opened = self._files.get(handle)
        late = opened.late
        if late is not None and trio.current_time() < late[1]:
            raise late[0]
        try:
            return await opened.file.pread(offset, size)
        except DeadlineExceeded as error:
            opened.late = (error, trio.current_time() + ASKED_AGAIN_S)
            raise

    async def write(self, handle: int, offset: int, data: bytes | memoryview) -> int:
        opened = self._files.get(handle)
        if opened.strip_privileges and opened.direct:
            await self._strip_privileges(opened)
        if opened.append:
            await opened.file.append([data])
        else:
            await opened.file.pwrite(offset, [data])
        if opened.direct and opened.inode in self._cached_opens:
            # Somebody here reads the file, perhaps through a mapping: the pages that these bytes went past must go before write(2) returns.
            await self._invalidate.data_now(opened.inode)
        return len(data)

    async def _strip_privileges(self, opened: FileHandle) -> None:
        opened.strip_privileges = False
        inode = (await self._meta.get_attr([opened.inode], user=ROOT))[0]
        mode = inode.mode & ~stat.S_ISUID
        if mode & stat.S_IXGRP:
            mode &= ~stat.S_ISGID
        if mode != inode.mode:
            await self._meta.set_attr(opened.inode, user=ROOT, mode=mode)
            self._cache.changing(opened.inode)
            await self._invalidate.attributes_now(opened.inode)

    async def flush(self, handle: int) -> None:
        """close(2) of one descriptor. What was written is on every replica, and its length known to all, when this returns."""
        opened = self._files.get(handle)
        if opened.writable:
            await opened.file.report()

    async def fsync(self, handle: int, datasync: bool) -> None:
        await self._file(handle).fsync()

    async def release(self, handle: int) -> None:
        """The last descriptor is gone. Nobody hears an error any more: flush has told it."""
        await self._close(self._files.remove(handle))

    async def _close(self, opened: FileHandle) -> None:
        if not opened.direct:
            self._cached_opens[opened.inode] -= 1
            if not self._cached_opens[opened.inode]:
                del self._cached_opens[opened.inode]
        if opened.writable:
            try:
                await opened.file.close()
            finally:
                others = self._writing[opened.inode]
                others.remove(opened)
                if not others:
                    del self._writing[opened.inode]
                self._cache.changing(opened.inode)
        else:
            await opened.file.close()
            if opened.inode & BLOCK_BIT:
                self._closed_block(opened.inode)

    async def close(self) -> None:
        """The end of the mount: flush and close whatever is still open. Raises the first error, after all were tried."""
        first: KvfsError | None = None
        for number in self._files.numbers():
            try:
                await self._close(self._files.remove(number))
            except KvfsError as error:
                first = first or error
        if first is not None:
            raise first


def _modes(flags: int) -> tuple[bool, bool]:
    """(read, write) of open flags."""
    mode = flags & os.O_ACCMODE
    return mode != os.O_WRONLY, mode != os.O_RDONLY
