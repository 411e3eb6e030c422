"""Memory of blocks: what is recognised as registered, what is refused, and that nobody writes into it after a miss."""

from __future__ import annotations

import os
import threading
from array import array
from typing import Any

import pytest
import trio
from tests.unit.client.fakes import run, world
from tests.unit.kvcache.test_space import BLOCK, PARAMS, block, key

from kvfs.client.block_placement import BlockPlacement
from kvfs.client.file.memory import PAGE_BYTES, RegisteredBuffer, registered_at
from kvfs.common.errors import InvalidArgument, ReadOnly
from kvfs.common.ids import SPACE_BIT, block_id
from kvfs.common.wire import meta_pb2
from kvfs.kvcache import AsyncSpace, BlockBuffers, CacheConfig
from kvfs.kvcache.buffers import Memory, to_fill, to_send


def filled(buffer: Any, place: int, need_bytes: int) -> Memory:
    """As a get makes it where a service is to write."""
    return Memory(to_fill(buffer, place, need_bytes), direct=True)


def test_views_of_registered_memory_are_recognised_whoever_made_them() -> None:
    with BlockBuffers(3, 10_000) as buffers, RegisteredBuffer(8 * PAGE_BYTES) as other:
        for place in range(3):
            memory = filled(buffers[place], place, 10_000)
            assert memory.span is not None and (memory.span.offset, memory.span.length) == (place * 12_288, 10_000)
            assert memory.part(100).length == 100 if not isinstance(memory.part(100), memoryview) else False
        inside = other.view[PAGE_BYTES : 3 * PAGE_BYTES]
        span = filled(inside, 0, 1).span
        assert span is not None and span.offset == PAGE_BYTES and span.region is other.region
        assert filled(other.span(PAGE_BYTES, PAGE_BYTES), 0, 1).span is not None
        assert filled(other, 0, 1).span is not None
        # Not whole pages: it could not be taken from a service again, so a get copies; a put may be read from anywhere.
        for odd in (other.view[100 : 100 + PAGE_BYTES], other.view[: PAGE_BYTES + 100]):
            assert filled(odd, 0, 1).span is None and to_send(odd, 0).span is not None
        assert filled(bytearray(10_000), 0, 1).span is None
    assert registered_at(buffers.memory.address, 10) is None


def test_what_cannot_be_filled() -> None:
    with pytest.raises(ReadOnly):
        to_fill(bytes(10), 0, 1)
    with pytest.raises(InvalidArgument):
        to_fill(7, 0, 1)
    assert len(to_fill(array("d", [0.0] * 4), 0, 32)) == 32


def test_arrays_that_have_no_bytes() -> None:
    numpy = pytest.importorskip("numpy")
    for bad in (numpy.zeros(4, "M8[s]"), numpy.array([object(), None])):
        with pytest.raises(InvalidArgument, match="block 3"):
            to_send(bad, 3)
    assert len(to_send(numpy.zeros((0, 3)), 0).view) == 0
    assert len(to_send(numpy.zeros(3, [("a", "i4"), ("b", ">f8")]), 0).view) == 36


def test_numpy_views() -> None:
    numpy = pytest.importorskip("numpy")
    with BlockBuffers(2, 8192) as buffers:
        one = buffers.numpy(1, "float32", (64, 32))
        one[:] = 1.5
        memory = filled(one, 0, 8192)
        assert memory.span is not None and memory.span.offset == 8192
        assert bytes(buffers[1]) == numpy.full(2048, 1.5, "float32").tobytes()
        with pytest.raises(InvalidArgument, match="not contiguous"):
            to_fill(one[:, ::2], 0, 1)
        one.flags.writeable = False
        with pytest.raises(ReadOnly):
            to_fill(one, 0, 1)
        del one, memory


def test_torch_views() -> None:
    torch = pytest.importorskip("torch")
    with BlockBuffers(2, 8192) as buffers:
        one = buffers.torch(1, torch.bfloat16, (64, 64))
        one.fill_(1.5)
        memory = filled(one, 0, 8192)
        assert memory.span is not None and memory.span.offset == 8192
        own = torch.zeros(4096, dtype=torch.bfloat16)
        to_fill(own, 0, 8192)[:2] = b"\xc0\x3f"
        assert own[0] == 1.5
        with pytest.raises(InvalidArgument, match="not contiguous"):
            to_fill(one.t(), 0, 1)
        del one, memory


