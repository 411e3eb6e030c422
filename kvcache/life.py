"""Whether a space is still there: how long its handle may be used without asking the metadata service.

Owns the age of one handle and the question that renews it. Invariants: a handle in use is renewed in the background and no operation waits for that;
a handle that has not been used for a while, or whose space changed, waits a moment for the answer; reads go on when nobody can be asked (what a
dropped space held is still what was put there), puts do not: none goes on beyond HANDLE_LIFE_S after the space was seen to be there.
"""

from __future__ import annotations

import logging
import math

import trio

from kvfs.client.async_client import AsyncClient
from kvfs.common.errors import KvfsError
from kvfs.common.wire import meta_pb2 as pb
from kvfs.kvcache.config import HANDLE_LIFE_S, CacheConfig

log = logging.getLogger("kvfs.kvcache")

GAP_S = 1.0
"""Between two questions about one space."""
LIMIT_S = 10.0


class Life:
    def __init__(self, client: AsyncClient, name: str, inode: int, config: CacheConfig) -> None:
        self._client = client
        self._name = name
        self._inode = inode
        self._config = config
        self._clock = client.clock
        self._seen_s = self._clock.monotonic()
        self._asked_s = self._seen_s
        self._suspect = False
        self._changes = 0
        self._answered: trio.Event | None = None
        """Set when the question under way is over."""
        self.over = False

    def end(self) -> None:
        """The space was dropped."""
        self.over = True

    def suspect(self) -> None:
        """Something about the space's directory changed: ask before the next operation."""
        self._suspect = True
        self._changes += 1
        self._asked_s = -math.inf

    @property
    def fresh(self) -> bool:
        """Whether the space was seen to be there lately enough, so that nothing need be asked. Any thread may look."""
        return not self.over and not self._suspect and self._clock.monotonic() - self._seen_s <= self._config.refresh_s

    async def readable(self, end_s: float) -> bool:
        """False: the space is known to be gone. `end_s`: when the operation that asks is over."""
        age_s = self._clock.monotonic() - self._seen_s
        if (age_s > self._config.refresh_s or self._suspect) and not self.over:
            needed = age_s > self._config.trust_s or self._suspect
            self._ask()
            if needed:
                await self._answer(end_s)
        return not self.over

    def left_s(self) -> float:
        """For how many seconds from now on a put may go on; 0: not at all, since nobody could be asked."""
        age_s = self._clock.monotonic() - self._seen_s
        return 0.0 if self.over or self._suspect or age_s > self._config.trust_s else HANDLE_LIFE_S - age_s

    def _ask(self) -> None:
        now_s = self._clock.monotonic()
        if self._answered is None and now_s - self._asked_s >= GAP_S:
            self._asked_s = now_s
            self._answered = trio.Event()
            self._client.in_background(self._look, self._answered)

    async def _answer(self, end_s: float) -> None:
        """Wait for it, but only for a moment after it was asked for: while the metadata service is away, not every operation waits."""
        left_s = min(self._asked_s + self._config.check_s, end_s) - self._clock.monotonic()
        if self._answered is not None and left_s > 0:
            with trio.move_on_after(left_s):
                await self._answered.wait()

    async def _look(self, answered: trio.Event) -> None:
        asked_s, changes = self._clock.monotonic(), self._changes
        try:
            with trio.move_on_after(LIMIT_S):
                [inode] = await self._client.meta.get_attr([self._inode])
                if inode.type == pb.TYPE_INVALID or inode.nlink == 0:
                    self.over = True
                else:
                    self._seen_s = asked_s
                    self._suspect = self._changes != changes
        except KvfsError as error:
            log.warning("space %s: cannot ask whether it is still there: %s", self._name, error.message)
        finally:
            self._answered = None
            answered.set()
