"""Sending updates on to the successors: one request per node for a whole batch.

The bytes are passed along as they came (shared memory: the caller's own memory, no copy); only a whole-chunk replacement that differs from what came
is read back from the local pending version. A forward ends early when the chain changes under it, so that nobody waits for a dead successor.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from kvfs.common.checksum import checksums
from kvfs.common.errors import ChecksumMismatch, KvfsError
from kvfs.common.ids import is_block
from kvfs.common.transport.region import Span
from kvfs.common.wire import storage_pb2 as pb
from kvfs.common.wire.channel import Buffer
from kvfs.common.wire.service import method
from kvfs.storage.chain.flight import Flight
from kvfs.storage.chain.messages import FlightEffect, Forward, Result, TagKey
from kvfs.storage.engine.requests import UpdateKind
from kvfs.storage.host import Host
from kvfs.storage.target import Target

if TYPE_CHECKING:  # updates imports this module
    from kvfs.storage.updates import Item

log = logging.getLogger("kvfs.storage")

WRITE = method("Storage", "Write")
KINDS = {kind: pb.UpdateKind.Name(int(kind)) for kind in UpdateKind}
MAX_CHUNK_BYTES = 64 << 20
REPLY_MARGIN_S = 0.1
"""A forward ends this much before its sender's own deadline, so that the answer still goes up."""
_BYTES_KINDS = (UpdateKind.WRITE, UpdateKind.REPLACE)


@dataclass(slots=True)
class Parcel:
    """What goes to one node."""

    effects: list[Forward] = field(default_factory=list)
    writes: list[pb.WriteIO] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    borrowed: list[Span] = field(default_factory=list)
    """Of our own pool, to be given back."""
    spaces: dict[int, pb.KvSpace] = field(default_factory=dict)


