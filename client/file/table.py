"""The open files of a client, by inode.

Owns which `FileState` an inode has while at least one handle is open on it, and what concerns a file from outside its handles: news from the metadata
service, truncate by number, the attributes as this client sees them.
"""

from __future__ import annotations

import logging

import trio

from kvfs.client.file.open_file import OpenFile
from kvfs.client.file.state import FileState, Shared
from kvfs.client.user import User
from kvfs.common.errors import InvalidArgument, KvfsError
from kvfs.common.wire import meta_pb2 as pb

log = logging.getLogger("kvfs.client")

FINISH_AGAIN_S = 1.0


class FileTable:
    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._states: dict[int, FileState] = {}
        self._handles: set[OpenFile] = set()
        self._unfinished: list[OpenFile] = []
        self._wake = trio.Event()
        self._finishing = trio.Lock()

    def open(self, inode: pb.Inode, *, session: bytes, read: bool, write: bool, append: bool, user: User) -> OpenFile:
        if inode.type != pb.FILE:
            raise InvalidArgument(f"inode {inode.inode} is not a regular file")
        if write and not session:
            raise InvalidArgument("a file is opened for writing under a session")
        state = self._states.get(inode.inode)
        if state is None:
            state = FileState(self._shared, inode)
            self._states[inode.inode] = state
        else:
            state.adopt(inode)
        state.handles += 1
        state.write_handles += write
        state.write_opens += write
        handle = OpenFile(state, session=session, read=read, write=write, append=append, user=user, on_close=self._closed)
        self._handles.add(handle)
        return handle

    def _closed(self, handle: OpenFile, state: FileState, ended: bool) -> None:
        if not ended:
            self._unfinished.append(handle)
            self._wake.set()
        else:
            self._gone(handle, state)

    async def finish_closes(self) -> None:
        """For ever: end the sessions of handles whose close was cancelled or failed, or their files would stay open for as long as this client lives.
        Until then the file counts as open here too: it has bytes that nobody else knows of."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            await self._finish_all()
            if self._unfinished:
                self._wake.set()
                await self._shared.clock.sleep(FINISH_AGAIN_S)

    async def _finish_all(self) -> None:
        async with self._finishing:
            for handle in list(self._unfinished):
                try:
                    with trio.fail_after(self._shared.config.deadline_s):
                        await handle.finish_close()
                except (KvfsError, trio.TooSlowError) as error:
                    log.warning("the close of inode %d is tried again: %s", handle.inode, error)
                else:
                    self._unfinished.remove(handle)
                    self._gone(handle, self._states[handle.inode])

    def _gone(self, handle: OpenFile, state: FileState) -> None:
        self._handles.discard(handle)
        state.handles -= 1
        if state.handles == 0:
            state.forget_read()
            if self._states.get(state.number) is state:
                del self._states[state.number]

    async def hint_lengths(self) -> None:
        """For ever: tell the lengths of files that are being written."""
        while True:
            await self._shared.clock.sleep(self._shared.config.length_hint_s)
            for handle in list(self._handles):
                try:
                    await handle.hint()
                except KvfsError as error:
                    log.debug("hinting the length of inode %d: %s", handle.inode, error.message)

    def state(self, inode: int) -> FileState | None:
        return self._states.get(inode)

    def view(self, inode: pb.Inode) -> pb.Inode:
        state = self._states.get(inode.inode)
        return inode if state is None else state.view(inode)

    async def truncate(self, inode: int, length: int, *, session: bytes, user: User) -> pb.Inode:
        state = self._states.get(inode)
        if state is not None:
            return await state.truncate(length, session, user)
        return await self._shared.meta.set_attr(inode, user=user, length=length, session=session)

    async def revoke(self, inode: int, flush_limit_s: float) -> None:
        """Cached attributes and data of an inode are no longer true. What is written here and not yet sent goes out first, so that another client's
        change comes after it."""
        state = self._states.get(inode)
        if state is not None:
            state.revoke()
            if state.dirty:
                with trio.move_on_after(flush_limit_s):
                    await state.flush()

    def lose_all(self) -> None:
        for state in self._states.values():
            state.lose_all()

    async def close_all(self) -> None:
        """Close what was left open, with what it still holds. The first error comes out after all have been tried."""
        first: KvfsError | None = None
        for handle in list(self._handles):
            try:
                await handle.close()
            except KvfsError as error:
                first = first or error
        await self._finish_all()
        if first is not None:
            raise first
