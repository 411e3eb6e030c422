"""Workers and a router over them in the test's own process, through real sockets: `async with workers(path, [...]) as router`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import trio

from kvfs.common.boundary.clock import SystemClock
from kvfs.common.boundary.random import SystemRandom
from kvfs.common.boundary.system_net import SystemNet
from kvfs.common.wire.channel import ChannelPool
from kvfs.common.wire.identity import Identity
from kvfs.inference.request import Request, TokenEvent
from kvfs.inference.workers.config import WorkerConfig
from kvfs.inference.workers.router import Router, RouterConfig
from kvfs.inference.workers.worker import serve


@asynccontextmanager
async def routing(addresses: dict[str, Sequence[str]], config: RouterConfig | None = None) -> AsyncIterator[Router]:
    net, clock, random = SystemNet(), SystemClock(), SystemRandom()
    identity = Identity.of(net, cluster_id="", client_id=random.bytes(16), role="router")
    async with ChannelPool(net, clock, identity) as pool, trio.open_nursery() as nursery:
        router = Router(addresses, pool, clock, random, config)
        nursery.start_soon(router.run)
        with trio.fail_after(60):
            await router.ready()
        yield router
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def workers(
    path: Path, roles: Sequence[str], *, cluster: str = "", router: RouterConfig | None = None, **settings: object
) -> AsyncIterator[tuple[Router, list[trio.CancelScope]]]:
    """One for each role, with the scopes that stop them."""
    async with trio.open_nursery() as nursery:
        addresses: dict[str, Sequence[str]] = {}
        scopes: list[trio.CancelScope] = []

        async def run(config: WorkerConfig, scope: trio.CancelScope, *, task_status: trio.TaskStatus[dict[str, list[str]]]) -> None:
            with scope:
                await serve(config, task_status=task_status)

        for number, role in enumerate(roles, 1):
            fields = {"cache_pages": 64, **settings}
            config = WorkerConfig(model=str(path), role=role, cluster=cluster, disk_cache=bool(cluster), drain_s=1.0, **fields)  # type: ignore[arg-type]
            scopes.append(trio.CancelScope())
            addresses[f"w{number}"] = (await nursery.start(run, config, scopes[-1]))["addresses"]
        async with routing(addresses, router) as made:
            yield made, scopes
        nursery.cancel_scope.cancel()


async def answer(router: Router, request: Request) -> list[TokenEvent]:
    async with aclosing(router.generate(request)) as events:
        return [event async for event in events]


def tokens(events: Sequence[TokenEvent]) -> list[int]:
    """Checks their places too."""
    found = [event for event in events if event.token is not None]
    first = found[0].index
    assert [event.index for event in found] == list(range(first, first + len(found)))
    return [event.token for event in found if event.token is not None]
