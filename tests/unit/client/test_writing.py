"""Writing open files over fake services: every byte, write-behind, appends, errors, how much is kept."""

from __future__ import annotations

import random

import pytest
import trio
from tests.unit.client.fakes import CHUNK, run, world
from tests.unit.client.handles import nothing_is_held, opened

from kvfs.client.config import ClientConfig
from kvfs.client.file.open_file import OpenFile
from kvfs.common.errors import BadHandle, InputOutput, NoSpace
from kvfs.common.wire import cluster_pb2


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


def test_fsync_syncs_a_target_that_is_being_brought_up_to_date_too() -> None:
    """It may serve, and be the last, before anybody syncs what it took meanwhile."""

    async def test() -> None:
        async with world(nodes=2, chains=3) as place:
            for chain in place.routing.message.chains:
                chain.targets[1].state = cluster_pb2.SYNCING
            place.routing.update()
            place.meta.make(7)
            file = opened(place, 7)
            await file.pwrite(0, [b"x" * (2 * CHUNK)])
            await file.fsync()
            assert sorted(target for storage in place.storage for target in storage.synced) == [1001, 1002, 2001, 2002]
            await file.close()

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
