"""The returning side of a resync: what a target that is brought up to date is told by its predecessor (`resync.py` is the other side).

Invariants: nothing is taken from who is not the predecessor in this version of the chain; what others have synced is synced here before the target
may serve; pending versions from before are forgotten before the first chunk comes.
"""

from __future__ import annotations

from kvfs.common.errors import BadRequest, KvfsError, from_wire
from kvfs.common.ids import CLIENT_ID_BYTES
from kvfs.common.wire import base_pb2 as base
from kvfs.common.wire import storage_pb2 as pb
from kvfs.common.wire.server import Call
from kvfs.storage.chain.messages import RECORD_BYTES, TagKey, newer
from kvfs.storage.engine.requests import Tag
from kvfs.storage.host import MARGIN_S, Host
from kvfs.storage.target import Target


class ReturnCalls:
    """The service's SyncStart and SyncDone."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def start(self, request: pb.SyncStartRequest, call: Call) -> base.Empty:
        target = self._host.usable(request.target_id)
        await self._host.know_chain(target, request.chain_version)
        result, effects = target.replica.sync_start(request.chain_version, request.from_target)
        if result.status:
            raise from_wire(result.status, result.message)
        assert effects
        self._host.link.report_now()
        await drop_leftovers(self._host, target, call.deadline - MARGIN_S)
        return base.Empty()

    async def done(self, request: pb.SyncDoneRequest, call: Call) -> base.Empty:
        target = self._host.usable(request.target_id)
        refused = target.replica.screen_sync(request.chain_version, request.from_target)
        if refused is not None:  # nothing is taken from who is not the predecessor in this version of the chain
            raise from_wire(refused.status, refused.message)
        tags = []
        for record in request.tags:
            if len(record.tag.client_id) != CLIENT_ID_BYTES or len(record.result) != RECORD_BYTES:
                raise BadRequest(f"a tag record of {len(record.tag.client_id)} and {len(record.result)} bytes: {CLIENT_ID_BYTES} and {RECORD_BYTES}")
            key = TagKey(record.tag.client_id, record.tag.channel, record.tag.sequence)
            known = target.engine.tag(key.client_id, key.channel)
            if known is None or newer(key, known.sequence):
                tags.append(Tag(record.tag.client_id, record.tag.channel, record.tag.sequence, record.result))
        if tags:
            target.engine.commit([], target.replica.version, tags)
        # What was synced on the others must be so here before it may be the last one serving: it may lose power then.
        try:
            await target.sync(self._host.workers)
        except KvfsError as error:
            self._host.note_error(target, error)
            raise
        target.replica.sync_done(request.chain_version, request.from_target)
        self._host.link.report_now()
        return base.Empty()


async def drop_leftovers(host: Host, target: Target, deadline: float) -> None:
    """Forget the pending versions of a target that is about to be brought up to date."""
    for chunk in await host.workers.run(target.pending_chunks):
        ticket = await host.lock([(target.target_id, chunk)], deadline)
        try:
            target.engine.drop_pending([chunk])
        finally:
            host.unlock(ticket)
