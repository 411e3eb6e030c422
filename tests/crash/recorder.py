"""A file system in memory that writes down what the kernel asks of it: every write, sync, rename and removal, in order.

A process of its own, mounted over our own loop on /dev/fuse, so that it sees what really leaves a program: also LMDB's writes, which pass no
boundary of ours. Run as `recorder.py MOUNT_POINT LOG`: it prints "up" and serves until it is unmounted. It is told by setxattr on MOUNT_POINT:
`user.mark` puts a mark of the program's own into the log; `user.kill` with a process's id and a number n kills it at the nth change from then on,
when that has been made and before anyone hears of it; `user.end` makes it write the log (a pickle of a list of Events).
"""

from __future__ import annotations

import os
import pickle
import signal
import stat
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import trio

from kvfs.common.errors import AlreadyExists, InvalidArgument, IsDirectory, NotFound, NotPermitted
from kvfs.fuse import session
from kvfs.fuse.loop import Loop
from kvfs.fuse.model import Attributes, Caller, Changes, Opened, Statistics
from kvfs.fuse.protocol import HEADER_BYTES, Op
from kvfs.fuse.requests import EMPTY, Body, Request, Requests

ROOT = 1
MARK = b"user.mark"
KILL = b"user.kill"
END = b"user.end"
_FALLOCATE_IN = struct.Struct("=QQQII")  # handle, offset, length, mode, padding
_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02


class Event(NamedTuple):
    """`inode` is the file, or the directory whose names change. By kind:

    write: offset, data. truncate, grow: offset is the new size. zero: `size` bytes from offset (a hole that was punched). sync: the file.
    sync_range: `size` bytes from offset of it. create, mkdir: data is the name, target the inode that got it. unlink, rmdir: data is the name.
    rename: data is the old name, to_name the new one in directory `target`. syncdir. mark: data is what the program said.
    """

    kind: str
    inode: int = 0
    offset: int = 0
    data: bytes = b""
    size: int = 0
    target: int = 0
    to_name: bytes = b""


@dataclass
class _Node:
    inode: int
    mode: int
    data: bytearray = field(default_factory=bytearray)
    names: dict[bytes, int] = field(default_factory=dict)


@dataclass
class _Handle:
    node: _Node
    synced: bool
    """Opened with O_DSYNC: the kernel follows each write with a sync that need not cover more than that write."""
    written: tuple[int, int] = (0, 0)


