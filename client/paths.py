"""Path operations: what `os` and `shutil` offer, on the cluster.

Owns how a path becomes a directory and a name: from the root, components between slashes, one lookup for all of them, symbolic links followed by the
service. Paths are str (as os.fsencode has it), bytes or PathLike; a leading slash is optional. Attributes come back as meta.proto's Inode.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

from kvfs.client.file.async_file import AsyncFile
from kvfs.client.file.open_file import OpenFile
from kvfs.client.file.table import FileTable
from kvfs.client.meta_client import MetaClient
from kvfs.client.spaces import SPACE_XATTRS, space_attribute
from kvfs.client.storage_client import StorageClient
from kvfs.client.user import User
from kvfs.common.boundary.random import Random
from kvfs.common.errors import AlreadyExists, InvalidArgument, IsDirectory, NotDirectory, NotFound
from kvfs.common.ids import ROOT_INODE
from kvfs.common.wire import meta_pb2 as pb

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]
PAGE = 1024


def components(path: Path) -> list[bytes]:
    """The names of a path, without empty ones and "."."""
    raw = os.fsencode(path)
    if b"\0" in raw:
        raise InvalidArgument("a path has no NUL bytes")
    return [name for name in raw.split(b"/") if name not in (b"", b".")]


def shown(path: Path) -> str:
    return os.fsdecode(os.fsencode(path))


class PathOperations:
    """Part of AsyncClient."""

    meta: MetaClient
    files: FileTable
    storage: StorageClient
    user: User
    umask: int
    _random: Random

    # --- finding ---------------------------------------------------------------------------------------------------------------------

    async def _walk(self, path: Path, *, follow_last: bool) -> pb.LookupReply:
        names = components(path)
        if not names:
            return pb.LookupReply(inodes=await self.meta.get_attr([ROOT_INODE]))
        return await self.meta.lookup(ROOT_INODE, names, follow=True, follow_last=follow_last)

    async def _find(self, path: Path, *, follow: bool = True) -> pb.Inode:
        reply = await self._walk(path, follow_last=follow)
        if len(reply.inodes) < max(1, len(components(path))):
            raise NotFound(f"{shown(path)}: no such file or directory")
        return reply.inodes[-1]

    async def _place(self, path: Path) -> tuple[int, bytes]:
        """The directory that holds, or would hold, the last name of a path; the name itself is not followed."""
        names = components(path)
        if not names:
            raise AlreadyExists("the root has no name")
        if len(names) == 1:
            return ROOT_INODE, names[0]
        reply = await self.meta.lookup(ROOT_INODE, names[:-1], follow=True, follow_last=True)
        if len(reply.inodes) < len(names) - 1:
            raise NotFound(f"{shown(path)}: no such directory")
        if reply.inodes[-1].type != pb.DIRECTORY:
            raise NotDirectory(f"{shown(path)}: not a directory on the way")
        return reply.inodes[-1].inode, names[-1]

    async def stat(self, path: Path) -> pb.Inode:
        """Attributes; symbolic links are followed."""
        return self.files.view(await self._find(path))

    async def lstat(self, path: Path) -> pb.Inode:
        return self.files.view(await self._find(path, follow=False))

    async def exists(self, path: Path) -> bool:
        try:
            await self._find(path)
        except (NotFound, NotDirectory):
            return False
        return True

    # --- directories -----------------------------------------------------------------------------------------------------------------

    async def scandir(self, path: Path = "/") -> list[tuple[str, pb.Inode]]:
        """(name, attributes) of every entry, in the byte order of names."""
        directory = await self._find(path)
        if directory.type != pb.DIRECTORY:
            raise NotDirectory(f"{shown(path)}: not a directory")
        found: list[tuple[str, pb.Inode]] = []
        after, more = b"", True
        while more:
            page = await self.meta.read_dir(directory.inode, after=after, limit=PAGE, attributes=True)
            found += [(os.fsdecode(entry.name), self.files.view(entry.attributes)) for entry in page.entries]
            more = page.more and bool(page.entries)
            after = page.entries[-1].name if page.entries else b""
        return found

    async def listdir(self, path: Path = "/") -> list[str]:
        directory = await self._find(path)
        if directory.type != pb.DIRECTORY:
            raise NotDirectory(f"{shown(path)}: not a directory")
        found: list[str] = []
        after, more = b"", True
        while more:
            page = await self.meta.read_dir(directory.inode, after=after, limit=4 * PAGE)
            found += [os.fsdecode(entry.name) for entry in page.entries]
            more = page.more and bool(page.entries)
            after = page.entries[-1].name if page.entries else b""
        return found

    async def walk(self, path: Path = "/") -> AsyncIterator[tuple[str, list[str], list[str]]]:
        """As os.walk, top down: (directory, its directories, the rest). Change the list of directories to prune."""
        top = shown(path)
        directories: list[str] = []
        rest: list[str] = []
        for name, inode in await self.scandir(path):
            (directories if inode.type == pb.DIRECTORY else rest).append(name)
        yield top, directories, rest
        for name in directories:
            async for step in self.walk(top.rstrip("/") + "/" + name):
                yield step

    async def mkdir(self, path: Path, mode: int = 0o777, *, layout: pb.Layout | None = None) -> pb.Inode:
        parent, name = await self._place(path)
        return await self.meta.make(parent, name, pb.DIRECTORY, mode & ~self.umask, layout=layout)

    async def makedirs(self, path: Path, mode: int = 0o777, *, exist_ok: bool = False) -> None:
        names = components(path)
        reply = await self._walk(path, follow_last=True)
        if len(reply.inodes) >= max(1, len(names)):
            if not exist_ok or reply.inodes[-1].type != pb.DIRECTORY:
                raise AlreadyExists(f"{shown(path)}: exists")
            return
        parent = reply.inodes[-1].inode if reply.inodes else ROOT_INODE
        for name in names[len(reply.inodes) :]:
            try:
                parent = (await self.meta.make(parent, name, pb.DIRECTORY, mode & ~self.umask)).inode
            except AlreadyExists:
                # Someone else made it meanwhile: good, if it is a directory.
                again = await self.meta.lookup(parent, [name], follow=True, follow_last=True)
                if not again.inodes or again.inodes[0].type != pb.DIRECTORY:
                    raise
                parent = again.inodes[0].inode

    async def rmdir(self, path: Path) -> None:
        await self._remove(path, directory=True)

    async def rmtree(self, path: Path) -> None:
        """A directory and all below it: gone at once, the space comes back in the background."""
        await self._remove(path, recursive=True)

    async def _remove(self, path: Path, *, directory: bool = False, recursive: bool = False) -> None:
        names = components(path)
        if not names:
            raise AlreadyExists("the root has no name")
        await self.meta.remove(ROOT_INODE, names[-1], directory=directory, recursive=recursive, path=names[:-1])

    # --- names -----------------------------------------------------------------------------------------------------------------------

    async def unlink(self, path: Path) -> None:
        await self._remove(path)

    remove = unlink

    async def rename(self, source: Path, destination: Path, *, no_replace: bool = False, exchange: bool = False) -> None:
        parent, name = await self._place(source)
        new_parent, new_name = await self._place(destination)
        await self.meta.rename(parent, name, new_parent, new_name, no_replace=no_replace, exchange=exchange)

    async def symlink(self, target: Path, path: Path) -> None:
        parent, name = await self._place(path)
        await self.meta.make(parent, name, pb.SYMLINK, 0o777, symlink=os.fsencode(target))

    async def readlink(self, path: Path) -> str:
        inode = await self._find(path, follow=False)
        if inode.type != pb.SYMLINK:
            raise InvalidArgument(f"{shown(path)}: not a symbolic link")
        return os.fsdecode(inode.symlink)

    async def link(self, source: Path, path: Path) -> None:
        inode = await self._find(source, follow=False)
        parent, name = await self._place(path)
        await self.meta.link(inode.inode, parent, name)

    # --- attributes ------------------------------------------------------------------------------------------------------------------

    async def chmod(self, path: Path, mode: int) -> None:
        inode = await self._find(path)
        await self.meta.set_attr(inode.inode, mode=mode)

    async def chown(self, path: Path, uid: int = -1, gid: int = -1, *, follow: bool = True) -> None:
        """-1 leaves an owner as it is."""
        inode = await self._find(path, follow=follow)
        await self.meta.set_attr(inode.inode, uid=None if uid < 0 else uid, gid=None if gid < 0 else gid)

    async def utimens(self, path: Path, atime_ns: int | None = None, mtime_ns: int | None = None, *, follow: bool = True) -> None:
        """Both times, in nanoseconds; now, where none is given."""
        inode = await self._find(path, follow=follow)
        await self.meta.set_attr(inode.inode, atime_ns=atime_ns, mtime_ns=mtime_ns, atime_now=atime_ns is None, mtime_now=mtime_ns is None)

    async def truncate(self, path: Path, length: int) -> None:
        inode = await self._find(path)
        if inode.type == pb.DIRECTORY:
            raise IsDirectory(f"{shown(path)}: a directory")
        await self.files.truncate(inode.inode, length, session=b"", user=self.user)

    async def getxattr(self, path: Path, name: str | bytes) -> bytes:
        """Of a KV-cache space's directory also what it is (user.kvfs.space) and what it holds (user.kvfs.stats)."""
        inode = await self._find(path)
        wanted = os.fsencode(name)
        if wanted in SPACE_XATTRS:
            return await space_attribute(self.storage, inode, wanted)
        return await self.meta.get_xattr(inode.inode, wanted)

    async def setxattr(self, path: Path, name: str | bytes, value: bytes, *, create: bool = False, replace: bool = False) -> None:
        inode = await self._find(path)
        await self.meta.set_xattr(inode.inode, os.fsencode(name), value, create=create, replace=replace)

    async def listxattr(self, path: Path) -> list[str]:
        inode = await self._find(path)
        return [os.fsdecode(name) for name in await self.meta.list_xattr(inode.inode)]

    async def removexattr(self, path: Path, name: str | bytes) -> None:
        inode = await self._find(path)
        await self.meta.remove_xattr(inode.inode, os.fsencode(name))

    async def statfs(self) -> pb.StatFsReply:
        return await self.meta.stat_fs()

    # --- opening ---------------------------------------------------------------------------------------------------------------------

    async def open_path(self, path: Path, flags: int, mode: int = 0o666, *, layout: pb.Layout | None = None) -> OpenFile:
        """With the flags of os.open: O_RDONLY, O_WRONLY, O_RDWR, O_CREAT, O_EXCL, O_TRUNC, O_APPEND, O_NOFOLLOW."""
        access = flags & os.O_ACCMODE
        read, write = access in (os.O_RDONLY, os.O_RDWR), access in (os.O_WRONLY, os.O_RDWR)
        truncate = bool(flags & os.O_TRUNC) and write
        session = self._random.bytes(16)
        names = components(path)
        if flags & os.O_CREAT:
            if not names:
                raise IsDirectory("the root is a directory")
            created = await self.meta.create(
                ROOT_INODE,
                b"",
                mode & ~self.umask,
                session=session,
                read=read,
                write=write,
                exclusive=bool(flags & os.O_EXCL),
                truncate=truncate,
                layout=layout,
                path=names,
                follow_last=not flags & (os.O_EXCL | os.O_NOFOLLOW),
            )
            inode = created.inode
        else:
            inode = await self.meta.open(
                ROOT_INODE, session=session, read=read, write=write, truncate=truncate, path=names, follow_last=not flags & os.O_NOFOLLOW
            )
            if inode.type == pb.DIRECTORY:
                raise IsDirectory(f"{shown(path)}: a directory")
        return self.files.open(inode, session=session, read=read, write=write, append=bool(flags & os.O_APPEND), user=self.user)

    async def open(self, path: Path, mode: str = "rb", *, layout: pb.Layout | None = None) -> AsyncFile:
        """A binary file object. `mode` as in the built-in open: r, w, a or x, with + and b."""
        file = await self.open_path(path, flags_of(mode), layout=layout)
        return AsyncFile(file, position=file.length if file.appending else 0)

    async def read_bytes(self, path: Path) -> bytes:
        """All of a file."""
        async with await self.open(path) as file:
            return bytes(await file.read())

    async def write_bytes(self, path: Path, data: bytes | bytearray | memoryview) -> None:
        """Replace the content of a file, or make it."""
        async with await self.open(path, "wb") as file:
            await file.write(data)


def flags_of(mode: str) -> int:
    """os.open flags of an `open` mode; text modes are the sync face's business."""
    letters = set(mode) - {"b"}
    kinds = letters & set("rwax")
    if len(kinds) != 1 or letters - kinds - {"+"} or len(mode) != len(set(mode)):
        raise InvalidArgument(f"no such mode: {mode!r}")
    plus = "+" in letters
    [kind] = kinds
    access = os.O_RDWR if plus else os.O_RDONLY if kind == "r" else os.O_WRONLY
    return access | {"r": 0, "w": os.O_CREAT | os.O_TRUNC, "a": os.O_CREAT | os.O_APPEND, "x": os.O_CREAT | os.O_EXCL}[kind]
