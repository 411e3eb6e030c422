"""Chunk locks: FIFO for each chunk, taken all at once by a batch.

A batch joins the queues of all its chunks in one step and owns them when it stands first in every one. Joining is atomic, so two batches that share
chunks stand in the same order in every queue they share: they cannot deadlock, and whoever came first goes first. No I/O, no waiting: release()
says who owns its chunks now. Along a chain locks are taken from the head on, so batches of different nodes cannot deadlock either.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

ChunkKey = tuple[int, bytes]
"""(target id, chunk id)"""


class Ticket:
    __slots__ = ("keys", "missing", "on_ready")

    def __init__(self, keys: Sequence[ChunkKey]) -> None:
        self.keys = keys
        self.missing = 0
        self.on_ready: Callable[[], None] | None = None

    @property
    def ready(self) -> bool:
        return self.missing == 0


class ChunkLocks:
    def __init__(self) -> None:
        self._queues: dict[ChunkKey, deque[Ticket]] = {}

    def __len__(self) -> int:
        return len(self._queues)

    def join(self, keys: Iterable[ChunkKey]) -> Ticket:
        ticket = Ticket(sorted(set(keys)))
        for key in ticket.keys:
            queue = self._queues.get(key)
            if queue is None:
                self._queues[key] = deque((ticket,))
            else:
                queue.append(ticket)
                ticket.missing += 1
        return ticket

    def leave(self, ticket: Ticket) -> list[Ticket]:
        """Give the chunks back, or stop waiting for them. -> tickets that own all their chunks now."""
        ready = []
        for key in ticket.keys:
            queue = self._queues[key]
            first = queue[0] is ticket
            if first:
                queue.popleft()
            else:
                queue.remove(ticket)
            if not queue:
                del self._queues[key]
            elif first:
                queue[0].missing -= 1
                if queue[0].missing == 0:
                    ready.append(queue[0])
        return ready

    def held(self, key: ChunkKey) -> bool:
        return key in self._queues