class Forwarder:
    def __init__(self, host: Host, owners: Mapping[Flight, Item], deadline: float) -> None:
        self._host = host
        self._owners = owners
        self._deadline = deadline

    async def send(self, forwards: Sequence[Forward], sent: Callable[[], None] | None) -> list[FlightEffect]:
        """What the cores say to the answers. `sent` is called each time a request has left."""
        effects: list[FlightEffect] = []
        per_node: dict[tuple[str, ...], list[Forward]] = defaultdict(list)
        for effect in forwards:
            try:
                per_node[self._host.addresses(effect.target_id)].append(effect)
            except KvfsError as error:
                effects += self._fail(effect, error)
        if len(per_node) == 1:
            for addresses, group in per_node.items():
                effects += await self._send(addresses, group, sent)
        elif per_node:

            async def collect(addresses: tuple[str, ...], group: list[Forward]) -> None:
                effects.extend(await self._send(addresses, group, sent))

            async with trio.open_nursery() as nursery:
                for addresses, group in per_node.items():
                    nursery.start_soon(collect, addresses, group)
        return effects

    def _fail(self, effect: Forward, error: KvfsError) -> list[FlightEffect]:
        log.info("forwarding %r to target %d: %s", effect.flight, effect.target_id, error.message)
        return self._owners[effect.flight].target.replica.forward_failed(effect.flight)

    async def _send(self, addresses: tuple[str, ...], group: Sequence[Forward], sent: Callable[[], None] | None) -> list[FlightEffect]:
        parcel = Parcel()
        effects: list[FlightEffect] = []
        scope = trio.CancelScope()
        left_s = self._deadline - self._host.clock.monotonic() - REPLY_MARGIN_S
        timeout_s = max(0.05, min(left_s, self._host.config.forward_timeout_ms / 1000))
        sources = {self._owners[effect.flight].target: effect.target_id for effect in group}
        try:
            for source, to in sources.items():
                source.forwards[scope] = to
            results: Sequence[pb.WriteResult] | None = None
            with scope:
                try:
                    until = self._host.clock.monotonic() + timeout_s
                    for effect in group:
                        try:
                            await self._pack(parcel, effect, until)
                        except ChecksumMismatch as error:
                            log.warning("forwarding %r: %s", effect.flight, error.message)
                            effects += self._owners[effect.flight].target.replica.spoiled(effect.flight)
                        except KvfsError as error:
                            effects += self._fail(effect, error)
                    if parcel.effects:
                        request = pb.WriteRequest(writes=parcel.writes, from_target=parcel.writes[0].from_target, spaces=parcel.spaces.values())
                        reply = await self._host.pool.call(addresses, WRITE, request, timeout_s=timeout_s, send=parcel.buffers, sent=sent)
                        results = reply.results
                except trio.TooSlowError:
                    log.info("no buffers for forwards within %.1f s", timeout_s)
                except KvfsError as error:
                    log.debug("forwarding %d updates to %s: %s", len(group), addresses[-1], error.message)
        finally:
            for source in sources:
                source.forwards.pop(scope, None)
            for span in parcel.borrowed:
                self._host.buffers.release(span)
        packed = {id(effect) for effect in parcel.effects}
        answered = results is not None and len(results) == len(parcel.effects)
        for place, effect in enumerate(parcel.effects):
            replica = self._owners[effect.flight].target.replica
            if answered and results is not None:
                effects += replica.forwarded(effect.flight, _result(results[place]))
            else:
                effects += replica.forward_failed(effect.flight)
        for effect in group:  # never packed, because the scope ended first
            if id(effect) not in packed and effect.flight.forwarding:
                effects += self._owners[effect.flight].target.replica.forward_failed(effect.flight)
        return effects

    async def _pack(self, parcel: Parcel, effect: Forward, until: float) -> None:
        flight, item = effect.flight, self._owners[effect.flight]
        target, io = item.target, item.io
        key = target.pending_tag(item.chunk_id) if flight.recovery else item.tag
        write = pb.WriteIO(
            chain_id=target.chain_id,
            chain_version=effect.chain_version,
            chunk_id=item.chunk_id,
            kind=KINDS[effect.kind],
            chunk_size=io.chunk_size if io is not None else MAX_CHUNK_BYTES,
            target_id=effect.target_id,
            update_version=flight.update_version,
            from_target=target.target_id,
            sequence=effect.sequence,
            syncing=effect.syncing,
            mtime_ns=io.mtime_ns if io is not None and not flight.recovery else target.pending_mtime_ns(item.chunk_id),
        )
        if key is not None:
            _set_tag(write, key)
        if is_block(item.chunk_id):
            write.slab_bytes = target.slab_bytes(item.chunk_id) if io is None else io.slab_bytes
            target.retention.tell_space(item.chunk_id, parcel.spaces)
        buffer: Buffer | None = None
        if effect.kind is UpdateKind.REPLACE and not self._came_whole(item, flight):
            write.length = flight.length
            if flight.length:
                with trio.fail_after(max(0.0, until - self._host.clock.monotonic())):
                    span = await self._host.buffers.acquire(flight.length)
                parcel.borrowed.append(span)
                write.checksums = await self._read_back(target, flight, span)
                buffer = span
        elif io is not None:
            write.offset, write.length, write.checksums = io.offset, io.length, io.checksums
            if effect.kind in _BYTES_KINDS and io.length:
                buffer = item.span if item.span is not None else item.view
        parcel.effects.append(effect)
        parcel.writes.append(write)
        if buffer is not None:
            parcel.buffers.append(buffer)

    def _came_whole(self, item: Item, flight: Flight) -> bool:
        """Whether the bytes that came are the whole chunk as it is after the update."""
        io = item.io
        if flight.recovery or io is None or flight.kind not in _BYTES_KINDS:
            return False
        return io.offset == 0 and io.length == flight.length

    async def _read_back(self, target: Target, flight: Flight, span: Span) -> bytes:
        """The pending version's bytes into the span; their checksums, one per unit."""
        view = span.view
        outcome = await self._host.workers.run(
            lambda: target.engine.read(flight.chunk_id, 0, flight.length, view, version=flight.update_version, nowait=False)
        )
        assert outcome is not None
        if checksums(view, 0) != outcome.checksums:
            raise ChecksumMismatch(f"chunk {flight.chunk_id.hex()} of target {target.target_id} does not have its checksums")
        return outcome.checksums


def _set_tag(write: pb.WriteIO, key: TagKey) -> None:
    write.tag.client_id = key.client_id
    write.tag.channel = key.channel
    write.tag.sequence = key.sequence


def _result(result: pb.WriteResult) -> Result:
    return Result(result.status, result.version, result.chain_version, result.chunk_length, result.checksum, result.message)
