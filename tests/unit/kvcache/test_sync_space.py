"""The face for threads, over a real cluster that runs in a thread of the test."""

from __future__ import annotations

import os
import random
import threading
import traceback
from collections.abc import Callable

import pytest
from tests.unit.kvcache.test_space import BLOCK, PARAMS, PRESENT, STORED, block, buffers, key

from kvfs.client import Client
from kvfs.common.errors import BadHandle, InvalidArgument, NotFound, SpaceDiffers
from kvfs.kvcache import KVCache, Space, SpaceParams


def test_everything_once(cache: KVCache) -> None:
    space = cache.create("s", PARAMS)
    keys, blocks = [key(number) for number in range(10)], [block(number) for number in range(10)]
    assert space.put(keys[:8], blocks[:8]) == [STORED] * 8
    assert space.put(keys, blocks) == [PRESENT] * 8 + [STORED] * 2
    assert space.exists([*keys, key(99)]) == [True] * 10 + [False]
    assert space.match_keys([*keys[:4], key(99), *keys[4:]]) == 4
    with space.buffers(10) as registered:
        assert space.get(keys, registered) == [BLOCK] * 10
        assert [bytes(each) for each in registered] == blocks
    into = buffers(2, 100)
    assert space.get_range([keys[3], key(99)], 1000, 100, into) == [100, None] and bytes(into[0]) == blocks[3][1000:1100]
    tokens = list(range(20))
    space.put(space.keys(tokens)[:3], blocks[:3])
    assert space.match(tokens) == 12 and space.match(tokens, b"salt") == 0
    space.touch(keys)
    assert space.remove(keys[:1]) == [True] and not space.exists(keys[:1])[0]
    assert space.counters.stored == 13 and not space.dropped
    assert space.stats().blocks == 12 == cache.stats("s").blocks
    assert cache.list() == {"s": space.params}
    assert (space.name, space.block_tokens, space.block_bytes) == ("s", 4, BLOCK)


def test_errors_are_those_of_the_tree(cache: KVCache) -> None:
    with pytest.raises(NotFound):
        cache.open("nothing")
    space = cache.create("s", PARAMS)
    with pytest.raises(SpaceDiffers, match="model"):
        cache.open("s", SpaceParams(block_tokens=4, block_bytes=BLOCK, model="other", dtype="bf16"))
    with pytest.raises(InvalidArgument):
        space.get([b"short"], buffers(1))
    with pytest.raises(InvalidArgument):
        space.match(["a"])  # type: ignore[list-item]


def test_many_threads(cache: KVCache) -> None:
    space = cache.create("s", PARAMS)
    wrong: list[str] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(15):
                numbers = chance.sample(range(60), 8)
                space.put([key(number) for number in numbers], [block(number) for number in numbers])
                into = buffers(8)
                assert space.get([key(number) for number in numbers], into) == [BLOCK] * 8
                assert [bytes(each) for each in into] == [block(number) for number in numbers]
        except BaseException:
            wrong.append(traceback.format_exc())

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong, wrong[0]
    assert space.counters.stored == space.stats().stored <= 60


def in_child(body: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            body()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_child_goes_on_with_connections_of_its_own(cache: KVCache) -> None:
    space: Space = cache.create("s", PARAMS)
    space.put([key(1)], [block(1)])
    registered = space.buffers(1)

    def child() -> None:
        assert space.get([key(1)], registered) == [BLOCK] and bytes(registered[0]) == block(1)
        assert space.put([key(2)], [block(2)]) == [STORED]

    assert in_child(child) == 0
    assert space.exists([key(1), key(2)]) == [True, True]
    assert bytes(registered[0]) == block(1)  # the memory is shared with the child
    registered.close()


def test_after_the_end_of_the_client(client: Client) -> None:
    cache = KVCache(client)
    space = cache.create("late", PARAMS)
    cache.drop("late")
    client.close()
    with pytest.raises((BadHandle, OSError)):
        space.exists([key(1)])
