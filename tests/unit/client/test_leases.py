"""What a reply's attributes are worth when it took its time: never older than the question, and leased only if nobody has revoked that meanwhile."""

from __future__ import annotations

import trio
import trio.testing
from tests.unit.client.fakes import World, run, world

from kvfs.client.config import ClientConfig
from kvfs.client.file.open_file import OpenFile
from kvfs.client.leases import REMEMBERED_MAX, Leases
from kvfs.common.boundary.clock import SystemClock
from kvfs.common.wire import meta_pb2 as pb

CONFIG = ClientConfig(buffer_pool_bytes=8 << 20)


def opened(place: World) -> OpenFile:
    """A file whose attributes must be asked for."""
    place.meta.lease_ms = 0
    inode = place.meta.make(7)
    file = place.client.open_file(inode, session=place.client.new_session(), read=True, write=True)
    place.meta.lease_ms = 60_000
    return file


async def lengths(file: OpenFile, into: list[int]) -> None:
    into.append(await file.current_length())


async def asked(place: World, times: int) -> None:
    while place.meta.asked < times:
        await trio.sleep(0.001)


def test_a_lease_that_was_revoked_before_its_reply_came_is_none() -> None:
    async def test() -> None:
        async with world(config=CONFIG) as place, trio.open_nursery() as nursery:
            file, found = opened(place), list[int]()
            place.meta.hold_answers = trio.Event()
            nursery.start_soon(lengths, file, found)
            await asked(place, 1)
            place.meta.inodes[7].length, place.meta.inodes[7].data_version = 100, 5
            await place.meta.revoke(7)  # another client's change is answered from here on
            place.meta.hold_answers.set()
            while not found:
                await trio.sleep(0.001)
            assert found == [0]  # asked before the change
            assert await file.current_length() == 100

    run(test)


def test_a_question_is_not_answered_by_what_was_on_its_way_before_it() -> None:
    async def test() -> None:
        async with world(config=CONFIG) as place, trio.open_nursery() as nursery:
            file, first, later = opened(place), list[int](), list[int]()
            place.meta.lease_ms = 0
            place.meta.hold_answers = trio.Event()
            nursery.start_soon(lengths, file, first)
            await asked(place, 1)
            place.meta.inodes[7].length, place.meta.inodes[7].data_version = 100, 5
            for _ in range(5):
                nursery.start_soon(lengths, file, later)
            await trio.testing.wait_all_tasks_blocked()
            place.meta.hold_answers.set()
            while len(later) < 5:
                await trio.sleep(0.001)
            assert first == [0]
            assert later == [100] * 5
            assert place.meta.asked == 2  # once for all who waited

    run(test)


def test_a_lease_counts_from_when_it_was_asked_for() -> None:
    async def test() -> None:
        async with world(config=CONFIG) as place, trio.open_nursery() as nursery:
            file, found = opened(place), list[int]()
            place.meta.lease_ms = 50
            place.meta.hold_answers = trio.Event()
            nursery.start_soon(lengths, file, found)
            await asked(place, 1)
            await trio.sleep(0.06)
            place.meta.lease_ms = 60_000
            place.meta.hold_answers.set()
            while not found:
                await trio.sleep(0.001)
            await file.current_length()
            assert place.meta.asked == 2
            await file.current_length()
            assert place.meta.asked == 2  # this one holds

    run(test)


def test_what_is_forgotten_costs_leases_only() -> None:
    leases = Leases(SystemClock())
    leases.revoked(1)
    before = leases.asked()
    for number in range(2, REMEMBERED_MAX + 3):
        leases.revoked(number)
    now = leases.asked()

    def lease(number: int, since: tuple[int, float]) -> int:
        return leases.heard(pb.Inode(inode=number, attr_lease_ms=60_000), since).attr_lease_ms

    assert lease(2, before) == 0  # was forgotten, and so was any other
    assert lease(1_000_000, before) == 0
    assert 0 < lease(2, now) < 60_000
    leases.lose_all()
    assert lease(3, now) == 0
    assert lease(3, leases.asked()) > 0
