"""A mount from start to end: checks, the client, pyfuse3's loop, revocations, and the way out.

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

import pyfuse3
import trio

from kvfs.client import AsyncClient, open_client
from kvfs.common.errors import KvfsError, MountError
from kvfs.fuse import kernel
from kvfs.fuse.config import MountConfig
from kvfs.fuse.invalidate import Invalidator
from kvfs.fuse.loop import KernelOperations
from kvfs.fuse.operations import FileSystem

log = logging.getLogger("kvfs.fuse")

HANDSHAKE_TIMEOUT_S = 15.0
UNMOUNT_RETRY_S = 0.1
FLUSH_AT_END_S = 30.0
LOOP_END_S = 5.0

_mounted = threading.Lock()
"""pyfuse3 keeps its session in module variables: one mount a process."""


async def mount(config: MountConfig, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
    """Mount and serve until unmounted, signalled (SIGTERM, SIGINT; only in the main thread) or cancelled."""
    kernel.check_device()
    mount_point = kernel.check_mount_point(config.mount_point)
    if not _mounted.acquire(blocking=False):
        raise MountError("this process has a mount already: one process serves one mount point")
    try:
        async with open_client(config.cluster, role="mount", description=mount_point) as client:
            await _serve(config, mount_point, client, task_status)
    finally:
        _mounted.release()


async def _serve(config: MountConfig, mount_point: str, client: AsyncClient, task_status: trio.TaskStatus[str]) -> None:
    invalidator = Invalidator()
    file_system = FileSystem(client, invalidate=invalidator, attr_cache=config.attr_cache, data_cache=config.data_cache)
    operations = KernelOperations(file_system, deadline_s=config.operation_deadline_s)
    try:
        pyfuse3.init(operations, mount_point, _options(config, client.routing.cluster_id))
    except RuntimeError as error:
        raise MountError(
            f"mounting on {mount_point} failed ({error}): run as root, or check that fusermount3 is installed and, with allow_other, that "
            "user_allow_other is set in /etc/fuse.conf"
        ) from error
    try:
        await _run(config, mount_point, client, file_system, operations, invalidator, task_status)
    finally:
        # Only now does no task and no thread use the session any more.
        pyfuse3.close(unmount=kernel.mount_entry(mount_point) is not None)
        log.info("unmounted %s", mount_point)


async def _run(
    config: MountConfig,
    mount_point: str,
    client: AsyncClient,
    file_system: FileSystem,
    operations: KernelOperations,
    invalidator: Invalidator,
    task_status: trio.TaskStatus[str],
) -> None:
    async with trio.open_nursery() as nursery:
        # The loop is out of reach of the cancel that begins an unmount: the unmount needs its answers. It ends when the kernel says so.
        loop_scope, loop_ended = trio.CancelScope(shield=True), trio.Event()

        async def loop() -> None:
            try:
                with loop_scope:
                    await pyfuse3.main(min_tasks=2, max_tasks=config.max_tasks)
            finally:
                loop_ended.set()
                nursery.cancel_scope.cancel()

        try:
            client.on_revoked(file_system.revoked)
            client.on_lost(file_system.lost)
            await nursery.start(invalidator.run, client)
            nursery.start_soon(loop)
            with trio.move_on_after(HANDSHAKE_TIMEOUT_S):
                await operations.ready.wait()
            if not operations.ready.is_set():
                raise MountError(f"the kernel did not answer the handshake for {mount_point} within {HANDSHAKE_TIMEOUT_S:.0f} s")
            _tune(config, mount_point)
            log.info("mounted %s on %s", client.routing.cluster_id, mount_point)
            task_status.started(mount_point)
            await _until_signalled()
        finally:
            with trio.CancelScope(shield=True):
                await _unmount(config, mount_point)
                await _flush(file_system)
                if not loop_ended.is_set():
                    pyfuse3.terminate()
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


def _options(config: MountConfig, cluster_id: str) -> set[str]:
    # No max_read: libfuse refuses one that its init() has not been told too, which pyfuse3 cannot. Without it the kernel reads up to 256
    # pages, 1 MiB.
    options = {f"fsname=kvfs#{cluster_id}", f"subtype={kernel.SUBTYPE}", "default_permissions"}
    if os.geteuid() == 0:
        options |= {"dev", "suid"}
    if config.allow_other:
        options.add("allow_other")
    if config.read_only:
        options.add("ro")
    return options


def _tune(config: MountConfig, mount_point: str) -> None:
    entry = kernel.mount_entry(mount_point)
    if entry is None or os.geteuid() != 0:
        return
    if config.read_ahead_kb and not kernel.set_read_ahead(entry.device_minor, config.read_ahead_kb):
        log.info("read-ahead stays at the kernel's default: /sys/class/bdi is not writable")
    if not kernel.set_max_background(entry.device_minor, config.max_background):
        log.debug("max_background stays at the kernel's default: fusectl is not mounted")
