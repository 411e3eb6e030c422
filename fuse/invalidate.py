"""Telling the kernel to forget: what other clients changed (the metadata service's revocations), and what this mount changed behind the kernel's
back.

Invariants: the kernel is told from a thread, never from the trio thread (it may wait for a page that is being read through this very mount); a
revocation is acknowledged to the service only when the kernel has forgotten; the queue is bounded, and what does not fit is told late by the
lease's end instead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from kvfs.client import AsyncClient
from kvfs.fuse import protocol

log = logging.getLogger("kvfs.fuse")

QUEUE_MAX = 4096
THREADS = 4


class Invalidator:
    """`attributes` and `data` are called by the operations; revocations come in from the client."""

    def __init__(self, notify: Callable[[bytes], None]) -> None:
        """`notify`: sends a message to the kernel, from a thread."""
        self._notify = notify
        self._send, self._receive = trio.open_memory_channel[tuple[int, bool]](QUEUE_MAX)
        self._threads = trio.CapacityLimiter(THREADS)
        self._ended = False

    def attributes(self, inode: int) -> None:
        self._put(inode, True)

    def data(self, inode: int) -> None:
        self._put(inode, False)

    async def attributes_now(self, inode: int) -> None:
        await self._tell(protocol.inval_inode(inode, attributes_only=True))

    async def data_now(self, inode: int) -> None:
        """Not while the kernel waits for us with a lock of this file that invalidating needs: reads are fine, since they are answered meanwhile."""
        await self._tell(protocol.inval_inode(inode, attributes_only=False))

    def _put(self, inode: int, attributes_only: bool) -> None:
        try:
            self._send.send_nowait((inode, attributes_only))
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            log.debug("inode %d: the kernel keeps its attributes until their lease ends", inode)

    async def run(self, client: AsyncClient, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. When this has ended no thread of it uses the session any more."""
        client.on_revoked(self.revoked)
        task_status.started()
        try:
            async with self._receive:
                async for inode, attributes_only in self._receive:
                    await self._tell(protocol.inval_inode(inode, attributes_only=attributes_only))
        finally:
            self._ended = True

    async def revoked(self, inode: int, name: bytes) -> None:
        """Another client changed the inode, or (name not empty) an entry of that directory."""
        if name:
            await self._tell(protocol.inval_entry(inode, name, expire_only=False))
        await self._tell(protocol.inval_inode(inode, attributes_only=False))

    async def _tell(self, message: bytes) -> None:
        if not self._ended:
            await trio.to_thread.run_sync(self._in_thread, message, limiter=self._threads)

    def _in_thread(self, message: bytes) -> None:
        try:
            self._notify(message)
        except OSError:
            pass  # ENOENT: the kernel does not know the inode; ENOTCONN and the like: the mount is ending
