"""KV-cache spaces on real processes: found again after a restart of everything, right or a miss while services are killed, a miss in time while one
is stopped, gone with their disk space when dropped."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from tests.cluster.test_lifecycle import wait_for

from kvfs.client import Client
from kvfs.kvcache import CacheConfig, KVCache, Put, Space, SpaceParams

if TYPE_CHECKING:
    from tests.cluster.conftest import RealCluster

pytestmark = pytest.mark.cluster

BLOCK = 300_000
PARAMS = SpaceParams(block_tokens=16, block_bytes=BLOCK, model="m", dtype="bf16")
SECONDS = float(os.environ.get("KVFS_KV_SECONDS", "10"))
SEED = int(os.environ.get("KVFS_KV_SEED", "1"))


def key(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()


def content(number: int, writer: int = 0) -> bytes:
    """What this writer puts under the key: every byte depends on both, and so does the length."""
    chance = random.Random(number * 1000 + writer)
    return chance.randbytes(BLOCK - chance.randrange(5) * 7000)


def assert_there(space: Space, numbers: range) -> None:
    with space.buffers(len(numbers)) as into:
        found = space.get([key(number) for number in numbers], into)
        for number, length, buffer in zip(numbers, found, into, strict=True):
            assert length is not None and bytes(buffer[:length]) == content(number), f"block {number}: {length}"


def test_everything_is_found_again_after_a_restart_of_all_processes(new_cluster: Callable[[], RealCluster]) -> None:
    cluster = new_cluster()
    cluster.up("--storage", "3", "--replicas", "2")
    numbers = range(40)
    with Client(str(cluster.path)) as one, Client(str(cluster.path)) as two:
        first, second = KVCache(one).create("s", PARAMS), KVCache(two).open("s", PARAMS)
        results = [
            *first.put([key(number) for number in numbers[:25]], [content(number) for number in numbers[:25]]),
            *second.put([key(number) for number in numbers[15:]], [content(number) for number in numbers[15:]]),
        ]
        assert results.count(Put.STORED) == 40 and results.count(Put.PRESENT) == 10
        assert_there(first, numbers)
        time.sleep(1.5)  # statistics are written once a second
    cluster.kvfs("down")
    cluster.up()
    with Client(str(cluster.path)) as client:
        cache = KVCache(client)
        space = cache.open("s", PARAMS)
        wait_for(lambda: all(space.exists([key(number) for number in numbers])), 30, "all blocks are found again")
        assert_there(space, numbers)
        assert space.put([key(3)], [b"other"]) == [Put.PRESENT]
        wait_for(lambda: cluster.serving() == [2] * len(cluster.serving()), 30, "all replicas serve again")
        stats = cache.stats("s")
        assert (stats.blocks, stats.stored) == (40, 40) and stats.hits >= 40
    report = cluster.json("fsck")
    assert report["clean"], report["problems"]


def test_a_dropped_space_gives_its_disk_space_back_and_fsck_knows(new_cluster: Callable[[], RealCluster]) -> None:
    cluster = new_cluster()
    cluster.up("--storage", "2", "--replicas", "2")
    with Client(str(cluster.path)) as client:
        cache = KVCache(client)
        space = cache.create("s", PARAMS)
        kept = cache.create("kept", PARAMS)
        keys, blocks = [key(number) for number in range(30)], [content(number) for number in range(30)]
        for each in (space, kept):
            assert each.put(keys, blocks) == [Put.STORED] * 30
        report = cluster.json("fsck")
        assert report["clean"] and report["chunks"] == 2 * 2 * 30, report
        with pytest.raises(PermissionError):
            client.write_bytes("/kvcache/s/file", b"x")
        client.rmdir("/kvcache/s")
        assert cache.list().keys() == {"kept"}
        wait_for(lambda: not any(space.exists(keys)), 20, "nothing is found any more")
        wait_for(lambda: cluster.json("fsck")["chunks"] == 2 * 30, 20, "the blocks are removed")
        report = cluster.json("fsck")
        assert report["clean"], report["problems"]
        assert_there(kept, range(30))


def test_full_spaces_are_packed_before_and_after_churn(new_cluster: Callable[[], RealCluster]) -> None:
    """As `kvfs kv stat` shows it: at least 97 % of what is taken from the disks are block bytes; and the disks have it back after a drop."""
    cluster = new_cluster()
    cluster.up("--storage", "3", "--replicas", "1")

    def taken() -> int:
        return sum(file.stat().st_blocks * 512 for file in cluster.path.rglob("targets/*/data/*"))

    def packed() -> bool:
        return all(stat["packing"] >= 0.97 for stat in cluster.json("kv", "stat"))

    with Client(str(cluster.path)) as client:
        cache = KVCache(client)
        for name, size, count, batch in (("small", 65_536, 640, 64), ("large", 4_497_408, 40, 4)):
            params = SpaceParams(block_tokens=64, block_bytes=size, model="m", quota_bytes=size * count)
            space, block = cache.create(name, params), random.Random(size).randbytes(size)
            for start in range(0, 3 * count, batch):
                space.put([key(number) for number in range(start, start + batch)], [block] * batch)
                if start + batch == count:
                    wait_for(packed, 15, f"{name} is packed when it is full")
            wait_for(packed, 15, f"{name} is packed after churn")
            stats = cache.stats(name)
            assert stats.evicted >= 2 * count and stats.blocks >= 0.9 * count
        assert taken() <= 1.04 * sum(cache.stats(name).bytes for name in ("small", "large"))
        cache.drop("small")
        cache.drop("large")
        wait_for(lambda: taken() < 1 << 20, 30, "the space is the disks' again")
    report = cluster.json("fsck")
    assert report["clean"], report["problems"]


def test_a_service_that_is_stopped_is_a_miss_in_time(new_cluster: Callable[[], RealCluster]) -> None:
    cluster = new_cluster()
    cluster.up("--storage", "2", "--replicas", "1", "--no-restart")
    numbers = range(40)
    with Client(str(cluster.path)) as client:
        space = KVCache(client, CacheConfig(get_deadline_s=1.0, rest_s=0.5)).create("s", PARAMS)
        assert space.put([key(number) for number in numbers], [content(number) for number in numbers]) == [Put.STORED] * 40
        pid = cluster.process("storage-1")["pid"]
        with space.buffers(40) as into:
            os.kill(pid, signal.SIGSTOP)
            try:
                start = time.monotonic()
                found = space.get([key(number) for number in numbers], into)
                assert time.monotonic() - start < 3.0
                hits = [number for number in numbers if found[number] is not None]
                assert 5 < len(hits) < 35 and space.counters.late == 40 - len(hits)
                for number in hits:
                    assert bytes(into[number][: found[number]]) == content(number)
                for number in set(numbers) - set(hits):
                    into[number][:] = b"u" * BLOCK  # used for something else
            finally:
                os.kill(pid, signal.SIGCONT)
            time.sleep(1.0)  # it answers now, too late
            for number in set(numbers) - set(hits):
                assert bytes(into[number]) == b"u" * BLOCK
            wait_for(lambda: all(space.exists([key(number) for number in numbers])), 30, "everything is found again")
        assert_there(space, numbers)


def test_two_clients_while_services_are_killed(new_cluster: Callable[[], RealCluster]) -> None:
    """The first writer's bytes or a miss, never anything else, and never another's afterwards; what was stored is there in the end."""
    print(f"seed {SEED}")
    cluster = new_cluster()
    cluster.up("--storage", "3", "--replicas", "2")
    seen: dict[int, tuple[int, bytes]] = {}
    stored: dict[int, int] = {}
    wrong: list[str] = []
    lock = threading.Lock()
    busy = range(80)
    candidates = {number: {who: hashlib.sha256(content(number, who)).digest() for who in (1, 2)} for number in busy}
    stopping = threading.Event()

    def note(number: int, digest: tuple[int, bytes]) -> None:
        with lock:
            assert seen.setdefault(number, digest) == digest, f"block {number} changed"

    def run(writer: int, space: Space) -> None:
        chance = random.Random(SEED * 100 + writer)
        try:
            with space.buffers(6) as into:
                while not stopping.is_set():
                    numbers = chance.sample(busy, 6)
                    if chance.random() < 0.5:
                        blocks: list[bytes | memoryview] = [content(number, writer) for number in numbers]
                        if chance.random() < 0.7:  # one, by this thread itself
                            numbers, lone = numbers[:1], into[0][: len(blocks[0])]
                            lone[:], blocks = blocks[0], [lone]
                        results = space.put([key(number) for number in numbers], blocks, deadline_s=8)
                        with lock:
                            for number, result in zip(numbers, results, strict=True):
                                if result is Put.STORED:
                                    assert number not in stored, f"block {number} was stored twice"
                                    stored[number] = writer
                    else:
                        found = space.get([key(number) for number in numbers], into, deadline_s=4)
                        for number, length, buffer in zip(numbers, found, into, strict=True):
                            if length is not None:
                                digest = hashlib.sha256(buffer[:length]).digest()
                                writers = [who for who, expected in candidates[number].items() if expected == digest]
                                assert writers, f"block {number}: bytes that nobody put there"
                                note(number, (writers[0], digest))
        except BaseException:
            wrong.append(traceback.format_exc())

    with Client(str(cluster.path)) as one, Client(str(cluster.path)) as two:
        config = CacheConfig(rest_s=0.2, rest_max_s=0.5)
        spaces = [KVCache(one, config).create("s", PARAMS), KVCache(two, config).open("s", PARAMS)]
        threads = [threading.Thread(target=run, args=(writer, space)) for writer, space in enumerate(spaces, 1)]
        for thread in threads:
            thread.start()
        chance = random.Random(SEED)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end and not wrong:
            time.sleep(chance.uniform(0.2, 1.0))
            victim = cluster.process(f"storage-{chance.randrange(1, 4)}")
            if victim["state"] == "running":
                os.kill(victim["pid"], signal.SIGKILL)
            time.sleep(chance.uniform(2.0, 4.0))  # a service needs that to be back
        wait_for(lambda: len(stored) > 20 or bool(wrong), 90, "blocks are stored between the kills")
        stopping.set()
        for thread in threads:
            thread.join(60)
        assert not wrong, wrong[0]
        wait_for(lambda: cluster.serving() == [2] * len(cluster.serving()), 90, "all replicas serve again")
        for number, writer in stored.items():
            assert seen.get(number, (writer, b""))[0] == writer, f"block {number}: stored by {writer}, and read as another's"
        time.sleep(1)
        for space in spaces:
            numbers = sorted(stored)
            into = [bytearray(BLOCK) for _ in numbers]
            for number, length, buffer in zip(numbers, space.get([key(number) for number in numbers], into, deadline_s=20), into, strict=True):
                assert length is not None, f"block {number} was acknowledged and is lost"
                assert bytes(buffer[:length]) == content(number, stored[number])
    report = cluster.json("fsck")
    assert report["clean"], report["problems"]
