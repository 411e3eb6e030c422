"""A mount from start to end: checks, the client, the session, the loop, revocations, and the way out.

Invariants: whatever ends mount() (umount, a signal, a cancel, an error), the mount point is free afterwards and every file that was open has been
flushed as far as the cluster answers; started() is called only once the kernel and the loop have shaken hands.
It must never stat(2) the mount point while the mount is up (it would wait for itself), and never block the trio thread on the kernel.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from functools import partial

import trio

from kvfs.client import AsyncClient, open_client
from kvfs.common.errors import KvfsError, MountError
from kvfs.fuse import kernel, session
from kvfs.fuse.config import MountConfig
from kvfs.fuse.invalidate import Invalidator
from kvfs.fuse.loop import Loop
from kvfs.fuse.names import KernelNames
from kvfs.fuse.operations import FileSystem
from kvfs.fuse.requests import Requests

log = logging.getLogger("kvfs.fuse")

HANDSHAKE_TIMEOUT_S = 15.0
UNMOUNT_RETRY_S = 0.1
FLUSH_AT_END_S = 30.0
LOOP_END_S = 5.0


async def mount(config: MountConfig, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
    """Mount and serve until unmounted, signalled (SIGTERM, SIGINT; only in the main thread) or cancelled."""
    kernel.check_device()
    mount_point = kernel.check_mount_point(config.mount_point)
    async with open_client(config.cluster, role="mount", description=mount_point) as client:
        await _serve(config, mount_point, client, task_status)


async def _serve(config: MountConfig, mount_point: str, client: AsyncClient, task_status: trio.TaskStatus[str]) -> None:
    source = f"kvfs#{client.routing.cluster_id}"
    begin = partial(session.start, mount_point, source=source, allow_other=config.allow_other, read_only=config.read_only)
    connection = await trio.to_thread.run_sync(begin)
    try:
        with trio.move_on_after(HANDSHAKE_TIMEOUT_S) as scope:
            await connection.shake_hands(config.max_background)
        if scope.cancelled_caught:
            raise MountError(f"the kernel did not answer the handshake for {mount_point} within {HANDSHAKE_TIMEOUT_S:.0f} s")
        names = KernelNames(trio.current_time) if connection.takes_names_back() else None
        invalidator = Invalidator(connection.notify, names)
        file_system = FileSystem(client, invalidate=invalidator, names=names, attr_cache=config.attr_cache, data_cache=config.data_cache)
        loop = Loop(
            connection.fd,
            Requests(file_system),
            buffer_bytes=session.READ_BUFFER_BYTES,
            deadline_s=config.operation_deadline_s,
            tasks_max=config.max_tasks,
        )
        await _run(config, mount_point, client, file_system, loop, invalidator, task_status)
    finally:
        # Only now does no task and no thread use the session any more.
        with trio.CancelScope(shield=True):
            await _unmount(config, mount_point)
        connection.close()
        log.info("unmounted %s", mount_point)


async def _run(
    config: MountConfig,
    mount_point: str,
    client: AsyncClient,
    file_system: FileSystem,
    loop: Loop,
    invalidator: Invalidator,
    task_status: trio.TaskStatus[str],
) -> None:
    async with trio.open_nursery() as nursery:
        # The loop is out of reach of the cancel that begins an unmount: the unmount needs its answers. It ends when the kernel says so.
        loop_scope, loop_ended = trio.CancelScope(shield=True), trio.Event()

        async def serve() -> None:
            try:
                with loop_scope:
                    await loop.run()
            finally:
                loop_ended.set()
                nursery.cancel_scope.cancel()

        try:
            client.on_revoked(file_system.revoked)
            client.on_lost(file_system.lost)
            await nursery.start(invalidator.run, client)
            nursery.start_soon(serve)
            _tune(config, mount_point)
            log.info("mounted %s on %s", client.routing.cluster_id, mount_point)
            task_status.started(mount_point)
            await _until_signalled()
        finally:
            with trio.CancelScope(shield=True):
                await _unmount(config, mount_point)
                await _flush(file_system)
                if not loop_ended.is_set():
                    loop.stop()
                    with trio.move_on_after(LOOP_END_S):
                        await loop_ended.wait()
                    loop_scope.cancel()
            nursery.cancel_scope.cancel()


async def _until_signalled() -> None:
    if threading.current_thread() is not threading.main_thread():
        await trio.sleep_forever()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("%s: unmounting", signal.Signals(number).name)
            return


async def _unmount(config: MountConfig, mount_point: str) -> None:
    """While the loop still answers; when files stay in use past the grace, detach the mount: they are flushed and closed under their programs."""
    give_up = trio.current_time() + config.unmount_grace_s
    lazy = False
    while kernel.mount_entry(mount_point) is not None:
        try:
            await trio.to_thread.run_sync(partial(kernel.unmount, mount_point, lazy=lazy))
        except MountError as error:
            if lazy:
                log.error("%s", error)
                return
            lazy = trio.current_time() >= give_up
            if lazy:
                log.warning("%s: detaching it", error)
            await trio.sleep(UNMOUNT_RETRY_S)


async def _flush(file_system: FileSystem) -> None:
    try:
        with trio.move_on_after(FLUSH_AT_END_S) as scope:
            await file_system.close()
        if scope.cancelled_caught:
            log.error("files open at the end were not all flushed within %.0f s", FLUSH_AT_END_S)
    except KvfsError as error:
        log.error("files open at the end could not all be flushed: %s", error)


def _tune(config: MountConfig, mount_point: str) -> None:
    entry = kernel.mount_entry(mount_point)
    if entry is None or os.geteuid() != 0:
        return
    if config.read_ahead_kb and not kernel.set_read_ahead(entry.device_minor, config.read_ahead_kb):
        log.info("read-ahead stays at the kernel's default: /sys/class/bdi is not writable")
