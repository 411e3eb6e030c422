"""Deadlines and waits between attempts.

Owns `Attempts`: how long an operation may go on, how long to wait before the next try, and which errors are worth one.
Invariants: the waits grow exponentially with full jitter from the Random boundary, and no wait reaches past the deadline; when no time is left the
last error comes out as DeadlineExceeded, with that error as its cause. It never decides where the next attempt goes.
"""

from __future__ import annotations

from kvfs.common.boundary.clock import Clock
from kvfs.common.boundary.random import Random
from kvfs.common.errors import ChecksumMismatch, DeadlineExceeded, KvfsError, NotRegistered, UnknownRegion


def worth_retrying(error: KvfsError) -> bool:
    """True when the same request may succeed later. A time-out of one attempt is: the caller's own deadline is checked by `Attempts`."""
    return error.retryable or isinstance(error, DeadlineExceeded | ChecksumMismatch | NotRegistered | UnknownRegion)


class Attempts:
    """One operation's attempts: `timeout_s` for each, `wait` between them."""

    __slots__ = ("_attempt_s", "_clock", "_first_s", "_max_s", "_random", "count", "deadline")

    def __init__(self, clock: Clock, random: Random, *, deadline: float, attempt_s: float, first_s: float, max_s: float) -> None:
        self._clock = clock
        self._random = random
        self._attempt_s = attempt_s
        self._first_s = first_s
        self._max_s = max_s
        self.deadline = deadline
        """On the clock's monotonic scale."""
        self.count = 0

    def left_s(self) -> float:
        return self.deadline - self._clock.monotonic()

    def timeout_s(self) -> float:
        """How long the next attempt may take. Doubles with every wait, so that a slow but living service is not asked for ever."""
        left = self.left_s()
        if left <= 0:
            raise DeadlineExceeded("no time left to try")
        return min(left, self._attempt_s * (1 << min(self.count, 10)))

    async def wait(self, error: KvfsError) -> None:
        """Sleep before the next attempt, or raise: the error itself when it is final, DeadlineExceeded when time is up."""
        if not worth_retrying(error):
            raise error
        ceiling = min(self._max_s, self._first_s * (1 << min(self.count, 20)))
        pause = self._random.uniform(ceiling / 2, ceiling)
        if self.left_s() <= pause:
            raise DeadlineExceeded(f"gave up after {self.count + 1} attempts, the last: {type(error).__name__}: {error.message}") from error
        self.count += 1
        await self._clock.sleep(pause)
