"""An open inode: what all handles of this client on one file share.

Owns the local view of a file: its attributes as last heard, its length with the client's own unreported writes, the buffers of
unacknowledged writes and
of read-ahead. Invariants:
  - a read sees every write that this client finished before it, acknowledged or not;
  - what was read ahead is used only while the attribute lease runs, or after the metadata service has confirmed that `data_version` is the same;
  - the length reported is that of acknowledged bytes, with the truncate version under which they were written: a report never undoes a truncate;
  - truncates and writes of this client exclude each other.
It must never change attributes by itself: those are the metadata service's.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from kvfs.client.config import ClientConfig
from kvfs.client.file.buffers import ChunkBuffer
from kvfs.client.file.dirty import DirtyChunks
from kvfs.client.file.memory import Block, Memory
from kvfs.client.file.places import Places, PlaceTable
from kvfs.client.file.readahead import ReadAhead, Windows
from kvfs.client.file.stretch import Stretch
from kvfs.client.file.unsynced import Unsynced
from kvfs.client.file.writeback import WriteBack
from kvfs.client.meta_client import MetaClient
from kvfs.client.placement import MAX_FILE_BYTES, Placement
from kvfs.client.storage_client import StorageClient
from kvfs.client.storage_writes import WriteDone
from kvfs.client.user import User
from kvfs.common.boundary.clock import Clock
from kvfs.common.errors import FileTooBig, KvfsError, StaleHandle, UnsyncedLost
from kvfs.common.wire import meta_pb2 as pb

LEASE_USE = 0.9
"""Part of a lease that is trusted: clocks need not run equally fast."""
WRITER_REFRESH_S = 1.0


@dataclass(frozen=True, slots=True)
class Shared:
    """What the states of all files of a client use."""

    meta: MetaClient
    storage: StorageClient
    memory: Memory
    ahead: ReadAhead
    places: PlaceTable
    back: WriteBack
    clock: Clock
    config: ClientConfig


@dataclass(slots=True)
class Held:
    """Unacknowledged bytes [start, end) of a file that a read must show; the block is retained."""

    start: int
    end: int
    block: Block
    offset: int


class FileState:
    def __init__(self, shared: Shared, inode: pb.Inode) -> None:
        self.shared = shared
        self.number = inode.inode
        self.placement = Placement.of(inode)
        self.attributes = inode
        self._length = inode.length
        self.handles = 0
        self.write_handles = 0
        """Not closed, nor about to be."""
        self.write_opens = 0
        """How many there have been."""
        self._gone = False
        """Removed, and not kept for us: this client was thought dead, and its sessions were ended."""
        self.windows = Windows(shared.ahead, self.placement)
        self.dirty = DirtyChunks(shared.back, self.placement, shared.clock, self._written, self._stretched)
        self.places = Places(shared.places, self.placement, self.dirty, lambda: self.lease_end)
        self.mtime_ns = 0
        self.unreported_end = 0
        self.unreported = False
        self._acknowledged_end = 0
        self._hinted_end = 0
        self._uncertain = False
        """A write failed that may have been applied."""
        self._serial = 0
        self._tokens = itertools.count(1)
        self.token = 0
        """Changes whenever bytes read earlier may no longer be true, to what it never was. Any thread may look, and touch."""
        self.lease_end = float("-inf")
        """Until when the attributes are trusted. Any thread may look."""
        self._heard = float("-inf")
        self._asking: trio.Event | None = None
        self._asks = self._answered = 0
        """How often attributes were asked for; the last of these that was answered."""
        self._resizing: trio.Event | None = None
        self._writers = 0
        self._writers_gone = trio.Event()
        self._cut_open = False
        """A truncate, ours that failed or another client's, may still wait for its chains."""
        self._cut_among = False
        """Another client cut the file while we wrote: which of our writes came after it, only the chains know."""
        self._writer: tuple[bytes, User] | None = None
        """Session and user of the last write."""
        self.unsynced = Unsynced()
        self.errors = 0
        self.last_error: KvfsError | None = None
        self.adopt(inode)

    @property
    def length(self) -> int:
        """As this client sees it. Any thread may look."""
        return max(self._length, self._stretched_end)

    @property
    def _stretched_end(self) -> int:
        """Where the bytes end that writers' threads have put down and this one has not heard of yet."""
        stretches = self.dirty.stretches
        return max((stretch.end for stretch in stretches if stretch.end > stretch.start), default=0) if stretches else 0

    def touch(self) -> None:
        self.token = next(self._tokens)

    # --- attributes ------------------------------------------------------------------------------------------------------------------

    def adopt(self, inode: pb.Inode, *, own: bool = False, cut: bool = False) -> None:
        """Attributes heard just now. `own`: the answer to a change of our own, which by itself makes nothing stale. `cut`: that was a truncate."""
        now = self.shared.clock.monotonic()
        known = self.attributes
        if inode.type == pb.TYPE_INVALID:
            self._gone = True
            self._heard = now  # what we know of its attributes stays true
            self.lease_end = now + WRITER_REFRESH_S
            return
        if inode.data_version < known.data_version:
            return  # an answer that another has overtaken
        self._heard = now
        self.lease_end = now + LEASE_USE * inode.attr_lease_ms / 1000 if self.shared.config.watch else float("-inf")
        was_cut = inode.truncate_version != known.truncate_version
        if was_cut and not cut:
            self.dirty.stop_stretches()
            self._cut_among = self._cut_among or self.unreported or self._writers > 0
            self._acknowledged_end = self._hinted_end = 0
            self.unreported_end = self.dirty.end
            self._cut_open = True
        if was_cut or (inode.data_version != known.data_version and not (own and inode.data_version == known.data_version + 1)):
            self.forget_read()
        self.attributes = inode
        self._length = max(inode.length, self.unreported_end)

    def revoke(self) -> None:
        """The lease is over: ask before anything cached is used again."""
        self.touch()
        self.lease_end = float("-inf")
        self._heard = float("-inf")
        self.dirty.stop_stretches()

    def lose_all(self) -> None:
        """The metadata service was restarted: nothing cached is known to be true."""
        self.revoke()
        self.forget_read()

    def check_kept(self) -> None:
        """Raise StaleHandle if the file's bytes are not kept for us any more: they would read as zeros, and what is written is lost."""
        if self._gone:
            raise StaleHandle(f"inode {self.number} was removed, and this client thought dead while it had it open: its bytes are gone")

    @property
    def leased(self) -> bool:
        """Whether a lease says that the attributes are true now."""
        return self.shared.clock.monotonic() < self.lease_end and not self._cut_among

    async def fresh(self, user: User) -> None:
        """Return with attributes that are true now (a lease says so, or the metadata service)."""
        if not self.leased:
            await self._ask(user)
        if self._cut_among and self._writer is not None:
            await self.flush()
            await self.report(*self._writer, still_open=True)

    async def fresh_for_writing(self, user: User) -> None:
        """A writer must hear of another client's truncate, but need not ask before each write."""
        now = self.shared.clock.monotonic()
        if now >= self.lease_end and now >= self._heard + WRITER_REFRESH_S:
            await self._ask(user)
        self.check_kept()

    async def _ask(self, user: User) -> None:
        """Attributes no older than this call. Who comes while others ask waits for them, and then one asks for all who have waited: an answer that
        was on its way already may not know of what was changed since."""
        begun = self._asks
        while self._asking is not None:
            await self._asking.wait()
            if self._answered > begun or self.leased:
                return
        self._asks = number = self._asks + 1
        self._asking = trio.Event()
        try:
            opens = self.write_opens if self.write_handles else -1
            [inode] = await self.shared.meta.get_attr([self.number], user=user)
            self.adopt(inode)
            if inode.type == pb.FILE and not inode.nlink and not inode.writers and self.write_handles and opens == self.write_opens:
                self._gone = True  # we are its writer: it is about to be freed
            self._answered = number
        finally:
            self._asking.set()
            self._asking = None

    def view(self, inode: pb.Inode | None = None) -> pb.Inode:
        """Attributes with our unreported writes on top: of `inode` (newer ones, say), or as last heard."""
        base = self.attributes if inode is None else inode
        end = self.written_end
        if (not end and not self.unreported) or base.truncate_version < self.attributes.truncate_version:
            return base
        mtime_ns = max((stretch.mtime_ns for stretch in self.dirty.stretches), default=0)
        shown = pb.Inode()
        shown.CopyFrom(base)
        shown.length = max(base.length, end)
        shown.mtime_ns = max(base.mtime_ns, self.mtime_ns, mtime_ns)
        shown.ctime_ns = max(base.ctime_ns, self.mtime_ns, mtime_ns)
        return shown

    # --- writing ---------------------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def writing(self, offset: int, size: int, session: bytes, user: User) -> AsyncIterator[None]:
        """Around a write of [offset, offset + size): keeps truncates out and waits for those under way, keeps what was read ahead true."""
        end = offset + size
        if end > MAX_FILE_BYTES:
            raise FileTooBig(f"a file ends at {MAX_FILE_BYTES} bytes")
        async with self._no_resizing(session, user):
            self._writer = session, user
            self.windows.drop_range(offset, end)
            self.touch()
            self._serial += 1
            try:
                yield
            except BaseException:
                self._uncertain = True  # some of it may go out all the same
                raise
            self._wrote(end, self.shared.clock.wall_ns())

    async def stretch(self, offset: int, session: bytes, user: User) -> Stretch | None:
        """For a writer's thread that goes on at `offset`; see DirtyChunks.stretch. Heed `fresh_for_writing` first."""
        if offset + self.shared.back.stretch_bytes_max > MAX_FILE_BYTES:
            return None
        async with self._no_resizing(session, user):
            stretch = await self.dirty.stretch(offset, self.touch)
        if stretch is not None:
            self._writer = session, user
            stretch.until = max(self.lease_end, self._heard + WRITER_REFRESH_S)
        return stretch

    @asynccontextmanager
    async def _no_resizing(self, session: bytes, user: User) -> AsyncIterator[None]:
        while self._resizing is not None or self._cut_open:
            if self._resizing is not None:
                await self._resizing.wait()
            else:
                await self._settle(session, user)
        self._writers += 1
        try:
            yield
        finally:
            self._writers -= 1
            if not self._writers:
                self._writers_gone.set()

    def _stretched(self, stretch: Stretch) -> None:
        if stretch.end > stretch.start:
            self._wrote(stretch.end, stretch.mtime_ns)

    def _wrote(self, end: int, now_ns: int) -> None:
        self.touch()
        self._serial += 1
        self.unreported = True
        self.unreported_end = max(self.unreported_end, end)
        self._length = max(self._length, end)
        self.mtime_ns = max(self.mtime_ns, now_ns)

    @property
    def written_end(self) -> int:
        """The highest end of what the metadata service does not know of."""
        return max(self.unreported_end, self._stretched_end)

    def _written(self, buffer: ChunkBuffer, outcome: WriteDone | KvfsError) -> None:
        self.windows.drop_range(buffer.file_start, buffer.file_end)  # fetched while the bytes were on their way
        if isinstance(outcome, KvfsError):
            self.failed(outcome)
        else:
            self.unsynced.note(self.placement.chain(buffer.index), outcome.loss)
            self.acknowledged(buffer.file_end)

    def acknowledged(self, end: int) -> None:
        self._acknowledged_end = max(self._acknowledged_end, end)

    def failed(self, error: KvfsError) -> None:
        """A write was lost, as far as is known."""
        self.errors += 1
        self.last_error = error
        self._uncertain = True
        self.dirty.stop_stretches()  # the next write is to raise it

    async def flush(self) -> None:
        await self.dirty.flush()

    async def sync(self) -> None:
        """What was acknowledged before this call survives power loss after it, or has been lost, of which every handle is told. Flush first."""
        mark = self.unsynced.mark
        chains = list(dict.fromkeys([*self.placement.chains_up_to(self.length), *self.unsynced.chains]))
        if not chains:
            return
        lost = self.unsynced.synced(await self.shared.storage.sync(chains), mark)
        if lost:
            self._acknowledged_end = self._hinted_end = 0  # only the chains know how far the file goes now
            self.forget_read()
            self.failed(
                UnsyncedLost(
                    f"all replicas of chain {', '.join(map(str, lost))} lost power, or their disks, before inode {self.number} was synced: "
                    "write again what was written since its last fsync, then sync it"
                )
            )

    @property
    def must_report(self) -> bool:
        """Whether the metadata service does not know yet all that was written."""
        return self.unreported or self._uncertain or self._cut_among

    async def report(self, session: bytes, user: User, *, still_open: bool) -> None:
        """Tell the metadata service what was written; end the session unless `still_open`. Flush first."""
        serial, cut_among = self._serial, self._cut_among
        if self._uncertain:  # lost bytes do not count
            self.unreported_end = max(self._acknowledged_end, self.dirty.end)
        reply = await self.shared.meta.close(
            self.number,
            session,
            user=user,
            wrote=self.unreported,
            length=0 if cut_among else self.unreported_end,
            truncate_version=self.attributes.truncate_version,
            mtime_ns=self.mtime_ns,
            still_open=still_open,
            uncertain=self._uncertain or cut_among,
        )
        if serial == self._serial and not self._writers and not (cut_among and self.dirty):
            self._uncertain = self._cut_among = False
            self.unreported = False
            self.unreported_end = self._acknowledged_end = self._hinted_end = 0
        self.adopt(reply, own=True)
        if still_open:
            self.check_kept()

    async def hint(self, session: bytes, user: User) -> None:
        """Tell others how far the file is written and acknowledged; what is buffered still waits for its flush."""
        end = self._acknowledged_end
        unsure = self._uncertain or self._cut_among or self._resizing is not None
        if unsure or not self.unreported or end <= max(self._hinted_end, self.attributes.length):
            return
        version = self.attributes.truncate_version
        reply = await self.shared.meta.close(
            self.number, session, user=user, wrote=True, length=end, truncate_version=version, mtime_ns=self.mtime_ns, still_open=True
        )
        self._hinted_end = end
        self.adopt(reply, own=True)

    async def truncate(self, length: int, session: bytes, user: User) -> pb.Inode:
        """Cut or extend, in order with our own writes: those before are told of first (a cut must know what there is to cut)."""
        while self._resizing is not None:
            await self._resizing.wait()
        self._resizing = trio.Event()
        try:
            while self._writers:
                self._writers_gone = trio.Event()
                await self._writers_gone.wait()
            await self.flush()
            if self.must_report:
                await self.report(session, user, still_open=True)
            try:
                reply = await self.shared.meta.set_attr(self.number, user=user, length=length, session=session)
            except BaseException:
                self._cut_open = True
                raise
            self._cut_open = False
            self.forget_read()
            self.adopt(reply, own=True, cut=True)
            return reply
        finally:
            self._resizing.set()
            self._resizing = None

    async def _settle(self, session: bytes, user: User) -> None:
        """No truncate that we have heard of can cut what is written from now on. Raises what keeps one from its chains."""
        reply = await self.shared.meta.append(self.number, session, 0, user=user)
        self._cut_open = False
        self.adopt(reply.inode)

    # --- reading ---------------------------------------------------------------------------------------------------------------------

    async def find_places(self, start: int, stop: int) -> None:
        """Ask where these bytes lie on this machine's disks."""
        await self.places.fetch(start, stop, self.length, lambda: self.token)

    def forget_read(self) -> None:
        """What is read from now on is asked for anew."""
        self.touch()
        self.windows.drop_all()
        self.places.clear()

    def hold_unacknowledged(self, start: int, end: int) -> list[Held]:
        """Our own bytes in [start, end) that the storage may not show yet, in the order in which they were written. `let_go` them."""
        held: list[Held] = []
        if not self.dirty:
            return held
        for buffer in self.dirty.overlapping(start, end):
            buffer.block.retain()
            first, last = max(start, buffer.file_start), min(end, buffer.file_end)
            held.append(Held(first, last, buffer.block, first - buffer.file_start))
        return held


def let_go(held: list[Held]) -> None:
    for part in held:
        part.block.release()
