"""Reading open files over fake services: holes, read-ahead, lent views, what others changed, and services that do not answer."""

from __future__ import annotations

import random

import pytest
import trio
from tests.unit.client.fakes import CHUNK, run, world
from tests.unit.client.handles import nothing_is_held, opened

from kvfs.client.config import ClientConfig
from kvfs.common.errors import DeadlineExceeded


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
