"""The client on trio. (Interface first; the body follows.)"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from kvfs.client.config import ClientConfig
from kvfs.client.file.open_file import OpenFile
from kvfs.client.meta_client import MetaClient
from kvfs.client.user import User
from kvfs.common.wire import meta_pb2 as pb


class AsyncClient:
    meta: MetaClient
    storage: Any
    user: User
    config: ClientConfig
    client_id: bytes

    def new_session(self) -> bytes:
        """16 random bytes: the name of an open file at the metadata service."""
        raise NotImplementedError

    def open_file(self, inode: pb.Inode, *, session: bytes, read: bool, write: bool, append: bool = False, user: User | None = None) -> OpenFile:
        """A handle over an inode that meta.open or meta.create answered just now (no call is made here)."""
        raise NotImplementedError

    def local_view(self, inode: pb.Inode) -> pb.Inode:
        """The attributes as this client sees them: with the length and mtime of its own unreported writes."""
        raise NotImplementedError

    async def truncate_inode(self, inode: int, length: int, *, user: User | None = None, session: bytes = b"") -> pb.Inode:
        """Truncate or extend by number, in step with whatever files of this client are open on it."""
        raise NotImplementedError

    async def flush_inode(self, inode: int) -> None:
        """flush of whatever this client has unsent for an inode; nothing when it is not open."""
        raise NotImplementedError

    def on_revoked(self, callback: Callable[[int, bytes], Awaitable[None]]) -> None:
        """Call with (inode, name) when cached attributes (name empty) or an entry of that directory are no longer true. The revocation is acknowledged
        when all callbacks have returned: they must be quick and must not fail."""
        raise NotImplementedError

    def on_lost(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Call when the metadata service has restarted: nothing cached is true any more."""
        raise NotImplementedError

    def register(self, size_bytes: int) -> Any:
        """Memory that storage services on this host read and write directly: a RegisteredBuffer (view, span(offset, length), close())."""
        raise NotImplementedError


@asynccontextmanager
async def open_client(
    cluster: str, *, user: User | None = None, role: str = "client", description: str = "", config: ClientConfig | None = None
) -> AsyncIterator[AsyncClient]:
    """A client of the cluster (a directory of `kvfs up`, or "host:port,..."); lives as long as the block."""
    raise NotImplementedError
    yield