class Recorder:
    """What `Requests` calls. Nothing here waits, so that the log's order is the order of the effects."""

    def __init__(self, log_path: str) -> None:
        self.log: list[Event] = []
        self._log_path = log_path
        self._nodes = {ROOT: _Node(ROOT, stat.S_IFDIR | 0o755)}
        self._handles: dict[int, _Handle] = {}
        self._next = ROOT + 1
        self._victim = 0
        self._left = 0
        self._uncounted: set[int] = set()
        """LMDB's lock files: the kernel writes them when it likes, for they are mapped into memory."""

    def _note(self, kind: str, inode: int = 0, **more: Any) -> None:
        self.log.append(Event(kind, inode, **more))
        if kind == "create" and more["data"] == b"lock.mdb":
            self._uncounted.add(more["target"])
        if self._left and kind != "mark" and inode not in self._uncounted:
            self._left -= 1
            if not self._left:
                os.kill(self._victim, signal.SIGKILL)

    def _shown(self, node: _Node) -> Attributes:
        return Attributes(node.inode, node.mode, 1, os.getuid(), os.getgid(), 0, len(node.data), -(-len(node.data) // 512), 4096, 0, 0, 0, 1.0, 1.0)

    def _child(self, parent: int, name: bytes) -> _Node:
        inode = self._nodes[parent].names.get(name)
        if inode is None:
            raise NotFound(os.fsdecode(name))
        return self._nodes[inode]

    # --- what the kernel asks at once ---

    def kept_entry(self, parent: int, name: bytes) -> None:
        return None

    def known_absent(self, parent: int, name: bytes) -> float:
        return -1.0

    def kept_attributes(self, inode: int) -> None:
        return None

    def forget(self, pairs: object) -> None:
        """Inodes stay: nothing here is large."""

    # --- names ---

    async def lookup(self, parent: int, name: bytes, caller: Caller) -> Attributes:
        return self._shown(self._child(parent, name))

    def _make(self, parent: int, name: bytes, mode: int, kind: str) -> _Node:
        names = self._nodes[parent].names
        if name in names:
            raise AlreadyExists(os.fsdecode(name))
        node = self._nodes[self._next] = _Node(self._next, mode)
        self._next += 1
        names[name] = node.inode
        if not stat.S_ISSOCK(mode):  # nothing of a socket is on a disk but its name, which nobody expects to find again
            self._note(kind, parent, data=name, target=node.inode)
        return node

    async def mknod(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Attributes:
        return self._shown(self._make(parent, name, mode, "create"))

    async def mkdir(self, parent: int, name: bytes, mode: int, caller: Caller) -> Attributes:
        return self._shown(self._make(parent, name, stat.S_IFDIR | mode & 0o7777, "mkdir"))

    async def create(self, parent: int, name: bytes, mode: int, flags: int, caller: Caller) -> tuple[Opened, Attributes]:
        node = self._make(parent, name, stat.S_IFREG | mode & 0o7777, "create")
        return self._opened(node, flags), self._shown(node)

    async def unlink(self, parent: int, name: bytes, caller: Caller) -> None:
        node = self._child(parent, name)
        del self._nodes[parent].names[name]
        if not stat.S_ISSOCK(node.mode):
            self._note("unlink", parent, data=name)

    async def rmdir(self, parent: int, name: bytes, caller: Caller) -> None:
        await self.unlink(parent, name, caller)

    async def rename(self, old_parent: int, old: bytes, new_parent: int, new: bytes, flags: int, caller: Caller) -> None:
        if flags:
            raise InvalidArgument("a rename with flags")
        node = self._child(old_parent, old)
        del self._nodes[old_parent].names[old]
        self._nodes[new_parent].names[new] = node.inode
        self._note("rename", old_parent, data=old, target=new_parent, to_name=new)

    # --- attributes ---

    async def getattr(self, inode: int, caller: Caller) -> Attributes:
        return self._shown(self._nodes[inode])

    async def setattr(self, inode: int, changes: Changes, handle: int | None, caller: Caller) -> Attributes:
        node = self._nodes[inode]
        if changes.mode is not None:
            node.mode = stat.S_IFMT(node.mode) | changes.mode
        if changes.length is not None:
            self._resize(node, changes.length)
        return self._shown(node)

    def _resize(self, node: _Node, length: int) -> None:
        del node.data[length:]
        node.data.extend(bytes(length - len(node.data)))
        self._note("truncate", node.inode, offset=length)

    async def access(self, inode: int, mask: int, caller: Caller) -> bool:
        return True

    async def statfs(self, caller: Caller) -> Statistics:
        return Statistics(4096, 1 << 24, 1 << 24, 1 << 20, 1 << 20)

    async def setxattr(self, inode: int, name: bytes, value: bytes, caller: Caller, *, flags: int) -> None:
        if name == MARK:
            self._note("mark", data=value)
        elif name == KILL:
            self._victim, self._left = map(int, value.split())
        elif name == END:
            with open(self._log_path, "wb") as file:
                pickle.dump([tuple(event) for event in self.log], file, protocol=5)
        else:
            raise NotPermitted("this file system keeps no attributes")

    # --- files ---

    def _opened(self, node: _Node, flags: int) -> Opened:
        if flags & os.O_TRUNC and node.data:
            self._resize(node, 0)
        self._next += 1
        self._handles[self._next] = _Handle(node, bool(flags & os.O_DSYNC))
        return Opened(self._next, keep_cache=True, direct_io=False, flush=False)

    async def open(self, inode: int, flags: int, caller: Caller) -> Opened:
        node = self._nodes[inode]
        if stat.S_ISDIR(node.mode):
            raise IsDirectory("a directory")
        return self._opened(node, flags)

    async def read(self, handle: int, offset: int, size: int) -> bytes:
        return bytes(self._handles[handle].node.data[offset : offset + size])

    async def write(self, handle: int, offset: int, data: memoryview) -> int:
        opened = self._handles[handle]
        content, end = opened.node.data, offset + len(data)
        if len(content) < end:
            content.extend(bytes(end - len(content)))
        content[offset:end] = data
        opened.written = (offset, len(data))
        self._note("write", opened.node.inode, offset=offset, data=bytes(data))
        return len(data)

    async def fallocate(self, handle: int, offset: int, length: int, mode: int) -> None:
        node = self._handles[handle].node
        end = offset + length
        if mode & _PUNCH_HOLE:
            end = min(end, len(node.data))
            if end > offset:
                node.data[offset:end] = bytes(end - offset)
                self._note("zero", node.inode, offset=offset, size=end - offset)
        elif not mode & _KEEP_SIZE and end > len(node.data):
            node.data.extend(bytes(end - len(node.data)))
            self._note("grow", node.inode, offset=end)

    async def flush(self, handle: int) -> None:
        """Nothing to do."""

    async def fsync(self, handle: int, datasync: bool) -> None:
        opened = self._handles[handle]
        if opened.synced:
            offset, size = opened.written
            self._note("sync_range", opened.node.inode, offset=offset, size=size)
        else:
            self._note("sync", opened.node.inode)

    async def release(self, handle: int) -> None:
        self._handles.pop(handle, None)

    # --- directories ---

    async def opendir(self, inode: int, caller: Caller) -> int:
        self._next += 1
        self._handles[self._next] = _Handle(self._nodes[inode], False)
        return self._next

    async def readdir(self, handle: int, position: int, emit: Callable[..., bool], *, attributes: bool) -> None:
        names = sorted(self._handles[handle].node.names.items())
        for place, (name, inode) in enumerate(names[position:], position + 1):
            if not emit(name, inode, self._nodes[inode].mode, None, place):
                return

    async def releasedir(self, handle: int) -> None:
        self._handles.pop(handle, None)

    async def fsyncdir(self, handle: int, datasync: bool) -> None:
        self._note("syncdir", self._handles[handle].node.inode)


class RecorderRequests(Requests):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__(recorder)  # type: ignore[arg-type]
        self._recorder = recorder
        for op in (Op.GETXATTR, Op.LISTXATTR, Op.REMOVEXATTR, Op.SYMLINK, Op.READLINK, Op.LINK):
            del self.waiting[op]
        self.waiting[Op.FALLOCATE] = self._fallocate

    async def _fallocate(self, request: Request) -> Body:
        handle, offset, length, mode, _ = _FALLOCATE_IN.unpack_from(request.data, HEADER_BYTES)
        await self._recorder.fallocate(handle, offset, length, mode)
        return EMPTY


async def main(mount_point: str, log_path: str) -> None:
    connection = session.start(mount_point, source="crash-recorder", allow_other=False, read_only=False)
    try:
        await connection.shake_hands(12)
        recorder = Recorder(log_path)
        loop = Loop(connection.fd, RecorderRequests(recorder), buffer_bytes=session.READ_BUFFER_BYTES, deadline_s=60, tasks_max=8)
        print("up", flush=True)
        await loop.run()
    finally:
        connection.close()


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
