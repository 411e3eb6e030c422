"""Idempotency tags: (client, channel, sequence).

Owns the channels: a bounded set of numbers, one update under way on each, its sequence growing by one an update. An update keeps its tag
over all of its
attempts, so that the chain applies it once; the channel is given to another update only when this one is over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import trio

from kvfs.common.errors import InvalidArgument
from kvfs.common.wire import base_pb2 as pb


class Channels:
    def __init__(self, client_id: bytes, count: int) -> None:
        self._client_id = client_id
        self._count = count
        self._free = list(range(count, 0, -1))
        """The last used is used next: few channels are ever touched by a quiet client, and the services keep a record for each."""
        self._sequence = [0] * (count + 1)
        self._waiting: deque[tuple[int, trio.Event]] = deque()

    async def acquire(self, count: int) -> list[pb.Tag]:
        """`count` tags at once (all or none, first come first served: so that two batches cannot wait for each other)."""
        if count > self._count:
            raise InvalidArgument(f"{count} updates in one batch, but a client has {self._count} channels")
        if self._waiting or len(self._free) < count:
            event = trio.Event()
            entry = (count, event)
            self._waiting.append(entry)
            try:
                await event.wait()
                while len(self._free) < count:
                    event = trio.Event()
                    self._waiting[0] = entry = (count, event)
                    await event.wait()
            finally:
                self._waiting.remove(entry)
                self._wake()
        tags = []
        for _ in range(count):
            channel = self._free.pop()
            self._sequence[channel] += 1
            tags.append(pb.Tag(client_id=self._client_id, channel=channel, sequence=self._sequence[channel]))
        self._wake()
        return tags

    def release(self, tags: Sequence[pb.Tag]) -> None:
        """The updates are over, whatever came of them."""
        self._free.extend(tag.channel for tag in tags)
        self._wake()

    def _wake(self) -> None:
        if self._waiting and len(self._free) >= self._waiting[0][0]:
            self._waiting[0][1].set()
