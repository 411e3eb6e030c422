"""Mending one damaged chunk: its damaged units are read from the other serving replicas of the chain and put back.

Whoever has bytes with the checksum that the index here has for a unit has the right bytes, whatever version it is at, so replicas are asked with
ordinary reads and unit by unit: two copies that are damaged in different places make a whole one. Invariants: bytes that do not have the checksum are
never written (engine/inspect.py sees to that); what is in memory at a time is bounded by BATCH_UNITS.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial

from kvfs.common.checksum import CHECKSUM_UNIT_BYTES
from kvfs.common.errors import KvfsError
from kvfs.common.wire import storage_pb2 as pb
from kvfs.common.wire.service import method
from kvfs.storage.engine.inspect import Inspection
from kvfs.storage.host import Host
from kvfs.storage.target import Target

log = logging.getLogger("kvfs.storage")

READ = method("Storage", "Read")
BATCH_UNITS = 128
READ_S = 10.0
ROUNDS = 3
PAUSE_S = 0.2
_UNIT = CHECKSUM_UNIT_BYTES


async def mend(host: Host, target: Target, inspection: Inspection) -> bool | None:
    """Whether the chunk is whole afterwards; None: it was removed meanwhile. Raises an error of this target's own disk."""
    chunk_id, engine = inspection.chunk_id, target.engine
    missing = list(inspection.damaged)
    for turn in range(ROUNDS):
        if turn:
            await host.clock.sleep(PAUSE_S)
        for replica in _others(target):
            for first in range(0, len(missing), BATCH_UNITS):
                units = await _fetch(host, target, replica, inspection, missing[first : first + BATCH_UNITS])
                if units:
                    await host.workers.run(partial(engine.repair, chunk_id, units))
            # What is asked of the next replica, and whether another version has taken the place of this one, the disk says.
            now = await host.workers.run(partial(engine.inspect, chunk_id))
            if now is None:
                return None
            if not now.damaged:
                return True
            inspection, missing = now, list(now.damaged)
        if not _others(target):
            return False
    return False


def _others(target: Target) -> list[int]:
    view = target.replica.view
    return [member for member in view.serving if member != target.target_id] if view is not None else []


async def _fetch(host: Host, target: Target, replica: int, inspection: Inspection, units: Sequence[int]) -> dict[int, memoryview]:
    """The bytes of these units as a replica has them; none when it cannot be asked."""
    request = pb.ReadRequest()
    memory: list[memoryview] = []
    for start, end in _runs(units, inspection.length):
        request.reads.add(
            chain_id=target.chain_id,
            target_id=replica,
            chunk_id=inspection.chunk_id,
            offset=start,
            length=end - start,
            counted=True,  # nobody reads a KV-cache block here
        )
        memory.append(memoryview(bytearray(end - start)))
    try:
        reply = await host.pool.call(host.addresses(replica), READ, request, timeout_s=READ_S, receive=memory)
    except KvfsError as error:
        log.info("target %d: chunk %s cannot be mended from target %d: %s", target.target_id, inspection.chunk_id.hex(), replica, error.message)
        return {}
    found: dict[int, memoryview] = {}
    for io, view, result in zip(request.reads, memory, reply.results, strict=False):
        if result.status == 0:
            for at in range(0, result.length, _UNIT):
                found[(io.offset + at) // _UNIT] = view[at : min(at + _UNIT, result.length)]
    return found


def _runs(units: Sequence[int], length: int) -> Iterator[tuple[int, int]]:
    """Ranges of bytes of neighbouring units, in order."""
    first = last = units[0]
    for unit in [*units[1:], -1]:
        if unit == last + 1:
            last = unit
            continue
        yield first * _UNIT, min((last + 1) * _UNIT, length)
        first = last = unit
