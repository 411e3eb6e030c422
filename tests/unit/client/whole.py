"""A whole cluster in one trio run: manager, meta (memory engine) and storage services over loopback, for tests that want the real thing."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import trio

from kvfs.client.async_client import AsyncClient, open_client
from kvfs.client.config import ClientConfig
from kvfs.client.locate import ClusterAddress
from kvfs.common.boundary.clock import SystemClock
from kvfs.common.boundary.net import Here
from kvfs.common.boundary.random import SystemRandom
from kvfs.common.boundary.system_net import SystemNet
from kvfs.common.membership import ManagerLink
from kvfs.common.wire import cluster_pb2
from kvfs.common.wire.channel import ChannelPool
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.service import method
from kvfs.meta.cluster import server as manager_server
from kvfs.meta.cluster.config import ManagerConfig
from kvfs.meta.config import MetaConfig
from kvfs.meta.server import serve as serve_meta
from kvfs.storage.config import StorageConfig
from kvfs.storage.server import World as StorageWorld
from kvfs.storage.server import serve as serve_storage

CREATE_TARGETS = method("Manager", "CreateTargets")


@dataclass
class Whole:
    folder: Path
    address: ClusterAddress
    nursery: trio.Nursery
    scopes: list[trio.CancelScope] = field(default_factory=list)
    over: dict[int, trio.Event] = field(default_factory=dict)
    """Of storage services: set when they have ended."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of storage services."""

    def client(self, **options: Any) -> Any:
        return open_client(self.address, config=options.pop("config", ClientConfig(buffer_pool_bytes=64 << 20)), **options)

    async def start_storage(self, number: int, *, boot: str = "") -> None:
        """`boot`: of a machine that lost power since it ran the others."""
        config = StorageConfig(
            data=(str(self.folder / f"storage-{number}"),),
            listen=("tcp://127.0.0.1:0", f"unix://{self.folder}/storage-{number}.sock"),
            cluster_id="whole",
            managers=self.address.managers,
            **self.settings,
        )
        await self.nursery.start(self._storage, number, config, StorageWorld(net=NetOfBoot(boot)) if boot else StorageWorld())

    async def _storage(self, number: int, config: StorageConfig, world: StorageWorld, *, task_status: Any) -> None:
        with trio.CancelScope() as scope:
            while len(self.scopes) <= number:
                self.scopes.append(trio.CancelScope())
            self.scopes[number] = scope
            self.over[number] = trio.Event()
            try:
                await serve_storage(config, world=world, task_status=task_status)
            finally:
                self.over[number].set()

    def stop_storage(self, number: int) -> None:
        """It still answers what it has begun: wait for `over` where that matters."""
        self.scopes[number].cancel()


class NetOfBoot(SystemNet):
    """The real network, of a machine that was booted once more."""

    def __init__(self, boot: str) -> None:
        self._boot = boot

    @property
    def here(self) -> Here:
        return replace(super().here, host_id=self._boot)


@asynccontextmanager
async def whole(*, storage: int = 3, replicas: int = 2, lease_ms: int = 2000, **settings: Any) -> AsyncIterator[Whole]:
    with tempfile.TemporaryDirectory(prefix="kvfs-") as name:
        folder = Path(name)
        async with trio.open_nursery() as nursery:
            info: dict[str, Any] = await nursery.start(
                lambda task_status: manager_server.serve(
                    ManagerConfig(data=str(folder / "manager"), listen=("tcp://127.0.0.1:0",), cluster_id="whole", lease_ms=lease_ms, kv="memory"),
                    task_status=task_status,
                )
            )
            address = ClusterAddress(tuple(info["addresses"]), "whole")
            made = Whole(folder, address, nursery, settings=settings)
            for number in range(storage):
                await made.start_storage(number)
            await nursery.start(
                lambda task_status: serve_meta(
                    MetaConfig(data=str(folder / "meta"), cluster_id="whole", managers=address.managers, kv="memory"), task_status=task_status
                )
            )
            await _create_targets(address, replicas, storage)
            try:
                yield made
            finally:
                nursery.cancel_scope.cancel()


@contextmanager
def whole_in_thread(*, storage: int = 2, replicas: int = 2) -> Iterator[ClusterAddress]:
    """The same for tests of the synchronous face."""
    ready = threading.Event()
    found: dict[str, Any] = {}

    async def main() -> None:
        async with whole(storage=storage, replicas=replicas) as made:
            found["address"], found["stop"] = made.address, trio.Event()
            found["token"] = trio.lowlevel.current_trio_token()
            ready.set()
            await found["stop"].wait()

    thread = threading.Thread(target=lambda: trio.run(main), daemon=True)
    thread.start()
    assert ready.wait(30)
    yield found["address"]
    found["token"].run_sync_soon(found["stop"].set)
    thread.join(30)


async def _create_targets(address: ClusterAddress, replicas: int, storage: int) -> None:
    clock = SystemClock()
    identity = Identity(cluster_id="whole", client_id=SystemRandom().bytes(16), role="admin")
    async with ChannelPool(SystemNet(), clock, identity) as pool:
        link = ManagerLink(pool, clock, SystemRandom(), address.managers, identity)
        request = cluster_pb2.CreateTargetsRequest(table_id=1, replicas=replicas, targets_per_disk=replicas, expected_nodes=storage)
        await link.call(CREATE_TARGETS, request, timeout_s=10)
        while True:
            routing = await link.refresh()
            if any(table.table_id == 1 for table in routing.tables) and all(
                len(routing.serving(chain.chain_id)) == replicas for chain in routing.chains
            ):
                return
            await trio.sleep(0.02)


__all__ = ["AsyncClient", "Whole", "whole", "whole_in_thread"]
