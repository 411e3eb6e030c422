"""The worker process: a checkpoint in memory, its pages, the store, an engine, and the Worker service around it.

Owns `serve`. Invariants: it serves only when the model is loaded and the space is open; a model that cannot be loaded is an error that says why
before anything listens; told to stop, it first writes the pages that wait (drain_s at most), so that whoever goes on finds them. The model is
loaded, and every step computed, in a thread: the service answers meanwhile.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import torch
import trio

from kvfs.client.async_client import open_client
from kvfs.common.boundary.world import Boundaries
from kvfs.common.errors import InvalidArgument, NotFound, SetupError
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.server import RpcServer
from kvfs.inference.cache.pool import PagePool
from kvfs.inference.engine.engine import Engine
from kvfs.inference.model.config import ROPE_LAYOUT
from kvfs.inference.model.deepseek import DTYPES, DeepseekV3
from kvfs.inference.model.digest import model_digest
from kvfs.inference.store.store import KvStore
from kvfs.inference.workers.config import WorkerConfig
from kvfs.inference.workers.service import WorkerService
from kvfs.kvcache import AsyncKVCache

log = logging.getLogger("kvfs.inference.worker")


async def serve(
    config: WorkerConfig, *, world: Boundaries | None = None, task_status: trio.TaskStatus[dict[str, Any]] = trio.TASK_STATUS_IGNORED
) -> None:
    """Until cancelled. Starts with {"addresses", "model", "space"}. Raises a KvfsError that says what to do."""
    digest, model = await trio.to_thread.run_sync(_load, config, abandon_on_cancel=True)
    async with trio.open_nursery() as nursery:
        stop = trio.Event()
        nursery.start_soon(_cancelled, stop)
        # What ends the worker is heard by the task above; everything here goes on until the pages are written.
        with trio.CancelScope(shield=True):
            await _serve(config, world or Boundaries(), digest, model, stop, task_status)
        nursery.cancel_scope.cancel()


async def _cancelled(stop: trio.Event) -> None:
    try:
        await trio.sleep_forever()
    finally:
        stop.set()


async def _serve(
    config: WorkerConfig, world: Boundaries, digest: bytes, model: DeepseekV3, stop: trio.Event, task_status: trio.TaskStatus[dict[str, Any]]
) -> None:
    pool = _pool(config, model)
    try:
        async with _store(config, world, digest, pool) as store:
            service = WorkerService(
                world.random.bytes(16),
                world.clock,
                model=digest.hex(),
                role=config.role,
                space=store.space if store is not None else "",
                waiting_max=config.waiting_requests,
            )
            engine = Engine(config, model, pool, world.clock, service.on_events, store)
            service.attach(engine, _counters(engine, store))
            identity = Identity.of(world.net, cluster_id="", client_id=world.random.bytes(16), role="worker")
            server = RpcServer(world.net, world.clock, identity)
            server.add("Worker", service)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(engine.run)
                nursery.start_soon(service.watch)
                addresses = await nursery.start(server.serve, config.listen)
                log.info("%s worker of model %s serves at %s", config.role, digest.hex(), ", ".join(addresses))
                task_status.started({"addresses": list(addresses), "model": digest.hex(), "space": store.space if store is not None else ""})
                await stop.wait()
                service.draining = True
                if store is not None:
                    with trio.move_on_after(config.drain_s):
                        await store.idle()
                nursery.cancel_scope.cancel()
    finally:
        pool.close()


def _pool(config: WorkerConfig, model: DeepseekV3) -> PagePool:
    format = model.page_format(config.cache_dtype)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if model.device.type == "cpu" and config.cache_pages * format.page_bytes > memory:  # the kernel would give it, and end somebody later
        raise SetupError(f"{config.cache_pages} pages of {format.page_bytes} bytes are more than this machine's memory: use fewer --cache-pages")
    return PagePool(format, config.cache_pages, device=config.device, compute=DTYPES[config.dtype])


def _load(config: WorkerConfig) -> tuple[bytes, DeepseekV3]:
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise SetupError(f"device is {config.device}, and torch finds no GPU: use --device cpu, or a build of torch for this GPU")
    try:
        torch.zeros(1, device=config.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # by the kind of device and the build of torch
        raise SetupError(f"torch has no device {config.device} here: {str(error).splitlines()[0]}") from None
    try:
        return model_digest(config.model), DeepseekV3.load(config.model, device=config.device, dtype=config.dtype)
    except (NotFound, InvalidArgument) as error:  # no fault of the program's: another directory, or another model
        raise SetupError(error.message) from None


@asynccontextmanager
async def _store(config: WorkerConfig, world: Boundaries, digest: bytes, pool: PagePool) -> AsyncIterator[KvStore | None]:
    if not config.disk_cache:
        yield None
        return
    async with open_client(config.cluster, role="worker", description=f"worker of {config.model}", net=world.net, clock=world.clock) as client:
        yield await KvStore.open(AsyncKVCache(client), digest, ROPE_LAYOUT, pool, config, world.clock)


def _counters(engine: Engine, store: KvStore | None) -> Callable[[], Mapping[str, float]]:
    """For Status: names as in http/metrics.py."""

    def counters() -> Mapping[str, float]:
        stats = engine.stats
        found: dict[str, float] = {
            "prefix_cache_queries": stats.memory_queries,
            "prefix_cache_hits": stats.memory_hits,
            "external_prefix_cache_queries": stats.disk_queries,
            "external_prefix_cache_hits": stats.disk_hits,
            "num_preemptions": stats.preemptions,
        }
        if store is not None:
            found |= {
                "kv_bytes_read": store.stats.read_bytes,
                "kv_bytes_written": store.stats.written_bytes,
                "kv_blocks_dropped": store.stats.dropped_pages,
                "kv_reads_failed": store.stats.failed_reads,
            }
        return found

    return counters
