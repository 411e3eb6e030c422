"""Blocks read by their places: right bytes or a miss whatever becomes of the places, and the services hear of it."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
from tests.unit.client.fakes import run
from tests.unit.client.whole import Whole
from tests.unit.kvcache.test_space import BLOCK, PARAMS, STORED, block, buffers, eventually, key, space

from kvfs.client import Client
from kvfs.client.config import ClientConfig
from kvfs.client.place import Place, Read
from kvfs.common.boundary.real_disk import RealLentFile
from kvfs.kvcache import AsyncKVCache, KVCache, SpaceParams
from kvfs.kvcache.known import KNOWN_S

MIB = 1 << 20


def data_files(cluster: Whole) -> list[Path]:
    return [path for path in cluster.folder.glob("storage-*/**/*") if path.is_file() and path.stat().st_size >= BLOCK]


def drop_page_cache(cluster: Whole) -> None:
    for path in data_files(cluster):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


@pytest.fixture
def long_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a test takes shall not matter."""
    monkeypatch.setattr("kvfs.kvcache.gets.KNOWN_S", 60.0)


@pytest.mark.usefixtures("long_known")
def test_blocks_whose_places_are_known_are_read_without_a_request_and_the_services_are_told() -> None:
    async def test() -> None:
        async with space(storage=2, replicas=2) as (made, cache, _):
            counters = made.gets._transfers
            keys = [key(number) for number in range(12)]
            await made.put(keys, [block(number, BLOCK - number) for number in range(12)])
            await trio.sleep(0.1)
            into = buffers(13)
            for _ in range(5):
                assert await made.get([*keys, key(99)], into) == [*(BLOCK - number for number in range(12)), None]
            assert [bytes(into[number][: BLOCK - number]) for number in range(12)] == [block(number, BLOCK - number) for number in range(12)]
            assert counters.read_requests == 0 and counters.direct_bytes == 5 * sum(BLOCK - number for number in range(12))
            assert counters.place_requests <= 2 + 4, "one a node, and afterwards only for the one that is not there"
            assert made.counters.hits == 60 and made.counters.misses == 5

            async def told() -> bool:
                return (await cache.stats("s")).hits == 60

            await eventually(told)
            assert (await cache.stats("s")).misses == 5

    run(test)


@pytest.mark.usefixtures("long_known")
def test_what_is_read_without_a_request_is_not_evicted_first() -> None:
    async def test() -> None:
        async with space() as (made, _, _):
            keys = [key(number) for number in range(10)]
            await made.put(keys, [block(number) for number in range(10)])
            await made.get(keys, buffers(10))
            for kept in (keys[7], keys[3]):
                assert await made.get([kept], buffers(1)) == [BLOCK]
            await trio.sleep(0.3)
            assert await made.evict(8) == 8
            assert [number for number, there in enumerate(await made.exists(keys)) if there] == [3, 7]

    run(test)


@pytest.mark.usefixtures("long_known")
def test_a_block_that_was_removed_and_its_place_used_for_another_key_is_a_miss() -> None:
    """The reader still believes in the old places, all of which hold other keys' bytes by now."""

    async def test() -> None:
        async with space() as (reader, _, made), made.client() as other:
            writer = await AsyncKVCache(other).open("s", PARAMS)
            keys = [key(number) for number in range(20)]
            await reader.put(keys, [block(number) for number in range(20)])
            assert await reader.get(keys, buffers(20)) == [BLOCK] * 20
            assert await writer.remove(keys) == [True] * 20
            await other.storage.sync(reader.chain_ids)  # freed blocks may be used from here on
            into = buffers(20)
            stale = 0
            for start in range(100, 1000, 50):
                fresh = list(range(start, start + 50))
                assert await writer.put([key(number) for number in fresh], [block(number) for number in fresh]) == [STORED] * 50
                for place, count in enumerate(await reader.get(keys, into)):
                    assert count is None or bytes(into[place]) == block(place), "another key's bytes"
                stale = reader.gets._transfers.places_stale
                if stale == 20:
                    break
            assert stale == 20, "no place was used again: the test tests nothing"
            assert await reader.get(keys, into) == [None] * 20 and not len(reader.gets.known)
            assert await writer.put(keys[:1], [block(5)]) == [STORED]
            assert await reader.get(keys[:2], into[:2]) == [BLOCK, None] and bytes(into[0]) == block(5)

    run(test, 60)


