"""Spaces on a whole cluster in one trio run: what is stored is found, what is wrong is refused, what is down is a miss."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from tests.unit.client.fakes import run
from tests.unit.client.whole import Whole, whole

from kvfs.client.async_client import AsyncClient
from kvfs.client.block_placement import BlockPlacement
from kvfs.client.config import ClientConfig
from kvfs.common.errors import (
    AlreadyExists,
    ArgumentTooBig,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    NotPermitted,
    OutOfRange,
    ReadOnly,
    SpaceDiffers,
    VersionMismatch,
)
from kvfs.common.ids import is_space
from kvfs.common.wire import base_pb2, identity
from kvfs.kvcache import AsyncKVCache, AsyncSpace, CacheConfig, Put, SpaceParams, async_space, life
from kvfs.kvcache.keys import chain, digest

BLOCK = 40_000
PARAMS = SpaceParams(block_tokens=4, block_bytes=BLOCK, model="m", dtype="bf16")
STORED, PRESENT, REFUSED = Put.STORED, Put.PRESENT, Put.REFUSED


def key(number: int) -> bytes:
    return hashlib.blake2b(b"%d" % number, digest_size=16).digest()


def block(number: int, length: int = BLOCK) -> bytes:
    return random.Random(number).randbytes(length)


def buffers(count: int, size: int = BLOCK) -> list[bytearray]:
    return [bytearray(size) for _ in range(count)]


@asynccontextmanager
async def space(
    params: SpaceParams = PARAMS, config: CacheConfig | None = None, **cluster: Any
) -> AsyncIterator[tuple[AsyncSpace, AsyncKVCache, Whole]]:
    async with whole(**{"storage": 1, "replicas": 1, **cluster}) as made, made.client() as client:
        cache = AsyncKVCache(client, config)
        yield await cache.create("s", params), cache, made


async def eventually(check: Callable[[], Awaitable[bool]], limit_s: float = 15) -> None:
    with trio.fail_after(limit_s):
        while not await check():
            await trio.sleep(0.05)


def test_put_get_exists_match() -> None:
    async def test() -> None:
        async with space(storage=3, replicas=2) as (made, _, _):
            keys = [key(number) for number in range(20)]
            blocks = [block(number, BLOCK - number * 100) for number in range(20)]
            assert await made.exists(keys) == [False] * 20
            assert await made.put(keys[:15], blocks[:15]) == [STORED] * 15
            assert await made.put(keys[10:], blocks[10:], prefix=keys[:10]) == [PRESENT] * 5 + [STORED] * 5
            chance = random.Random(1)
            order = [chance.choice([*range(20), *range(100, 110)]) for _ in range(60)]  # misses among the hits, some keys twice
            into = buffers(60)
            expected = [BLOCK - number * 100 if number < 20 else None for number in order]
            assert await made.get([key(number) for number in order], into) == expected
            for number, buffer in zip(order, into, strict=True):
                if number < 20:
                    assert bytes(buffer[: BLOCK - number * 100]) == blocks[number]
            assert await made.exists([key(number) for number in order]) == [number < 20 for number in order]
            assert await made.match_keys([*keys[:7], key(100), *keys[7:]]) == 7
            assert await made.match_keys([]) == 0 and await made.get([], []) == [] and await made.put([], []) == [] and await made.exists([]) == []
            counters = made.counters
            assert (counters.stored, counters.present, counters.refused) == (20, 5, 0)
            assert counters.hits + counters.misses == counters.gets == 60 and counters.late == counters.failed == 0

    run(test, 30)


def test_tokens_match_by_their_longest_stored_prefix() -> None:
    async def test() -> None:
        async with space() as (made, _, _):
            prompt = list(range(41))
            keys = made.keys(prompt)
            assert len(keys) == 10 and keys == chain(prompt, 4)
            await made.put(keys[:6], [block(number) for number in range(6)])
            assert await made.match(prompt) == 24
            assert await made.match(prompt[:10]) == 8
            assert await made.match([*prompt[:9], 7, *prompt[10:]]) == 8
            assert await made.match(prompt, salt=b"other tenant") == 0

    run(test)


def test_ranges_are_verified_without_the_rest() -> None:
    async def test() -> None:
        async with space() as (made, _, _):
            data = [block(number, length) for number, length in ((0, BLOCK), (1, BLOCK), (2, 10_000))]
            await made.put([key(0), key(1), key(2)], data)
            for offset, length in ((0, 1), (0, BLOCK), (32_768, 100), (32_700, 200), (5_000, 10_000), (BLOCK - 1, 1)):
                into = buffers(4, length)
                found = await made.get_range([key(1), key(9), key(2), key(0)], offset, length, into)
                assert found == [length, None, max(0, min(length, 10_000 - offset)), length]
                for number, place in ((1, 0), (2, 2), (0, 3)):
                    expected = data[number][offset : offset + length]
                    assert bytes(into[place][: len(expected)]) == expected

    run(test)


def test_shorter_buffers() -> None:
    async def test() -> None:
        async with space() as (made, _, _):
            await made.put([key(0), key(1)], [block(0, 1000), block(1, 2000)])
            into = buffers(2, 1000)
            assert await made.get([key(0), key(1)], into, shorter=True) == [1000, None]
            assert bytes(into[0]) == block(0, 1000)

    run(test)


def test_the_first_writer_wins() -> None:
    async def test() -> None:
        async with space(storage=2, replicas=2) as (one, _, cluster), cluster.client() as other:
            two = await AsyncKVCache(other).open("s", PARAMS)
            outcomes: dict[int, list[tuple[bytes, Put]]] = {number: [] for number in range(60)}

            async def put(handle: AsyncSpace, seed: int) -> None:
                for start in range(0, 60, 6):
                    numbers = list(range(start, start + 6))
                    random.Random(seed + start).shuffle(numbers)
                    blocks = [block(1000 * seed + number) for number in numbers]
                    for number, data, result in zip(numbers, blocks, await handle.put([key(n) for n in numbers], blocks), strict=True):
                        outcomes[number].append((data, result))

            async with trio.open_nursery() as nursery:
                for seed, handle in enumerate((one, two, one, two)):
                    nursery.start_soon(put, handle, seed + 1)
            into = buffers(60)
            assert await two.get([key(number) for number in range(60)], into) == [BLOCK] * 60
            for number, results in outcomes.items():
                winners = [data for data, result in results if result is STORED]
                assert len(winners) == 1 and [result for _, result in results].count(PRESENT) == 3
                assert bytes(into[number]) == winners[0]

    run(test, 30)


def test_the_same_key_twice_in_one_put() -> None:
    async def test() -> None:
        async with space() as (made, _, _):
            assert await made.put([key(1), key(2), key(1)], [block(1), block(2), block(3)]) == [STORED, STORED, PRESENT]
            into = buffers(1)
            assert await made.get([key(1)], into) == [BLOCK] and bytes(into[0]) == block(1)

    run(test)


def test_a_put_of_what_is_there_sends_no_block_where_it_would_travel() -> None:
    async def test() -> None:
        async with whole(storage=1, replicas=1) as cluster, cluster.client() as client:
            made = await AsyncKVCache(client).create("s", SpaceParams(block_tokens=4, block_bytes=1 << 20))
            keys, blocks = [key(number) for number in range(8)], [block(number, 1 << 20) for number in range(8)]
            client.storage.nearby = lambda chain_id: False  # type: ignore[method-assign]
            assert await made.put(keys[:4], blocks[:4]) == [STORED] * 4
            written = client.counters.writes
            assert await made.put(keys, blocks) == [PRESENT] * 4 + [STORED] * 4
            assert client.counters.writes == written + 4

    run(test)


def test_one_request_for_each_node() -> None:
    async def test() -> None:
        async with whole(storage=2, replicas=1) as cluster, cluster.client() as client:
            made = await AsyncKVCache(client).create("s", PARAMS)
            keys = [key(number) for number in range(100)]
            await made.put([key(number) for number in range(200, 220)], [b"warm"] * 20)  # the services have only just learnt of their chains
            before = client.counters.write_requests
            await made.put(keys, [block(number) for number in range(100)])
            assert client.counters.write_requests - before == 2
            assert await made.get(keys, buffers(100)) == [BLOCK] * 100
            assert (client.counters.place_requests, client.counters.read_requests) == (2, 0), "they lie on this machine: places are asked for"
        apart = ClientConfig(buffer_pool_bytes=64 << 20, shared_memory=False)
        async with whole(storage=2, replicas=1) as cluster, cluster.client(config=apart) as client:
            made = await AsyncKVCache(client).create("s", PARAMS)
            await made.put(keys, [block(number) for number in range(100)])
            assert await made.get(keys, buffers(100)) == [BLOCK] * 100
            assert (client.counters.place_requests, client.counters.read_requests) == (0, 2)

    run(test)


def test_remove_and_touch() -> None:
    async def test() -> None:
        async with space(storage=2, replicas=2) as (made, _, _):
            keys = [key(number) for number in range(6)]
            await made.put(keys, [block(number) for number in range(6)])
            assert await made.remove([keys[1], key(99), keys[4]]) == [True] * 3
            assert await made.exists(keys) == [True, False, True, True, False, True]
            await made.touch(keys)
            assert await made.put([keys[1]], [block(50)]) == [STORED]
            into = buffers(1)
            assert await made.get([keys[1]], into) == [BLOCK] and bytes(into[0]) == block(50)

    run(test)


def test_long_keys_are_digested() -> None:
    async def test() -> None:
        async with space() as (made, _, _):
            long = [bytes([number]) * 32 for number in range(4)]
            await made.put(long, [block(number) for number in range(4)])
            assert await made.exists(long) == [True] * 4 == await made.exists([digest(each) for each in long])

    run(test)


def test_wrong_arguments_are_refused_before_anything_is_sent() -> None:
    async def test() -> None:
        async with whole(storage=1, replicas=1) as cluster, cluster.client() as client:
            made = await AsyncKVCache(client).create("s", PARAMS)
            calls = (client.counters.writes, client.counters.reads)
            good = key(1)
            for wrong in (b"short", b"x" * 65):
                for attempt in (
                    lambda wrong=wrong: made.get([good, wrong], buffers(2)),
                    lambda wrong=wrong: made.put([good, wrong], [b"x", b"y"]),
                    lambda wrong=wrong: made.put([good], [b"x"], prefix=[wrong]),
                    lambda wrong=wrong: made.exists([good, wrong]),
                    lambda wrong=wrong: made.match_keys([good, wrong]),
                    lambda wrong=wrong: made.touch([good, wrong]),
                    lambda wrong=wrong: made.remove([good, wrong]),
                ):
                    with pytest.raises(InvalidArgument, match=f"a key of {len(wrong)} bytes"):
                        await attempt()
            with pytest.raises(ArgumentTooBig, match=f"block 1 has {BLOCK + 1} bytes"):
                await made.put([good, key(2)], [b"x", bytes(BLOCK + 1)])
            with pytest.raises(InvalidArgument, match="block 0 is empty"):
                await made.put([good], [b""])
            with pytest.raises(OutOfRange, match="buffer 1 has 100 bytes"):
                await made.get([good, key(2)], [bytearray(BLOCK), bytearray(100)])
            with pytest.raises(ReadOnly, match="buffer 0"):
                await made.get([good], [bytes(BLOCK)])
            with pytest.raises(InvalidArgument, match="buffer 0 is a str"):
                await made.get([good], ["x"])
            with pytest.raises(InvalidArgument, match="not contiguous"):
                await made.get([good], [memoryview(bytearray(2 * BLOCK))[::2]])
            with pytest.raises(InvalidArgument, match="2 keys and 1 buffers"):
                await made.get([good, key(2)], buffers(1))
            with pytest.raises(InvalidArgument, match="1 keys and 2 blocks"):
                await made.put([good], [b"x", b"y"])
            for offset, length in ((-1, 5), (0, 0), (0, BLOCK + 1), (BLOCK, 1)):
                with pytest.raises(InvalidArgument):
                    await made.get_range([good], offset, length, [bytearray(max(length, 1))])
            with pytest.raises(OutOfRange):
                await made.get_range([good], 0, 200, [bytearray(100)])
            assert (client.counters.writes, client.counters.reads) == calls

    run(test)


def test_spaces_by_name() -> None:
    async def test() -> None:
        async with whole(storage=1, replicas=1) as cluster, cluster.client() as client:
            cache = AsyncKVCache(client)
            assert await cache.list() == {}
            with pytest.raises(NotFound, match="there is no space s, and no other either"):
                await cache.open("s")
            made = await cache.create("s", PARAMS)
            assert is_space(made.inode) and (made.params.replication, made.params.table) == (1, 1)
            other = SpaceParams(block_tokens=4, block_bytes=BLOCK, model="m", dtype="fp8", quota_bytes=1 << 30, ttl_s=60, extra={"tp": "1/2"})
            await cache.create("t", other)
            listed = await cache.list()
            assert list(listed) == ["s", "t"] and listed["t"].format == other.format and listed["t"].quota_bytes == 1 << 30
            assert (await client.stat("/kvcache")).mode == 0o1777 and await client.listdir("/kvcache") == ["s", "t"]
            with pytest.raises(AlreadyExists):
                await cache.create("s", PARAMS)
            assert (await cache.create("s", PARAMS, exist_ok=True)).inode == made.inode == (await cache.open("s", PARAMS)).inode
            with pytest.raises(SpaceDiffers, match="dtype is 'fp8' there, 'bf16' was asked for"):
                await cache.open("t", PARAMS)
            with pytest.raises(SpaceDiffers, match="dtype"):
                await cache.create("t", PARAMS, exist_ok=True)
            with pytest.raises(NotFound, match="there is no space u; there are s, t"):
                await cache.open("u")
            await client.mkdir("/kvcache/plain")
            with pytest.raises(InvalidArgument, match="is not a space"):
                await cache.open("plain")
            for name in ("", "a/b", "..", "x" * 256):
                with pytest.raises(InvalidArgument):
                    await cache.open(name)
            with pytest.raises(NotPermitted):
                await client.write_bytes("/kvcache/s/file", b"x")
            with pytest.raises(InvalidArgument, match="quota"):
                SpaceParams(block_tokens=1, block_bytes=1, quota_bytes=0)

    run(test)


def test_a_dropped_space_is_empty_at_once_and_its_disk_space_comes_back() -> None:
    async def test() -> None:
        async with space(storage=2, replicas=2) as (made, cache, cluster), cluster.client() as other:
            elsewhere = await AsyncKVCache(other).open("s")
            keys, blocks = [key(number) for number in range(30)], [block(number) for number in range(30)]
            await made.put(keys, blocks)
            assert await elsewhere.exists(keys) == [True] * 30
            await cache.drop("s")
            assert await made.exists(keys) == [False] * 30
            assert made.dropped and made.counters.dropped == 30

            async def elsewhere_empty() -> bool:
                return not any(await elsewhere.exists(keys))

            await eventually(elsewhere_empty, 3)  # it holds its handle for good still: the blocks are going
            elsewhere.life.suspect()
            assert await elsewhere.get(keys, buffers(30)) == [None] * 30 and elsewhere.dropped
            assert await elsewhere.put(keys, blocks) == [REFUSED] * 30
            again = await cache.create("s", PARAMS)
            assert again.inode != made.inode
            assert await again.exists(keys) == [False] * 30
            assert await again.put(keys[:3], blocks[:3]) == [STORED] * 3

            async def empty() -> bool:
                return all(row.blocks == 0 for row in await other.storage.space_stats(made.inode))

            await eventually(empty)
            assert (await again.stats()).blocks == 3

    run(test, 30)


def test_a_service_that_is_down_is_a_miss_and_the_others_are_served() -> None:
    async def test() -> None:
        config = CacheConfig(get_deadline_s=0.7, put_deadline_s=0.7, rest_s=0.5, trial_s=0.4)
        async with space(storage=2, replicas=1, config=config) as (made, _, cluster):
            keys, blocks = [key(number) for number in range(40)], [block(number) for number in range(40)]
            assert await made.put(keys, blocks, deadline_s=10) == [STORED] * 40
            cluster.stop_storage(0)
            await cluster.over[0].wait()  # places that it told while it stopped would be read for a second and a half
            into = buffers(40)
            with trio.fail_after(3):
                found = await made.get(keys, into)
            hits = [place for place, count in enumerate(found) if count is not None]
            assert 5 < len(hits) < 35
            for place in hits:
                assert bytes(into[place]) == blocks[place]
            assert made.counters.late + made.counters.failed == 40 - len(hits) == made.counters.misses
            with trio.fail_after(0.4):  # its chain rests: nobody waits for it again
                assert [place for place, there in enumerate(await made.exists(keys)) if there] == hits
            assert made.counters.resting == 40 - len(hits)
            new, fresh = [key(number) for number in range(100, 120)], [block(number) for number in range(20)]
            assert set(await made.put(new, fresh)) <= {STORED, REFUSED}
            await cluster.start_storage(0)

            async def back() -> bool:
                return await made.exists(keys) == [True] * 40

            await eventually(back)
            assert await made.get(keys, into) == [BLOCK] * 40
            assert [bytes(buffer) for buffer in into] == blocks

    run(test, 40)


def test_a_replica_that_dies_is_not_noticed() -> None:
    async def test() -> None:
        async with space(storage=3, replicas=2) as (made, _, cluster):
            keys, blocks = [key(number) for number in range(30)], [block(number) for number in range(30)]
            await made.put(keys, blocks)
            cluster.stop_storage(1)
            into = buffers(30)
            assert await made.get(keys, into) == [BLOCK] * 30
            assert [bytes(buffer) for buffer in into] == blocks
            new = [key(number) for number in range(50, 60)]
            assert await made.put(new, blocks[:10]) == [STORED] * 10
            assert await made.exists(keys + new) == [True] * 40

    run(test, 40)


def test_reads_go_on_and_puts_do_not_while_nobody_can_say_whether_the_space_is_there() -> None:
    async def test() -> None:
        config = CacheConfig(trust_s=0.3, refresh_s=0.2, check_s=0.2)
        async with whole(storage=1, replicas=1) as cluster, cluster.client() as client:
            made = await AsyncKVCache(client, config).create("s", PARAMS)
            assert await made.put([key(1)], [block(1)]) == [STORED]

            async def away(*_: Any, **__: Any) -> Any:
                await trio.sleep_forever()

            asked, client.meta.get_attr = client.meta.get_attr, away  # type: ignore[method-assign]
            await trio.sleep(0.4)
            assert await made.exists([key(1)]) == [True]
            assert await made.put([key(2)], [block(2)]) == [REFUSED] and made.counters.unchecked == 1
            started = trio.current_time()
            for _ in range(20):
                assert await made.get([key(1)], buffers(1)) == [BLOCK]
            assert trio.current_time() - started < 0.5  # not every operation waits for the answer
            client.meta.get_attr = asked  # type: ignore[method-assign]

    run(test)


def test_a_handle_in_use_is_renewed_beside_its_operations() -> None:
    async def test() -> None:
        config = CacheConfig(trust_s=10, refresh_s=0.2)
        async with whole(storage=1, replicas=1) as cluster, cluster.client() as client:
            made = await AsyncKVCache(client, config).create("s", PARAMS)
            asked = []
            get_attr = client.meta.get_attr

            async def slow(inodes: Any, **options: Any) -> Any:
                asked.append(inodes)
                await trio.sleep(1.0)
                return await get_attr(inodes, **options)

            client.meta.get_attr = slow  # type: ignore[method-assign]
            await made.put([key(1)], [block(1)])
            end = trio.current_time() + 2.5
            while trio.current_time() < end:
                started = trio.current_time()
                assert await made.exists([key(1)]) == [True]
                assert trio.current_time() - started < 0.8
                await trio.sleep(0.02)
            assert 1 <= len(asked) <= 3 and made.life.left_s() > 20

    run(test)


def test_statistics() -> None:
    async def test() -> None:
        async with space(storage=2, replicas=2) as (made, cache, _):
            keys = [key(number) for number in range(10)]
            await made.put(keys, [block(number, 30_000) for number in range(10)])
            await made.put(keys, [block(number, 30_000) for number in range(10)])
            await made.exists([*keys, key(99)])
            stats = await cache.stats("s")
            assert (stats.blocks, stats.bytes, stats.block_space) == (10, 300_000, 10 * 40_960)
            assert (stats.stored, stats.present, stats.hits, stats.misses) == (10, 10, 10, 1)
            assert stats.params == made.params and stats.name == "s"

    run(test)


def test_evicting_by_hand() -> None:
    async def test() -> None:
        async with space() as (made, _, _):
            keys = [key(number) for number in range(12)]
            await made.put(keys, [block(number) for number in range(12)])
            await trio.sleep(0.05)  # the touches of the put
            assert await made.evict(5) == 5
            assert await made.exists(keys) == [True] * 7 + [False] * 5  # touched together: the deepest go first
            with pytest.raises(InvalidArgument):
                await made.evict(-1)

    run(test)


def test_evicting_by_hand_where_the_blocks_are() -> None:
    """Not an equal share of each chain, where some hold nothing."""

    async def test() -> None:
        async with space(storage=2) as (made, _, _):
            last = made.chain_ids[-1]
            assert len(made.chain_ids) > 1
            place = BlockPlacement(made.chain_ids)
            keys = [key(number) for number in range(400) if place.chain(key(number)) == last][:5]
            await made.put(keys, [block(1)] * 5)
            assert await made.evict(1) == 1 and await made.evict(3) == 3 and await made.evict(1 << 70) == 1 and await made.evict(1) == 0

    run(test)


def test_a_deadline_that_was_too_short_says_nothing_about_the_chains() -> None:
    async def test() -> None:
        async with space() as (made, _, _):
            assert await made.put([key(1)], [block(1)]) == [STORED]
            for short in (0, -1, 1e-9):
                assert await made.exists([key(1)], deadline_s=short) == [False]
                assert await made.get([key(1)], buffers(1), deadline_s=short) == [None]
                assert await made.put([key(2)], [block(2)], deadline_s=short) == [REFUSED]
                assert await made.remove([key(1)], deadline_s=short) == [False]
            assert await made.exists([key(1)]) == [True]
            assert await made.get([key(1)], buffers(1)) == [BLOCK]
            assert made.counters.resting == 0
            for wrong in (float("nan"), "5"):
                with pytest.raises(InvalidArgument, match="number of seconds"):
                    await made.get([key(1)], buffers(1), deadline_s=wrong)  # type: ignore[arg-type]
            with pytest.raises(InvalidArgument, match="bytes from 1"):
                await made.get_range([key(1)], 1.5, 2, buffers(1))  # type: ignore[arg-type]

    run(test)


def test_a_put_may_last_longer_than_its_handle_is_good_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes in parts, and before each the space is known to be there."""

    async def test() -> None:
        monkeypatch.setattr(async_space, "PART_BLOCKS", 4)
        monkeypatch.setattr(life, "HANDLE_LIFE_S", 1.0)
        monkeypatch.setattr(life, "GAP_S", 0.05)
        async with space(config=CacheConfig(trust_s=0.5, refresh_s=0.2)) as (made, _, _):
            really = made._storage.write_each

            async def slowly(writes: Any, *, deadline_s: float) -> Any:
                needed_s = 0.075 * len(writes)
                await trio.sleep(min(needed_s, deadline_s))
                return [DeadlineExceeded("slow")] * len(writes) if needed_s > deadline_s else await really(writes, deadline_s=deadline_s)

            monkeypatch.setattr(made._storage, "write_each", slowly)
            keys = [key(number) for number in range(22)]
            assert await made.put([*keys, keys[0]], [block(number, 100) for number in range(22)] + [b"other"]) == [STORED] * 22 + [PRESENT]
            assert await made.exists(keys) == [True] * 22

    run(test)


