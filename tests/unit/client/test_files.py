"""Open files over fake services: every byte, holes, read-ahead, write-behind, truncates, errors."""

from __future__ import annotations

import random

import pytest
import trio
from tests.unit.client.fakes import CHUNK, World, run, world

from kvfs.client.config import ClientConfig
from kvfs.client.file.open_file import OpenFile
from kvfs.common.errors import BadHandle, DeadlineExceeded, InputOutput, NoSpace


def opened(place: World, number: int, *, client: int = 0, write: bool = True, append: bool = False) -> OpenFile:
    chosen = place.clients[client]
    return chosen.open_file(place.meta.copy(number), session=chosen.new_session() if write else b"", read=True, write=write, append=append)


def nothing_is_held(place: World) -> None:
    memory = place.client.memory
    memory.reclaim()
    assert memory.pool.free_bytes == memory.pool.total_bytes


def test_what_was_written_is_read_before_and_after_it_is_sent() -> None:
    async def test() -> None:
        async with world() as place:
            place.meta.make(7)
            file = opened(place, 7)
            data = random.Random(1).randbytes(5 * CHUNK + 123)
            assert await file.pwrite(10, [data[:1000], data[1000:]]) == len(data)
            assert file.length == 10 + len(data)
            assert bytes(await file.pread(0, 1 << 20)) == bytes(10) + data
            await file.close()
            assert place.content(7) == bytes(10) + data
            again = opened(place, 7, write=False)
            assert bytes(await again.pread(0, 1 << 20)) == bytes(10) + data
            await again.close()
            nothing_is_held(place)

    run(test)


def test_small_sequential_writes_are_sent_as_whole_chunks_in_batches() -> None:
    async def test() -> None:
        async with world(nodes=1) as place:
            place.meta.make(7)
            file = opened(place, 7)
            data = random.Random(1).randbytes(16 * CHUNK)
            for start in range(0, len(data), 1000):
                await file.pwrite(start, [data[start : start + 1000]])
            await file.close()
            assert place.content(7) == data
            sent = [io for request in place.storage[0].writes for io in request.writes]
            assert sorted(io.length for io in sent) == [CHUNK] * 16
            assert len(place.storage[0].writes) < 16

    run(test)


def test_while_a_request_is_under_way_the_next_grows_unless_somebody_waits_for_it() -> None:
    async def test() -> None:
        async with world(nodes=1, config=ClientConfig(dirty_age_s=60, write_batch_bytes=1 << 20)) as place:
            place.meta.make(7)
            place.meta.make(8)
            service, file, other = place.storage[0], opened(place, 7), opened(place, 8)
            hold = service.hold = trio.Event()
            for index in range(5):
                await file.pwrite(index * CHUNK, [bytes([index]) * CHUNK])
            await trio.sleep(0.05)
            assert place.client.counters.write_requests == 1, "the others wait for a batch, or for the end of the first"
            await other.pwrite(0, [b"x"])
            with trio.move_on_after(0.05):
                await other.flush()
            assert place.client.counters.write_requests == 2
            for index in range(5, 40):
                await file.pwrite(index * CHUNK, [bytes([index]) * CHUNK])
            await trio.sleep(0.05)
            assert place.client.counters.write_requests == 4, "two full batches"
            hold.set()
            await file.close()
            await other.close()
            assert place.content(7) == b"".join(bytes([index]) * CHUNK for index in range(40))
            assert place.client.counters.write_requests <= 6

    run(test)


def test_holes_and_short_chunks_are_zeros() -> None:
    async def test() -> None:
        async with world() as place:
            place.meta.make(7, length=1 << 40)
            file = opened(place, 7)
            await file.pwrite(3 * CHUNK + 5, [b"x"])
            await file.flush()
            expect = bytearray(6 * CHUNK)
            expect[3 * CHUNK + 5] = ord("x")
            target = bytearray(b"\xff" * 6 * CHUNK)
            assert await file.pread_into(0, [memoryview(target)[:100], memoryview(target)[100:]]) == len(target)
            assert target == expect
            assert bytes(await file.pread((1 << 40) - 10, 100)) == bytes(10)
            assert bytes(await file.pread(1 << 40, 100)) == b""
            buffer = place.client.register(6 * CHUNK)
            buffer.view[:] = b"\xff" * 6 * CHUNK
            assert await file.pread_into(0, [buffer.span(0, 70000), buffer.span(70000)]) == 6 * CHUNK
            assert buffer.view == expect
            await file.close()

    run(test)


