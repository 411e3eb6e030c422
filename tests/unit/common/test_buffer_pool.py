"""The pool of registered memory that wire and client allocate from."""

from __future__ import annotations

import itertools

import pytest
import trio
import trio.testing

from kvfs.common.errors import (
    Overloaded,
)
from kvfs.common.transport.region import BufferPool


def test_pool_is_bounded_and_merges_what_comes_back() -> None:
    pool = BufferPool(1 << 20)
    spans = [pool.allocate(size) for size in (1, 5000, 100_000, 300_000, 4096)]
    places = sorted((span.offset, span.offset + span.length) for span in spans)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(places))
    with pytest.raises(Overloaded):
        pool.allocate(1 << 20)
    for span in spans:
        pool.release(span)
    whole = pool.allocate(1 << 20)
    pool.release(whole)
    with pytest.raises(Exception, match="not held"):
        pool.release(whole)
    with pytest.raises(Exception, match="more than this pool"):
        pool.allocate((1 << 20) + 1)
    pool.close()
    with pytest.raises(Overloaded):
        pool.allocate(1)


def test_pool_serves_waiters_in_turn() -> None:
    async def main() -> None:
        pool = BufferPool(1 << 16)
        held = pool.allocate(1 << 16)
        order: list[int] = []

        async def take(number: int, size: int) -> None:
            span = await pool.acquire(size)
            order.append(number)
            await trio.testing.wait_all_tasks_blocked()
            pool.release(span)

        async with trio.open_nursery() as nursery:
            for number, size in enumerate((1 << 16, 4096, 1 << 16, 8192, 100)):
                nursery.start_soon(take, number, size)
                await trio.testing.wait_all_tasks_blocked()
            with trio.move_on_after(0.01) as scope:
                await pool.acquire(1)
            assert scope.cancelled_caught and not order
            pool.release(held)
        assert order == [0, 1, 2, 3, 4] and pool.free_bytes == 1 << 16

    trio.run(main)
