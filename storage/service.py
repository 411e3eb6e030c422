"""The Storage service: what each RPC does, over the reader, the driver of updates and the resync.

One object per process. Handlers check what came from outside, and answer an error per IO where the message has room for one. Invariants: client
writes and reads being worked on are bounded in bytes (forwards are not counted: they were, at the head); a node without a good lease takes no
update of a client.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from itertools import zip_longest

import trio

from kvfs.common.errors import (
    BadRequest,
    ChainVersionMismatch,
    DeadlineExceeded,
    InternalError,
    InvalidArgument,
    KvfsError,
    NoSpace,
    NotPermitted,
    TargetNotServing,
    from_wire,
)
from kvfs.common.ids import CHUNK_ID_BYTES, CLIENT_ID_BYTES, chunk_id, chunk_inode, is_block, is_space
from kvfs.common.transport.region import Span
from kvfs.common.wire import base_pb2 as base
from kvfs.common.wire import storage_pb2 as pb
from kvfs.common.wire.lending import Lender
from kvfs.common.wire.server import Call
from kvfs.storage.budget import Budget
from kvfs.storage.chain.messages import Incoming, Result, TagKey, refusal
from kvfs.storage.engine.requests import UpdateKind
from kvfs.storage.forwards import MAX_CHUNK_BYTES
from kvfs.storage.host import MARGIN_S, Host
from kvfs.storage.reads import Reader, Wanted
from kvfs.storage.retention.calls import RetentionCalls, check_block, note_blocks
from kvfs.storage.retention.evict import BATCH, make_room
from kvfs.storage.returning import ReturnCalls
from kvfs.storage.scrub.scrubber import Scrubber
from kvfs.storage.target import Target
from kvfs.storage.updates import Item, Round
from kvfs.storage.versions import Versions

log = logging.getLogger("kvfs.storage")

PLACES_S = 0.2
"""Places of chunks with an update under way wait no longer for it: who asked uses none for longer than that, and others of the same question wait.
With a dead tail that was until the chain had dropped it: readers of a file of which one chunk was being written stood still for a lease."""
LIST_LIMIT = 4096
REMOVE_LIMIT = 4096
_KINDS = frozenset(int(kind) for kind in UpdateKind)
_NO_BYTES = bytes(8)
_WITH_BYTES = (pb.WRITE, pb.REPLACE, pb.CREATE)


class StorageService:
    def __init__(self, host: Host, scrubber: Scrubber) -> None:
        self._host = host
        self._scrubber = scrubber
        self._versions = Versions(host)
        self._reader = Reader(host, self._versions)
        self._budget = Budget(host.config.in_flight_bytes)
        calls = RetentionCalls(host)
        self.kv_probe, self.kv_touch, self.kv_stats, self.kv_evict = calls.probe, calls.touch, calls.stats, calls.evict
        returning = ReturnCalls(host)
        self.sync_start, self.sync_done = returning.start, returning.done

    # --- reads -----------------------------------------------------------------------------------------------------------------------

    def read(self, request: pb.ReadRequest, call: Call) -> pb.ReadReply | Awaitable[pb.ReadReply]:
        """Inline when everything is small and cached; else the rest in the background."""
        return note_blocks(self._host, request, self._read(request, call))

    def _read(self, request: pb.ReadRequest, call: Call) -> pb.ReadReply | Awaitable[pb.ReadReply]:
        if request.places:
            return self._places(request, call)
        results, wanted = self._reader.begin(request, call)
        if not wanted:
            call.bulk.placed([result.length for result in results if result is not None])
            return pb.ReadReply(results=results)  # type: ignore[arg-type]
        return self._read_rest(results, wanted, call)

    async def _read_rest(self, results: list[pb.ReadResult | None], wanted: list[Wanted], call: Call) -> pb.ReadReply:
        count = sum(want.io.length for want in wanted)
        await self._budget.take(count, call.remaining_s())
        try:
            await self._reader.finish(wanted, call.deadline - MARGIN_S)
        finally:
            self._budget.give(count)
        done = _all_of(results, wanted)
        call.bulk.placed([result.length for result in done])
        return pb.ReadReply(results=done)

    def _places(self, request: pb.ReadRequest, call: Call) -> pb.ReadReply | Awaitable[pb.ReadReply]:
        if call.files is None:
            raise NotPermitted("this service tells no places to this caller: ask for the bytes")
        if call.bulk.count:
            raise InvalidArgument("a read asks either for places or for bytes")
        results, wanted = self._reader.begin_places(request, call.files)
        if not wanted:
            return pb.ReadReply(results=results)  # type: ignore[arg-type]
        deadline = min(call.deadline - MARGIN_S, self._host.clock.monotonic() + PLACES_S)
        return self._places_later(results, wanted, call.files, deadline)

    async def _places_later(self, results: list[pb.ReadResult | None], wanted: list[Wanted], files: Lender, deadline: float) -> pb.ReadReply:
        await self._reader.finish_places(wanted, files, deadline)
        return pb.ReadReply(results=_all_of(results, wanted))

    def version(self, request: pb.VersionRequest, call: Call) -> pb.VersionReply | Awaitable[pb.VersionReply]:
        """Asked of the last serving target: what has it committed?"""
        target = self._host.usable(request.target_id)
        versions = self._versions.committed(target, request.chunk_ids)
        if any(self._versions.whom(target, chunk) for chunk in request.chunk_ids):
            return self._version_later(target, request, call)
        return pb.VersionReply(versions=versions)

    async def _version_later(self, target: Target, request: pb.VersionRequest, call: Call) -> pb.VersionReply:
        return pb.VersionReply(versions=await self._versions.answer(target, request.chunk_ids, call.deadline - MARGIN_S))

    # --- updates ---------------------------------------------------------------------------------------------------------------------

    async def write(self, request: pb.WriteRequest, call: Call) -> pb.WriteReply:
        views = await call.bulk.source()
        from_client = request.from_target == 0
        count = sum(call.bulk.lengths) if from_client else 0
        if from_client:
            self._host.link.check_lease()
            await self._budget.take(count, call.remaining_s())
        try:
            self._learn(request)
            results = await self._update(request.writes, views, call.bulk.spans(), from_client, call.deadline - MARGIN_S)
        finally:
            if from_client:
                self._budget.give(count)
        return pb.WriteReply(results=[_to_wire(result) for result in results])

    def _learn(self, request: pb.WriteRequest) -> None:
        """What a request says of the spaces whose blocks it carries."""
        if not request.spaces:
            return
        spaces = {space.inode: space for space in request.spaces}
        for inode, target_id in {(chunk_inode(io.chunk_id), io.target_id) for io in request.writes}:
            target = self._host.targets.get(target_id)
            if target is not None and inode in spaces and is_space(inode):
                target.retention.learn(spaces[inode])

    async def _update(
        self, writes: Sequence[pb.WriteIO], views: Sequence[memoryview], spans: Sequence[Span], from_client: bool, deadline: float
    ) -> list[Result]:
        results: list[Result | None] = [None] * len(writes)
        rounds: list[dict[tuple[int, bytes], tuple[int, Item]]] = []
        taken = 0
        for place, io in enumerate(writes):
            view, span = None, None
            if io.kind in _WITH_BYTES and io.length:
                if taken >= len(views):
                    raise BadRequest(f"{len(views)} spans came, too few for {len(writes)} writes")
                view, span = views[taken], spans[taken]
                taken += 1
            try:
                item = self._item(io, view, span, from_client)
            except KvfsError as error:
                results[place] = refusal(error, 0)
                continue
            key = (io.target_id, io.chunk_id)
            # Several updates of one chunk in one request keep their order: each goes into a later round.
            where = next((at for at in range(len(rounds) - 1, -1, -1) if key in rounds[at]), -1) + 1 if rounds else 0
            if where == len(rounds):
                rounds.append({})
            rounds[where][key] = (place, item)
        if taken != len(views):
            raise BadRequest(f"{len(views)} spans came, {taken} updates have bytes")
        for members in rounds:
            items = [item for _, item in members.values()]
            await self._know_chains(items)
            await Round(self._host, items, deadline).run()
            if from_client:
                await self._make_room(items, deadline)
            for place, item in members.values():
                results[place] = item.result
        return [result if result is not None else refusal(InternalError, 0) for result in results]

    async def _make_room(self, items: Sequence[Item], deadline: float) -> None:
        """Updates of files that found the chain full are tried again as long as KV-cache blocks make way."""
        while True:
            refused = [item for item in items if item.result is not None and item.result.status == NoSpace.code and not is_block(item.chunk_id)]
            made = [target for target in {item.target for item in refused} if await make_room(self._host, target, deadline)]
            again = [item for item in refused if item.target in made]
            if not again:
                if self._host.clock.monotonic() >= deadline:  # blocks are still going: whoever asks again may find room
                    for item in refused:
                        item.result = refusal(DeadlineExceeded, item.target.replica.version, "room was still being made when its time was over")
                return
            for item in again:
                item.result = None
            await Round(self._host, again, deadline).run()

    def _item(self, io: pb.WriteIO, view: memoryview | None, span: Span | None, from_client: bool) -> Item:
        target = self._host.usable(io.target_id)
        if len(io.chunk_id) != CHUNK_ID_BYTES:
            raise InvalidArgument(f"a chunk id has {CHUNK_ID_BYTES} bytes, not {len(io.chunk_id)}")
        if not is_block(io.chunk_id) and io.chunk_id[8:16] != _NO_BYTES:
            raise InvalidArgument(f"chunk {io.chunk_id.hex()}: a file has no more than 2^64 chunks")
        if view is not None and len(view) != io.length:
            raise BadRequest(f"an update of {io.length} bytes came with {len(view)}")
        if io.kind not in _KINDS:
            raise InvalidArgument(f"unknown kind of update {io.kind}: is the sender newer than this service?")
        if not 0 < io.chunk_size <= MAX_CHUNK_BYTES and io.kind != pb.REMOVE:
            raise InvalidArgument(f"a chunk size of {io.chunk_size}: 1 to {MAX_CHUNK_BYTES}")
        if io.tag.client_id and len(io.tag.client_id) != CLIENT_ID_BYTES:
            raise InvalidArgument(f"a tag's client id has {CLIENT_ID_BYTES} bytes, not {len(io.tag.client_id)}")
        if io.damaged and (from_client or io.kind != pb.REPLACE):
            raise BadRequest("only a replica copies damaged bytes, and whole chunks of them")
        check_block(io, from_client)
        if from_client:
            io.mtime_ns = self._host.clock.wall_ns()
        tag = TagKey(io.tag.client_id, io.tag.channel, io.tag.sequence) if io.tag.client_id else None
        incoming = Incoming(
            chunk_id=io.chunk_id,
            kind=UpdateKind(io.kind),
            chain_version=io.chain_version,
            length=io.length,
            tag=tag,
            from_target=0 if from_client else io.from_target,
            update_version=0 if from_client else io.update_version,
            sequence=io.sequence,
            whole=io.offset == 0 and io.length == io.chunk_size,
            turn=io.turn if from_client else 0,
            roomy=target.take_room(io.length),
        )
        return Item(target, io.chunk_id, incoming, io, view, span)

    async def _know_chains(self, items: Sequence[Item]) -> None:
        """Asks at most once: the answer has all chains."""
        for item in items:
            if item.incoming is not None and item.incoming.chain_version > item.target.replica.version:
                await self._host.know_chain(item.target, item.incoming.chain_version)
                return

    async def remove_range(self, request: pb.RemoveRangeRequest, call: Call) -> pb.RemoveRangeReply:
        """Ordinary REMOVE updates of every chunk in the range, a batch at a time: they pass down the chain as such."""
        self._host.link.check_lease()
        target = self._host.usable(request.target_id)
        most = BATCH if is_space(request.inode) else REMOVE_LIMIT  # a space that is dropped may have millions of blocks, and others read meanwhile
        limit = min(request.limit or most, most)
        first = chunk_id(request.inode, request.first_index)
        end = chunk_id(request.inode, request.end_index) if request.end_index else chunk_id(request.inode, (1 << 128) - 1) + b"\0"
        probe = Incoming(first, UpdateKind.REMOVE, request.chain_version, turn=request.turn)
        if probe.chain_version > target.replica.version:
            await self._host.know_chain(target, probe.chain_version)
        _refuse(target.replica.screen(probe))  # before the list is made: what an earlier turn lists from now on is void
        before = (int.from_bytes(first, "big") - 1).to_bytes(CHUNK_ID_BYTES, "big") if any(first) else b""
        metas, more = await self._host.workers.run(lambda: target.engine.list(after=before, limit=limit, inode=request.inode))
        doomed = [meta for meta in metas if meta.chunk_id < end]
        more = more and len(doomed) == len(metas)
        items = []
        for meta in doomed:
            io = pb.WriteIO(chain_id=target.chain_id, chunk_id=meta.chunk_id, kind=pb.REMOVE, chain_version=request.chain_version, chunk_size=1)
            items.append(Item(target, meta.chunk_id, replace(probe, chunk_id=meta.chunk_id), io))
        if not items:
            _refuse(target.replica.screen(probe))
        await Round(self._host, items, call.deadline - MARGIN_S).run()
        removed = freed = 0
        for item, meta in zip(items, doomed, strict=True):
            if item.result is None or item.result.status:
                if removed:
                    return pb.RemoveRangeReply(removed=removed, more=True, freed_bytes=freed)
                raise _error(item.result or refusal(InternalError, 0))
            removed += 1
            freed += meta.allocated_bytes
        return pb.RemoveRangeReply(removed=removed, more=more, freed_bytes=freed)

    # --- questions -------------------------------------------------------------------------------------------------------------------

    def _serving(self, target_id: int) -> Target:
        target = self._host.usable(target_id)
        if not target.replica.serving or not self._host.link.lease_valid():
            raise TargetNotServing(f"target {target_id} is {target.replica.public.name.lower()}, {target.replica.phase.value}")
        return target

    def last_chunk(self, request: pb.LastChunkRequest, call: Call) -> pb.LastChunkReply:
        if is_space(request.inode):
            raise InvalidArgument(f"inode {request.inode} is a KV-cache space: its blocks have no order")
        last = self._serving(request.target_id).engine.last_chunk(request.inode)
        if last is None:
            return pb.LastChunkReply(found=False)
        return pb.LastChunkReply(found=True, index=last.index, length=last.length, chunks=last.chunks, bytes=last.bytes)

    async def list_chunks(self, request: pb.ListChunksRequest, call: Call) -> pb.ListChunksReply:
        target = self._host.usable(request.target_id)
        limit = min(request.limit or LIST_LIMIT, LIST_LIMIT)
        metas, more = await self._host.workers.run(lambda: target.engine.list(after=request.after, limit=limit, inode=request.inode))
        reply = pb.ListChunksReply(more=more)
        for meta in metas:
            reply.chunks.add(
                chunk_id=meta.chunk_id,
                version=meta.version,
                chain_version=meta.chain_version,
                pending_version=meta.pending.version if meta.pending is not None else 0,
                length=meta.length,
                checksum=meta.checksum_of_list if meta.version else 0,
                allocated=meta.allocated_bytes,
                mtime_ns=meta.mtime_ns,
            )
        return reply

    async def sync(self, request: pb.SyncRequest, call: Call) -> pb.SyncReply:
        if request.chain_versions and len(request.chain_versions) != len(request.target_ids):
            raise BadRequest(f"{len(request.chain_versions)} chain versions for {len(request.target_ids)} targets")
        targets: dict[int, Target] = {}
        for target_id, version in zip_longest(request.target_ids, request.chain_versions, fillvalue=0):
            target = self._host.usable(target_id)
            if version:
                await self._host.know_chain(target, version)
                if target.replica.version > version:
                    raise ChainVersionMismatch(f"target {target_id}: version {version} of its chain was asked for, it is at {target.replica.version}")
            targets[target_id] = target if target.replica.syncing else self._serving(target_id)
        errors: list[KvfsError] = []

        async def one(target: Target) -> None:
            try:
                await target.sync(self._host.workers, removals=request.removals)
            except KvfsError as error:
                self._host.note_error(target, error)
                errors.append(error)

        if len(targets) == 1:
            for target in targets.values():
                await one(target)
        else:
            async with trio.open_nursery() as nursery:
                for target in targets.values():
                    nursery.start_soon(one, target)
        if errors:
            raise errors[0]
        return pb.SyncReply()

    def status(self, request: base.Empty, call: Call) -> pb.StorageStatusReply:
        return pb.StorageStatusReply(targets=[target.status() for _, target in sorted(self._host.targets.items())])

    async def check_target(self, request: pb.CheckTargetRequest, call: Call) -> pb.CheckTargetReply:
        target = self._host.usable(request.target_id)
        report = await self._host.workers.run(lambda: target.engine.check(read_data=request.read_data))
        return pb.CheckTargetReply(chunks=report.chunks, bytes=report.bytes, problems=report.problems)

    def scrub(self, request: pb.ScrubRequest, call: Call) -> pb.ScrubReply:
        return pb.ScrubReply(number=self._scrubber.ask(self._serving(request.target_id), at_once=request.at_once))

    def damage(self, request: pb.DamageRequest, call: Call) -> pb.DamageReply:
        reply = pb.DamageReply()
        target = self._host.target(request.target_id)
        for problem in target.scrub.problems:
            reply.damages.add(problem=problem)
        for chunk, version in target.scrub.damaged().items():
            reply.damages.add(chunk_id=chunk, problem=f"version {version} does not have its checksums here, and no replica had it whole")
        return reply


def _all_of(results: list[pb.ReadResult | None], wanted: Sequence[Wanted]) -> list[pb.ReadResult]:
    """The results with those that came later in their places."""
    for want in wanted:
        results[want.place] = want.result
    done = [result for result in results if result is not None]
    if len(done) != len(results):
        raise InternalError("a read was left without a result")
    return done


def _to_wire(result: Result) -> pb.WriteResult:
    return pb.WriteResult(
        status=result.status,
        version=result.version,
        chain_version=result.chain_version,
        chunk_length=result.length,
        checksum=result.checksum,
        message=result.message,
    )


def _refuse(result: Result | None) -> None:
    if result is not None:
        raise _error(result)


def _error(result: Result) -> KvfsError:
    return from_wire(result.status, result.message)
