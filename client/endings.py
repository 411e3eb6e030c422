"""Sessions of files that were closed with nothing to report, on their way to the metadata service.

Nobody waits for the end of such a session: what depends on it is when a removed file's space is freed, and how many writers others see. So an end
travels in the context of the client's next request, whatever that is, and only if none comes within `delay_s` in a request of its own, with all that
have gathered. Invariants: an end is told no later than by the next request that begins after the close; one that a failed request carried is told
again (telling twice is harmless); the queue is bounded, and what does not fit, or cannot be told, ends with the client.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable

import trio

from kvfs.common.wire import meta_pb2 as pb

log = logging.getLogger("kvfs.client")

ENDINGS_MAX = 65_536
ENDINGS_A_REQUEST = 512


class Endings:
    def __init__(self) -> None:
        self._queue: deque[tuple[int, bytes]] = deque()
        self._some = trio.Event()

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, inode: int, session: bytes) -> None:
        if len(self._queue) >= ENDINGS_MAX:
            self._queue.popleft()
            log.debug("%d ends of sessions wait for the metadata service: the oldest stays until this client is gone", ENDINGS_MAX)
        self._queue.append((inode, session))
        self._some.set()

    def take(self, context: pb.Context) -> list[tuple[int, bytes]]:
        """Move what fits into a request; give it back with `again` should the request fail."""
        queue = self._queue
        taken = [queue.popleft() for _ in range(min(len(queue), ENDINGS_A_REQUEST))]
        for inode, session in taken:
            context.ended.add(inode=inode, session=session)
        return taken

    def again(self, taken: Iterable[tuple[int, bytes]]) -> None:
        for inode, session in taken:
            self.add(inode, session)

    async def due(self, delay_s: float) -> None:
        """Until there are some, and no request has taken the oldest of them for `delay_s`."""
        while True:
            while not self._queue:
                self._some = trio.Event()
                await self._some.wait()
            oldest = self._queue[0]
            await trio.sleep(delay_s)
            if self._queue and self._queue[0] is oldest:
                return