def test_what_others_remove_is_a_miss_soon_and_what_this_handle_removes_at_once() -> None:
    async def test() -> None:
        async with space() as (reader, _, made), made.client() as other:
            writer = await AsyncKVCache(other).open("s", PARAMS)
            keys = [key(number) for number in range(4)]
            await reader.put(keys, [block(number) for number in range(4)])
            assert await reader.get(keys, buffers(4)) == [BLOCK] * 4
            assert await reader.remove(keys[:1]) == [True]
            assert await reader.get(keys, buffers(4)) == [None, BLOCK, BLOCK, BLOCK]
            assert await reader.evict(1) == 1
            assert (await reader.get(keys, buffers(4))).count(BLOCK) == 2
            await writer.remove(keys)
            with trio.fail_after(KNOWN_S + 2):
                while await reader.get(keys, buffers(4)) != [None] * 4:  # asking again and again does not keep them alive
                    await trio.sleep(0.01)

    run(test)


@pytest.mark.usefixtures("long_known")
def test_a_space_that_another_client_drops_is_a_miss_although_places_are_known() -> None:
    async def test() -> None:
        async with space() as (reader, _, made), made.client() as other:
            await reader.put([key(1)], [block(1)])
            assert await reader.get([key(1)], buffers(1)) == [BLOCK]
            await AsyncKVCache(other).drop("s")
            with trio.fail_after(5):
                while await reader.get([key(1)], buffers(1)) != [None]:
                    await trio.sleep(0.01)
            assert reader.dropped and reader.counters.dropped > 0

    run(test)


@pytest.mark.usefixtures("long_known")
def test_what_is_not_in_memory_is_read_by_the_service_and_counts_once() -> None:
    async def test() -> None:
        async with space() as (made, cache, cluster):
            keys = [key(number) for number in range(10)]
            await made.put(keys, [block(number) for number in range(10)])
            counters = made.gets._transfers
            drop_page_cache(cluster)
            into = buffers(10)
            assert await made.get(keys, into) == [BLOCK] * 10
            assert [bytes(each) for each in into] == [block(number) for number in range(10)]
            assert counters.read_requests >= 1 and counters.places_stale == 0
            await trio.sleep(0.2)
            assert (await cache.stats("s")).hits == 10
            before = counters.read_requests
            assert await made.get(keys, into) == [BLOCK] * 10 and counters.read_requests == before

    run(test)


@pytest.mark.usefixtures("long_known")
def test_blocks_side_by_side_are_read_with_one_call_and_a_damaged_one_costs_its_neighbours_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 40_960  # blocks that fill their places lie side by side
    calls = []
    real = RealLentFile.try_read_into

    def try_read_into(self: RealLentFile, views: Sequence[memoryview], offset: int) -> int | None:
        calls.append(len(views))
        return real(self, views, offset)

    monkeypatch.setattr(RealLentFile, "try_read_into", try_read_into)

    async def test() -> None:
        async with space(SpaceParams(block_tokens=4, block_bytes=size)) as (made, _, cluster):
            numbers = list(range(60))
            lengths = [size if number % 20 else size - 1000 for number in numbers]  # a shorter one ends its run, and others go on behind it
            blocks = [block(number, length) for number, length in zip(numbers, lengths, strict=True)]
            await made.put([key(number) for number in numbers], blocks)
            counters = made.gets._transfers
            chance = random.Random(1)
            for order in (numbers, numbers[::-1], chance.choices(numbers, k=60)):  # keys twice, too
                into = buffers(60, size)
                calls.clear()
                assert await made.get([key(number) for number in order], into) == [lengths[number] for number in order]
                assert [bytes(each[: lengths[number]]) for each, number in zip(into, order, strict=True)] == [blocks[number] for number in order]
                if order is numbers:
                    assert sum(calls) == 60 and len(calls) <= 20
            assert counters.places_stale == counters.read_requests == 0
            damaged = (7, 8, 31)
            for path in data_files(cluster):
                for number in damaged:
                    at = path.read_bytes().find(blocks[number])
                    if at >= 0:
                        with path.open("r+b") as file:
                            file.seek(at + 35_000)
                            file.write(b"damage")
            into = buffers(60, size)
            found = await made.get([key(number) for number in numbers], into)
            assert found == [None if number in damaged else lengths[number] for number in numbers]
            assert all(bytes(into[number][: lengths[number]]) == blocks[number] for number in numbers if number not in damaged)
            assert counters.places_stale == made.counters.corrupt == len(damaged)

    run(test)


def test_small_blocks_over_tcp_are_the_same_in_memory_or_not() -> None:
    async def test() -> None:
        async with space() as (writer, _, made), made.client(config=ClientConfig(shared_memory=False)) as far:
            reader = await AsyncKVCache(far).open("s", PARAMS)
            numbers = range(40)  # more than is tried without a thread
            keys, blocks = [key(number) for number in numbers], [block(number, BLOCK - number) for number in numbers]
            await writer.put(keys, blocks)
            for cold in (False, True):
                if cold:
                    drop_page_cache(made)
                into = buffers(41)
                assert await reader.get([*keys, key(99)], into) == [*map(len, blocks), None]
                assert [bytes(each[: len(kept)]) for each, kept in zip(into, blocks, strict=False)] == blocks
            assert reader.gets._transfers.read_failovers == 0

    run(test)


