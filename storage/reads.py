"""Reads: straight into the caller's memory, inline when small and cached, else in worker threads; or the places of bytes, for callers who may
read the data files themselves; and the question to the tail when a chunk is dirty.

Invariants: only a serving target answers, and only while this node's lease is good; what is answered was committed by the chain when the read began
or later (CRAQ 2.3): a chunk with an update under way or a pending version is read only after the last target of the path told its committed version.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import trio

from kvfs.common.errors import ChunkNotFound, InternalError, InvalidArgument, KvfsError, TargetNotServing, TargetOffline
from kvfs.common.ids import CHUNK_ID_BYTES
from kvfs.common.wire import storage_pb2 as pb
from kvfs.common.wire.lending import Lender
from kvfs.common.wire.server import Call
from kvfs.storage.engine.engine import ChunkEngine
from kvfs.storage.engine.requests import ReadOutcome
from kvfs.storage.host import Host
from kvfs.storage.target import Target
from kvfs.storage.versions import Versions

log = logging.getLogger("kvfs.storage")

SMALL_BYTES = 64 << 10
"""Reads up to this are tried without a thread ..."""
SMALL_TOTAL_BYTES = 256 << 10
"""... but no more than this in one request, so that others get their turn ..."""
SPREAD_BYTES = 1 << 20
"""A worker job reads about this much before a second one is worth its hop."""
SPREAD_MAX = 4
SPREAD_FROM_BYTES = 128 << 10
"""Reads smaller than this on average are one thread's as far as they are in memory: several would wait for the interpreter more than they read."""


class Wanted:
    """One read that could not be answered inline. Without a view, its place is asked for."""

    __slots__ = ("io", "place", "result", "target", "view")

    def __init__(self, place: int, io: pb.ReadIO, target: Target, view: memoryview | None) -> None:
        self.place = place
        self.io = io
        self.target = target
        self.view = view
        self.result: pb.ReadResult | None = None


class Reader:
    def __init__(self, host: Host, versions: Versions) -> None:
        self._host = host
        self._versions = versions

    def target_for(self, target_id: int) -> Target:
        """The target, if it may answer."""
        target = self._host.target(target_id)
        replica = target.replica
        if not replica.serving:
            if not target.opened:
                raise TargetOffline(replica.problem)
            raise TargetNotServing(f"target {target_id} is {replica.public.name.lower()}, {replica.phase.value}: read another replica")
        if not self._host.link.lease_valid():
            raise TargetNotServing(f"node {self._host.link.node_id} has not reached a manager for half a lease: read another replica")
        return target

    def begin(self, request: pb.ReadRequest, call: Call) -> tuple[list[pb.ReadResult | None], list[Wanted]]:
        """Answer what can be answered at once; the rest is wanted."""
        views = call.bulk.sink()
        if len(views) != len(request.reads):
            raise InvalidArgument(f"{len(request.reads)} reads came with {len(views)} spans")
        results: list[pb.ReadResult | None] = []
        wanted: list[Wanted] = []
        large_bytes = self._host.config.inline_read_bytes
        if large_bytes and sum(call.bulk.lengths) <= large_bytes:
            largest, inline_left = large_bytes, large_bytes
        else:
            largest, inline_left = SMALL_BYTES, SMALL_TOTAL_BYTES
        allowed: dict[int, Target] = {}
        for place, (io, view) in enumerate(zip(request.reads, views, strict=True)):
            result: pb.ReadResult | None = None
            try:
                target_id, length = io.target_id, io.length
                target = allowed.get(target_id) or allowed.setdefault(target_id, self.target_for(target_id))
                _check_id(io.chunk_id)
                if length > len(view):
                    raise InvalidArgument(f"a read of {length} bytes came with a span of {len(view)}")
                if length <= largest and inline_left > 0 and io.chunk_id not in target.replica.flights:
                    inline_left -= length
                    result = self._inline(target, io, view)
                if result is None:
                    wanted.append(Wanted(place, io, target, view[:length]))
            except KvfsError as error:
                result = _refused(error)
            results.append(result)
        return results, wanted

    def begin_places(self, request: pb.ReadRequest, files: Lender) -> tuple[list[pb.ReadResult | None], list[Wanted]]:
        """As `begin`, for a reader who fetches the bytes himself: wanted is only what has an update under way."""
        results: list[pb.ReadResult | None] = []
        wanted: list[Wanted] = []
        allowed: dict[int, Target] = {}
        for place, io in enumerate(request.reads):
            result: pb.ReadResult | None = None
            try:
                target_id = io.target_id
                target = allowed.get(target_id) or allowed.setdefault(target_id, self.target_for(target_id))
                chunk_id = io.chunk_id
                _check_id(chunk_id)
                if chunk_id not in target.replica.flights:
                    result = self._place(target, chunk_id, io, files)
                if result is None:
                    wanted.append(Wanted(place, io, target, None))
            except KvfsError as error:
                result = _refused(error)
            results.append(result)
        return results, wanted

    def _place(self, target: Target, chunk_id: bytes, io: pb.ReadIO, files: Lender, *, settled: bool = False) -> pb.ReadResult | None:
        """None: an update may be under way. `settled`: the chain was asked, what is committed here is the truth."""
        try:
            found = target.engine.place(chunk_id, io.offset, io.length)
        except ChunkNotFound as error:
            if not settled and target.engine.get(chunk_id) is not None:
                return None
            raise target.absent(io.chunk_id, error) from None
        except KvfsError as error:
            self._host.note_error(target, error)
            raise
        length, sums, version, chunk_length, pending_version, file, file_offset, stored = found
        if pending_version and not settled:
            return None
        number = files.number(file) if file is not None else 0
        return pb.ReadResult(
            length=length, checksums=sums, version=version, chunk_length=chunk_length, file=number, file_offset=file_offset, stored=stored
        )

    async def finish_places(self, wanted: Sequence[Wanted], files: Lender, deadline: float) -> None:
        """Every wanted place has a result afterwards."""
        await self._settle_dirty(wanted, deadline)
        for want in wanted:
            if want.result is None:
                try:
                    want.result = self._place(want.target, want.io.chunk_id, want.io, files, settled=True)
                except KvfsError as error:
                    want.result = _refused(error)

    def _inline(self, target: Target, io: pb.ReadIO, view: memoryview) -> pb.ReadResult | None:
        try:
            outcome = target.engine.read(io.chunk_id, io.offset, io.length, view[: io.length], nowait=True)
        except ChunkNotFound as error:
            # Perhaps only not committed yet.
            meta = target.engine.get(io.chunk_id)
            if meta is not None:
                return None
            raise target.absent(io.chunk_id, error) from None
        except KvfsError as error:
            self._host.note_error(target, error)
            raise
        if outcome is None or outcome.pending_version:
            return None
        return _placed(outcome)

    async def finish(self, wanted: Sequence[Wanted], deadline: float) -> None:
        """Every wanted read has a result afterwards."""
        await self._settle_dirty(wanted, deadline)
        ready = [want for want in wanted if want.result is None]
        if len(ready) > 1 and sum([want.io.length for want in ready]) < len(ready) * SPREAD_FROM_BYTES:
            await self._read([ready], nowait=True)
            ready = [want for want in ready if want.result is None]
        await self._read(_spread(ready), nowait=False)

    async def _read(self, groups: Sequence[Sequence[Wanted]], *, nowait: bool) -> None:
        """Each group in a thread of its own."""
        jobs = [self._host.workers.submit(lambda group=group: _read_all(group, nowait)) for group in groups]  # type: ignore[misc]
        for job in jobs:
            for want, error in await job.wait():
                self._host.note_error(want.target, error)

    async def _settle_dirty(self, wanted: Sequence[Wanted], deadline: float) -> None:
        """Afterwards what is committed here is the truth about each, or its result is the reason why not."""
        dirty: dict[Target, list[Wanted]] = {}
        for want in wanted:
            if self._versions.whom(want.target, want.io.chunk_id):
                dirty.setdefault(want.target, []).append(want)
        if len(dirty) == 1:
            for target, group in dirty.items():
                await self._settle(target, group, deadline)
        elif dirty:
            async with trio.open_nursery() as nursery:
                for target, group in dirty.items():
                    nursery.start_soon(self._settle, target, group, deadline)

    async def _settle(self, target: Target, group: Sequence[Wanted], deadline: float) -> None:
        try:
            await self._versions.settle(target, [want.io.chunk_id for want in group], deadline)
        except KvfsError as error:
            for want in group:
                want.result = _refused(error)


