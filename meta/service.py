"""The Meta service object: every RPC of meta.proto over the namespace's operations.

Reads answer inline from one snapshot (and wait only if they saw a commit that is not durable yet); changes run as changes.py says. Here is what needs
more than one transaction: opens that truncate, reports whose length only the chains know, sessions that end. Invariant: a read's lease is granted
before anything can change what it read.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias, TypeVar

import trio

from kvfs.common.boundary.clock import Clock
from kvfs.common.boundary.random import Random
from kvfs.common.routing import Routing
from kvfs.common.wire import base_pb2
from kvfs.common.wire import meta_pb2 as pb
from kvfs.common.wire.server import Call
from kvfs.meta.changes import Changes, Kind, Outcome, remembered
from kvfs.meta.gc.chunks import Chunks
from kvfs.meta.gc.collector import Collector
from kvfs.meta.gc.cuts import Cuts
from kvfs.meta.kv.engine import Engine
from kvfs.meta.kv.transaction import Transaction
from kvfs.meta.namespace import attributes, entries, files, fsck, keys, lookup, records, remove, rename, xattrs
from kvfs.meta.namespace.leases import LeaseTable, watch
from kvfs.meta.namespace.open_files import OpenFiles
from kvfs.meta.namespace.step import Step, Surroundings
from kvfs.meta.namespace.store import InodeNumbers, Placement

Q = TypeVar("Q")
Now: TypeAlias = Q | Awaitable[Q]
"""A reply, or one that has to be waited for."""

WATCH_WAIT_S_MAX = 30.0

CREATE = remembered("create", files.create, pb.CreateReply)
OPEN = Kind(files.open_file, pb.InodeReply)
OPEN_TRUNCATED = remembered("open", files.open_file)
CLOSE = Kind(files.close, pb.InodeReply)
APPEND = remembered("append", files.append, pb.AppendReply)
MAKE = remembered("make", entries.make)
LINK = remembered("link", entries.link)
REMOVE = remembered("remove", remove.remove, pb.RemoveReply, grants=False)
RENAME = remembered("rename", rename.rename, pb.RenameReply, grants=False)
SET_ATTR = remembered("set_attr", attributes.set_attr)
SET_XATTR = remembered("set_xattr", xattrs.set_xattr)
REMOVE_XATTR = remembered("remove_xattr", xattrs.remove_xattr)
SET_LAYOUT = remembered("set_layout", attributes.set_layout)


class MetaService:
    def __init__(
        self,
        engine: Engine,
        clock: Clock,
        random: Random,
        chunks: Chunks,
        routing: Callable[[], Routing],
        *,
        attr_lease_ms: int = 1000,
        gc_delay_s: float = 2.0,
        epoch: int = 0,
        engine_name: str = "",
    ) -> None:
        self.engine = engine
        self.clock = clock
        self.chunks = chunks
        self.routing = routing
        self.engine_name = engine_name
        self.numbers = InodeNumbers(engine)
        self.open_files = OpenFiles()
        self.leases = LeaseTable(epoch or clock.wall_ns(), attr_lease_ms)
        placement = Placement(routing, random)
        around = Surroundings(
            new_inode=self.numbers.next,
            place=placement,
            table=placement.table,
            readers=self.open_files.readers,
            closing=self.open_files.closing,
            keep=self.open_files.keep,
            gc_delay_ns=int(gc_delay_s * 1e9),
        )
        self.cuts = Cuts(engine, chunks, routing, clock, random)
        self.changes = Changes(engine, clock, self.leases, self.numbers, around, self.cuts, lambda: self.collector.wake())
        self.collector = Collector(engine, chunks, clock, self.changes.root_step, self.changes.committed)
        self._fsck = fsck.Fsck(engine)

    # --- reads

    def _read(
        self, request: Any, call: Call, operation: Callable[[Step, Any], Q], granted: Callable[[Q], Iterable[pb.Inode]] | None = None
    ) -> Q | Awaitable[Q]:
        """One snapshot. Inline, unless what it saw must become durable first."""
        if request.context.ended:
            self._hear(request.context)
        txn = Transaction(self.engine)
        try:
            step = Step(txn, request.context.user, call.peer.client_id, self.clock.wall_ns(), self.changes.around, True)
            reply = operation(step, request)
            if granted is not None:
                now_s = self.clock.monotonic()
                for inode in granted(reply):
                    self.leases.grant(inode, step.client_id, now_s)
        except BaseException:
            txn.close()
            raise
        if txn.settled:
            txn.close()
            return reply
        return self._when_durable(txn, reply)

    async def _when_durable(self, txn: Transaction, reply: Q) -> Q:
        await txn.commit()
        return reply

    def lookup(self, request: pb.LookupRequest, call: Call) -> Now[pb.LookupReply]:
        return self._read(request, call, lookup.lookup, lambda reply: reply.inodes)

    def get_attr(self, request: pb.GetAttrRequest, call: Call) -> Now[pb.GetAttrReply]:
        return self._read(request, call, lookup.get_attr, lambda reply: reply.inodes)

    def read_dir(self, request: pb.ReadDirRequest, call: Call) -> Now[pb.ReadDirReply]:
        return self._read(request, call, lookup.read_dir, lambda reply: (entry.attributes for entry in reply.entries) if request.attributes else ())

    def get_xattr(self, request: pb.XattrRequest, call: Call) -> Now[pb.XattrReply]:
        return self._read(request, call, xattrs.get_xattr)

    def list_xattr(self, request: pb.XattrRequest, call: Call) -> Now[pb.XattrReply]:
        return self._read(request, call, xattrs.list_xattr)

    # --- changes

    def set_attr(self, request: pb.SetAttrRequest, call: Call) -> Now[pb.InodeReply]:
        if request.HasField("length"):
            return self._set_length(request, call)
        return self._change(SET_ATTR, request, call)

    async def _set_length(self, request: pb.SetAttrRequest, call: Call) -> pb.InodeReply:
        self._hear(request.context)
        async with self.cuts.exclusive(request.inode):
            await self.cuts.carry_out(request.inode)  # what a service that died left undone, or an earlier try of this request
            reply: pb.InodeReply = (await _outcome(self.changes.run(SET_ATTR, request, call)))[0]
            return reply

    def create(self, request: pb.CreateRequest, call: Call) -> Now[pb.CreateReply]:
        return self._open_or_cut(CREATE, request, call)

    def open(self, request: pb.OpenRequest, call: Call) -> Now[pb.InodeReply]:
        if request.truncate:
            return self._open_or_cut(OPEN_TRUNCATED, request, call)
        if request.write:
            return self._open_or_cut(OPEN, request, call)

        def opened(reply: pb.InodeReply) -> Iterable[pb.Inode]:
            # Open from here on, also when the answer has to wait: should the wait fail, the client closes or is pruned.
            self._opened(reply.inode, request, call)
            return (reply.inode,)

        return self._read(request, call, files.open_file, opened)

    def _open_or_cut(self, kind: Kind, request: pb.CreateRequest | pb.OpenRequest, call: Call) -> Now[Any]:
        self._hear(request.context)
        outcome = self.changes.run(kind, request, call)
        if isinstance(outcome, tuple) and not outcome[1].wants_cut and not (outcome[1].recalled and request.truncate):
            self._opened(outcome[0].inode, request, call)
            return outcome[0]
        return self._open_when_cut(outcome, kind, request, call)

    async def _open_when_cut(
        self, outcome: Outcome | Awaitable[Outcome], kind: Kind, request: pb.CreateRequest | pb.OpenRequest, call: Call
    ) -> pb.CreateReply | pb.InodeReply:
        """One that turned out to truncate a file is run again, with no other truncation of that file under way."""
        reply, step = await self._after_cuts(outcome, kind, request, call)
        if step.recalled and request.truncate:
            async with self.cuts.exclusive(reply.inode.inode):
                await self.cuts.carry_out(reply.inode.inode)  # the earlier try of this request may have failed there
        self._opened(reply.inode, request, call)
        answered: pb.CreateReply | pb.InodeReply = reply
        return answered

    async def _after_cuts(self, outcome: Outcome | Awaitable[Outcome], kind: Kind, request: Any, call: Call) -> Outcome:
        """Run an operation again that has to follow a truncation that was left undone (its service died, or a chain did not serve), or makes one."""
        reply, step = await _outcome(outcome)
        while step.wants_cut:
            async with self.cuts.exclusive(step.wants_cut):
                await self.cuts.carry_out(step.wants_cut)
                reply, step = await _outcome(self.changes.run(kind, request, call, cutting=step.wants_cut))
        return reply, step

    def _opened(self, inode: pb.Inode, request: pb.CreateRequest | pb.OpenRequest, call: Call) -> None:
        if request.read and not request.write and request.session and inode.type == pb.FILE:
            self.open_files.open_reader(inode.inode, request.session, call.peer.client_id, self.clock.wall_ns(), nameless=inode.nlink == 0)

    def close(self, request: pb.CloseRequest, call: Call) -> Now[pb.InodeReply]:
        if request.wrote or request.uncertain:
            return self._report(request, call)
        if request.session and not request.still_open:
            self.open_files.close(request.inode, request.session)
        return self._read(request, call, lookup.get_one, _granted_one)

    def end_sessions(self, request: pb.EndSessionsRequest, call: Call) -> base_pb2.Empty:
        self._hear(request.context)
        return base_pb2.Empty()

    def _hear(self, context: pb.Context) -> None:
        """Sessions that were closed with nothing to report: from now on they do not count; what is stored of them is cleared in the background."""
        for ended in context.ended:
            self.open_files.close(ended.inode, ended.session)

    async def _report(self, request: pb.CloseRequest, call: Call) -> pb.InodeReply:
        self._hear(request.context)
        reply, step = await _outcome(self.changes.run(CLOSE, request, call))
        if step.measure:
            async with self.cuts.measured(step.measure) as measured:
                kind = replace(CLOSE, operation=partial(files.close, measured=measured))
                reply, step = await _outcome(self.changes.run(kind, request, call))
        if request.session and not request.still_open:
            self.open_files.forget(request.inode, request.session)
        answered: pb.InodeReply = reply
        return answered

    def append(self, request: pb.AppendRequest, call: Call) -> Now[pb.AppendReply]:
        self._hear(request.context)
        outcome = self.changes.run(APPEND, request, call)
        if isinstance(outcome, tuple) and not outcome[1].wants_cut:
            reply: pb.AppendReply = outcome[0]
            return reply
        return _reply(self._after_cuts(outcome, APPEND, request, call))

    def make(self, request: pb.MakeRequest, call: Call) -> Now[pb.InodeReply]:
        return self._change(MAKE, request, call)

    def link(self, request: pb.LinkRequest, call: Call) -> Now[pb.InodeReply]:
        return self._change(LINK, request, call)

    def remove(self, request: pb.RemoveRequest, call: Call) -> Now[pb.RemoveReply]:
        return self._change(REMOVE, request, call)

    def rename(self, request: pb.RenameRequest, call: Call) -> Now[pb.RenameReply]:
        return self._change(RENAME, request, call)

    def set_xattr(self, request: pb.XattrRequest, call: Call) -> Now[pb.InodeReply]:
        return self._change(SET_XATTR, request, call)

    def remove_xattr(self, request: pb.XattrRequest, call: Call) -> Now[pb.InodeReply]:
        return self._change(REMOVE_XATTR, request, call)

    def set_layout(self, request: pb.SetLayoutRequest, call: Call) -> Now[pb.InodeReply]:
        return self._change(SET_LAYOUT, request, call)

    def _change(self, kind: Kind, request: Any, call: Call) -> Now[Any]:
        if request.context.ended:
            self._hear(request.context)
        outcome = self.changes.run(kind, request, call)
        return outcome[0] if isinstance(outcome, tuple) else _reply(outcome)

    # --- leases

    async def watch(self, request: pb.WatchRequest, call: Call) -> pb.WatchReply:
        wait_s = min(request.wait_ms / 1000, WATCH_WAIT_S_MAX, max(0.0, call.remaining_s() - 0.1))
        return await watch(self.leases, request, call.peer.client_id, self.clock.monotonic, wait_s)

    # --- the whole

    def stat_fs(self, request: pb.StatFsRequest, call: Call) -> pb.StatFsReply:
        self._hear(request.context)
        capacity, free = space(self.routing())
        files_count = max(0, self.changes.files)
        return pb.StatFsReply(capacity_bytes=capacity, free_bytes=free, files=files_count, free_files=(1 << 32) - 1, block_size=4096)

    async def fsck(self, request: pb.FsckRequest, call: Call) -> pb.FsckReply:
        self._hear(request.context)
        return await self._fsck.page(request)

    async def status(self, request: base_pb2.Empty, call: Call) -> pb.MetaStatusReply:
        garbage = await self._count(keys.span(keys.GARBAGE))
        sessions = await self._count(keys.span(keys.SESSION))
        return pb.MetaStatusReply(
            files=max(0, self.changes.files),
            gc_pending=garbage,
            sessions=sessions + self.open_files.count(),
            commits=self.changes.commits,
            conflicts=self.changes.conflicts,
            engine=self.engine_name,
        )

    async def collect_garbage(self, request: base_pb2.Empty, call: Call) -> pb.MetaStatusReply:
        await self.clear_closed()
        await self.collector.collect_all()
        return await self.status(request, call)

    async def _count(self, span: tuple[bytes, bytes]) -> int:
        begin, end = span
        total = 0
        more = True
        while more:
            with Transaction(self.engine) as txn:
                rows, more = txn.snapshot_get_range(begin, end, limit=2000)
            total += len(rows)
            if rows:
                begin = rows[-1][0] + b"\0"
            await trio.lowlevel.checkpoint()
        return total

    async def count_files(self) -> None:
        """How many inodes there are, once after the start; from then on changes are counted along."""
        before = self.changes.files
        self.changes.files = before + await self._count(keys.span(keys.INODE))

    async def clear_closed(self) -> int:
        """Clear sessions whose close had nothing to report; a file that waited for its last one goes on its way."""
        taken = self.open_files.take_closing(500)
        if not taken:
            return 0

        def attempt(txn: Transaction) -> Step:
            step = self.changes.root_step(txn)
            for inode, session in taken:
                files.end_session(step, inode, session)
            return step

        step = await self.engine.transact(attempt)
        for inode, session in taken:
            self.open_files.cleared(inode, session)
        self.changes.committed(step)
        return len(taken)

    async def store_readers(self) -> None:
        """Files that have been open for reading for a while get a stored session, so that they outlive this process."""
        due = self.open_files.due_to_store(self.clock.wall_ns(), 500)
        if not due:
            return

        def attempt(txn: Transaction) -> None:
            for inode, reader in due:
                txn.set(keys.session(inode, reader.session), records.encode_session(records.Session(reader.client_id, False, reader.opened_ns)))

        for _, reader in due:
            self.open_files.mark_stored(reader.session)  # before the commit: a close meanwhile must know that a record may be there
        await self.engine.transact(attempt)


async def _outcome(outcome: Outcome | Awaitable[Outcome]) -> Outcome:
    return outcome if isinstance(outcome, tuple) else await outcome


async def _reply(outcome: Awaitable[Outcome]) -> Any:
    return (await outcome)[0]


def _granted_one(reply: pb.InodeReply) -> Iterable[pb.Inode]:
    return (reply.inode,)


def space(routing: Routing) -> tuple[int, int]:
    """Usable (capacity, free) of the whole: divided by the replication of the default table."""
    capacity, free, _ = routing.space()
    replicas = 1
    for table in routing.tables:
        replicas = max(1, table.replicas)
        break
    return capacity // replicas, free // replicas
