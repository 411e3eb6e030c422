"""Blocks that go, on real storage services: which ones, on all replicas alike, and what readers see meanwhile."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import trio
from block_world import BLOCK_BYTES, INODE, Blocks, block_world, content, digest

from kvfs.client.storage_blocks import Touch
from kvfs.client.storage_writes import ChunkWrite, WriteDone
from kvfs.common.errors import NoSpace, NotChainHead
from kvfs.common.ids import block_id, chunk_id
from kvfs.common.wire import storage_pb2 as pb
from kvfs.common.wire.service import method


async def until(blocks: Blocks, keys: list[int], *, among: int, seconds: float = 15) -> None:
    """Exactly these are there, soon, on every replica."""
    found: list[int] = []
    with trio.move_on_after(seconds):
        while True:
            found = [key for key, there in enumerate(await blocks.present(range(among))) if there]
            if found == keys and {stats.blocks for stats in (await blocks.stats()).values()} == {len(keys)}:
                return
            await trio.sleep(0.05)
    raise AssertionError(f"{found} are there instead of {keys}")


def touch(blocks: Blocks, *keys: int) -> None:
    blocks.client.touch([Touch(blocks.chain, INODE, b"".join(map(digest, keys)))])


def test_quota_keeps_what_was_touched_last_on_all_replicas(tmp_path: Path) -> None:
    async def main() -> None:
        async with block_world(tmp_path, replicas=2) as blocks:
            blocks.space.quota_bytes = 10 * BLOCK_BYTES
            for key in range(10):
                await blocks.put([key])
            assert await blocks.present([0, 1, 2], touch=True) == [True] * 3  # the last one first: 2, 1, 0
            await blocks.put([10, 11, 12, 13])
            await until(blocks, [0, 1, 2, 7, 8, 9, 10, 11, 12, 13], among=14)
            for key in (9, 8, 7):  # any replica may answer, and tells the head within a tick
                await blocks.get([key])
                await trio.sleep(1.2)
            await blocks.put([14, 15, 16])
            await until(blocks, [7, 8, 9, 10, 11, 12, 13, 14, 15, 16], among=17)
            await blocks.put([17, 18, 19, 20, 21])
            await until(blocks, [7, 8, 14, 15, 16, 17, 18, 19, 20, 21], among=22)
            assert await blocks.world.assert_identical(blocks.chain) == 10
            stats = (await blocks.stats()).values()
            assert sum(one.evicted for one in stats) == 12 and sum(one.stored for one in stats) == 22

    trio.run(main)


def test_the_heads_of_a_process_keep_to_a_quota_together(tmp_path: Path) -> None:
    async def main() -> None:
        async with block_world(tmp_path, targets=3) as blocks:
            assert len(list(blocks.world.routing.chains)) == 3
            blocks.space.quota_bytes = 10 * BLOCK_BYTES  # each

            async def put(place: int, keys: range) -> None:
                blocks.place = place
                assert all(isinstance(done, WriteDone) for done in await blocks.put(keys))
                await trio.sleep(0.01)  # the order of touches is told by the millisecond

            async def there(place: int) -> list[int]:
                blocks.place = place
                return [key for key, found in enumerate(await blocks.present(range(40))) if found]

            async def become(*expected: list[int]) -> None:
                with trio.move_on_after(10):
                    while [await there(place) for place in range(3)] != list(expected):
                        await trio.sleep(0.05)
                assert [await there(place) for place in range(3)] == list(expected)

            await put(0, range(4))
            await put(2, range(6))
            await put(1, range(20))  # over its own share, and nothing has to go
            await trio.sleep(1.5)
            await become(list(range(4)), list(range(20)), list(range(6)))
            await put(2, range(6, 9))  # the three oldest go, and they lie on another chain
            await become([3], list(range(20)), list(range(9)))
            await put(0, range(4, 9))
            await become([4, 5, 6, 7, 8], list(range(20)), [4, 5, 6, 7, 8])

    trio.run(main)


def test_a_quota_that_shrinks_counts_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with block_world(tmp_path) as blocks:
            await blocks.put(range(30))
            blocks.space.quota_bytes, blocks.space.version = 5 * BLOCK_BYTES, 2
            await blocks.put([30])
            with trio.fail_after(10):
                while (await blocks.stats()).popitem()[1].blocks != 5:
                    await trio.sleep(0.02)
            blocks.space.quota_bytes, blocks.space.version = 0, 1  # an older word is none
            await blocks.put([31])
            assert (await blocks.stats()).popitem()[1].quota_bytes == 5 * BLOCK_BYTES

    trio.run(main)


def test_blocks_expire_when_nobody_touches_them(tmp_path: Path) -> None:
    async def main() -> None:
        async with block_world(tmp_path, replicas=2) as blocks:
            blocks.space.ttl_ms = 3000
            await blocks.put(range(6))
            began = time.monotonic()
            while time.monotonic() - began < 5:
                touch(blocks, 5, 4)
                await trio.sleep(0.2)
            await until(blocks, [4, 5], among=6, seconds=5)
            stats = (await blocks.stats()).values()
            assert sum(one.expired for one in stats) == 4 and sum(one.evicted for one in stats) == 0

    trio.run(main)


def test_a_full_target_makes_room_before_it_refuses(tmp_path: Path) -> None:
    async def main() -> None:
        settings: dict[str, object] = {"target_capacity_bytes": 32 << 20}
        async with block_world(tmp_path, replicas=2, settings=settings) as blocks:
            data = b"b" * 250_000
            blocks.sizes(len(data))
            stored = 0
            for key in range(400):
                [done] = await blocks.put([key], [data])
                stored += isinstance(done, WriteDone)
                if key % 50 == 0:
                    await blocks.present([0], touch=True)  # it stays
            assert stored == 400
            before: list[pb.KvSpaceStats] = []
            with trio.fail_after(10):
                while (stats := list((await blocks.stats()).values())) != before:  # until it has come to rest
                    before = stats
                    await trio.sleep(1.2)
            assert all(one.block_space <= 0.9 * (32 << 20) for one in stats)
            there = await blocks.present(range(400))
            assert there[0] and all(there[-80:]) and not any(there[1:200])
            assert stats[0].block_space >= 0.8 * (32 << 20), "no more than has to"
            assert await blocks.world.assert_identical(blocks.chain) == sum(there)

    trio.run(main)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_file_is_not_refused_while_blocks_can_go(tmp_path: Path, replicas: int) -> None:
    """A cache must not keep out what people save: faster than the eviction of every tick, too."""

    async def main() -> None:
        settings: dict[str, object] = {"target_capacity_bytes": 64 << 20}
        async with block_world(tmp_path, replicas=replicas, settings=settings) as blocks:
            data = b"b" * 250_000
            blocks.sizes(len(data))
            for key in range(300):
                assert isinstance((await blocks.put([key], [data]))[0], WriteDone)
            chunk = b"f" * (1 << 20)
            saved = 0
            while saved < 56:
                writes = [ChunkWrite(blocks.chain, chunk_id(5, saved + more), 0, len(chunk), len(chunk), chunk) for more in range(8)]
                for done in await blocks.client.write_each(writes):
                    assert isinstance(done, WriteDone), f"after {saved} MiB: {done}"
                saved += 8
            more = [ChunkWrite(blocks.chain, chunk_id(6, place), 0, len(chunk), len(chunk), chunk) for place in range(16)]
            refused = [done for done in await blocks.client.write_each(more) if not isinstance(done, WriteDone)]
            assert refused and all(isinstance(error, NoSpace) for error in refused), refused
            assert not any(await blocks.present(range(300))), "refused though a block could have gone"
            assert await blocks.world.assert_identical(blocks.chain) >= 56

    trio.run(main)


def test_the_next_head_has_the_same_order(tmp_path: Path) -> None:
    async def main() -> None:
        async with block_world(tmp_path, replicas=3) as blocks:
            await blocks.put(range(20))
            touch(blocks, 3, 2, 1)
            await trio.sleep(0.2)
            # A reader of the last replica: the head hears of it, and tells the second.
            chain = blocks.world.routing.serving(blocks.chain)
            assert await blocks.world.read(blocks.chain, block_id(INODE, digest(7)), 0, BLOCK_BYTES, target=chain[-1]) == content(7)
            await trio.sleep(2.5)
            head = blocks.service_of(chain[0])
            blocks.world.stop(head)
            with trio.fail_after(20):
                while blocks.world.routing.serving(blocks.chain)[0] == chain[0]:
                    await trio.sleep(0.02)
            assert await blocks.client.evict(blocks.chain, INODE, 16) == 16
            await until(blocks, [1, 2, 3, 7], among=20)
            # The one that comes back learns the order from the head, also of what it had itself.
            await blocks.put([30, 31])
            touch(blocks, 30, 2, 7)
            await blocks.world.start(head)
            await blocks.world.settled(3)
            await trio.sleep(2.5)
            for other in blocks.world.routing.serving(blocks.chain)[:-1]:
                blocks.world.stop(blocks.service_of(other))
            with trio.fail_after(20):
                while blocks.world.routing.serving(blocks.chain) != [chain[0]]:
                    await trio.sleep(0.02)
            assert await blocks.client.evict(blocks.chain, INODE, 3) == 3
            await until(blocks, [2, 7, 30], among=32)

    trio.run(main)


def test_order_and_statistics_survive_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        async with block_world(tmp_path) as blocks:
            await blocks.put(range(10))
            touch(blocks, 2, 1, 0)
            await trio.sleep(0.1)
            await blocks.get([5, 99])
            before = (await blocks.stats()).popitem()[1]
            blocks.world.stop(1)
            await blocks.world.start(1)
            await blocks.world.settled(1)
            after = (await blocks.stats()).popitem()[1]
            assert after == before and (after.stored, after.hits, after.misses) == (10, 1, 1)
            assert await blocks.client.evict(blocks.chain, INODE, 6) == 6
            await until(blocks, [0, 1, 2, 5], among=10)

    trio.run(main)


def test_a_read_of_a_block_that_goes_is_right_or_a_miss(tmp_path: Path) -> None:
    """The space of what goes is used again at once, by blocks of other bytes."""

    async def main() -> None:
        async with block_world(tmp_path, replicas=2) as blocks:
            blocks.space.quota_bytes = 30 * BLOCK_BYTES
            keys = range(60)
            found = {True: 0, False: 0}
            over = False

            async def read() -> None:
                while not over:
                    for key, data in zip(keys, await blocks.get(keys), strict=True):
                        assert data is None or data == content(key), f"{key} has other bytes"
                        found[data is None] += 1

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                nursery.start_soon(read)
                for turn in range(12):
                    await blocks.put([(turn * 17 + step) % 60 for step in range(20)])
                over = True
            assert found[True] and found[False]
            with trio.fail_after(10):  # the last eviction may still be under way
                while {one.blocks for one in (await blocks.stats()).values()} != {30}:
                    await trio.sleep(0.02)
            assert await blocks.world.assert_identical(blocks.chain) == 30

    trio.run(main)


def test_a_burst_of_removals_does_not_stop_reads(tmp_path: Path) -> None:
    async def main() -> None:
        async with block_world(tmp_path) as blocks:
            blocks.sizes(4000)
            for first in range(0, 4000, 250):
                await blocks.put(range(first, first + 250), [b"s" * 4000] * 250)
            await blocks.get([3999], 4000)
            waits: list[float] = []
            over = trio.Event()

            async def read() -> None:
                while not over.is_set():
                    began = time.monotonic()
                    assert await blocks.get([3999], 4000) == [b"s" * 4000]
                    waits.append(time.monotonic() - began)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                assert await blocks.client.evict(blocks.chain, INODE, 3900) == 3900
                over.set()
            assert len(waits) > 30, "reads went on between the batches"
            assert (await blocks.stats()).popitem()[1].blocks == 100

    trio.run(main)


def test_only_the_head_evicts(tmp_path: Path) -> None:
    async def main() -> None:
        async with block_world(tmp_path, replicas=2) as blocks:
            await blocks.put(range(4))
            world = blocks.world
            tail = world.routing.tail(blocks.chain)
            request = pb.KvEvictRequest(target_id=tail, inode=INODE, blocks=2)
            with pytest.raises(NotChainHead):
                await world.pool.call(world.routing.addresses_of_target(tail), method("Storage", "KvEvict"), request, timeout_s=5)
            assert await blocks.present(range(4)) == [True] * 4

    trio.run(main)
