"""Simulated clock: trio's own time, which under `trio.testing.MockClock` jumps from event to event.

Each simulated machine has its own SimClock: its wall clock may be set apart from the others' (`wall_offset_ns`) and may step back; its monotonic
clock may start anywhere, but never goes back.
"""

from __future__ import annotations

from typing import Final

import trio

from kvfs.common.boundary.clock import Clock

_EPOCH_NS: Final = 1_700_000_000_000_000_000


class SimClock(Clock):
    def __init__(self, *, start_s: float = 0.0, wall_offset_ns: int = 0) -> None:
        self._start_s = start_s
        self.wall_offset_ns = wall_offset_ns

    def monotonic(self) -> float:
        return self._start_s + trio.current_time()

    def wall_ns(self) -> int:
        return _EPOCH_NS + self.wall_offset_ns + round(trio.current_time() * 1e9)

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)
