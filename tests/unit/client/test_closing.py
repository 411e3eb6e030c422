"""The end of open files over fake services: what it tells, when, and what it says when nobody answers."""

from __future__ import annotations

import pytest
import trio
from tests.unit.client.fakes import CHUNK, run, world
from tests.unit.client.handles import opened

from kvfs.client.config import ClientConfig
from kvfs.common.errors import DeadlineExceeded, InputOutput, StaleHandle


def test_a_close_that_nobody_answers_ends_by_its_deadline_and_says_what_is_lost() -> None:
    """Sending the bytes and reporting their end do not take a deadline each."""

    async def test() -> None:
        async with world(config=ClientConfig(deadline_s=1.0, write_attempt_s=0.4)) as place:
            place.meta.make(7)
            file = opened(place, 7)
            await file.pwrite(0, [b"a" * CHUNK])
            for storage in place.storage:
                storage.silent = True
            place.meta.hold_answers = trio.Event()
            began = trio.current_time()
            with pytest.raises(DeadlineExceeded, match="earlier written bytes are lost"):
                await file.close()
            assert trio.current_time() - began < 1.6
            assert file.closed

    run(test)


def test_the_end_of_a_file_with_nothing_to_report_travels_with_the_next_request() -> None:
    async def test() -> None:
        async with world(config=ClientConfig(buffer_pool_bytes=32 << 20, session_end_s=60)) as place:
            place.meta.make(7)
            written = opened(place, 7)
            await written.pwrite(0, [b"x"])
            await written.fsync()
            sessions = [written.session]
            await written.close()
            for _ in range(2):
                file = opened(place, 7)
                sessions.append(file.session)
                await file.close()
            assert len(place.meta.closes) == 1 and not place.meta.ended  # fsync has told all there was
            await place.client.meta.get_attr([7])
            assert place.meta.ended == [(7, session) for session in sessions]
            await place.client.meta.get_attr([7])
            assert len(place.meta.ended) == 3 and not place.meta.end_requests

    run(test)


def test_ends_that_no_request_takes_along_are_told_together_soon() -> None:
    async def test() -> None:
        async with world(config=ClientConfig(buffer_pool_bytes=32 << 20, session_end_s=0.05)) as place:
            place.meta.make(7)
            files = [opened(place, 7) for _ in range(20)]
            for file in files:
                await file.close()
            assert not place.meta.ended
            while not place.meta.ended:
                await trio.sleep(0.01)
            assert sorted(place.meta.ended) == sorted((7, file.session) for file in files)
            assert place.meta.end_requests == 1

    run(test)


def test_ends_that_a_failed_request_carried_are_told_again() -> None:
    async def test() -> None:
        async with world(config=ClientConfig(buffer_pool_bytes=32 << 20, session_end_s=0.02)) as place:
            place.meta.make(7)
            place.meta.fail_ends = InputOutput("no")
            file = opened(place, 7)
            await file.close()
            while place.meta.end_requests < 2:
                await trio.sleep(0.01)
            assert not place.meta.ended
            place.meta.fail_ends = None
            while not place.meta.ended:
                await trio.sleep(0.01)
            assert place.meta.ended == [(7, file.session)]

    run(test)


def test_a_client_tells_what_has_ended_before_it_goes() -> None:
    async def test() -> None:
        async with world(config=ClientConfig(buffer_pool_bytes=32 << 20, session_end_s=60)) as place:
            place.meta.make(7)
            files = [opened(place, 7) for _ in range(1000)]  # more than one request takes
            for file in files[:-1]:
                await file.close()
            await place.client.aclose()
            assert sorted(place.meta.ended) == sorted((7, file.session) for file in files)

    run(test)


@pytest.mark.parametrize("cancelled", [True, False], ids=["cancelled", "too late"])
def test_a_close_that_did_not_come_to_its_end_is_finished_in_the_background(cancelled: bool) -> None:
    """Else its session stayed open for as long as the client lives: a removed file would never be freed, and what was written not counted."""

    async def test() -> None:
        async with world(config=ClientConfig(deadline_s=0.5 if not cancelled else 30)) as place:
            place.meta.make(7)
            file = opened(place, 7)
            await file.pwrite(0, [b"a" * 100])
            hold = trio.Event()
            if cancelled:
                place.storage[0].hold = place.storage[1].hold = hold
                with trio.move_on_after(0.05):
                    await file.close()
                again = opened(place, 7, write=False)
                assert bytes(await again.pread(0, 200)) == b"a" * 100, "a file that is still to be closed is one with its other handles"
                await again.close()
                assert not place.meta.closes
            else:
                place.meta.hold_answers = hold
                with pytest.raises(DeadlineExceeded):
                    await file.close()
                place.meta.closes.clear()
            assert file.closed
            hold.set()
            with trio.fail_after(10):
                while place.client.files.state(7) is not None:
                    await trio.sleep(0.01)
            assert [(close.session, close.still_open) for close in place.meta.closes][-1:] == [(file.session, False)]
            assert place.content(7) == b"a" * 100

    run(test)


@pytest.mark.parametrize("when", ["it is gone", "it is about to go"])
def test_a_removed_file_that_is_not_kept_for_us_any_more_is_stale(when: str) -> None:
    """Its writer was thought dead, and its session ended: zeros were read, and an fsync was answered, of bytes that nobody has."""

    async def test() -> None:
        async with world() as place:
            place.meta.lease_ms = 0
            place.meta.make(7)
            file = opened(place, 7)
            await file.pwrite(0, [b"a" * 100])
            await file.fsync()
            place.meta.inodes[7].nlink = 0
            place.meta.inodes[7].writers = 1
            assert bytes(await file.pread(0, 100)) == b"a" * 100
            if when == "it is gone":
                del place.meta.inodes[7]
            else:
                place.meta.inodes[7].writers = 0
            with pytest.raises(StaleHandle):
                await file.pread(0, 100)
            with pytest.raises(StaleHandle):
                await file.pwrite(0, [b"b"])
            assert not await file.pread(100, 100)  # nothing is missing there
            await file.close()

    run(test)


def test_an_fsync_of_a_file_that_is_gone_is_an_error() -> None:
    async def test() -> None:
        async with world() as place:
            place.meta.make(7)
            file = opened(place, 7)
            await file.pwrite(0, [b"a" * 100])
            del place.meta.inodes[7]
            with pytest.raises(StaleHandle):
                await file.fsync()
            await file.close()

    run(test)


def test_a_reader_keeps_a_removed_file_when_its_last_writer_has_closed_it() -> None:
    async def test() -> None:
        async with world() as place:
            place.meta.lease_ms = 0
            place.meta.make(7)
            writer, reader = opened(place, 7), opened(place, 7, write=False)
            await writer.pwrite(0, [b"a" * 100])
            place.meta.inodes[7].nlink = 0
            place.meta.hold_answers = trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(writer.close)
                while not place.meta.closes:
                    await trio.sleep(0.01)
                nursery.start_soon(reader.current_length)
                while not place.meta.asked:
                    await trio.sleep(0.01)
                place.meta.hold_answers.set()
            assert bytes(await reader.pread(0, 100)) == b"a" * 100
            await reader.close()

    run(test)
