"""The spaces of a cluster: make, open, list, drop, look at.

Owns the directory /kvcache and the handles that are open. Invariants: a space is a directory made by one metadata operation and dropped by one; a
handle hears of changes of its space by the client's watch of revocations; metadata is asked when spaces are made, opened, listed and dropped, and by
a handle every few seconds whether it still holds, never about a block. `AsyncKVCache` belongs to its client's trio thread, `KVCache` to any thread.
Errors of both are those of common/errors.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from kvfs.client.async_client import AsyncClient
from kvfs.client.file.memory import RegisteredBuffer
from kvfs.client.sync_client import Client
from kvfs.common.errors import AlreadyExists, InvalidArgument, NotFound
from kvfs.common.ids import ROOT_INODE
from kvfs.common.wire import meta_pb2 as pb
from kvfs.kvcache.async_space import AsyncSpace
from kvfs.kvcache.config import CacheConfig
from kvfs.kvcache.outcomes import SpaceStats
from kvfs.kvcache.params import SpaceParams
from kvfs.kvcache.space import Space

DIRECTORY = b"kvcache"
DIRECTORY_MODE = 0o1777
"""As /tmp: everyone may make spaces, and drops none but his own."""
SPACE_MODE = 0o755
PAGE = 1024

T = TypeVar("T")


class AsyncKVCache:
    def __init__(self, client: AsyncClient, config: CacheConfig | None = None) -> None:
        self._client = client
        self._config = config or CacheConfig()
        self._open: dict[int, weakref.WeakSet[AsyncSpace]] = {}
        client.on_revoked(self._revoked)
        client.on_lost(self._lost)

    async def create(self, name: str, params: SpaceParams, *, exist_ok: bool = False) -> AsyncSpace:
        """Make a space and open it. AlreadyExists if the name is taken; with `exist_ok` the space there is opened, if it holds such blocks."""
        parent, _ = await self._find(_checked(name), make=True)
        try:
            inode = await self._client.meta.make(parent, _bytes(name), pb.DIRECTORY, SPACE_MODE, space=params.to_wire())
        except AlreadyExists:
            if exist_ok:
                return await self.open(name, params)
            raise AlreadyExists(f"/kvcache/{name} is there already: open it, or choose another name") from None
        return self._handle(name, inode)

    async def open(self, name: str, expect: SpaceParams | None = None) -> AsyncSpace:
        """A handle. NotFound without such a space; SpaceDiffers, naming the field, if it holds blocks of another format than `expect`."""
        inode = await self._space(name)
        if expect is not None:
            expect.check_same(name, inode.space)
        return self._handle(name, inode)

    async def list(self) -> dict[str, SpaceParams]:
        """All spaces by name, with their parameters."""
        parent, _ = await self._find()
        found: dict[str, SpaceParams] = {}
        after, more = b"", parent != 0
        while more:
            page = await self._client.meta.read_dir(parent, after=after, limit=PAGE, attributes=True)
            for entry in page.entries:
                if entry.attributes.HasField("space"):
                    found[entry.name.decode(errors="surrogateescape")] = SpaceParams.from_wire(entry.attributes.space)
            more = page.more and bool(page.entries)
            after = page.entries[-1].name if page.entries else b""
        return found

    async def drop(self, name: str) -> None:
        """Gone at once, for this client and every other; the blocks' disk space comes back in the background."""
        inode = await self._space(name)
        parent, _ = await self._find()
        await self._client.meta.remove(parent, _bytes(name), directory=True)
        for space in self._open.pop(inode.inode, ()):
            space.life.end()

    async def stats(self, name: str) -> SpaceStats:
        return await AsyncSpace(self._client, name, await self._space(name), self._config).stats()

    def register(self, size_bytes: int) -> RegisteredBuffer:
        """Memory that services on this host read and write directly; `Space.buffers` makes it in the shape of blocks."""
        return self._client.register(size_bytes)

    async def _find(self, name: str = "", *, make: bool = False) -> tuple[int, pb.Inode | None]:
        """The directory of spaces (0: there is none) and the entry of that name in it."""
        names = [DIRECTORY, _bytes(name)] if name else [DIRECTORY]
        reply = await self._client.meta.lookup(ROOT_INODE, names, follow=True, follow_last=False)
        if not reply.inodes:
            if not make:
                return 0, None
            try:
                return (await self._client.meta.make(ROOT_INODE, DIRECTORY, pb.DIRECTORY, DIRECTORY_MODE)).inode, None
            except AlreadyExists:  # another client was faster
                return await self._find(name)
        return reply.inodes[0].inode, reply.inodes[1] if len(reply.inodes) > 1 else None

    async def _space(self, name: str) -> pb.Inode:
        _, inode = await self._find(_checked(name))
        if inode is None:
            known = sorted(await self.list())
            raise NotFound(f"there is no space {name}" + (f"; there are {', '.join(known[:20])}" if known else ", and no other either"))
        if not inode.HasField("space"):
            raise InvalidArgument(f"/kvcache/{name} is not a space: spaces are made by KVCache.create or `kvfs kv create`")
        return inode

    def _handle(self, name: str, inode: pb.Inode) -> AsyncSpace:
        space = AsyncSpace(self._client, name, inode, self._config)
        self._open.setdefault(space.inode, weakref.WeakSet()).add(space)
        return space

    async def _revoked(self, inode: int, name: bytes) -> None:
        if not name:
            for space in self._open.get(inode, ()):
                space.life.suspect()

    async def _lost(self) -> None:
        for spaces in self._open.values():
            for space in spaces:
                space.life.suspect()


def _checked(name: str) -> str:
    try:
        size = len(_bytes(name))
    except UnicodeEncodeError:
        size = 0
    if not size or "/" in name or "\0" in name or name in (".", "..") or size > 255:
        raise InvalidArgument(f"{name!r} is no name for a space: 1 to 255 bytes without '/'")
    return name


def _bytes(name: str) -> bytes:
    return name.encode(errors="surrogateescape")


class KVCache:
    """The same for threads. `with Client(cluster) as client: KVCache(client).create(...)`."""

    def __init__(self, client: Client, config: CacheConfig | None = None) -> None:
        self._client = client
        self._config = config
        self._bound: tuple[Any, AsyncKVCache] | None = None

    def _run(self, function: Callable[[AsyncKVCache], Awaitable[T]]) -> T:
        async def in_thread(client: AsyncClient) -> T:
            if self._bound is None or self._bound[0] is not client:  # the first call, or the first in a forked child
                self._bound = (client, AsyncKVCache(client, self._config))
            return await function(self._bound[1])

        portal = self._client.portal
        return portal.call(in_thread, portal.client)

    def create(self, name: str, params: SpaceParams, *, exist_ok: bool = False) -> Space:
        return Space(self._run, self._client, self._run(lambda cache: cache.create(name, params, exist_ok=exist_ok)))

    def open(self, name: str, expect: SpaceParams | None = None) -> Space:
        return Space(self._run, self._client, self._run(lambda cache: cache.open(name, expect)))

    def list(self) -> dict[str, SpaceParams]:
        return self._run(lambda cache: cache.list())

    def drop(self, name: str) -> None:
        self._run(lambda cache: cache.drop(name))

    def stats(self, name: str) -> SpaceStats:
        return self._run(lambda cache: cache.stats(name))

    def register(self, size_bytes: int) -> RegisteredBuffer:
        return self._client.register(size_bytes)
