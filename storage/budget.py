"""Bytes of requests under way, bounded.

Invariants: first come, first served, also where a smaller request behind would fit; more than everything is taken as everything, so that no request
is too large for ever; who leaves while waiting leaves nothing taken.
"""

from __future__ import annotations

from collections import deque

import trio

from kvfs.common.errors import DeadlineExceeded


class Budget:
    def __init__(self, total_bytes: int) -> None:
        self._left = total_bytes
        self._total = total_bytes
        self._waiting: deque[tuple[int, trio.Event]] = deque()

    def try_take(self, count: int) -> bool:
        if self._waiting or count > self._left:
            return False
        self._left -= count
        return True

    async def take(self, count: int, timeout_s: float) -> None:
        count = min(count, self._total)
        if self.try_take(count):
            return
        entry = (count, trio.Event())
        self._waiting.append(entry)
        try:
            with trio.fail_after(max(0.0, timeout_s)):
                await entry[1].wait()
        except BaseException as error:
            if entry in self._waiting:
                self._waiting.remove(entry)
            else:
                self.give(count)
            if isinstance(error, trio.TooSlowError):
                raise DeadlineExceeded(f"{self._total} bytes of other requests are under way") from None
            raise

    def give(self, count: int) -> None:
        self._left += min(count, self._total)
        while self._waiting and self._waiting[0][0] <= self._left:
            needed, event = self._waiting.popleft()
            self._left -= needed
            event.set()