def test_sequential_reading_is_read_ahead_without_copies() -> None:
    async def test() -> None:
        async with world(config=ClientConfig(buffer_pool_bytes=64 << 20)) as place:
            data = random.Random(2).randbytes(20 << 20)
            place.meta.make(7, chunk_size=1 << 20, length=len(data))
            for index in range(20):
                place.chunks[(7).to_bytes(8, "big") + index.to_bytes(16, "big")] = bytearray(data[index << 20 : (index + 1) << 20])
            file = opened(place, 7, write=False)
            for start in range(0, len(data), 300_000):
                view = await file.pread(start, 300_000)
                assert bytes(view) == data[start : start + 300_000]
                del view
            counters = place.client.counters
            assert counters.window_hits > 50
            assert counters.read_requests < 25  # 20 MiB over two nodes, in windows of several chunks
            await file.close()
            nothing_is_held(place)

    run(test)


def test_a_lent_view_stays_right_while_everything_else_goes_on() -> None:
    async def test() -> None:
        async with world() as place:
            data = random.Random(3).randbytes(4 * CHUNK)
            place.meta.make(7)
            file = opened(place, 7)
            await file.pwrite(0, [data])
            await file.flush()
            view = await file.pread(0, len(data))
            part = view[CHUNK : 2 * CHUNK]
            assert view.readonly
            await file.pwrite(0, [bytes(4 * CHUNK)])
            await file.flush()
            for _ in range(20):
                assert bytes(await file.pread(0, 4 * CHUNK)) == bytes(4 * CHUNK)
            assert bytes(view) == data
            del view
            assert bytes(part) == data[CHUNK : 2 * CHUNK]
            await file.close()

    run(test)


def test_a_write_under_way_is_not_hidden_by_older_read_ahead() -> None:
    async def test() -> None:
        async with world(nodes=1) as place:
            place.meta.make(7, length=8 * CHUNK)
            file = opened(place, 7)
            await file.pread(0, 10)  # windows of zeros
            hold = place.storage[0].hold = trio.Event()
            await file.pwrite(CHUNK, [b"a" * CHUNK])
            async with trio.open_nursery() as nursery:
                seen: list[bytes] = []

                async def read() -> None:
                    seen.append(bytes(await file.pread(0, 4 * CHUNK)))

                nursery.start_soon(read)
                await trio.sleep(0.05)
                hold.set()
            expect = bytes(CHUNK) + b"a" * CHUNK + bytes(2 * CHUNK)
            assert seen == [expect]
            await file.flush()
            assert bytes(await file.pread(0, 4 * CHUNK)) == expect
            await file.close()

    run(test)


def test_handles_of_one_inode_share_what_was_written() -> None:
    async def test() -> None:
        async with world() as place:
            place.meta.make(7)
            writer, reader = opened(place, 7), opened(place, 7, write=False)
            await writer.pwrite(0, [b"hello"])
            assert reader.length == 5
            assert bytes(await reader.pread(0, 10)) == b"hello"
            assert place.client.local_view(place.meta.copy(7)).length == 5
            await writer.close()
            assert place.meta.inodes[7].length == 5
            with pytest.raises(BadHandle):
                await reader.pwrite(0, [b"x"])
            with pytest.raises(BadHandle):
                await writer.pread(0, 1)
            await reader.close()

    run(test)


def test_writers_of_disjoint_ranges_in_two_clients_do_not_touch_each_other() -> None:
    async def test() -> None:
        async with world(clients=2) as place:
            place.meta.make(7)
            files = [opened(place, 7), opened(place, 7, client=1)]
            data = random.Random(5).randbytes(4 * CHUNK)
            order = list(range(0, len(data), 777))
            random.Random(6).shuffle(order)
            for turn, start in enumerate(order):
                await files[turn % 2].pwrite(start, [data[start : start + 777]])
            for file in files:
                await file.close()
            assert place.content(7) == data

    run(test)


