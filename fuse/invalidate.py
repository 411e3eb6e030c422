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
from kvfs.fuse.names import EXPIRE_WITHIN_S, KernelNames, Recall

log = logging.getLogger("kvfs.fuse")

QUEUE_MAX = 4096
THREADS = 4


class Invalidator:
    """`attributes` and `data` are called by the operations; revocations come in from the client."""

    def __init__(self, notify: Callable[[bytes], None], names: KernelNames | None = None) -> None:
        """`notify`: sends a message to the kernel. `names`: those that it keeps."""
        self._notify = notify
        self._names = names
        self._expiring = 0
        self._send, self._receive = trio.open_memory_channel[tuple[int, bool]](QUEUE_MAX)
        self._threads = trio.CapacityLimiter(THREADS)
        self._expirers = trio.CapacityLimiter(THREADS)
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
        try:
            async with trio.open_nursery() as self._nursery, self._receive:
                task_status.started()
                async for inode, attributes_only in self._receive:
                    await self._tell(protocol.inval_inode(inode, attributes_only=attributes_only))
        finally:
            self._ended = True

    def all_names(self) -> None:
        """Every name in the kernel is asked for again. Needs no lock, so it is told at once."""
        self._send_now(protocol.inc_epoch())

    async def revoked(self, inode: int, name: bytes) -> None:
        """Another client changed the inode, or (name not empty) an entry of that directory."""
        if self._names is not None:
            recall = self._names.recall(inode)
            if recall is not None and not await self._expire(inode, recall):
                self.all_names()
        await self._tell(protocol.inval_inode(inode, attributes_only=False))

    async def _expire(self, directory: int, recall: Recall) -> bool:
        """Have the kernel ask for each of the names again. False: it did not come to it in time."""
        await trio.sleep_until(recall.settled_at)
        if self._ended or self._expiring >= THREADS:
            return False
        done = trio.Event()
        self._expiring += 1
        self._nursery.start_soon(self._expire_all, directory, recall.names, done)
        with trio.move_on_after(EXPIRE_WITHIN_S):
            await done.wait()
        return done.is_set()

    async def _expire_all(self, directory: int, names: list[bytes], done: trio.Event) -> None:
        def expire() -> None:
            for name in names:
                self._send_now(protocol.inval_entry(directory, name, expire_only=True))

        try:
            await trio.to_thread.run_sync(expire, limiter=self._expirers)
            done.set()
        finally:
            self._expiring -= 1

    async def _tell(self, message: bytes) -> None:
        if not self._ended:
            await trio.to_thread.run_sync(self._send_now, message, limiter=self._threads)

    def _send_now(self, message: bytes) -> None:
        try:
            self._notify(message)
        except OSError:
            pass  # ENOENT: the kernel does not know the inode or the name; ENOTCONN and the like: the mount is ending
