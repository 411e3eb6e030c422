"""Is what is committed here what the chain has committed? The question before a read of a chunk with an update under way (CRAQ 2.3).

Only the core says whom to ask (Replica.ask_whom). This module asks: the last serving target for its committed versions, or nobody, after the update
that is under way has ended. When `settle` returns, what is committed here is at least what anyone could have read before it was called.
Every wait is bounded by the caller's deadline. It must never make a reader see a version that the tail did not tell.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import trio

from kvfs.common.errors import ChainError, ChainVersionMismatch, KvfsError, TargetNotServing
from kvfs.common.wire import storage_pb2 as pb
from kvfs.common.wire.service import method
from kvfs.storage.chain.replica import BEHIND
from kvfs.storage.host import Host
from kvfs.storage.target import Target
from kvfs.storage.updates import Item, Round

log = logging.getLogger("kvfs.storage")

VERSION = method("Storage", "Version")
RETRY_S = 0.01


class Versions:
    def __init__(self, host: Host) -> None:
        self._host = host

    def whom(self, target: Target, chunk_id: bytes) -> int:
        """0: what is committed here is the truth; BEHIND; or a target."""
        return target.replica.ask_whom(chunk_id, target.stored(chunk_id, None))

    async def settle(self, target: Target, chunk_ids: Sequence[bytes], deadline: float) -> None:
        """Make what is committed here the truth about these chunks. Raises a ChainError when it cannot be found out."""
        while True:
            if not target.replica.serving:
                raise TargetNotServing(f"target {target.target_id} left its chain: read another replica")
            behind = []
            asked: dict[int, list[bytes]] = {}
            for chunk_id in chunk_ids:
                whom = self.whom(target, chunk_id)
                if whom == BEHIND:
                    behind.append(chunk_id)
                elif whom:
                    asked.setdefault(whom, []).append(chunk_id)
            for chunk_id in behind:
                await self._behind(target, chunk_id, deadline)
            try:
                for tail, group in asked.items():
                    for chunk_id, version in zip(group, await self._ask(target, tail, group, deadline), strict=True):
                        await self._catch_up(target, chunk_id, version, deadline)
                return
            except KvfsError as error:
                # The tail died or the chain changed: the next look finds another tail, or that this target is it.
                if self._host.clock.monotonic() + RETRY_S >= deadline:
                    raise error if isinstance(error, ChainError) else TargetNotServing(f"the tail does not answer: {error.message}") from None
                log.debug("asking for versions: %s", error.message)
            with trio.move_on_after(RETRY_S):
                await target.moved.wait()

    async def answer(self, target: Target, chunk_ids: Sequence[bytes], deadline: float) -> list[int]:
        """Committed versions, for a target that asks this one as the last serving."""
        for chunk_id in chunk_ids:
            if self.whom(target, chunk_id) == BEHIND:
                await self._behind(target, chunk_id, deadline)
        return self.committed(target, chunk_ids)

    def committed(self, target: Target, chunk_ids: Sequence[bytes]) -> list[int]:
        if not target.replica.knows_versions:
            version = target.replica.version
            raise ChainVersionMismatch(f"target {target.target_id} is not the last serving one of chain {target.chain_id} at version {version}")
        metas = [target.engine.get(chunk_id) for chunk_id in chunk_ids]
        return [meta.version if meta is not None else 0 for meta in metas]

    async def _ask(self, target: Target, tail: int, chunk_ids: Sequence[bytes], deadline: float) -> Sequence[int]:
        request = pb.VersionRequest(chain_id=target.chain_id, target_id=tail, chunk_ids=chunk_ids)
        left_s = max(0.01, deadline - self._host.clock.monotonic())
        reply = await self._host.pool.call(self._host.addresses(tail), VERSION, request, timeout_s=left_s)
        if len(reply.versions) != len(chunk_ids):
            raise ChainError(f"target {tail} told {len(reply.versions)} of {len(chunk_ids)} versions")
        versions: Sequence[int] = reply.versions
        return versions

    async def _catch_up(self, target: Target, chunk_id: bytes, version: int, deadline: float) -> None:
        """The tail has this version: what is committed here, or about to be, has to be as new."""
        if not target.replica.committed_after(chunk_id, target.stored(chunk_id, None), version):
            return
        await self._behind(target, chunk_id, deadline)
        if not target.replica.serving or target.replica.committed_after(chunk_id, target.stored(chunk_id, None), version):
            raise TargetNotServing(f"chunk {chunk_id.hex()} has version {version} at the tail and not here: read another replica")

    async def _behind(self, target: Target, chunk_id: bytes, deadline: float) -> None:
        """After the update under way; a pending version that nobody carries is carried to its end."""
        item = Item(target, chunk_id)
        await Round(self._host, [item], deadline).run()
        if item.result is not None and item.result.status:
            raise TargetNotServing(f"chunk {chunk_id.hex()} has an update under way that does not end: {item.result.message}")