def test_another_clients_close_is_seen_by_a_reader_that_had_read_before() -> None:
    async def test() -> None:
        async with world(clients=2) as place:
            place.meta.lease_ms = 60_000
            place.meta.make(7)
            writer, reader = opened(place, 7), opened(place, 7, client=1, write=False)
            await writer.pwrite(0, [b"old" + bytes(8 * CHUNK)])
            await writer.fsync()
            await place.meta.revoke(7)
            assert bytes(await reader.pread(0, 3)) == b"old"
            await writer.pwrite(0, [b"new"])
            await writer.fsync()
            await place.meta.revoke(7)
            assert bytes(await reader.pread(0, 3)) == b"new"
            await writer.close()
            await reader.close()

    run(test)


def test_a_restarted_metadata_service_makes_cached_bytes_worthless() -> None:
    async def test() -> None:
        async with world() as place:
            place.meta.lease_ms = 60_000
            place.meta.make(7, length=4 * CHUNK)
            file = opened(place, 7, write=False)
            await file.pread(0, 3)
            key = (7).to_bytes(8, "big") + bytes(16)
            place.chunks[key] = bytearray(b"abc")
            assert bytes(await file.pread(0, 3)) == bytes(3)  # read ahead, lease runs
            lost = trio.Event()

            async def on_lost() -> None:
                lost.set()

            place.client.on_lost(on_lost)
            place.meta.epoch = 2
            place.meta.wake()
            with trio.fail_after(2):
                await lost.wait()
            assert bytes(await file.pread(0, 3)) == b"abc"
            await file.close()

    run(test)


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


@pytest.mark.parametrize("lent", [True, False], ids=["pread", "pread_into"])
def test_a_read_that_nobody_answers_ends_by_its_deadline(lent: bool) -> None:
    """The read-ahead in front of it and the read itself do not take a deadline each."""

    async def test() -> None:
        async with world(config=ClientConfig(deadline_s=1.0, read_attempt_s=0.4)) as place:
            place.meta.make(7)
            file = opened(place, 7)
            await file.pwrite(0, [b"a" * 3 * CHUNK])
            await file.fsync()
            for storage in place.storage:
                storage.silent = True
            began = trio.current_time()
            with pytest.raises(DeadlineExceeded):
                await (file.pread(0, CHUNK) if lent else file.pread_into(0, [bytearray(CHUNK)]))
            assert trio.current_time() - began < 1.6
            for storage in place.storage:
                storage.silent = False
            assert bytes(await file.pread(0, 3 * CHUNK)) == b"a" * 3 * CHUNK
            await file.close()

    run(test)


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


def test_appends_of_two_clients_do_not_overlap() -> None:
    async def test() -> None:
        async with world(clients=2) as place:
            place.meta.make(7)
            files = [opened(place, 7, append=True), opened(place, 7, client=1, append=True)]

            async def write(which: int) -> None:
                for number in range(50):
                    await files[which].pwrite(0, [f"{which}:{number:04}\n".encode()])

            async with trio.open_nursery() as nursery:
                nursery.start_soon(write, 0)
                nursery.start_soon(write, 1)
            for file in files:
                await file.close()
            lines = place.content(7).decode().splitlines()
            assert len(lines) == 100
            for which in "01":
                assert [line for line in lines if line[0] == which] == [f"{which}:{number:04}" for number in range(50)]

    run(test)


def test_an_append_behind_unreported_writes_does_not_overwrite_them() -> None:
    async def test() -> None:
        async with world() as place:
            place.meta.make(7)
            plain, append = opened(place, 7), opened(place, 7, append=True)
            await plain.pwrite(0, [b"abc"])
            assert await append.append([b"def"]) == 3
            await plain.close()
            await append.close()
            assert place.content(7) == b"abcdef"

    run(test)


def test_registered_memory_is_sent_and_filled_where_it_is() -> None:
    async def test() -> None:
        async with world() as place:
            place.meta.make(7)
            file = opened(place, 7)
            with place.client.register(1 << 20) as buffer:
                data = random.Random(8).randbytes(300_000)
                buffer.view[:300_000] = data
                await file.pwrite(5, [b"before the spans go"])
                assert await file.pwrite(5, [buffer.span(0, 300_000)]) == 300_000
                assert place.client._back.dirty_bytes == 0
                buffer.view[:] = bytes(1 << 20)
                assert await file.pread_into(0, [buffer.span(0, 300_005)]) == 300_005
                assert buffer.view[:300_005] == bytes(5) + data
                await file.close()
            assert place.content(7) == bytes(5) + data

    run(test)


