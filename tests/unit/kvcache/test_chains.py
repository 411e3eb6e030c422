"""Chains that rest are left out, and an operation that began with a chain ends with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import trio

from kvfs.common.boundary.clock import SystemClock
from kvfs.common.errors import ConnectionLost, UnknownChain
from kvfs.kvcache import CacheConfig
from kvfs.kvcache.chains import Chains
from kvfs.kvcache.outcomes import SpaceCounters


class _Storage:
    """Knows of no chain's version."""

    @property
    def routing(self) -> Any:
        return self

    def chain(self, chain: int) -> Any:
        raise UnknownChain(f"chain {chain}")


def test_an_operation_goes_on_with_a_chain_that_it_tried() -> None:
    async def main() -> None:
        counters = SpaceCounters()
        made = Chains(_Storage(), CacheConfig(rest_s=0.05, rest_max_s=30, trial_s=0.25), SystemClock(), counters)  # type: ignore[arg-type]
        asked: list[tuple[list[int], bool]] = []

        async def ask(chains: Sequence[int], limit_s: float) -> None:
            asked.append((list(chains), limit_s <= 0.25))

        groups = {1: [0, 2], 2: [1]}
        end_s = SystemClock().monotonic() + 5
        made.trouble(2, ConnectionLost("gone"), 1, 5.0)
        await made.ask(groups, ask, end_s)
        assert asked == [([1], False)] and counters.resting == 1 and counters.failed == 1
        await trio.sleep(0.06)
        asked.clear()
        await made.ask(groups, ask, end_s)
        assert sorted(asked) == [([1], False), ([2], True)], "the rest is over: one operation tries, with a deadline of its own"
        asked.clear()
        await made.ask(groups, ask, end_s)
        assert asked == [([1], False)] and counters.resting == 2, "others wait for its outcome"
        asked.clear()
        await made.ask(groups, ask, end_s, begun={2})
        assert sorted(asked) == [([1], False), ([2], True)] and counters.resting == 2
        made.well(2)
        asked.clear()
        await made.ask(groups, ask, end_s)
        assert asked == [([1, 2], False)]

    trio.run(main)
