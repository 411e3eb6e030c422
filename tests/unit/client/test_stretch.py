"""Writing from a writer's own thread: what pwrite promises is true of stretches too, and no byte comes in after one is over."""

from __future__ import annotations

import random
import threading

import pytest
import trio
from tests.unit.client.fakes import CHUNK, World, run, world
from tests.unit.client.handles import nothing_is_held, opened

from kvfs.client.config import ClientConfig
from kvfs.client.file import stretch as module
from kvfs.client.file.open_file import OpenFile
from kvfs.client.file.stretch import Stretch
from kvfs.common.errors import Busy, NoSpace

DATA = random.Random(1).randbytes(8 * CHUNK)


async def stretched(file: OpenFile, offset: int) -> Stretch:
    made = await file.stretch(offset)
    assert made is not None
    return made


def put(stretch: Stretch, data: bytes) -> int:
    return stretch.put(stretch.end, memoryview(data))


def requests(place: World) -> int:
    return place.client.counters.write_requests


def sent_bytes(place: World) -> int:
    return place.client.counters.written_bytes


def test_what_was_put_is_seen_at_once_by_all_handles() -> None:
    async def test() -> None:
        async with world() as place:
            place.meta.make(7)
            file, other = opened(place, 7), opened(place, 7)
            await file.pwrite(0, [DATA[:100]])
            token = other.token
            stretch = await stretched(file, 100)
            assert put(stretch, DATA[100 : 3 * CHUNK]) == 3 * CHUNK - 100
            assert requests(place) == 0
            assert other.token != token
            assert file.length == other.length == other.attributes().length == 3 * CHUNK
            assert other.attributes().mtime_ns > 0
            assert bytes(await other.pread(0, 4 * CHUNK)) == DATA[: 3 * CHUNK]
            assert put(stretch, DATA[3 * CHUNK : 3 * CHUNK + 5]) == 5
            assert bytes(await file.pread(CHUNK, 4 * CHUNK)) == DATA[CHUNK : 3 * CHUNK + 5]
            await other.close()
            await file.close()
            assert place.content(7) == DATA[: 3 * CHUNK + 5]
            assert place.meta.inodes[7].length == 3 * CHUNK + 5
            nothing_is_held(place)
            assert place.client._back.dirty_bytes == place.client._back._sent_bytes == 0

    run(test)


def test_a_flush_sends_all_and_what_is_put_later_is_refused() -> None:
    async def test() -> None:
        async with world() as place:
            place.meta.make(7)
            file = opened(place, 7)
            stretch = await stretched(file, 0)
            put(stretch, DATA[: CHUNK + 9])
            await file.flush()
            assert sent_bytes(place) == CHUNK + 9
            assert put(stretch, b"late") == 0
            await file.fsync()
            assert place.meta.inodes[7].length == CHUNK + 9
            await file.close()
            assert place.content(7) == DATA[: CHUNK + 9]

    run(test)


def test_bytes_put_elsewhere_or_by_two_threads_at_once_are_refused() -> None:
    async def test() -> None:
        async with world() as place:
            place.meta.make(7)
            file = opened(place, 7)
            stretch = await stretched(file, 0)
            assert stretch.put(1, memoryview(DATA[:10])) == 0
            stretch._inside["writer"] = threading.current_thread()
            assert put(stretch, DATA[:10]) == 0
            stretch._inside.clear()
            assert put(stretch, DATA[:10]) == 10
            await file.close()
            assert place.content(7) == DATA[:10]

    run(test)


def test_a_stretch_ends_with_its_memory() -> None:
    async def test() -> None:
        async with world(nodes=1, config=ClientConfig(dirty_max_bytes=1 << 20, buffer_pool_bytes=32 << 20)) as place:
            place.meta.make(7)
            file = opened(place, 7)
            stretch = await stretched(file, 5)
            assert put(stretch, DATA[5:]) == 4 * CHUNK - 5, "a quarter of the dirty bytes that are allowed"
            again = await stretched(file, 4 * CHUNK)
            with trio.fail_after(5):
                while sent_bytes(place) < 4 * CHUNK - 5:  # who wants more hands over what is full
                    await trio.sleep(0.01)
            assert put(again, DATA[4 * CHUNK :]) == 4 * CHUNK
            await file.close()
            assert place.content(7) == bytes(5) + DATA[5:]
            sent = [io for request in place.storage[0].writes for io in request.writes]
            assert sorted(io.length for io in sent) == [CHUNK - 5] + [CHUNK] * 7
            assert len(place.storage[0].writes) == 2, "what is handed over together goes out together"
            nothing_is_held(place)

    run(test)


def test_a_write_in_the_middle_of_what_was_put_has_the_right_checksums() -> None:
    async def test() -> None:
        async with world() as place:
            place.meta.make(7)
            file = opened(place, 7)
            stretch = await stretched(file, 100)
            put(stretch, DATA[: CHUNK - 300])
            expected = bytearray(bytes(100) + DATA[: CHUNK - 300])
            for offset, size in ((200, 10), (32768 - 5, 10), (32768, 1), (CHUNK - 250, 60)):
                await file.pwrite(offset, [b"#" * size])
                expected[offset : offset + size] = b"#" * size
            await file.close()
            assert place.content(7) == expected
            assert place.client.counters.write_retries == 0

    run(test)


