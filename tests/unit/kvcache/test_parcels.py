"""Blocks on their way out: hashed as they are sent, copied into registered memory where they lie elsewhere, and the copies come back."""

from __future__ import annotations

import random
import time
from typing import Any

import trio
from tests.unit.client.fakes import run
from tests.unit.kvcache.test_space import STORED, block, key, space

from kvfs.client import Client
from kvfs.client.file.memory import Memory, RegisteredBuffer
from kvfs.client.peers import Counters
from kvfs.common.checksum import checksums
from kvfs.common.transport.region import BufferPool, Region, Span
from kvfs.kvcache import KVCache, SpaceParams
from kvfs.kvcache.buffers import to_send
from kvfs.kvcache.parcels import Parcel, _pieces, give_back, hash_registered, make_ready

MIB = 1 << 20
SIZES = (3 * MIB + 5, 100, 40_000, MIB, 16 << 10)


def test_what_is_sent_has_the_checksums_that_go_with_it() -> None:
    async def main() -> None:
        memory = Memory(BufferPool(64 * MIB, region=Region.private(64 * MIB)), Counters())
        free = memory.pool.free_bytes
        with RegisteredBuffer(4 * MIB) as registered:
            blocks: list[Any] = [random.Random(size).randbytes(size) for size in SIZES]
            registered.view[: SIZES[0]] = blocks[0]
            parcels = [Parcel(to_send(block, 0)) for block in [*blocks, registered.view[: SIZES[0]]]]
            hash_registered(parcels)
            assert [parcel.checksums is not None for parcel in parcels] == [False] * 5 + [True]
            await make_ready(parcels, memory)
            assert [isinstance(parcel.data, Span) for parcel in parcels] == [True, False, True, True, True, True]
            for parcel, expected in zip(parcels, [*blocks, blocks[0]], strict=True):
                data = parcel.data
                sent = data.view if isinstance(data, Span) else data
                assert sent == expected and parcel.checksums == checksums(expected)
            assert memory.pool.free_bytes < free
            give_back(parcels)
            give_back(parcels)
            assert memory.pool.free_bytes == free
            del sent, data, parcels, parcel
        memory.close()

    trio.run(main)


def test_the_work_for_many_small_blocks_grows_as_they_do() -> None:
    parcels = [Parcel(to_send(b"b" * 24, place)) for place in range(50_000)]
    began_s = time.process_time()
    assert len(_pieces(parcels)) == 50_000 * 24 // (512 << 10) + 1
    assert time.process_time() - began_s < 3


def test_without_room_for_copies_blocks_go_as_they_lie() -> None:
    async def main() -> None:
        memory = Memory(BufferPool(4 * MIB, region=Region.private(4 * MIB)), Counters())
        blocks = [random.Random(number).randbytes(MIB) for number in range(5)]
        parcels = [Parcel(to_send(block, 0)) for block in blocks]
        await make_ready(parcels, memory)
        copied = [parcel.copy is not None for parcel in parcels]
        assert copied.count(True) in (2, 3) and memory.pool.free_bytes >= MIB, "others want memory too"
        assert [parcel.checksums for parcel in parcels] == [checksums(block) for block in blocks]
        give_back(parcels)
        memory.close()

    trio.run(main)


def test_large_blocks_from_any_memory_arrive(client: Client) -> None:
    size = 2 * MIB
    cache = KVCache(client)
    made = cache.create("large", SpaceParams(block_tokens=4, block_bytes=size))
    blocks = [random.Random(number).randbytes(size - 1000 * number) for number in range(6)]
    with made.buffers(6) as buffers:
        buffers[1][: len(blocks[1])] = blocks[1]
        given: list[Any] = [blocks[0], buffers[1][: len(blocks[1])], bytearray(blocks[2]), memoryview(blocks[3]), blocks[4], blocks[5]]
        free = client.portal.client.pool.free_bytes
        keys = [key(number) for number in range(6)]
        assert made.put(keys, given) == [STORED] * 6
        assert client.portal.client.pool.free_bytes == free
        assert made.get(keys, buffers) == [len(block) for block in blocks]
        assert [bytes(view[: len(block)]) for view, block in zip(buffers, blocks, strict=True)] == blocks
    cache.drop("large")


def test_a_put_that_is_cancelled_gives_its_copies_back() -> None:
    async def test() -> None:
        async with space(SpaceParams(block_tokens=4, block_bytes=4 * MIB)) as (made, _, _):
            pool = made._client.pool
            free = pool.free_bytes
            with trio.CancelScope() as scope:
                scope.cancel()
                await made.put([key(1), key(2)], [block(1, 2 * MIB), block(2, 2 * MIB)])
            assert scope.cancelled_caught
            with trio.fail_after(5):
                while pool.free_bytes != free:
                    await trio.sleep(0.01)

    run(test)
