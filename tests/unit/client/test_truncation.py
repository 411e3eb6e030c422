"""Truncates among writes and reports, over fake services."""

from __future__ import annotations

import pytest
import trio
from tests.unit.client.fakes import CHUNK, run, world
from tests.unit.client.handles import opened

from kvfs.common.errors import InputOutput


def test_truncate_comes_after_the_writes_before_it_and_before_those_after() -> None:
    async def test() -> None:
        async with world() as place:
            place.meta.make(7)
            file = opened(place, 7)
            await file.pwrite(0, [b"a" * 3 * CHUNK])
            await file.truncate(CHUNK + 10)
            assert file.length == CHUNK + 10
            await file.truncate(2 * CHUNK)
            assert bytes(await file.pread(0, 3 * CHUNK)) == b"a" * (CHUNK + 10) + bytes(CHUNK - 10)
            await file.pwrite(2 * CHUNK + 5, [b"z"])
            await file.close()
            assert place.content(7) == b"a" * (CHUNK + 10) + bytes(CHUNK - 5) + b"z"
            assert place.client.files.state(7) is None

    run(test)


@pytest.mark.parametrize("other", [False, True], ids=["ours", "another client's"])
def test_nothing_is_written_while_a_truncate_that_failed_is_still_to_come(other: bool) -> None:
    """It would be cut off when the truncate reaches the chains; and what lies behind the end would come back when the file grows."""

    async def test() -> None:
        async with world(clients=2) as place:
            place.meta.lease_ms = 60_000
            place.meta.make(7)
            file = opened(place, 7)
            await file.pwrite(0, [b"a" * 3 * CHUNK])
            await file.fsync()
            place.meta.cut_fails = InputOutput("no chain serves")
            with pytest.raises(InputOutput):
                await (place.clients[1].truncate_inode(7, 10) if other else file.truncate(10))
            if other:
                await place.meta.revoke(7)
            with pytest.raises(InputOutput):
                await file.pwrite(CHUNK + 5, [b"b"])
            place.meta.cut_fails = None
            await file.pwrite(CHUNK + 5, [b"b"])
            await file.close()
            assert not place.meta.cuts_left
            assert place.content(7) == b"a" * 10 + bytes(CHUNK - 5) + b"b"

    run(test)


def test_a_report_does_not_undo_another_clients_truncate() -> None:
    async def test() -> None:
        async with world(clients=2) as place:
            place.meta.lease_ms = 60_000
            place.meta.make(7)
            file = opened(place, 7)
            await file.pwrite(0, [b"a" * 100])
            await file.flush()
            await place.clients[1].truncate_inode(7, 0)
            await place.meta.revoke(7)
            assert bytes(await file.pread(0, 200)) == b""
            await file.pwrite(10, [b"b"])
            await file.close()
            assert place.content(7) == bytes(10) + b"b"

    run(test)


def test_bytes_acknowledged_after_another_clients_cut_and_before_it_was_heard_of_count() -> None:
    """The chains have them: left out of the length, they would be lost, and come to light when the file grows."""

    async def test() -> None:
        async with world(clients=2) as place:
            place.meta.lease_ms = 60_000
            place.meta.make(7)
            file = opened(place, 7)
            reader = opened(place, 7, write=False)
            await file.pwrite(0, [b"a" * 100])
            await file.flush()
            await place.clients[1].truncate_inode(7, 0)
            await file.pwrite(100, [b"b" * 100])
            await file.flush()
            await place.meta.revoke(7)
            assert bytes(await reader.pread(0, 300)) == bytes(100) + b"b" * 100
            await file.close()
            assert place.meta.inodes[7].length == 200
            assert place.content(7) == bytes(100) + b"b" * 100
            await reader.close()

    run(test)


@pytest.mark.parametrize("hint", [True, False], ids=["of a hint", "of a report"])
def test_the_answer_to_our_own_report_may_be_the_first_to_tell_of_another_clients_cut(hint: bool) -> None:
    async def test() -> None:
        async with world(clients=2) as place:
            place.meta.lease_ms = 60_000
            place.meta.make(7)
            file = opened(place, 7)
            await file.pwrite(0, [b"a" * 100])
            await file.flush()
            await place.clients[1].truncate_inode(7, 10)
            if hint:
                await file.hint()
            else:
                place.meta.hold_answers = trio.Event()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(file.report)
                    while not place.meta.closes:
                        await trio.sleep(0.001)
                    await file.pwrite(15, [b"b"])  # the report knows nothing of it
                    await file.flush()
                    place.meta.hold_answers.set()
                place.meta.hold_answers = None
            await file.close()
            expected = b"a" * 10 if hint else b"a" * 10 + bytes(5) + b"b"
            assert place.meta.inodes[7].length == len(expected)
            assert place.content(7) == expected

    run(test)


def test_bytes_on_their_way_when_another_client_cut_the_file_count_only_if_they_came_after_it() -> None:
    async def test() -> None:
        async with world(nodes=1, clients=2) as place:
            place.meta.lease_ms = 0
            place.meta.make(7)
            file = opened(place, 7)
            place.storage[0].hold_answers = trio.Event()
            await file.pwrite(0, [b"a" * 100])
            async with trio.open_nursery() as nursery:
                nursery.start_soon(file.flush)
                while not place.chunks:
                    await trio.sleep(0.001)
                await place.clients[1].truncate_inode(7, 0)
                await file.hint()
                nursery.start_soon(file.current_length)
                await trio.sleep(0.01)
                place.storage[0].hold_answers.set()
            assert await file.current_length() == 0
            await file.close()
            assert place.meta.inodes[7].length == 0

    run(test)