def test_an_error_of_the_sending_comes_out_of_the_next_write_once() -> None:
    async def test() -> None:
        async with world(nodes=1) as place:
            place.meta.make(7)
            place.storage[0].fail_writes = [NoSpace("full")]
            file = opened(place, 7)
            await file.pwrite(0, [DATA[:CHUNK]])
            stretch = await stretched(file, CHUNK)
            put(stretch, DATA[CHUNK : CHUNK + 10])
            await trio.sleep(0.05)
            assert put(stretch, b"more") == 0
            with pytest.raises(NoSpace):
                await file.stretch(stretch.end)
            again = await stretched(file, stretch.end)
            put(again, b"more")
            await file.close()
            assert place.content(7)[CHUNK:] == DATA[CHUNK : CHUNK + 10] + b"more"

    run(test)


def test_truncates_and_other_clients_end_a_stretch() -> None:
    async def test() -> None:
        async with world(clients=2) as place:
            place.meta.lease_ms = 60_000
            place.meta.make(7)
            file, other = opened(place, 7), opened(place, 7)
            stretch = await stretched(file, 0)
            put(stretch, DATA[:CHUNK])
            await other.truncate(10)
            assert put(stretch, b"x") == 0
            stretch = await stretched(file, CHUNK)
            put(stretch, DATA[:20])
            await place.clients[1].truncate_inode(7, 0)
            await place.meta.revoke(7)
            assert put(stretch, b"x") == 0
            stretch = await stretched(file, 5)
            put(stretch, b"end")
            await other.close()
            await file.close()
            assert place.content(7)[:8] == bytes(5) + b"end"

    run(test)


def test_a_stretch_that_nobody_fills_does_not_keep_others_from_writing() -> None:
    async def test() -> None:
        async with world(nodes=1, config=ClientConfig(dirty_max_bytes=1 << 20, buffer_pool_bytes=32 << 20, dirty_age_s=60)) as place:
            files = []
            for number in range(7, 7 + 12):
                place.meta.make(number)
                files.append(opened(place, number))
            stretches = [await stretched(file, 0) for file in files]
            for file in files:
                await file.pwrite(0, [DATA[: 2 * CHUNK]])
            assert sum(put(stretch, b"x") for stretch in stretches) == 0
            for file in files:
                await file.close()
            assert all(place.content(file.inode) == DATA[: 2 * CHUNK] for file in files)
            nothing_is_held(place)

    run(test)


def test_a_writer_waits_when_enough_of_its_file_is_on_its_way() -> None:
    async def test() -> None:
        config = ClientConfig(dirty_max_bytes=4 << 20, write_ahead_bytes=1 << 20, buffer_pool_bytes=32 << 20)
        async with world(nodes=1, config=config) as place:
            place.meta.make(7)
            hold = place.storage[0].hold = trio.Event()
            file = opened(place, 7)
            for turn in range(2):
                assert put(await stretched(file, turn << 20), bytes([turn]) * (2 << 20)) == 1 << 20
            with trio.move_on_after(0.05) as waits:
                await file.stretch(2 << 20)  # one is on its way, the other ends now and is too much
            assert waits.cancelled_caught
            assert place.client._back.dirty_bytes <= 3 << 20
            hold.set()
            assert put(await stretched(file, 2 << 20), b"x") == 1
            await file.close()
            assert place.content(7) == bytes(1 << 20) + b"\1" * (1 << 20) + b"x"

    run(test)


def test_old_bytes_are_sent_and_a_lease_ends_the_stretch() -> None:
    async def test() -> None:
        async with world(config=ClientConfig(dirty_age_s=0.02)) as place:
            place.meta.make(7)
            file = opened(place, 7)
            stretch = await stretched(file, 0)
            put(stretch, DATA[:10])
            await trio.sleep(0.1)
            assert sent_bytes(place) == 10
            stretch = await stretched(file, 10)
            stretch.until = 0.0
            assert put(stretch, b"x") == 0
            await file.close()

    run(test)


def test_a_flush_that_waits_for_one_writer_is_not_upset_by_the_next() -> None:
    async def test() -> None:
        async with world(config=ClientConfig(dirty_max_bytes=1 << 20, buffer_pool_bytes=32 << 20, dirty_age_s=60)) as place:
            place.meta.make(7)
            file, other = opened(place, 7), opened(place, 7)
            first = await stretched(file, 0)
            put(first, DATA[:10])
            first._inside["writer"] = object()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(file.flush)
                await trio.sleep(0.02)
                second = await stretched(other, 20 * CHUNK)
                third = await stretched(other, 40 * CHUNK)
                put(third, DATA[:10])
                first._inside.clear()
                first._tell()
            assert sent_bytes(place) in (10, 20)
            put(second, DATA[:10])
            await other.close()
            await file.close()
            assert sent_bytes(place) == 30
            nothing_is_held(place)

    run(test)


def test_who_waits_for_a_writer_inside_waits_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with world() as place:
            place.meta.make(7)
            file = opened(place, 7)
            stretch = await stretched(file, 0)
            put(stretch, DATA[:10])
            inside = stretch._inside
            inside["writer"] = object()
            monkeypatch.setattr(module, "GONE_S", 0.05)
            with pytest.raises(Busy):
                await file.flush()
            monkeypatch.setattr(module, "GONE_S", 10.0)

            def leave() -> None:
                inside.clear()
                stretch._tell()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(file.flush)
                await trio.sleep(0.02)
                assert requests(place) == 0
                await trio.to_thread.run_sync(leave)
            assert sent_bytes(place) == 10
            await file.close()

    run(test)