def test_an_error_of_the_write_behind_comes_out_once_of_each_handle() -> None:
    async def test() -> None:
        async with world(nodes=1) as place:
            place.meta.make(7)
            one, two = opened(place, 7), opened(place, 7)
            place.storage[0].fail_writes = [NoSpace("the target is full")]
            await one.pwrite(0, [b"x" * CHUNK])
            with pytest.raises(NoSpace):
                await one.flush()
            await one.flush()
            with pytest.raises(NoSpace):
                await two.pwrite(0, [b"y"])
            await two.pwrite(0, [b"y"])
            await one.close()
            place.storage[0].fail_writes = [InputOutput("the disk died")]
            await two.pwrite(0, [b"z"])
            with pytest.raises(InputOutput):
                await two.close()
            assert two.closed
            assert place.client.files.state(7) is None

    run(test)


def test_old_buffered_bytes_are_sent_without_being_asked() -> None:
    async def test() -> None:
        async with world(nodes=1, config=ClientConfig(buffer_pool_bytes=32 << 20, dirty_age_s=0.05)) as place:
            place.meta.make(7)
            file = opened(place, 7)
            await file.pwrite(0, [b"abc"])
            assert not place.storage[0].writes
            await trio.sleep(0.3)
            assert len(place.storage[0].writes) == 1
            await file.close()

    run(test)


def test_others_hear_how_long_a_file_is_while_it_is_written() -> None:
    async def test() -> None:
        config = ClientConfig(buffer_pool_bytes=32 << 20, length_hint_s=0.05, dirty_age_s=60)
        async with world(nodes=1, config=config) as place:
            place.meta.make(7)
            file = opened(place, 7)
            await file.pwrite(0, [b"x" * (2 * CHUNK + 5)])
            await trio.sleep(0.2)
            assert place.meta.inodes[7].length == 2 * CHUNK  # what is acknowledged, and no more
            assert len(place.meta.closes) == 1
            assert file.length == 2 * CHUNK + 5
            await file.close()
            assert place.meta.inodes[7].length == 2 * CHUNK + 5

    run(test)


def test_writers_wait_when_too_much_is_dirty() -> None:
    async def test() -> None:
        async with world(nodes=1, config=ClientConfig(buffer_pool_bytes=32 << 20, dirty_max_bytes=1 << 20)) as place:
            hold = place.storage[0].hold = trio.Event()
            for number in (7, 8):
                place.meta.make(number)
            files = [opened(place, 7), opened(place, 8)]
            done = 0

            async def write(file: OpenFile) -> None:
                nonlocal done
                for start in range(0, 2 << 20, CHUNK):
                    await file.pwrite(start, [b"x" * CHUNK])
                done += 1

            async with trio.open_nursery() as nursery:
                for file in files:
                    nursery.start_soon(write, file)
                await trio.sleep(0.1)
                assert done == 0
                assert place.client._back.dirty_bytes <= 1 << 20
                hold.set()
            for file in files:
                await file.close()
            assert place.content(7) == place.content(8) == b"x" * (2 << 20)

    run(test)


def test_fsync_syncs_every_serving_target_and_reports_the_length() -> None:
    async def test() -> None:
        async with world(nodes=2, chains=3) as place:
            place.meta.make(7)
            file = opened(place, 7)
            await file.pwrite(0, [b"x" * (2 * CHUNK)])
            await file.fsync()
            assert sorted(target for storage in place.storage for target in storage.synced) == [1001, 1002, 2001, 2002]
            assert place.meta.inodes[7].length == 2 * CHUNK
            assert place.meta.closes[-1].still_open
            await file.pwrite(0, [b"y"])
            await file.close()
            assert not place.meta.closes[-1].still_open

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


def test_a_full_pool_costs_speed_not_progress() -> None:
    async def test() -> None:
        async with world(config=ClientConfig(buffer_pool_bytes=1 << 20)) as place:
            place.meta.make(7)
            file = opened(place, 7)
            data = random.Random(9).randbytes(8 << 20)
            await file.pwrite(0, [data])
            views = [await file.pread(start, 1 << 20) for start in range(0, 8 << 20, 1 << 20)]
            assert b"".join(views) == data
            assert place.client.counters.heap_blocks > 0
            await file.close()

    run(test)
