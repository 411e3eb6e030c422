"""Following the metadata service's revocations.

Owns the long poll. Invariants: a revocation is acknowledged only after every callback has returned, that is when nothing of this client
trusts the revoked
attributes any more; a new epoch of the service (it was restarted) means that all is lost, and the callbacks for that run before anything else.
A service that cannot be reached revokes nothing: then the leases run out by themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from kvfs.client.config import ClientConfig
from kvfs.client.meta_client import MetaClient
from kvfs.common.boundary.clock import Clock
from kvfs.common.errors import KvfsError

log = logging.getLogger("kvfs.client")

OnRevoked = Callable[[int, bytes], Awaitable[None]]
OnLost = Callable[[], Awaitable[None]]


class Watcher:
    def __init__(self, meta: MetaClient, config: ClientConfig, clock: Clock) -> None:
        self._meta = meta
        self._config = config
        self._clock = clock
        self._revoked: list[OnRevoked] = []
        self._lost: list[OnLost] = []
        self.epoch = 0
        self.acknowledged = 0

    def on_revoked(self, callback: OnRevoked) -> None:
        self._revoked.append(callback)

    def on_lost(self, callback: OnLost) -> None:
        self._lost.append(callback)

    async def run(self) -> None:
        """For ever."""
        pause_s = self._config.backoff_first_s
        while True:
            try:
                await self._once()
                pause_s = self._config.backoff_first_s
            except Exception as error:
                if not isinstance(error, KvfsError):
                    log.exception("following revocations failed")  # a callback's fault: leases run out by themselves
                await self._clock.sleep(pause_s)
                pause_s = min(2 * pause_s, self._config.backoff_max_s)

    async def _once(self) -> None:
        reply = await self._meta.watch(acknowledged=self.acknowledged, epoch=self.epoch, wait_ms=self._config.watch_wait_ms)
        if reply.epoch != self.epoch:
            self._meta.leases.lose_all()
            if self.epoch:
                for lost in self._lost:
                    await lost()
            self.epoch = reply.epoch
        names = reply.names
        for place, inode in enumerate(reply.inodes):
            name = names[place] if place < len(names) else b""
            self._meta.leases.revoked(inode)
            for revoked in self._revoked:
                await revoked(inode, name)
        self.acknowledged = reply.sequence
