"""From the kernel's requests to the file system operations and back: it unpacks, calls, and packs. Nothing is decided here.

Two tables: AT_ONCE has what can often be answered from what is known, with neither a task switch nor a deadline (None: it cannot);
WAITING has everything, as coroutines. Invariants: whatever a coroutine needs of the request is copied before it waits, but for the bytes of a WRITE,
which lie in the request's own buffer until it is answered.
It must never hold state: handles and caches belong to the operations.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvfs.common.errors import AccessDenied, InvalidArgument, NotFound, OutOfRange
from kvfs.fuse import protocol
from kvfs.fuse.model import Attributes, Caller, Changes, Opened
from kvfs.fuse.operations.xattrs import ASKED_BY_THE_KERNEL
from kvfs.fuse.protocol import DIRECT_IO, HEADER_BYTES, KEEP_CACHE, NOFLUSH, Op, Set

if TYPE_CHECKING:
    from kvfs.fuse.operations import FileSystem

Body = bytes | bytearray | memoryview
EMPTY = b""
MODE_BITS = 0o7777


@dataclass(slots=True, eq=False)
class Request:
    """One at a time: `data` is where requests are received into, the rest is its header."""

    data: memoryview
    op: int = 0
    unique: int = 0
    node: int = 0
    uid: int = 0
    gid: int = 0
    pid: int = 0
    end: int = 0
    """The request's bytes are data[:end]."""

    def caller(self) -> Caller:
        return Caller(self.uid, self.gid, self.pid)

    def name(self, start: int = 0) -> bytes:
        """The name that begins behind `start` bytes of the operation's own struct and ends the request."""
        return bytes(self.data[HEADER_BYTES + start : self.end - 1])

    def names(self, start: int = 0) -> tuple[bytes, bytes]:
        first, _, second = self.name(start).partition(b"\0")
        return first, second