def test_a_block_that_is_damaged_everywhere_can_be_put_again() -> None:
    """Else it was a miss for every reader and present for every writer."""

    async def test() -> None:
        async with space(storage=1) as (made, _, cluster):
            keys = [key(number) for number in range(3)]
            await made.put(keys, [block(number) for number in range(3)])
            damaged = 0
            for path in cluster.folder.glob("storage-0/targets/*/data/*"):
                data = bytearray(path.read_bytes())
                at = data.find(block(1)[:64])
                if at >= 0:
                    data[at + 20_000] ^= 1
                    path.write_bytes(data)
                    damaged += 1
            assert damaged == 1
            assert await made.get(keys, buffers(3)) == [BLOCK, None, BLOCK]
            await eventually(lambda: _all_false(made, keys[1]))
            assert await made.put(keys, [block(number) for number in range(3)]) == [PRESENT, STORED, PRESENT]
            into = buffers(3)
            assert await made.get(keys, into) == [BLOCK] * 3 and into[1] == block(1)
            # Bytes that the caller himself spoils are no reason to remove anything.
            made.gets._spoilt.look_at(made._placement.chain(keys[0]), keys[0])
            await trio.sleep(0.3)
            assert await made.exists(keys) == [True] * 3

    async def _all_false(made: AsyncSpace, one: bytes) -> bool:
        return await made.exists([one]) == [False]

    run(test)


def test_a_client_of_another_protocol_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with whole(storage=1, replicas=1) as cluster:
            hello = identity.Identity.hello

            def older(self: identity.Identity) -> bytes:
                made = base_pb2.Hello.FromString(hello(self))
                if made.role == "client":
                    made.version_min, made.version_max = 0, identity.PROTOCOL_MIN - 1
                return made.SerializeToString()

            monkeypatch.setattr(identity.Identity, "hello", older)
            with pytest.raises(VersionMismatch, match="speaks protocol versions"):
                async with cluster.client(config=ClientConfig(deadline_s=2.0)) as client:
                    assert isinstance(client, AsyncClient)
                    await AsyncKVCache(client).list()

    run(test)
