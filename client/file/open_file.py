"""An open file. (Interface first; the body follows.)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvfs.client.user import User
from kvfs.common.wire import meta_pb2 as pb


class OpenFile:
    """One open file of this client. All OpenFiles of one inode share buffers: they see each other's writes at once."""

    inode: int
    session: bytes
    user: User

    @property
    def length(self) -> int:
        """The length as this client sees it, unflushed writes included."""
        raise NotImplementedError

    def attributes(self) -> pb.Inode:
        """The newest attributes known, with the local length and mtime."""
        raise NotImplementedError

    async def pread(self, offset: int, length: int) -> memoryview:
        """Up to `length` bytes, fewer only at the end of the file. A read-only view of the client's registered memory, without a copy where it was read
        ahead: the memory goes back to the pool when the last view of it is gone, so hand it on or copy it, do not collect many."""
        raise NotImplementedError

    async def pread_into(self, offset: int, views: Sequence[Any]) -> int:
        """Fill writable views (or Spans of a RegisteredBuffer, then without a copy) in order; the count is short only at the end of the file."""
        raise NotImplementedError

    async def pwrite(self, offset: int, buffers: Sequence[Any]) -> int:
        """Write bytes-likes (or Spans of a RegisteredBuffer: sent from there, acknowledged by the storage before this returns). Gives the count. bytes-likes are
        copied before this returns; errors of the write behind come out of a later pwrite, flush, fsync or close."""
        raise NotImplementedError

    async def append(self, buffers: Sequence[Any]) -> int:
        """Write at the end of the file, also with respect to other clients; gives the offset."""
        raise NotImplementedError

    async def flush(self) -> None:
        """Wait until everything written (through any handle of the inode in this client) is acknowledged by the storage."""
        raise NotImplementedError

    async def fsync(self) -> None:
        """flush, then synced on every replica, then the length and mtime reported to the metadata service."""
        raise NotImplementedError

    async def truncate(self, length: int) -> pb.Inode:
        raise NotImplementedError

    async def close(self) -> None:
        """flush, report, end the session. The handle is closed even when this raises; a second close does nothing."""
        raise NotImplementedError