@pytest.mark.usefixtures("long_known")
def test_no_time_left_is_a_miss_also_where_places_are_known() -> None:
    async def test() -> None:
        async with space() as (made, _, _):
            keys = [key(number) for number in range(10)]
            await made.put(keys, [block(number) for number in range(10)])
            assert await made.get(keys, buffers(10)) == [BLOCK] * 10
            assert await made.get(keys, buffers(10), deadline_s=-1.0) == [None] * 10
            assert made.counters.late == 10
            assert await made.get(keys, buffers(10)) == [BLOCK] * 10, "the places are still good"

    run(test)


@pytest.mark.usefixtures("long_known")
def test_a_service_that_dies_takes_its_places_with_it() -> None:
    async def test() -> None:
        async with space(storage=2, replicas=2) as (made, _, cluster):
            keys = [key(number) for number in range(20)]
            await made.put(keys, [block(number) for number in range(20)])
            into = buffers(20)
            assert await made.get(keys, into) == [BLOCK] * 20
            cluster.stop_storage(0)
            for _ in range(20):
                found = await made.get(keys, into)
                for number, count in enumerate(found):
                    assert count is None or bytes(into[number]) == block(number)
                await trio.sleep(0.05)
            assert found == [BLOCK] * 20, "the other replica has them"

    run(test)


def test_where_no_places_are_told_none_are_asked_for_again_and_again() -> None:
    async def test() -> None:
        async with space(direct_reads=False) as (made, _, _):
            await made.put([key(1)], [block(1)])
            for _ in range(10):
                into = buffers(1)
                assert await made.get([key(1)], into) == [BLOCK] and bytes(into[0]) == block(1)
            counters = made.gets._transfers
            assert counters.read_requests == 10 and counters.direct_bytes == 0 and counters.place_requests <= 1

    run(test)


@pytest.mark.usefixtures("long_known")
def test_large_blocks_are_read_in_pieces_by_several_threads(client: Client) -> None:
    """Batches of different lengths, keys twice, misses, ranges that begin and end anywhere."""
    size = 3 * MIB + 40_000
    cache = KVCache(client)
    made = cache.create("large", SpaceParams(block_tokens=4, block_bytes=size))
    lengths = [size, 2 * MIB, MIB + 1, 70_000, 5]
    blocks = [random.Random(number).randbytes(length) for number, length in enumerate(lengths)]
    assert made.put([key(number) for number in range(5)], blocks) == [STORED] * 5
    order = [4, 0, 9, 1, 0, 3, 2]
    with made.buffers(len(order)) as into:
        for _ in range(3):
            found = made.get([key(number) for number in order], into)
            assert found == [lengths[number] if number < 5 else None for number in order]
            for number, view in zip(order, into, strict=True):
                if number < 5:
                    assert view[: lengths[number]] == blocks[number]
                    view[:] = bytes(size)
    chance = random.Random(3)
    for _ in range(60):
        offset = chance.randrange(size - 1)
        length = min(chance.choice([1, 1000, 32_768, 600_000, size]), size - offset)
        number = chance.randrange(5)
        into = [bytearray(length)]
        count = max(0, min(length, lengths[number] - offset))
        assert made.get_range([key(number)], offset, length, into) == [count]
        assert into[0][:count] == blocks[number][offset : offset + count]
    transfers = client.portal.client.counters
    assert transfers.read_requests == 0 and transfers.direct_bytes > 20 * MIB
    cache.drop("large")


@pytest.mark.usefixtures("long_known")
def test_one_piece_that_is_wrong_makes_the_block_be_read_through_the_service(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2 * MIB
    cache = KVCache(client)
    made = cache.create("pieces", SpaceParams(block_tokens=4, block_bytes=size))
    blocks = [random.Random(number).randbytes(size) for number in range(3)]
    made.put([key(number) for number in range(3)], blocks)
    keys = [key(number) for number in range(3)]
    into = [bytearray(size) for _ in range(3)]
    assert made.get(keys, into) == [size] * 3
    real = Place.read
    third = made._space.gets.known.find([key(2)])[0]
    assert third is not None

    def read(self: Place, offset: int, view: memoryview, *, nowait: bool = False) -> Read:
        return Read.STALE if self is third and offset == MIB else real(self, offset, view, nowait=nowait)

    monkeypatch.setattr(Place, "read", read)
    into = [bytearray(size) for _ in range(3)]
    assert made.get(keys, into) == [size] * 3 and into == blocks
    transfers = client.portal.client.counters
    assert (transfers.places_stale, transfers.read_requests) == (1, 1)
    cache.drop("pieces")
