"""What there is to KV-cache blocks besides reading and writing them: probes, touches, statistics.

Owns the path of digests: they travel as one string of 16 bytes each, never as messages. Invariants: a batch of probes goes out as few requests, per
node and bounded in size; a probe that failed is an outcome and never an exception; touches are advice: their queue is bounded, what does not fit or
cannot be delivered is dropped and counted, and nobody waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from kvfs.client.batch import group_by_node
from kvfs.client.config import ClientConfig
from kvfs.client.peers import Peers
from kvfs.client.retry import Attempts, worth_retrying
from kvfs.common.errors import InputOutput, InvalidArgument, KvfsError, from_wire
from kvfs.common.ids import DIGEST_BYTES
from kvfs.common.wire import cluster_pb2
from kvfs.common.wire import storage_pb2 as pb
from kvfs.common.wire.service import method

KV_PROBE = method("Storage", "KvProbe")
KV_TOUCH = method("Storage", "KvTouch")
KV_STATS = method("Storage", "KvStats")

REQUEST_BYTES = 1 << 20
"""Of digests in one request."""
TOUCH_QUEUE_BYTES = 4 << 20
TOUCH_DELAY_S = 0.003
"""Touches gather for so long."""
CALL_S = 5.0


@dataclass(slots=True)
class Probe:
    """Which of these blocks are there? `digests`: 16 bytes each, all of one chain."""

    chain_id: int
    inode: int
    digests: bytes
    touch: bool = False
    """Those that are there count as used, the last one first: put the deepest block last."""


@dataclass(slots=True)
class Touch:
    """These blocks of one chain were used, in this order: the deepest block first."""

    chain_id: int
    inode: int
    digests: bytes
    hits: int = 0
    """Reads that these stand for, which no service has seen: this client knew where the bytes lie."""


class BlockPath:
    def __init__(self, peers: Peers, config: ClientConfig, nursery: trio.Nursery, attempts: Callable[[float | None, float], Attempts]) -> None:
        """`attempts(deadline_s, attempt_s)` begins an operation's attempts."""
        self._attempts = attempts
        self._peers = peers
        self._config = config
        self._nursery = nursery
        self._touches: list[Touch] = []
        self._queued_bytes = 0
        self._sending = False

    # --- probes ------------------------------------------------------------------------------------------------------------------------

    async def probe(self, probes: Sequence[Probe], *, deadline_s: float | None = None) -> list[bytes | KvfsError]:
        """A bitmap each (bit i % 8 of byte i / 8: digest i is there), in order."""
        config, peers = self._config, self._peers
        attempts = self._attempts(deadline_s, config.read_attempt_s)
        outcomes: list[bytes | KvfsError] = [InputOutput("not asked")] * len(probes)
        pending = []
        for index, probe in enumerate(probes):
            if len(probe.digests) % DIGEST_BYTES:
                outcomes[index] = InvalidArgument(f"{len(probe.digests)} bytes of digests: {DIGEST_BYTES} each")
            elif probe.digests:
                pending.append(index)
            else:
                outcomes[index] = b""
        try:
            while pending:
                await self._attempt(probes, pending, outcomes, attempts.timeout_s())
                pending = [index for index in pending if _again(outcomes[index])]
                if pending:
                    await peers.refresh(min(max(attempts.left_s(), 0), config.read_attempt_s))
                    error = outcomes[pending[0]]
                    assert isinstance(error, KvfsError)
                    await attempts.wait(error)
        except KvfsError as error:
            for index in pending:
                outcomes[index] = error
        return outcomes

    async def _attempt(self, probes: Sequence[Probe], pending: Sequence[int], outcomes: list[bytes | KvfsError], timeout_s: float) -> None:
        operations = []
        for index in pending:
            try:
                target = self._peers.routing.head(probes[index].chain_id)
                where = self._peers.where(target)
            except KvfsError as error:
                outcomes[index] = error
                continue
            operations.append((index, target, where.node_id, where.addresses, len(probes[index].digests)))
        groups = group_by_node(operations, max_ios=self._config.batch_max_ios, max_bytes=REQUEST_BYTES)

        async def ask(addresses: tuple[str, ...], node_id: int, indexes: list[int], targets: list[int]) -> None:
            request = pb.KvProbeRequest()
            for index, target in zip(indexes, targets, strict=True):
                probe = probes[index]
                request.probes.add(chain_id=probe.chain_id, target_id=target, inode=probe.inode, digests=probe.digests, touch=probe.touch)
            try:
                reply = await self._peers.ask(addresses, KV_PROBE, request, targets, heads=True, timeout_s=timeout_s)
                if len(reply.results) != len(indexes):
                    raise InputOutput(f"a reply with {len(reply.results)} results for {len(indexes)} probes")
            except KvfsError as error:
                self._peers.suspect(node_id, error)
                for index in indexes:
                    outcomes[index] = error
                return
            self._peers.trust(node_id)
            for index, target, result in zip(indexes, targets, reply.results, strict=True):
                outcomes[index] = from_wire(result.status, f"target {target}") if result.status else result.present

        if len(groups) == 1:
            await ask(groups[0].addresses, groups[0].node_id, groups[0].indexes, groups[0].targets)
            return
        async with trio.open_nursery() as nursery:
            for group in groups:
                nursery.start_soon(ask, group.addresses, group.node_id, group.indexes, group.targets)

    # --- touches -----------------------------------------------------------------------------------------------------------------------

    def touch(self, touches: Sequence[Touch]) -> None:
        for touch in touches:
            if self._queued_bytes + len(touch.digests) > TOUCH_QUEUE_BYTES:
                self._peers.counters.touches_dropped += len(touch.digests) // DIGEST_BYTES
                continue
            self._queued_bytes += len(touch.digests)
            self._touches.append(touch)
        if self._touches and not self._sending:
            self._sending = True
            self._nursery.start_soon(self._send_touches)

    async def _send_touches(self) -> None:
        """Until the queue is empty. One round at a time, so the order of the touches stands."""
        try:
            while self._touches:
                await self._peers.clock.sleep(TOUCH_DELAY_S)
                touches, self._touches = self._touches, []
                self._queued_bytes = 0
                await self._deliver(touches)
        finally:
            self._sending = False

    async def _deliver(self, touches: Sequence[Touch]) -> None:
        operations = []
        for index, touch in enumerate(touches):
            try:
                target = self._peers.routing.head(touch.chain_id)
                where = self._peers.where(target)
            except KvfsError:
                self._peers.counters.touches_dropped += len(touch.digests) // DIGEST_BYTES
                continue
            operations.append((index, target, where.node_id, where.addresses, len(touch.digests)))
        for group in group_by_node(operations, max_ios=self._config.batch_max_ios, max_bytes=REQUEST_BYTES):
            request = pb.KvTouchRequest()
            for index, target in zip(group.indexes, group.targets, strict=True):
                touch = touches[index]
                request.touches.add(target_id=target, inode=touch.inode, digests=touch.digests, hits=touch.hits)
            try:
                await self._peers.caller.call(group.addresses, KV_TOUCH, request, timeout_s=CALL_S)
            except KvfsError as error:
                self._peers.suspect(group.node_id, error)
                self._peers.counters.touches_dropped += group.length_bytes // DIGEST_BYTES

    # --- statistics --------------------------------------------------------------------------------------------------------------------

    async def space_stats(self, inode: int) -> list[pb.KvSpaceStats]:
        found: list[pb.KvSpaceStats] = []

        async def ask(node_id: int, addresses: tuple[str, ...]) -> None:
            try:
                reply = await self._peers.caller.call(addresses, KV_STATS, pb.KvStatsRequest(inode=inode), timeout_s=CALL_S)
                found.extend(reply.spaces)
            except KvfsError as error:
                self._peers.suspect(node_id, error)

        async with trio.open_nursery() as nursery:
            for node in self._peers.routing.nodes_with_role(cluster_pb2.ROLE_STORAGE, alive=True):
                nursery.start_soon(ask, node.node_id, tuple(node.addresses))
        return sorted(found, key=lambda stats: (stats.inode, stats.target_id))


def _again(outcome: bytes | KvfsError) -> bool:
    return isinstance(outcome, KvfsError) and worth_retrying(outcome)
