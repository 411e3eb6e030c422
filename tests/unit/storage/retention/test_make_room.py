"""A write that waits for blocks to go is told when none will."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio

from kvfs.common.boundary.clock import SystemClock
from kvfs.storage.retention import evict, keeper
from kvfs.storage.retention.keeper import Keeper
from kvfs.storage.retention.retention import Retention


def test_a_target_that_may_no_longer_evict_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was the head when the write asked, and is not when its turn comes: the write's deadline is far, and its chain has another head."""

    async def main() -> None:
        clock = SystemClock()
        host: Any = SimpleNamespace(clock=clock, config=SimpleNamespace(target_capacity_bytes=1))
        target: Any = SimpleNamespace(retention=Retention(clock, None), tasks=trio.CancelScope())
        target.retention.table(1).put(bytes(16), 1, 1)
        monkeypatch.setattr(evict, "may_evict", lambda *_: True)
        monkeypatch.setattr(keeper, "may_evict", lambda *_: False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Keeper(host).evict, target)
            with trio.fail_after(10):
                assert not await evict.make_room(host, target, clock.monotonic() + 60)
            nursery.cancel_scope.cancel()

    trio.run(main)