class Requests:
    """One instance a mount."""

    def __init__(self, file_system: FileSystem) -> None:
        self._fs = file_system
        self.at_once: dict[int, Callable[[Request], bytes | None]] = {
            Op.LOOKUP: self._known_entry,
            Op.GETATTR: self._known_attributes,
            Op.GETXATTR: self._known_xattr,
            Op.FORGET: self._forget,
            Op.BATCH_FORGET: self._forget_many,
        }
        """Whole answers; empty: there is none to give."""
        self.waiting: dict[int, Callable[[Request], Awaitable[Body]]] = {
            Op.LOOKUP: self._lookup,
            Op.GETATTR: self._getattr,
            Op.SETATTR: self._setattr,
            Op.READLINK: self._readlink,
            Op.SYMLINK: self._symlink,
            Op.MKNOD: self._mknod,
            Op.MKDIR: self._mkdir,
            Op.UNLINK: self._unlink,
            Op.RMDIR: self._rmdir,
            Op.RENAME: self._rename,
            Op.RENAME2: self._rename2,
            Op.LINK: self._link,
            Op.OPEN: self._open,
            Op.CREATE: self._create,
            Op.READ: self._read,
            Op.WRITE: self._write,
            Op.FLUSH: self._flush,
            Op.FSYNC: self._fsync,
            Op.RELEASE: self._release,
            Op.STATFS: self._statfs,
            Op.ACCESS: self._access,
            Op.SETXATTR: self._setxattr,
            Op.GETXATTR: self._getxattr,
            Op.LISTXATTR: self._listxattr,
            Op.REMOVEXATTR: self._removexattr,
            Op.OPENDIR: self._opendir,
            Op.READDIR: self._readdir,
            Op.READDIRPLUS: self._readdirplus,
            Op.RELEASEDIR: self._releasedir,
            Op.FSYNCDIR: self._fsyncdir,
        }
        """The bodies of answers."""

    # --- what is known ---

    def _known_entry(self, request: Request) -> bytes | None:
        name = request.name()
        kept = self._fs.kept_entry(request.node, name)
        if kept is not None:
            return protocol.entry_reply(request.unique, kept)
        absent_s = self._fs.known_absent(request.node, name)
        return None if absent_s < 0 else protocol.absent_reply(request.unique, absent_s)

    def _known_attributes(self, request: Request) -> bytes | None:
        kept = self._fs.kept_attributes(request.node)
        return None if kept is None else protocol.attribute_reply(request.unique, kept)

    def _known_xattr(self, request: Request) -> bytes | None:
        """Asked before every write through the page cache."""
        if request.name(protocol.GETXATTR_IN.size) == ASKED_BY_THE_KERNEL:
            return protocol.error_reply(request.unique, errno.ENODATA)
        return None

    def _forget(self, request: Request) -> bytes:
        self._fs.forget(((request.node, protocol.FORGET_IN.unpack_from(request.data, HEADER_BYTES)[0]),))
        return EMPTY

    def _forget_many(self, request: Request) -> bytes:
        start = HEADER_BYTES + protocol.BATCH_FORGET_IN.size
        self._fs.forget(protocol.FORGET_ONE.iter_unpack(request.data[start : request.end]))
        return EMPTY

    # --- names ---

    async def _lookup(self, request: Request) -> Body:
        name = request.name()
        try:
            return protocol.pack_entry(await self._fs.lookup(request.node, name, request.caller()))
        except NotFound:
            absent_s = self._fs.known_absent(request.node, name)
            if absent_s <= 0:
                raise
            return protocol.pack_absent(absent_s)

    async def _mknod(self, request: Request) -> Body:
        mode, rdev, _, _ = protocol.MKNOD_IN.unpack_from(request.data, HEADER_BYTES)
        return protocol.pack_entry(await self._fs.mknod(request.node, request.name(protocol.MKNOD_IN.size), mode, rdev, request.caller()))

    async def _mkdir(self, request: Request) -> Body:
        mode, _ = protocol.MKDIR_IN.unpack_from(request.data, HEADER_BYTES)
        return protocol.pack_entry(await self._fs.mkdir(request.node, request.name(protocol.MKDIR_IN.size), mode, request.caller()))

    async def _symlink(self, request: Request) -> Body:
        name, target = request.names()
        return protocol.pack_entry(await self._fs.symlink(request.node, name, target, request.caller()))

    async def _link(self, request: Request) -> Body:
        (inode,) = protocol.NODE_IN.unpack_from(request.data, HEADER_BYTES)
        return protocol.pack_entry(await self._fs.link(inode, request.node, request.name(protocol.NODE_IN.size), request.caller()))

    async def _unlink(self, request: Request) -> Body:
        await self._fs.unlink(request.node, request.name(), request.caller())
        return EMPTY

    async def _rmdir(self, request: Request) -> Body:
        await self._fs.rmdir(request.node, request.name(), request.caller())
        return EMPTY

    async def _rename(self, request: Request) -> Body:
        (parent,) = protocol.NODE_IN.unpack_from(request.data, HEADER_BYTES)
        return await self._move(request, parent, 0, protocol.NODE_IN.size)

    async def _rename2(self, request: Request) -> Body:
        parent, flags, _ = protocol.RENAME2_IN.unpack_from(request.data, HEADER_BYTES)
        return await self._move(request, parent, flags, protocol.RENAME2_IN.size)

    async def _move(self, request: Request, parent: int, flags: int, start: int) -> Body:
        old, new = request.names(start)
        await self._fs.rename(request.node, old, parent, new, flags, request.caller())
        return EMPTY

    async def _readlink(self, request: Request) -> Body:
        return await self._fs.readlink(request.node, request.caller())

    # --- attributes ---

    async def _getattr(self, request: Request) -> Body:
        return protocol.pack_attributes(await self._fs.getattr(request.node, request.caller()))

    async def _setattr(self, request: Request) -> Body:
        (valid, _, handle, length, _, atime_s, mtime_s, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _) = protocol.SETATTR_IN.unpack_from(
            request.data, HEADER_BYTES
        )
        changes = Changes(
            mode=mode & MODE_BITS if valid & Set.MODE else None,
            uid=uid if valid & Set.UID else None,
            gid=gid if valid & Set.GID else None,
            length=length if valid & Set.SIZE else None,
            atime_ns=atime_s * protocol.SECOND_NS + atime_ns if valid & Set.ATIME else None,
            mtime_ns=mtime_s * protocol.SECOND_NS + mtime_ns if valid & Set.MTIME else None,
            times_are_now=(not valid & Set.ATIME or bool(valid & Set.ATIME_NOW)) and (not valid & Set.MTIME or bool(valid & Set.MTIME_NOW)),
        )
        return protocol.pack_attributes(await self._fs.setattr(request.node, changes, handle if valid & Set.HANDLE else None, request.caller()))

    async def _access(self, request: Request) -> Body:
        mask, _ = protocol.ACCESS_IN.unpack_from(request.data, HEADER_BYTES)
        if not await self._fs.access(request.node, mask, request.caller()):
            raise AccessDenied("the permissions do not allow it")
        return EMPTY

    async def _statfs(self, request: Request) -> Body:
        found = await self._fs.statfs(request.caller())
        return protocol.STATFS_OUT.pack(
            found.blocks,
            found.blocks_free,
            found.blocks_free,
            found.files,
            found.files_free,
            found.block_size,
            found.name_max,
            found.block_size,
        )

    # --- extended attributes ---

    async def _setxattr(self, request: Request) -> Body:
        size, flags = protocol.SETXATTR_IN.unpack_from(request.data, HEADER_BYTES)
        text = bytes(request.data[HEADER_BYTES + protocol.SETXATTR_IN.size : request.end])
        name, _, value = text.partition(b"\0")
        if len(value) != size:
            raise InvalidArgument(f"a value of {size} bytes came as {len(value)}")
        await self._fs.setxattr(request.node, name, value, request.caller(), flags=flags)
        return EMPTY

    async def _getxattr(self, request: Request) -> Body:
        size, _ = protocol.GETXATTR_IN.unpack_from(request.data, HEADER_BYTES)
        return _sized(await self._fs.getxattr(request.node, request.name(protocol.GETXATTR_IN.size), request.caller()), size)

    async def _listxattr(self, request: Request) -> Body:
        size, _ = protocol.GETXATTR_IN.unpack_from(request.data, HEADER_BYTES)
        names = await self._fs.listxattr(request.node, request.caller())
        return _sized(b"".join(name + b"\0" for name in names), size)

    async def _removexattr(self, request: Request) -> Body:
        await self._fs.removexattr(request.node, request.name(), request.caller())
        return EMPTY

    # --- files ---

    async def _open(self, request: Request) -> Body:
        flags, _ = protocol.OPEN_IN.unpack_from(request.data, HEADER_BYTES)
        return _opened(await self._fs.open(request.node, flags, request.caller()))

    async def _create(self, request: Request) -> Body:
        flags, mode, _, _ = protocol.CREATE_IN.unpack_from(request.data, HEADER_BYTES)
        opened, entry = await self._fs.create(request.node, request.name(protocol.CREATE_IN.size), mode, flags, request.caller())
        return protocol.pack_entry(entry) + _opened(opened)

    async def _read(self, request: Request) -> Body:
        handle, offset, size, _, _, _, _ = protocol.READ_IN.unpack_from(request.data, HEADER_BYTES)
        return await self._fs.read(handle, offset, size)

    async def _write(self, request: Request) -> Body:
        handle, offset, size, _, _, _, _ = protocol.WRITE_IN.unpack_from(request.data, HEADER_BYTES)
        start = HEADER_BYTES + protocol.WRITE_IN.size
        return protocol.WRITE_OUT.pack(await self._fs.write(handle, offset, request.data[start : start + size]), 0)

    async def _flush(self, request: Request) -> Body:
        await self._fs.flush(_handle(request))
        return EMPTY

    async def _fsync(self, request: Request) -> Body:
        handle, flags, _ = protocol.HANDLE_IN.unpack_from(request.data, HEADER_BYTES)
        await self._fs.fsync(handle, bool(flags & 1))
        return EMPTY

    async def _release(self, request: Request) -> Body:
        await self._fs.release(_handle(request))
        return EMPTY

    # --- directories ---

    async def _opendir(self, request: Request) -> Body:
        return protocol.OPEN_OUT.pack(await self._fs.opendir(request.node, request.caller()), 0, 0)

    async def _readdir(self, request: Request) -> Body:
        return await self._list(request, False)

    async def _readdirplus(self, request: Request) -> Body:
        return await self._list(request, True)

    async def _list(self, request: Request, plus: bool) -> Body:
        handle, position, size, _, _, _, _ = protocol.READ_IN.unpack_from(request.data, HEADER_BYTES)
        listing = bytearray()

        def emit(name: bytes, inode: int, mode: int, attributes: Attributes | None, after: int) -> bool:
            record = protocol.pack_dirent(inode, mode, name, after)
            if plus:
                record = (protocol.NO_ENTRY if attributes is None else protocol.pack_entry(attributes)) + record
            if len(listing) + len(record) > size:
                return False
            listing.extend(record)
            return True

        await self._fs.readdir(handle, position, emit, attributes=plus)
        return listing

    async def _releasedir(self, request: Request) -> Body:
        await self._fs.releasedir(_handle(request))
        return EMPTY

    async def _fsyncdir(self, request: Request) -> Body:
        handle, flags, _ = protocol.HANDLE_IN.unpack_from(request.data, HEADER_BYTES)
        await self._fs.fsyncdir(handle, bool(flags & 1))
        return EMPTY


def _handle(request: Request) -> int:
    handle: int = protocol.HANDLE_IN.unpack_from(request.data, HEADER_BYTES)[0]
    return handle


def _opened(opened: Opened) -> bytes:
    flags = 0
    if opened.keep_cache:
        flags |= KEEP_CACHE
    if opened.direct_io:
        flags |= DIRECT_IO
    if not opened.flush:
        flags |= NOFLUSH
    return protocol.OPEN_OUT.pack(opened.handle, flags, 0)


def _sized(value: bytes, size: int) -> bytes:
    """How the xattr calls answer: the length to those who ask for it with size 0, the value to those who have room."""
    if not size:
        return protocol.GETXATTR_OUT.pack(len(value), 0)
    if len(value) > size:
        raise OutOfRange(f"the value has {len(value)} bytes, there is room for {size}")
    return value
