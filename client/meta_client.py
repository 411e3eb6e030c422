"""The metadata service, one method per call, by inode number.

Owns the request ids: a change keeps its own over all retries, so that it happens once. Failures of the connection or of the service are retried with
backoff until the deadline; what the file system itself answers (NotFound, AccessDenied, ...) comes out at once.
Replies are the protobuf messages of meta.proto. It caches nothing. Requests carry along which sessions have ended (endings.py); the attributes of
files come with what is left of their lease (leases.py).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Sequence
from typing import Any, Protocol

from kvfs.client.endings import Endings
from kvfs.client.leases import Leases
from kvfs.client.user import User
from kvfs.common.boundary.clock import Clock
from kvfs.common.boundary.random import Random
from kvfs.common.errors import KvfsError, MalformedFrame
from kvfs.common.wire import base_pb2
from kvfs.common.wire import meta_pb2 as pb

log = logging.getLogger("kvfs.client")


class MetaCaller(Protocol):
    """One request to the metadata service, with retries: `caller.RetryingCaller`."""

    async def __call__(self, name: str, request: Any, /, *, deadline_s: float | None = None) -> Any: ...


class MetaClient:
    """Every call takes `user`: who asks. `user=None` is the client's own user."""

    def __init__(self, call: MetaCaller, clock: Clock, random: Random, user: User) -> None:
        self._call = call
        self._random = random
        self.user = user
        self._endings = Endings()
        self.leases = Leases(clock)

    def _send(self, name: str, request: Any) -> Awaitable[Any]:
        """One request, and with it the ends of sessions that wait to be told."""
        return self._send_with_ends(name, request) if self._endings else self._call(name, request)

    async def _send_with_ends(self, name: str, request: Any) -> Any:
        taken = self._endings.take(request.context)
        try:
            return await self._call(name, request)
        except BaseException:
            self._endings.again(taken)
            raise

    def _read(self, user: User | None) -> pb.Context:
        return pb.Context(user=(user or self.user).wire)

    def _change(self, user: User | None) -> pb.Context:
        return pb.Context(user=(user or self.user).wire, request_id=self._random.bytes(16))

    async def lookup(
        self, parent: int, names: Sequence[bytes], *, user: User | None = None, follow: bool = False, follow_last: bool = False
    ) -> pb.LookupReply:
        """Walk `names` from `parent` in one call. Fewer inodes than names in the reply: the next component does not exist."""
        request = pb.LookupRequest(context=self._read(user), parent=parent, names=names, follow=follow, follow_last=follow_last)
        reply: pb.LookupReply = await self._send("Lookup", request)
        return reply

    async def get_attr(self, inodes: Sequence[int], *, user: User | None = None) -> list[pb.Inode]:
        """Attributes, in order; an inode that is gone has type TYPE_INVALID."""
        asked = self.leases.asked()
        reply: pb.GetAttrReply = await self._send("GetAttr", pb.GetAttrRequest(context=self._read(user), inodes=inodes))
        if len(reply.inodes) != len(inodes):
            raise MalformedFrame(f"the metadata service told of {len(reply.inodes)} inodes, {len(inodes)} were asked for")
        return [self.leases.heard(inode, asked) for inode in reply.inodes]

    async def set_attr(
        self,
        inode: int,
        *,
        user: User | None = None,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
        ctime_ns: int | None = None,
        atime_now: bool = False,
        mtime_now: bool = False,
        length: int | None = None,
        session: bytes = b"",
    ) -> pb.Inode:
        """Change what is given. `length` truncates or extends: use AsyncClient.truncate, which also flushes and drops what this client holds."""
        request = pb.SetAttrRequest(
            context=self._change(user),
            inode=inode,
            mode=mode,
            uid=uid,
            gid=gid,
            atime_ns=atime_ns,
            mtime_ns=mtime_ns,
            ctime_ns=ctime_ns,
            atime_now=atime_now,
            mtime_now=mtime_now,
            length=length,
            session=session,
        )
        asked = self.leases.asked()
        reply: pb.InodeReply = await self._send("SetAttr", request)
        return self.leases.heard(reply.inode, asked)

    async def create(
        self,
        parent: int,
        name: bytes,
        mode: int,
        *,
        user: User | None = None,
        session: bytes = b"",
        read: bool = False,
        write: bool = False,
        exclusive: bool = False,
        truncate: bool = False,
        layout: pb.Layout | None = None,
        path: Sequence[bytes] = (),
        follow_last: bool = False,
    ) -> pb.CreateReply:
        """Create and open (or only open, unless `exclusive`) a regular file. `session`: 16 random bytes that name the open file.
        `path`, with an empty name: walked from `parent` in the same step, symbolic links followed, and the file is what it leads to."""
        request = pb.CreateRequest(
            context=self._change(user),
            parent=parent,
            name=name,
            mode=mode,
            exclusive=exclusive,
            truncate=truncate,
            read=read,
            write=write,
            session=session,
            layout=layout,
            path=path,
            follow_last=follow_last,
        )
        asked = self.leases.asked()
        reply: pb.CreateReply = await self._send("Create", request)
        self.leases.heard(reply.inode, asked)
        return reply

    async def open(
        self,
        inode: int,
        *,
        user: User | None = None,
        session: bytes = b"",
        read: bool = True,
        write: bool = False,
        truncate: bool = False,
        path: Sequence[bytes] = (),
        follow_last: bool = False,
    ) -> pb.Inode:
        """Check permissions, note the session (a reader's too: it keeps the content of a removed file), and give attributes true at this moment.
        `path`: walked from `inode`, a directory, in the same step."""
        context = self._change(user) if truncate else self._read(user)
        request = pb.OpenRequest(context=context, inode=inode, read=read, write=write, truncate=truncate, session=session)
        if path:
            request.path.extend(path)
            request.follow_last = follow_last
        asked = self.leases.asked()
        reply: pb.InodeReply = await self._send("Open", request)
        return self.leases.heard(reply.inode, asked)

    async def close(
        self,
        inode: int,
        session: bytes,
        *,
        user: User | None = None,
        wrote: bool = False,
        length: int = 0,
        truncate_version: int = 0,
        mtime_ns: int = 0,
        still_open: bool = False,
        uncertain: bool = False,
    ) -> pb.Inode:
        """Report what was written through the session; end it unless `still_open`. `uncertain`: a failed write may have been applied.
        With nothing to report, `end_session` does it without a wait."""
        request = pb.CloseRequest(
            context=self._change(user),
            inode=inode,
            session=session,
            wrote=wrote,
            length=length,
            truncate_version=truncate_version,
            mtime_ns=mtime_ns,
            still_open=still_open,
            uncertain=uncertain,
        )
        asked = self.leases.asked()
        reply: pb.InodeReply = await self._send("Close", request)
        return self.leases.heard(reply.inode, asked)

    def end_session(self, inode: int, session: bytes) -> None:
        """The file was closed and there is nothing to report: the service hears of it with the next request, or soon."""
        self._endings.add(inode, session)

    async def tell_ends(self, *, deadline_s: float | None = None) -> None:
        """Tell the ends that wait now. Afterwards the service knows all that was ended before."""
        while self._endings:
            request = pb.EndSessionsRequest(context=pb.Context())
            taken = self._endings.take(request.context)
            try:
                await self._call("EndSessions", request, deadline_s=deadline_s)
            except BaseException:
                self._endings.again(taken)
                raise

    async def keep_telling_ends(self, delay_s: float) -> None:
        """For ever: tell ends that no other request has taken along for `delay_s`."""
        while True:
            await self._endings.due(delay_s)
            try:
                await self.tell_ends()
            except KvfsError as error:
                log.debug("the ends of closed files wait: %s", error.message)

    async def append(self, inode: int, session: bytes, length: int, *, user: User | None = None) -> pb.AppendReply:
        """Reserve `length` bytes at the end of the file: [reply.offset, reply.offset + length) is the caller's alone."""
        asked = self.leases.asked()
        reply: pb.AppendReply = await self._send("Append", pb.AppendRequest(context=self._change(user), inode=inode, session=session, length=length))
        self.leases.heard(reply.inode, asked)
        return reply

    async def make(
        self,
        parent: int,
        name: bytes,
        type: pb.InodeType,
        mode: int,
        *,
        user: User | None = None,
        rdev: int = 0,
        symlink: bytes = b"",
        layout: pb.Layout | None = None,
        space: pb.Space | None = None,
    ) -> pb.Inode:
        """mkdir (with `space`: of a KV-cache space), symlink and mknod (also of an empty regular file)."""
        request = pb.MakeRequest(
            context=self._change(user), parent=parent, name=name, type=type, mode=mode, rdev=rdev, symlink=symlink, layout=layout, space=space
        )
        reply: pb.InodeReply = await self._send("Make", request)
        return reply.inode

    async def link(self, inode: int, parent: int, name: bytes, *, user: User | None = None) -> pb.Inode:
        reply: pb.InodeReply = await self._send("Link", pb.LinkRequest(context=self._change(user), inode=inode, parent=parent, name=name))
        return reply.inode

    async def remove(
        self, parent: int, name: bytes, *, user: User | None = None, directory: bool = False, recursive: bool = False, path: Sequence[bytes] = ()
    ) -> pb.Inode:
        """unlink, rmdir (`directory`), or the whole tree (`recursive`). Gives the inode as it is after, with its new nlink.
        `path`: walked from `parent` in the same step, to the directory that holds the name."""
        request = pb.RemoveRequest(context=self._change(user), parent=parent, name=name, directory=directory, recursive=recursive, path=path)
        reply: pb.RemoveReply = await self._send("Remove", request)
        return reply.inode

    async def rename(
        self,
        parent: int,
        name: bytes,
        new_parent: int,
        new_name: bytes,
        *,
        user: User | None = None,
        no_replace: bool = False,
        exchange: bool = False,
    ) -> pb.RenameReply:
        request = pb.RenameRequest(
            context=self._change(user),
            parent=parent,
            name=name,
            new_parent=new_parent,
            new_name=new_name,
            no_replace=no_replace,
            exchange=exchange,
        )
        reply: pb.RenameReply = await self._send("Rename", request)
        return reply

    async def read_dir(
        self, inode: int, *, user: User | None = None, after: bytes = b"", limit: int = 0, attributes: bool = False
    ) -> pb.ReadDirReply:
        """One page of entries behind `after`, in the byte order of names."""
        request = pb.ReadDirRequest(context=self._read(user), inode=inode, after=after, limit=limit, attributes=attributes)
        reply: pb.ReadDirReply = await self._send("ReadDir", request)
        return reply

    async def set_xattr(
        self, inode: int, name: bytes, value: bytes, *, user: User | None = None, create: bool = False, replace: bool = False
    ) -> pb.Inode:
        request = pb.XattrRequest(context=self._change(user), inode=inode, name=name, value=value, create=create, replace=replace)
        reply: pb.InodeReply = await self._send("SetXattr", request)
        return reply.inode

    async def get_xattr(self, inode: int, name: bytes, *, user: User | None = None) -> bytes:
        reply: pb.XattrReply = await self._send("GetXattr", pb.XattrRequest(context=self._read(user), inode=inode, name=name))
        return reply.value

    async def list_xattr(self, inode: int, *, user: User | None = None) -> list[bytes]:
        reply: pb.XattrReply = await self._send("ListXattr", pb.XattrRequest(context=self._read(user), inode=inode))
        return list(reply.names)

    async def remove_xattr(self, inode: int, name: bytes, *, user: User | None = None) -> pb.Inode:
        reply: pb.InodeReply = await self._send("RemoveXattr", pb.XattrRequest(context=self._change(user), inode=inode, name=name))
        return reply.inode

    async def stat_fs(self, *, user: User | None = None) -> pb.StatFsReply:
        reply: pb.StatFsReply = await self._send("StatFs", pb.StatFsRequest(context=self._read(user)))
        return reply

    async def set_layout(self, inode: int, layout: pb.Layout, *, user: User | None = None) -> pb.Inode:
        """A directory's layout for new files."""
        reply: pb.InodeReply = await self._send("SetLayout", pb.SetLayoutRequest(context=self._change(user), inode=inode, layout=layout))
        return reply.inode

    async def watch(self, *, acknowledged: int, epoch: int, wait_ms: int, user: User | None = None) -> pb.WatchReply:
        """Long poll for revoked leases; `watch.Watcher` is its one caller."""
        request = pb.WatchRequest(context=self._read(user), acknowledged=acknowledged, wait_ms=wait_ms, epoch=epoch)
        reply: pb.WatchReply = await self._call("Watch", request, deadline_s=wait_ms / 1000 + 10)
        return reply

    async def fsck(self, *, cursor: bytes = b"", limit: int = 0, user: User | None = None) -> pb.FsckReply:
        """One page of all inodes with what is wrong in the metadata itself."""
        reply: pb.FsckReply = await self._send("Fsck", pb.FsckRequest(context=self._read(user), cursor=cursor, limit=limit))
        return reply

    async def status(self) -> pb.MetaStatusReply:
        await self.tell_ends()
        reply: pb.MetaStatusReply = await self._call("Status", base_pb2.Empty())
        return reply

    async def collect_garbage(self) -> pb.MetaStatusReply:
        """Run the queue of deleted files to its end now."""
        await self.tell_ends()
        reply: pb.MetaStatusReply = await self._call("CollectGarbage", base_pb2.Empty())
        return reply
