"""The meta service's background tasks: small jobs at a steady pace, each bounded per round.

A job that fails is logged and tried again; it never ends the service. This module must never answer a client.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio

from kvfs.common.errors import KvfsError
from kvfs.common.wire import cluster_pb2
from kvfs.meta.namespace.idempotency import Periods

if TYPE_CHECKING:
    from kvfs.meta.gc.prune import Pruner
    from kvfs.meta.service import MetaService

log = logging.getLogger(__name__)

CLEAR_CLOSED_S = 0.05
STORE_READERS_S = 0.5
SWEEP_LEASES_S = 2.0
TURN_PERIODS_S = 30.0
PRUNE_S = 2.0
REDO_CUTS_S = 1.0


async def repeat(name: str, every_s: float, job: Callable[[], Awaitable[object]]) -> None:
    """Until cancelled."""
    while True:
        await trio.sleep(every_s)
        try:
            await job()
        except KvfsError as error:
            log.warning("%s: %s", name, error.message)


async def run(service: MetaService, pruner: Pruner | None) -> None:
    """All of them, until cancelled."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.collector.run)
        nursery.start_soon(repeat, "clearing closed sessions", CLEAR_CLOSED_S, service.clear_closed)
        nursery.start_soon(repeat, "storing open files", STORE_READERS_S, service.store_readers)
        nursery.start_soon(repeat, "sweeping leases", SWEEP_LEASES_S, lambda: _sweep_leases(service))
        nursery.start_soon(repeat, "sweeping request records", TURN_PERIODS_S, Periods(service.engine, service.clock).round)
        if pruner is not None:
            nursery.start_soon(repeat, "pruning sessions", PRUNE_S, pruner.round)
        nursery.start_soon(_redo_cuts, service)
        nursery.start_soon(service.count_files)


async def _redo_cuts(service: MetaService) -> None:
    """Truncations that an earlier run left, or that failed since; the chains may not serve yet."""
    while True:
        await service.cuts.undone.wait()
        try:
            done = await service.cuts.redo_all()
        except KvfsError as error:
            log.warning("redoing truncations: %s", error.message)
            await service.clock.sleep(REDO_CUTS_S)
        else:
            if done:
                log.info("carried out %d truncations that had been left", done)


async def _sweep_leases(service: MetaService) -> None:
    now_s = service.clock.monotonic()
    service.leases.sweep(now_s)
    # With a second meta service alive, changes could pass this one's leases by: then nobody gets any.
    service.leases.enabled = len(service.routing().nodes_with_role(cluster_pb2.ROLE_META, alive=True)) <= 1
    await trio.lowlevel.checkpoint()
