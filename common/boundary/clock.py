"""Clock boundary: monotonic time, wall time and sleeping.

Owns the only calls to the operating system's clocks. Invariants: `monotonic` never goes back; leases, deadlines and waits use it alone. Wall time is
for timestamps that people see (mtime, logs) and may jump; it must never decide anything.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod

import trio


class Clock(ABC):
    @abstractmethod
    def monotonic(self) -> float:
        """Seconds from an arbitrary start, never going back."""

    @abstractmethod
    def wall_ns(self) -> int:
        """Nanoseconds since 1970, as far as this machine knows."""

    @abstractmethod
    async def sleep(self, seconds: float) -> None: ...


class SystemClock(Clock):
    def monotonic(self) -> float:
        return time.monotonic()

    def wall_ns(self) -> int:
        return time.time_ns()

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)
