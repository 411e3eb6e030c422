"""The pyfuse3 face of the file system operations: it converts, and it guards. Nothing is decided here.

Invariants: no exception but FUSEError ever reaches pyfuse3 (any other one ends the mount): a KvfsError becomes its errno, everything else is
logged and becomes EIO; every operation ends within the deadline (ETIMEDOUT); a name never stays in the kernel (entry_timeout 0), so that another
mount's renames are seen at once; attributes stay for their lease.
It must never hold state: handles and caches belong to the operations.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, SetattrFields, StatvfsData

from kvfs.common.errors import KvfsError
from kvfs.fuse.model import Attributes, Caller, Changes, Opened

if TYPE_CHECKING:
    from kvfs.fuse.operations import FileSystem

log = logging.getLogger("kvfs.fuse")

T = TypeVar("T")


def errno_of(error: BaseException) -> int:
    """The errno a system call answers. EAGAIN means "try again" to programs that asked for non-blocking calls, which a file never is: EIO."""
    while isinstance(error, BaseExceptionGroup):
        kvfs, _ = error.split(KvfsError)
        error = (kvfs or error).exceptions[0]
    if isinstance(error, KvfsError):
        return errno.EIO if error.errno == errno.EAGAIN else error.errno
    return errno.EIO


def entry_of(attributes: Attributes) -> EntryAttributes:
    entry = EntryAttributes()
    entry.st_ino = attributes.inode
    entry.entry_timeout = 0
    entry.attr_timeout = attributes.lease_s
    entry.st_mode = attributes.mode
    entry.st_nlink = attributes.nlink
    entry.st_uid = attributes.uid
    entry.st_gid = attributes.gid
    entry.st_rdev = attributes.rdev
    entry.st_size = attributes.length
    entry.st_blksize = attributes.block_size
    entry.st_blocks = attributes.blocks
    entry.st_atime_ns = attributes.atime_ns
    entry.st_mtime_ns = attributes.mtime_ns
    entry.st_ctime_ns = attributes.ctime_ns
    return entry


def caller_of(ctx: RequestContext) -> Caller:
    return Caller(ctx.uid, ctx.gid, ctx.pid)


def info_of(opened: Opened) -> FileInfo:
    return FileInfo(fh=opened.handle, direct_io=opened.direct_io, keep_cache=opened.keep_cache)


class KernelOperations(pyfuse3.Operations):
    """One instance a mount; pyfuse3 calls its methods, one task a request."""

    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, file_system: FileSystem, *, deadline_s: float) -> None:
        super().__init__()
        self._fs = file_system
        self._deadline_s = deadline_s
        self.ready = trio.Event()

    async def _guard(self, what: str, call: Awaitable[T]) -> T:
        """The one place where errors of the operations become errno."""
        try:
            with trio.move_on_after(self._deadline_s):
                return await call
        except KvfsError as error:
            number = errno_of(error)
            if number == errno.EIO:
                log.warning("%s: %s: %s", what, type(error).__name__, error)
            raise FUSEError(number) from None
        except FUSEError:
            raise
        except BaseExceptionGroup as group:
            if group.subgroup(lambda e: not isinstance(e, Exception)) is not None:
                raise
            log.exception("%s failed", what)
            raise FUSEError(errno_of(group)) from None
        except Exception:
            log.exception("%s failed", what)
            raise FUSEError(errno.EIO) from None
        log.error("%s did not end within %.0f s", what, self._deadline_s)
        raise FUSEError(errno.ETIMEDOUT)

    async def _entry(self, what: str, call: Awaitable[Attributes]) -> EntryAttributes:
        return entry_of(await self._guard(what, call))

    def init(self) -> None:
        """The kernel and libfuse have shaken hands: requests follow."""
        self.ready.set()

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        try:
            self._fs.forget([inode for inode, _ in inode_list])
        except Exception:
            log.exception("forget failed")

    # --- names ---

    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        kept = self._fs.kept_entry(parent_inode, name)  # most lookups end here, without a task switch and a deadline
        if kept is not None:
            return entry_of(kept)
        return await self._entry("lookup", self._fs.lookup(parent_inode, name, caller_of(ctx)))

    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        return await self._entry("mknod", self._fs.mknod(parent_inode, name, mode, rdev, caller_of(ctx)))

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        return await self._entry("mkdir", self._fs.mkdir(parent_inode, name, mode, caller_of(ctx)))

    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        return await self._entry("symlink", self._fs.symlink(parent_inode, name, target, caller_of(ctx)))

    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        return await self._entry("link", self._fs.link(inode, new_parent_inode, new_name, caller_of(ctx)))

    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        await self._guard("unlink", self._fs.unlink(parent_inode, name, caller_of(ctx)))

    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        await self._guard("rmdir", self._fs.rmdir(parent_inode, name, caller_of(ctx)))

    async def rename(self, parent_inode_old: int, name_old: bytes, parent_inode_new: int, name_new: bytes, flags: int, ctx: RequestContext) -> None:
        await self._guard("rename", self._fs.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags, caller_of(ctx)))

    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return await self._guard("readlink", self._fs.readlink(inode, caller_of(ctx)))

    # --- attributes ---

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        kept = self._fs.kept_attributes(inode)
        if kept is not None:
            return entry_of(kept)
        return await self._entry("getattr", self._fs.getattr(inode, caller_of(ctx)))

    async def setattr(self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext) -> EntryAttributes:
        changes = Changes(
            mode=attr.st_mode & 0o7777 if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            length=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
            ctime_ns=attr.st_ctime_ns if fields.update_ctime else None,
        )
        return await self._entry("setattr", self._fs.setattr(inode, changes, fh, caller_of(ctx)))

    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        return await self._guard("access", self._fs.access(inode, mode, caller_of(ctx)))

    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        found = await self._guard("statfs", self._fs.statfs(caller_of(ctx)))
        data = StatvfsData()
        data.f_bsize = data.f_frsize = found.block_size
        data.f_blocks = found.blocks
        data.f_bfree = data.f_bavail = found.blocks_free
        data.f_files = found.files
        data.f_ffree = data.f_favail = found.files_free
        data.f_namemax = found.name_max
        return data

    # --- extended attributes ---

    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        await self._guard("setxattr", self._fs.setxattr(inode, name, value, caller_of(ctx)))

    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        return await self._guard("getxattr", self._fs.getxattr(inode, name, caller_of(ctx)))

    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        return await self._guard("listxattr", self._fs.listxattr(inode, caller_of(ctx)))

    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        await self._guard("removexattr", self._fs.removexattr(inode, name, caller_of(ctx)))

    # --- files ---

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        return info_of(await self._guard("open", self._fs.open(inode, flags, caller_of(ctx))))

    async def create(self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext) -> tuple[FileInfo, EntryAttributes]:
        opened, attributes = await self._guard("create", self._fs.create(parent_inode, name, mode, flags, caller_of(ctx)))
        return info_of(opened), entry_of(attributes)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        # pyfuse3 takes any contiguous buffer, and copies it to the kernel before it runs anything else.
        data: Any = await self._guard("read", self._fs.read(fh, off, size))
        return data  # type: ignore[no-any-return]

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return await self._guard("write", self._fs.write(fh, off, buf))

    async def flush(self, fh: int) -> None:
        await self._guard("flush", self._fs.flush(fh))

    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._guard("fsync", self._fs.fsync(fh, datasync))

    async def release(self, fh: int) -> None:
        await self._guard("release", self._fs.release(fh))

    # --- directories ---

    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        return await self._guard("opendir", self._fs.opendir(inode, caller_of(ctx)))

    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        def emit(name: bytes, attributes: Attributes, position: int) -> bool:
            return pyfuse3.readdir_reply(token, name, entry_of(attributes), position)

        await self._guard("readdir", self._fs.readdir(fh, start_id, emit))

    async def releasedir(self, fh: int) -> None:
        await self._guard("releasedir", self._fs.releasedir(fh))

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._guard("fsyncdir", self._fs.fsyncdir(fh, datasync))
