"""The Meta service object: every RPC of meta.proto over the namespace's operations.

Reads answer inline from one snapshot (and wait only if they saw a commit that is not durable yet). Changes run as one transaction with retries,
carry out what the transaction noted (cuts, garbage), and are answered when every other holder of a lease on what changed has been told.
Invariants: a lease is granted inside the transaction whose attributes it covers, so no later change can miss it; a change with a request id is
applied once; nothing of a lost attempt reaches anyone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import trio

from kvfs.common.boundary.clock import Clock
from kvfs.common.boundary.random import Random
from kvfs.common.routing import Routing
from kvfs.common.wire import base_pb2, cluster_pb2
from kvfs.common.wire import meta_pb2 as pb
from kvfs.common.wire.server import Call
from kvfs.meta.gc.chunks import Chunks
from kvfs.meta.gc.collector import Collector
from kvfs.meta.gc.cuts import Cuts, measure
from kvfs.meta.kv.engine import Engine
from kvfs.meta.kv.transaction import Transaction
from kvfs.meta.namespace import attributes, entries, files, fsck, idempotency, keys, lookup, records, remove, rename, xattrs
from kvfs.meta.namespace.leases import LeaseTable, settle, watch
from kvfs.meta.namespace.open_files import OpenFiles
from kvfs.meta.namespace.step import Step, Surroundings
from kvfs.meta.namespace.store import InodeNumbers, Placement

P = TypeVar("P")
Q = TypeVar("Q")

WATCH_WAIT_S_MAX = 30.0
ROOT = pb.User()
REMEMBERED = ("create", "append", "make", "link", "remove", "rename", "set_xattr", "remove_xattr", "set_attr", "open", "set_layout")
NUMBERS = {name: number for number, name in enumerate(REMEMBERED)}
"""Operations that leave a request record, as the record names them: append only."""


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
        self.around = Surroundings(
            new_inode=self.numbers.next,
            place=Placement(routing, random),
            readers=self.open_files.readers,
            closing=self.open_files.closing,
            keep=self.open_files.keep,
            gc_delay_ns=int(gc_delay_s * 1e9),
        )
        self.cuts = Cuts(engine, chunks)
        self.collector = Collector(engine, chunks, clock, self.root_step, self.committed)
        self.files = 0
        self.commits = 0
        self.conflicts = 0
        self._open_from_s = 0.0
        self._stamp_ns = 0
        self._fsck = fsck.Fsck(engine)

    def hold_changes(self, seconds: float) -> None:
        """After a start: leases of an earlier run may still be trusted for that long."""
        self._open_from_s = self.clock.monotonic() + seconds

    def root_step(self, txn: Transaction) -> Step:
        return Step(txn, ROOT, b"", self.now_ns(), self.around)

    def now_ns(self) -> int:
        """The time for records: of two changes by this process the later has the greater one, whatever the clock does (caches compare ctimes)."""
        self._stamp_ns = max(self._stamp_ns + 1, self.clock.wall_ns())
        return self._stamp_ns

    def committed(self, step: Step) -> None:
        """After a change of our own: what it made stale is told, and nobody waits for it."""
        self.files += step.files_made - step.files_gone
        if step.garbage:
            self.collector.wake()
        if step.changed:
            self.leases.revoke(step.changed, b"", self.clock.monotonic())

    # --- the two ways to run an operation

    def _read(
        self, request: Any, call: Call, operation: Callable[[Step, Any], Q], granted: Callable[[Q], Iterable[pb.Inode]] | None = None
    ) -> Q | Awaitable[Q]:
        """One snapshot. Inline, unless what it saw must become durable first."""
        if request.context.ended:
            self._end(request.context)
        txn = Transaction(self.engine)
        try:
            step = Step(txn, request.context.user, call.peer.client_id, self.clock.wall_ns(), self.around, True)
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

    async def _change(
        self,
        request: Any,
        call: Call,
        operation: Callable[[Step, Any], Q],
        *,
        remember: str = "",
        reply_class: type[Any] | None = None,
        granted: Callable[[Any], pb.Inode] | None = None,
        cutting: int = 0,
    ) -> tuple[Q, Step]:
        """One transaction, its consequences, and the leases of others."""
        if request.context.ended:
            self._end(request.context)
        if self._open_from_s:
            await self._wait_open()
        client_id = call.peer.client_id
        request_id = request.context.request_id if remember else b""
        tries = 0

        def attempt(txn: Transaction) -> tuple[Q, Step]:
            nonlocal tries
            tries += 1
            step = Step(txn, request.context.user, client_id, self.now_ns(), self.around, cutting=cutting)
            if request_id:
                assert reply_class is not None
                earlier = idempotency.recall(step, request_id, NUMBERS[remember], reply_class)
                if earlier is not None:
                    step.recalled = True
                    return earlier, step
            reply = operation(step, request)
            if step.measure or step.wants_cut:
                return reply, step
            if request_id:
                idempotency.remember(step, request_id, NUMBERS[remember], reply)  # type: ignore[arg-type]
            if granted is not None:
                self.leases.grant(granted(reply), client_id, self.clock.monotonic())
            return reply, step

        if self.numbers.short():
            await self.numbers.ensure()
        try:
            reply, step = await self.engine.transact(attempt)
        finally:
            self.commits += 1
            self.conflicts += tries - 1
        self.files += step.files_made - step.files_gone
        for number in step.cuts:
            await self.cuts.carry_out(number)
        if step.garbage:
            self.collector.wake()
        if step.changed:
            waits = self.leases.revoke(step.changed, client_id, self.clock.monotonic())
            if waits:
                await settle(waits, self.clock.monotonic)
        return reply, step

    async def _wait_open(self) -> None:
        left_s = self._open_from_s - self.clock.monotonic()
        if left_s > 0:
            await self.clock.sleep(left_s)
        self._open_from_s = 0.0

    # --- reads

    def lookup(self, request: pb.LookupRequest, call: Call) -> pb.LookupReply | Awaitable[pb.LookupReply]:
        return self._read(request, call, lookup.lookup, lambda reply: reply.inodes)

    def get_attr(self, request: pb.GetAttrRequest, call: Call) -> pb.GetAttrReply | Awaitable[pb.GetAttrReply]:
        return self._read(request, call, lookup.get_attr, lambda reply: reply.inodes)

    def read_dir(self, request: pb.ReadDirRequest, call: Call) -> pb.ReadDirReply | Awaitable[pb.ReadDirReply]:
        return self._read(request, call, lookup.read_dir, lambda reply: (entry.attributes for entry in reply.entries) if request.attributes else ())

    def get_xattr(self, request: pb.XattrRequest, call: Call) -> pb.XattrReply | Awaitable[pb.XattrReply]:
        return self._read(request, call, xattrs.get_xattr)

    def list_xattr(self, request: pb.XattrRequest, call: Call) -> pb.XattrReply | Awaitable[pb.XattrReply]:
        return self._read(request, call, xattrs.list_xattr)

    # --- changes

    async def set_attr(self, request: pb.SetAttrRequest, call: Call) -> pb.InodeReply:
        if not request.HasField("length"):
            return await self._set_attr(request, call)
        async with self.cuts.exclusive(request.inode):
            await self.cuts.carry_out(request.inode)  # what a service that died left undone, or an earlier try of this request
            return await self._set_attr(request, call)

    async def _set_attr(self, request: pb.SetAttrRequest, call: Call) -> pb.InodeReply:
        reply, _ = await self._change(request, call, attributes.set_attr, remember="set_attr", reply_class=pb.InodeReply, granted=_inode)
        return reply

    async def create(self, request: pb.CreateRequest, call: Call) -> pb.CreateReply:
        reply: pb.CreateReply = await self._open_or_cut(request, call, files.create, "create", pb.CreateReply)
        return reply

    async def _open_or_cut(self, request: Any, call: Call, operation: Callable[[Step, Any], Any], remember: str, reply_class: type[Any]) -> Any:
        """Run an operation that may turn out to truncate a file. Then it is run again, with no other truncation of that file under way."""
        reply, step = await self._after_cuts(
            partial(self._change, request, call, operation, remember=remember, reply_class=reply_class, granted=_inode)
        )
        if step.recalled and request.truncate:
            async with self.cuts.exclusive(reply.inode.inode):
                await self.cuts.carry_out(reply.inode.inode)  # the earlier try of this request may have failed there
        self._opened(reply.inode, request.read, request.write, request.session, call)
        return reply

    async def _after_cuts(self, run: Callable[..., Awaitable[tuple[Q, Step]]]) -> tuple[Q, Step]:
        """Run an operation that may have to follow a truncation that was left undone: its service died, or a chain did not serve."""
        reply, step = await run()
        while step.wants_cut:
            async with self.cuts.exclusive(step.wants_cut):
                await self.cuts.carry_out(step.wants_cut)
                reply, step = await run(cutting=step.wants_cut)
        return reply, step

    def open(self, request: pb.OpenRequest, call: Call) -> pb.InodeReply | Awaitable[pb.InodeReply]:
        if request.write or request.truncate:
            return self._open_to_change(request, call)

        def opened(reply: pb.InodeReply) -> Iterable[pb.Inode]:
            # Open from here on, also when the answer has to wait: should the wait fail, the client closes or is pruned.
            self._opened(reply.inode, request.read, False, request.session, call)
            return (reply.inode,)

        return self._read(request, call, files.open_file, opened)

    async def _open_to_change(self, request: pb.OpenRequest, call: Call) -> pb.InodeReply:
        remember = "open" if request.truncate else ""  # to open twice is harmless
        reply: pb.InodeReply = await self._open_or_cut(request, call, files.open_file, remember, pb.InodeReply)
        return reply

    def _opened(self, inode: pb.Inode, read: bool, write: bool, session: bytes, call: Call) -> None:
        if read and not write and session and inode.type == pb.FILE:
            self.open_files.open_reader(inode.inode, session, call.peer.client_id, self.clock.wall_ns(), nameless=inode.nlink == 0)

    def close(self, request: pb.CloseRequest, call: Call) -> pb.InodeReply | Awaitable[pb.InodeReply]:
        if request.wrote or request.uncertain:
            return self._report(request, call)
        if request.session and not request.still_open:
            self.open_files.close(request.inode, request.session)
        return self._read(request, call, lookup.get_one, _granted_one)

    def end_sessions(self, request: pb.EndSessionsRequest, call: Call) -> base_pb2.Empty:
        self._end(request.context)
        return base_pb2.Empty()

    def _end(self, context: pb.Context) -> None:
        """Sessions that were closed with nothing to report: from now on they do not count; what is stored of them is cleared in the background."""
        for ended in context.ended:
            self.open_files.close(ended.inode, ended.session)

    async def _report(self, request: pb.CloseRequest, call: Call) -> pb.InodeReply:
        reply, step = await self._change(request, call, files.close, granted=_inode)
        if step.measure:
            async with self.cuts.exclusive(step.measure):
                await self.cuts.carry_out(step.measure)  # or what is to be cut off would be measured
            inode = await self.engine.transact(lambda txn: self.root_step(txn).peek(step.measure))
            measured = await measure(self.chunks, inode) if inode is not None else 0
            reply, step = await self._change(request, call, lambda again, asked: files.close(again, asked, measured=measured), granted=_inode)
        if request.session and not request.still_open:
            self.open_files.forget(request.inode, request.session)
        return reply

    async def append(self, request: pb.AppendRequest, call: Call) -> pb.AppendReply:
        run = partial(self._change, request, call, files.append, remember="append", reply_class=pb.AppendReply, granted=_inode)
        reply, _ = await self._after_cuts(run)
        return reply

    async def make(self, request: pb.MakeRequest, call: Call) -> pb.InodeReply:
        reply, _ = await self._change(request, call, entries.make, remember="make", reply_class=pb.InodeReply, granted=_inode)
        return reply

    async def link(self, request: pb.LinkRequest, call: Call) -> pb.InodeReply:
        reply, _ = await self._change(request, call, entries.link, remember="link", reply_class=pb.InodeReply, granted=_inode)
        return reply

    async def remove(self, request: pb.RemoveRequest, call: Call) -> pb.RemoveReply:
        reply, _ = await self._change(request, call, remove.remove, remember="remove", reply_class=pb.RemoveReply)
        return reply

    async def rename(self, request: pb.RenameRequest, call: Call) -> pb.RenameReply:
        reply, _ = await self._change(request, call, rename.rename, remember="rename", reply_class=pb.RenameReply)
        return reply

    async def set_xattr(self, request: pb.XattrRequest, call: Call) -> pb.InodeReply:
        reply, _ = await self._change(request, call, xattrs.set_xattr, remember="set_xattr", reply_class=pb.InodeReply, granted=_inode)
        return reply

    async def remove_xattr(self, request: pb.XattrRequest, call: Call) -> pb.InodeReply:
        reply, _ = await self._change(request, call, xattrs.remove_xattr, remember="remove_xattr", reply_class=pb.InodeReply, granted=_inode)
        return reply

    async def set_layout(self, request: pb.SetLayoutRequest, call: Call) -> pb.InodeReply:
        reply, _ = await self._change(request, call, attributes.set_layout, remember="set_layout", reply_class=pb.InodeReply, granted=_inode)
        return reply

    # --- leases

    async def watch(self, request: pb.WatchRequest, call: Call) -> pb.WatchReply:
        wait_s = min(request.wait_ms / 1000, WATCH_WAIT_S_MAX, max(0.0, call.remaining_s() - 0.1))
        return await watch(self.leases, request, call.peer.client_id, self.clock.monotonic, wait_s)

    # --- the whole

    def stat_fs(self, request: pb.StatFsRequest, call: Call) -> pb.StatFsReply:
        capacity, free = space(self.routing())
        files_count = max(0, self.files)
        return pb.StatFsReply(capacity_bytes=capacity, free_bytes=free, files=files_count, free_files=(1 << 32) - 1, block_size=4096)

    async def fsck(self, request: pb.FsckRequest, call: Call) -> pb.FsckReply:
        return await self._fsck.page(request)

    async def status(self, request: base_pb2.Empty, call: Call) -> pb.MetaStatusReply:
        garbage = await self._count(keys.span(keys.GARBAGE))
        sessions = await self._count(keys.span(keys.SESSION))
        return pb.MetaStatusReply(
            files=max(0, self.files),
            gc_pending=garbage,
            sessions=sessions + self.open_files.count(),
            commits=self.commits,
            conflicts=self.conflicts,
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
        before = self.files
        self.files = before + await self._count(keys.span(keys.INODE))

    async def clear_closed(self) -> int:
        """Clear sessions whose close had nothing to report; a file that waited for its last one goes on its way."""
        taken = self.open_files.take_closing(500)
        if not taken:
            return 0

        def attempt(txn: Transaction) -> Step:
            step = self.root_step(txn)
            for inode, session in taken:
                files.end_session(step, inode, session)
            return step

        step = await self.engine.transact(attempt)
        for inode, session in taken:
            self.open_files.cleared(inode, session)
        self.committed(step)
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


def _inode(reply: Any) -> pb.Inode:
    found: pb.Inode = reply.inode
    return found


def _granted_one(reply: pb.InodeReply) -> Iterable[pb.Inode]:
    return (reply.inode,)


def space(routing: Routing) -> tuple[int, int]:
    """Usable (capacity, free) of the whole: disks counted once, divided by the replication of the default table."""
    disks: dict[tuple[int, int], cluster_pb2.Target] = {}
    for target in routing.targets:
        disks.setdefault((target.node_id, target.disk), target)
    capacity = sum(target.capacity_bytes for target in disks.values())
    free = sum(target.free_bytes for target in disks.values())
    replicas = 1
    for table in routing.tables:
        replicas = max(1, table.replicas)
        break
    return capacity // replicas, free // replicas
