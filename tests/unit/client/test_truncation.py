"""Truncates among writes and reports, over fake services."""

from __future__ import annotations

import pytest
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