def test_a_registry_under_many_threads() -> None:
    def work() -> None:
        for _ in range(100):
            with RegisteredBuffer(2 * PAGE_BYTES) as buffer:
                assert filled(buffer.view, 0, 1).span is not None

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_forsaken_memory_is_out_of_reach() -> None:
    with RegisteredBuffer(4 * PAGE_BYTES) as buffer:
        shared = os.dup(buffer.region.fd or -1)  # what a service holds
        view = buffer.view[PAGE_BYTES : 3 * PAGE_BYTES]
        buffer.view[:] = b"m" * (4 * PAGE_BYTES)
        span = filled(view, 0, 1).span
        assert span is not None
        buffer.forsake(span)
        os.pwrite(shared, b"x" * (4 * PAGE_BYTES), 0)
        assert bytes(view) == bytes(2 * PAGE_BYTES)
        assert bytes(buffer.view[:PAGE_BYTES]) == b"x" * PAGE_BYTES == bytes(buffer.view[3 * PAGE_BYTES :])
        view[:5] = b"still"
        assert bytes(buffer.view[PAGE_BYTES : PAGE_BYTES + 5]) == b"still"
        for again in (view, buffer.view[: 2 * PAGE_BYTES], buffer.view):
            assert filled(again, 0, 1).span is None and to_send(again, 0).span is None
        assert filled(buffer.view[3 * PAGE_BYTES :], 0, 1).span is not None
        os.close(shared)


def test_forsaken_memory_comes_back_when_the_service_has_ended_with_it() -> None:
    with BlockBuffers(3, PAGE_BYTES + 100) as buffers:
        shared = os.dup(buffers.memory.region.fd or -1)
        spans = [filled(buffers[place], 0, 1).span for place in range(3)]
        for place in (2, 0):
            span = spans[place]
            assert span is not None
            span.pin()
            buffers.memory.forsake(span)
        assert [filled(buffers[place], 0, 1).span is None for place in range(3)] == [True, False, True]
        buffers.restore(0)
        os.pwrite(shared, b"x" * 5, 0)
        assert filled(buffers[0], 0, 1).span is None and bytes(buffers[0][:5]) == bytes(5), "it may still be written into"
        assert spans[0] is not None and spans[2] is not None
        spans[0].unpin()
        spans[2].unpin()
        buffers.restore(0)
        os.pwrite(shared, b"y" * 5, 0)
        assert filled(buffers[0], 0, 1).span is not None and bytes(buffers[0][:5]) == b"y" * 5
        assert filled(buffers[2], 0, 1).span is None, "its owner may have something in it"
        buffers.restore(2)
        assert filled(buffers[2], 0, 1).span is not None
        os.close(shared)


