"""Finding the primary among the managers, and asking it.

Owns which manager this process believes to be the primary. Invariants: a request goes to one manager at a time; a manager that refuses and names the
primary is believed at once, but hints that lead in circles cost a pause; tries end with the caller's time. It must never retry what another manager
would answer in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from kvfs.common.boundary.clock import Clock
from kvfs.common.boundary.random import Random
from kvfs.common.errors import (
    ConfigError,
    ConnectionLost,
    DeadlineExceeded,
    KvfsError,
    NotPrimary,
    Overloaded,
    ServiceStopping,
    TxnError,
    Unreachable,
)
from kvfs.common.wire.channel import ChannelPool
from kvfs.common.wire.service import Method

TRY_S: Final = 2.0
"""How long one manager may take over one request before another is asked."""
BACKOFF_FIRST_S: Final = 0.02
BACKOFF_LAST_S: Final = 0.5

ELSEWHERE: Final = (ConnectionLost, Unreachable, DeadlineExceeded, Overloaded, ServiceStopping, NotPrimary, TxnError)
"""Another manager, or the same a little later, may answer what failed like this."""
_HINT: Final = re.compile(r"the primary is (\S+)$")


def not_primary(address: str) -> NotPrimary:
    """The refusal of a standby manager; `hinted_address` gets the address back out of it on the other side."""
    if address:
        return NotPrimary(f"this manager is not the primary; the primary is {address}")
    return NotPrimary("this manager is not the primary, and none is known yet: ask again in a moment")


def hinted_address(error: NotPrimary) -> str:
    """The primary's address that the refusal names, or ''."""
    found = _HINT.search(error.message)
    return found.group(1) if found else ""


class Managers:
    def __init__(self, pool: ChannelPool, clock: Clock, random: Random, addresses: Sequence[str]) -> None:
        """`addresses`: one of each manager."""
        if not addresses:
            raise ConfigError("no manager address: a cluster has at least one, e.g. tcp://127.0.0.1:7001")
        self.addresses = tuple(addresses)
        self._pool = pool
        self._clock = clock
        self._random = random
        self._primary = ""
        self._next = 0

    async def call(self, what: Method, request: Any, *, timeout_s: float, try_s: float = TRY_S) -> Any:
        """Ask the primary manager, looking for it among all known addresses until the time is up."""
        deadline_s = self._clock.monotonic() + timeout_s
        backoff_s = BACKOFF_FIRST_S
        tries = 0
        before: KvfsError | None = None
        while True:
            address = self._primary or self.addresses[self._next % len(self.addresses)]
            left_s = deadline_s - self._clock.monotonic()
            try:
                reply = await self._pool.call([address], what, request, timeout_s=max(0.001, min(try_s, left_s)))
            except ELSEWHERE as error:
                if isinstance(error, TxnError) and not error.retryable:
                    raise
                self._turn_from(address, error)
                tries += 1
                left_s = deadline_s - self._clock.monotonic()
                # A named primary is asked at once; a full round of the others, or a hint that leads in circles, waits a little.
                if tries % (len(self.addresses) + 1) == 0 or not isinstance(error, NotPrimary):
                    pause_s = backoff_s * self._random.uniform(0.5, 1.5)
                    backoff_s = min(backoff_s * 2, BACKOFF_LAST_S)
                else:
                    pause_s = 0.0
                if left_s <= pause_s:
                    # The last try had whatever time was left; what an earlier one said tells more than that it was too short.
                    raise (before if before is not None and isinstance(error, DeadlineExceeded) else error) from None
                before = error
                await self._clock.sleep(pause_s)
            else:
                self._primary = address
                return reply

    def _turn_from(self, address: str, error: KvfsError) -> None:
        """Decide whom to ask next."""
        if isinstance(error, NotPrimary) and (hint := hinted_address(error)) and hint != address:
            self._primary = hint
            return
        if self._primary in ("", address):
            self._primary = ""
            self._next += 1
