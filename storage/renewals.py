"""Targets that are closed while their process goes on: one that was drained has its data deleted; one whose index is damaged is made anew.

A target whose index cannot be trusted says nothing about what it holds: it is filled again by its chain, as after a change of its disk. Invariants:
the manager has marked it blank before anything of it is touched, which it does only while another replica serves, so what is set aside is never the
last copy; until the new one serves, the old files stay in `aside`, unless the disk has no room for both. The engine of a target is closed only when
no update of it is under way and every thread has ended what it did for it.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from kvfs.common.errors import KvfsError, TargetOffline
from kvfs.common.wire import cluster_pb2 as cluster
from kvfs.common.wire.service import method
from kvfs.storage.disks import TARGETS, DataDirectory, Disks
from kvfs.storage.engine import journal
from kvfs.storage.engine.files import FOLDER as DATA
from kvfs.storage.host import Host
from kvfs.storage.retention.log import NAME as RETENTION_LOG
from kvfs.storage.target import Target

log = logging.getLogger("kvfs.storage")

WITHDRAW = method("Manager", "Withdraw")
CALL_S = 5.0
RETRY_S = 5.0
FLIGHTS_S = 10.0
ASIDE = "aside"
INDEX = "index"
_SET_ASIDE = (INDEX, journal.FOLDER, DATA, RETENTION_LOG)
"""In this order: a crash between two of them leaves a target that cannot be opened, or an empty one."""
Open = Callable[[DataDirectory, int, int], Awaitable[Target]]


class Renewals:
    def __init__(self, host: Host, disks: Disks, open_target: Open) -> None:
        """`open_target`: (directory, target id, chain id), as one that was away."""
        self._host = host
        self._disks = disks
        self._open = open_target
        self._under_way: set[int] = set()

    def begin(self, target: Target) -> None:
        """The index of the target is damaged. Nothing happens when it is being seen to already."""
        self._start(target, self._renew)

    def discard(self, target: Target) -> None:
        """The target has no chain any more, and its data has its place elsewhere."""
        self._start(target, self._discard)

    def _start(self, target: Target, work: Callable[[Target], Awaitable[None]]) -> None:
        if target.target_id in self._under_way or self._host.nursery.cancel_scope.cancel_called:
            return
        self._under_way.add(target.target_id)

        async def run() -> None:
            try:
                await work(target)
            except KvfsError as error:
                log.error("target %d: %s", target.target_id, error.message)
            finally:
                self._under_way.discard(target.target_id)

        self._host.nursery.start_soon(run)

    # --- drained -------------------------------------------------------------------------------------------------------------------------

    async def _discard(self, target: Target) -> None:
        self._host.targets.pop(target.target_id, None)
        await self._close(target)
        directory = self._disks.directories[target.disk]
        await self._host.workers.run(partial(directory.disk.remove_tree, f"{TARGETS}/{target.target_id}"))
        log.info("target %d was drained: its data is deleted", target.target_id)

    # --- damaged -------------------------------------------------------------------------------------------------------------------------

    async def _renew(self, target: Target) -> None:
        host, target_id = self._host, target.target_id
        while not await self._withdrawn(target):
            with trio.move_on_after(RETRY_S):
                await target.moved.wait()
        log.warning("target %d: its index is damaged: it is made anew and filled by its chain", target_id)
        await self._close(target)
        directory = self._disks.directories[target.disk]
        await host.workers.run(partial(self._set_aside, directory, target_id))
        await self._open(directory, target_id, target.chain_id)
        host.link.report_now()

    async def _withdrawn(self, target: Target) -> bool:
        """Whether the manager has taken the target out of its chain and marked it blank."""
        link = self._host.link
        view = target.replica.view
        if view is None or not any(member != target.target_id for member in view.serving):
            return False
        request = cluster.WithdrawRequest(target_id=target.target_id, node_id=link.node_id, incarnation=link.incarnation)
        try:
            await link.call(WITHDRAW, request, timeout_s=CALL_S)
        except KvfsError as error:
            log.info("target %d cannot be made anew yet: %s", target.target_id, error.message)
            return False
        return True

    def _set_aside(self, directory: DataDirectory, target_id: int) -> None:
        """Blocking."""
        disk = self._disks.disk_of(directory, target_id)
        capacity, free = disk.space()
        keep = free > capacity // 2  # whatever the old files take, the new ones fit beside them
        disk.makedirs(ASIDE)
        for name in _SET_ASIDE:
            if not disk.exists(name):
                continue
            disk.remove_tree(f"{ASIDE}/{name}")
            if keep:
                disk.rename(name, f"{ASIDE}/{name}")
            else:
                disk.remove_tree(name)
        disk.sync_directory(ASIDE)
        disk.sync_directory()

    async def _forget_aside(self, target: Target) -> None:
        while not target.replica.serving:
            if not target.opened:
                return
            await target.moved.wait()
        await self._host.workers.run(partial(target.engine.disk.remove_tree, ASIDE))
        log.info("target %d serves again: what was set aside is deleted", target.target_id)

    def watch(self, target: Target) -> None:
        """A target that was opened: what was set aside for it is deleted once it serves."""
        if target.engine.disk.exists(ASIDE):
            self._host.nursery.start_soon(self._forget_aside, target)

    # --- closing -------------------------------------------------------------------------------------------------------------------------

    async def _close(self, target: Target) -> None:
        """Nobody uses the engine any more when this returns."""
        host = self._host
        engine = target.close_door()
        target.tasks.cancel()
        target.wake()
        deadline_s = host.clock.monotonic() + FLIGHTS_S
        while target.replica.flights and host.clock.monotonic() < deadline_s:
            await host.clock.sleep(0.01)
        await host.workers.settle()
        if engine is not None:
            await host.workers.run(target.retention.close)
            engine.abandon(TargetOffline("the target was given up"))
            await host.workers.run(engine.close)