class _Held:
    """A fake cluster with one block stored, whose nodes can be made to hang."""

    def __init__(self, made: Any) -> None:
        self.world = made
        record = meta_pb2.Inode(inode=SPACE_BIT | 5, type=meta_pb2.DIRECTORY, nlink=2, space=PARAMS.to_wire())
        record.space.chain_ids.extend([1, 2])
        self.space = AsyncSpace(made.client, "s", record, CacheConfig(get_deadline_s=0.3, rest_s=0))
        for number in (1, 2, 3, 4):
            made.chunks[block_id(self.space.inode, key(number))] = bytearray(block(number))

    def node_of(self, number: int) -> Any:
        chain = BlockPlacement([1, 2]).chain(key(number))
        target = self.world.routing.routing.serving(chain)[0]
        return self.world.storage[target // 1000 - 1]


def test_a_service_that_hangs_never_writes_into_the_buffer_after_the_miss() -> None:
    async def test() -> None:
        async with world(nodes=1, chains=2) as made:
            held = _Held(made)
            with held.space.buffers(2) as buffers:
                assert await held.space.get([key(1), key(2)], buffers) == [BLOCK, BLOCK]
                assert bytes(buffers[0]) == block(1) and bytes(buffers[1]) == block(2)
                node = held.node_of(1)
                node.hold = trio.Event()
                assert await held.space.get([key(3), key(4)], buffers) == [None, None]
                assert held.space.counters.late == 2
                buffers[0][:] = buffers[1][:] = b"u" * BLOCK  # used for something else now
                before = made.client.counters.reads
                node.hold.set()
                await trio.sleep(0.3)  # the service answers: too late
                assert before == made.client.counters.reads
                assert bytes(buffers[0]) == b"u" * BLOCK == bytes(buffers[1])
                node.hold = None
                buffers.restore(1)
                assert await held.space.get([key(3), key(4)], buffers) == [BLOCK, BLOCK]
                assert bytes(buffers[0]) == block(3) and bytes(buffers[1]) == block(4)

    run(test)


def test_a_get_that_is_cancelled_leaves_nothing_behind() -> None:
    async def test() -> None:
        async with world(nodes=1, chains=2) as made:
            held = _Held(made)
            with held.space.buffers(1) as buffers:
                node = held.node_of(1)
                node.hold = trio.Event()
                with trio.move_on_after(0.1):
                    await held.space.get([key(1)], buffers)
                buffers[0][:] = b"u" * BLOCK
                node.hold.set()
                await trio.sleep(0.2)
                assert bytes(buffers[0]) == b"u" * BLOCK

    run(test)


def test_another_replica_answers_while_the_first_hangs() -> None:
    async def test() -> None:
        from kvfs.client.config import ClientConfig

        async with world(nodes=2, chains=2, config=ClientConfig(buffer_pool_bytes=32 << 20, read_attempt_s=0.2)) as made:
            held = _Held(made)
            held.space._config = CacheConfig(get_deadline_s=3, rest_s=0)
            with held.space.buffers(4) as buffers:
                made.storage[0].hold = trio.Event()
                keys = [key(number) for number in (1, 2, 3, 4)]
                assert await held.space.get(keys, buffers) == [BLOCK] * 4
                assert held.space.counters.moved > 0
                made.storage[0].hold.set()
                await trio.sleep(0.2)
                assert [bytes(buffer) for buffer in buffers] == [block(number) for number in (1, 2, 3, 4)]

    run(test)


@pytest.mark.parametrize("limit_s", [0.0, 0.4])
def test_a_deadline_holds_for_the_whole_of_a_large_batch(limit_s: float) -> None:
    """Of hundreds of blocks, which go in several rounds, and with a service that hangs in each."""

    async def test() -> None:
        async with world(nodes=1, chains=2) as made:
            held = _Held(made)
            made.storage[0].silent = True
            keys = [key(number) for number in range(600)]
            with trio.fail_after(limit_s + 1.5):
                assert not any(await held.space.put(keys, [b"x"] * 600, deadline_s=limit_s))
            with trio.fail_after(limit_s + 1.5):
                assert await held.space.get(keys, [bytearray(BLOCK)] * 600, deadline_s=limit_s) == [None] * 600
            assert held.space.counters.late == 1200

    run(test)


def test_what_there_is_no_time_left_for_is_not_begun() -> None:
    async def test() -> None:
        async with world(nodes=1, chains=2) as made:
            held = _Held(made)
            made.storage[0].silent = True
            count = 10 * made.client.config.batch_max_ios
            before = made.client.counters.writes
            assert not any(await held.space.put([key(number) for number in range(count)], [b"x"] * count, deadline_s=0.2))
            assert held.space.counters.late == count
            assert made.client.counters.writes - before <= 2 * made.client.config.batch_max_ios

    run(test)


def test_corrupt_everywhere_is_a_miss() -> None:
    async def test() -> None:
        async with world(nodes=1, chains=2) as made:
            held = _Held(made)
            made.storage[0].corrupt = True
            assert await held.space.get([key(1), key(9)], [bytearray(BLOCK), bytearray(BLOCK)], deadline_s=2.0) == [None, None]
            assert held.space.counters.corrupt == 1 and held.space.counters.hits == 0

    run(test)