def _spread(wanted: Sequence[Wanted]) -> list[list[Wanted]]:
    """Groups of about equal bytes, as many as are worth a thread each."""
    total = sum(want.io.length for want in wanted)
    count = max(1, min(SPREAD_MAX, total // SPREAD_BYTES, len(wanted)))
    if not wanted:
        return []
    if count == 1:
        return [list(wanted)]
    groups: list[list[Wanted]] = [[] for _ in range(count)]
    loads = [0] * count
    for want in sorted(wanted, key=lambda one: -one.io.length):
        least = loads.index(min(loads))
        groups[least].append(want)
        loads[least] += want.io.length
    return groups


def _read_all(group: Sequence[Wanted], nowait: bool) -> list[tuple[Wanted, KvfsError]]:
    """In a worker thread. `nowait`: what is not in memory is left without a result. The failures are returned too, for whoever judges disks."""
    failed: list[tuple[Wanted, KvfsError]] = []
    for want in group:
        io = want.io
        engine: ChunkEngine = want.target.engine
        try:
            assert want.view is not None
            outcome = engine.read(io.chunk_id, io.offset, io.length, want.view, nowait=nowait)
            if outcome is not None:
                want.result = _placed(outcome)
        except ChunkNotFound as error:
            want.result = _refused(want.target.absent(io.chunk_id, error))
        except KvfsError as error:
            want.result = _refused(error)
            failed.append((want, error))
        except Exception as error:
            log.exception("reading chunk %s failed in an unforeseen way", io.chunk_id.hex())
            want.result = _refused(InternalError(f"reading chunk {io.chunk_id.hex()}: {error}"))
    return failed


def _check_id(chunk_id: bytes) -> None:
    if len(chunk_id) != CHUNK_ID_BYTES:
        raise InvalidArgument(f"a chunk id has {CHUNK_ID_BYTES} bytes, not {len(chunk_id)}")


def _placed(outcome: ReadOutcome) -> pb.ReadResult:
    return pb.ReadResult(length=outcome.length, checksums=outcome.checksums, version=outcome.version, chunk_length=outcome.chunk_length)


def _refused(error: KvfsError) -> pb.ReadResult:
    return pb.ReadResult(status=error.code)
