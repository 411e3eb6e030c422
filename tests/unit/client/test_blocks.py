"""Touches and single outcomes of the block path, against a service that only counts."""

from __future__ import annotations

import pytest
import trio
from tests.unit.client.fakes import World, run, world

from kvfs.client import storage_blocks
from kvfs.client.storage_blocks import Probe, Touch
from kvfs.client.storage_reads import ChunkRead
from kvfs.common.errors import KvfsError, NoSpace
from kvfs.common.ids import SPACE_BIT, chunk_id
from kvfs.common.wire import storage_pb2

INODE = SPACE_BIT | 1


def digests(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(16, "big") for number in numbers)


async def settle(place: World, count: int, told: list[storage_pb2.KvTouchRequest]) -> None:
    with trio.fail_after(5):
        while sum(len(touch.digests) // 16 for request in told for touch in request.touches) + place.client.counters.touches_dropped < count:
            await trio.sleep(0.005)


def test_touches_gather_and_keep_their_order() -> None:
    async def test() -> None:
        async with world(nodes=1) as place:
            told = place.storage[0].touches
            for number in range(50):
                place.client.storage.touch([Touch(1, INODE, digests(number))])
            await settle(place, 50, told)
            assert len(told) == 1
            assert b"".join(touch.digests for touch in told[0].touches) == digests(*range(50))

    run(test)


def test_touches_that_do_not_fit_or_cannot_be_told_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with world(nodes=1) as place:
            told = place.storage[0].touches
            monkeypatch.setattr(storage_blocks, "TOUCH_QUEUE_BYTES", 160)
            place.client.storage.touch([Touch(1, INODE, digests(number)) for number in range(15)])
            place.client.storage.touch([Touch(99, INODE, digests(1))])
            await settle(place, 16, told)
            assert place.client.counters.touches_dropped == 6
            # There is room again.
            place.client.storage.touch([Touch(99, INODE, digests(1)), Touch(1, INODE, digests(2))])
            await settle(place, 18, told)
            assert place.client.counters.touches_dropped == 7

    run(test)


def test_one_read_that_fails_for_good_does_not_hold_up_the_others() -> None:
    async def test() -> None:
        async with world(nodes=1) as place:
            place.chunks[chunk_id(9, 0)] = bytearray(b"x" * 100)
            place.storage[0].fail_reads = NoSpace("never read so")
            [failed] = await place.client.storage.read_each([ChunkRead(1, chunk_id(9, 0), 0, 100, memoryview(bytearray(100)))])
            assert isinstance(failed, KvfsError)
            place.storage[0].fail_reads = None
            found, hole = await place.client.storage.read_each(
                [ChunkRead(1, chunk_id(9, place_), 0, 100, memoryview(bytearray(100))) for place_ in (0, 1)]
            )
            assert not isinstance(found, KvfsError) and found.found and bytes(found.view) == b"x" * 100
            assert not isinstance(hole, KvfsError) and not hole.found

    run(test)


def test_probes_that_cannot_be_asked_are_outcomes() -> None:
    async def test() -> None:
        async with world(nodes=1) as place:
            # This service knows no probes: a client newer than the server hears so at once.
            [outcome] = await place.client.storage.probe([Probe(1, INODE, digests(1))], deadline_s=2)
            assert isinstance(outcome, KvfsError) and outcome.code == 205

    run(test)
