"""One block put by the thread that calls: right, and where anything is in the way it goes the ordinary way and ends the same."""

from __future__ import annotations

import os
import random
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
from tests.unit.kvcache.test_space import BLOCK, PARAMS, PRESENT, REFUSED, STORED, block, buffers, key

from kvfs.client import Client
from kvfs.client.lines import LINES_MAX, Lines
from kvfs.common.errors import ConnectionLost, DeadlineExceeded, InvalidArgument
from kvfs.common.wire.line import Line
from kvfs.kvcache import KVCache, Space
from kvfs.kvcache.buffers import BlockBuffers


@pytest.fixture
def made(cache: KVCache) -> Space:
    return cache.create("s", PARAMS)


@pytest.fixture
def registered(made: Space) -> Iterator[BlockBuffers]:
    with made.buffers(8) as memory:
        for number in range(8):
            memory[number][:] = block(number)
        yield memory


@pytest.fixture
def crossings(client: Client, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What went through the client's thread."""
    seen: list[str] = []
    real = client.portal.call
    monkeypatch.setattr(client.portal, "call", lambda function, *arguments: (seen.append("call"), real(function, *arguments))[1])
    return seen


def lines_of(client: Client) -> Lines:
    lines = client.portal.client.lines
    assert lines is not None
    return lines


def assert_there(space: Space, *numbers: int) -> None:
    into = buffers(len(numbers))
    assert space.get([key(number) for number in numbers], into) == [BLOCK] * len(numbers)
    assert [bytes(each) for each in into] == [block(number) for number in numbers]


def test_it_is_stored_without_the_clients_thread(made: Space, registered: BlockBuffers, crossings: list[str]) -> None:
    made.put([key(0)], [registered[0]])
    undisturbed = 0
    for number, memory, expected in (*((number, number, STORED) for number in range(1, 8)), (3, 5, PRESENT)):  # the first writer wins
        crossings.clear()
        fresh, changes = made._space.life.fresh, made._space.life._changes
        assert made.put([key(number)], [registered[memory]]) == [expected]
        if fresh and made._space.life._changes == changes:  # else it asks whether the space is still there: news of its creation may be late
            undisturbed += 1
            assert not crossings
    assert undisturbed >= 4
    counters = made.counters
    assert (counters.puts, counters.stored, counters.present, counters.stored_bytes) == (9, 8, 1, 8 * BLOCK)
    assert_there(made, *range(8))
    for wrong in ([b"short"], []):
        with pytest.raises(InvalidArgument):
            made.put(wrong, [registered[0]])
    with pytest.raises(InvalidArgument):
        made.put([key(9)], [registered[0]], prefix=[b"short"])
    assert made.exists([key(9)]) == [False]


def test_its_prefix_is_used_with_it(made: Space, registered: BlockBuffers) -> None:
    """The oldest go first: the prefix was put first, and then used again with the last block."""
    for number in range(4):
        made.put([key(number)], [registered[number]])
    made.put([key(4)], [registered[4]], prefix=[key(0), key(1)])
    left = range(5)
    for _ in range(200):  # touches are told in the background
        if made.evict(1):
            left = [number for number in left if made.exists([key(number)])[0]]
            if len(left) <= 3:
                break
    assert set(left) <= {0, 1, 4} or len(made._space.chain_ids) > 1


@pytest.mark.parametrize("error", [ConnectionLost("gone"), DeadlineExceeded("late")])
@pytest.mark.parametrize("done", [False, True])
def test_nobody_knows_what_became_of_it(
    made: Space, registered: BlockBuffers, crossings: list[str], monkeypatch: pytest.MonkeyPatch, done: bool, error: Exception
) -> None:
    real = Line.call

    def call(self: Line, *arguments: Any, **more: Any) -> Any:
        if done:
            real(self, *arguments, **more)
        self.broken = True
        raise error

    monkeypatch.setattr(Line, "call", call)
    assert made.put([key(1)], [registered[1]]) == [PRESENT if done else STORED] and crossings == ["call"]
    assert_there(made, 1)


def test_a_chain_that_has_changed_is_asked_the_ordinary_way(client: Client, made: Space, registered: BlockBuffers, crossings: list[str]) -> None:
    made.put([key(0)], [registered[0]])
    lines = lines_of(client)
    heads = lines._picture.heads
    for chain, head in list(heads.items()):
        assert head is not None
        heads[chain] = head._replace(chain_version=head.chain_version + 7)
    before = len(crossings)
    for number in range(1, 8):
        assert made.put([key(number)], [registered[number]]) == [STORED]
    assert len(crossings) > before
    assert_there(made, *range(8))


def test_bytes_that_change_meanwhile_are_not_stored(made: Space, registered: BlockBuffers, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Line.call

    def call(self: Line, *arguments: Any, **more: Any) -> Any:
        registered[2][77] ^= 1
        return real(self, *arguments, **more)

    monkeypatch.setattr(Line, "call", call)
    assert made.put([key(2)], [registered[2]]) == [REFUSED] and made.counters.corrupt == 1
    assert made.exists([key(2)]) == [False]


def test_other_memory_and_other_ways(cache: KVCache, made: Space, crossings: list[str]) -> None:
    assert made.put([key(1)], [block(1)]) == [STORED] and crossings == ["call"]
    with made.buffers(1) as memory:
        memory[0][:] = block(2)
        made._space.life.suspect()
        assert made.put([key(2)], [memory[0]]) == [STORED], "it is asked first whether the space is there"
        assert made.put([key(3)], [memory[0]], deadline_s=0) == [REFUSED] and len(crossings) == 3
        cache.drop("s")
        assert made.put([key(3)], [memory[0]]) == [REFUSED] and made.dropped
    assert made.counters.dropped


def test_many_threads_and_no_more_lines_than_allowed(client: Client, made: Space) -> None:
    wrong: list[str] = []
    start = threading.Barrier(LINES_MAX + 4)

    def work(seed: int) -> None:
        try:
            start.wait(20)
            with made.buffers(1) as memory:
                for turn in range(4):
                    number = random.Random(seed * 100 + turn).randrange(60)
                    memory[0][:] = block(number)
                    assert made.put([key(number)], [memory[0]])[0]
                    assert_there(made, number)
        except BaseException:
            wrong.append(traceback.format_exc())

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(LINES_MAX + 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong, wrong[0]
    lines = lines_of(client)
    assert 0 < sum(len(each) for each in lines._idle.values()) == lines._open <= LINES_MAX
    lines.close()
    assert made.put([key(99)], [block(99)]) == [STORED]


def test_lines_to_services_that_are_no_more_make_room(client: Client, made: Space, registered: BlockBuffers) -> None:
    made.put([key(0)], [registered[0]])
    lines = lines_of(client)
    lines._open = LINES_MAX
    [old, *_] = [server for server, each in lines._idle.items() if each]
    gone = lines._idle.pop(old)
    lines._idle["gone"] = gone
    for number in range(1, 8):
        assert made.put([key(number)], [registered[number]]) == [STORED]
    assert not gone and lines._open <= LINES_MAX


def test_a_child_opens_lines_of_its_own(made: Space, registered: BlockBuffers) -> None:
    assert made.put([key(0)], [registered[0]]) == [STORED]
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            registered[1][:] = block(1)
            code = 0 if made.put([key(1)], [registered[1]]) == [STORED] else 2
        finally:
            os._exit(code)
    assert made.put([key(2)], [registered[2]]) == [STORED]
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert_there(made, 0, 1, 2)
