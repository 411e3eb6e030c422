"""The workers of `kvfs serve`: processes of this machine, kept running.

Owns `WorkerProcesses`. Invariants: a worker that dies is started again at the same address, with a delay that doubles while it keeps dying early; one
that cannot work (no model, no cluster, wrong options) ends the command at the first start, with the worker's own words; all are stopped, and have
written what waited, before the command ends.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import trio

from kvfs.cli import process
from kvfs.cli.children import Child, Lifeline, kvfs_argv, stop
from kvfs.common.errors import SetupError

log = logging.getLogger("kvfs.serve")

DELAY_S = 0.5
DELAY_MAX_S = 30.0


class WorkerProcesses:
    def __init__(self, sockets: Path, logs: Path, roles: Sequence[str], arguments: Sequence[str]) -> None:
        """`sockets`, `logs`: directories. `arguments`: of every `kvfs worker`, the model first."""
        self._logs = logs
        self._lifeline = Lifeline()
        self.children: list[Child] = []
        self.addresses: dict[str, tuple[str, ...]] = {}
        for number, role in enumerate(roles, 1):
            name = f"{role}-{number}"
            address = f"unix://{sockets / name}.sock"
            argv = kvfs_argv("worker", *arguments, "--role", role, "--listen", address)
            self.children.append(Child(name, role, argv))
            self.addresses[name] = (address,)

    def log_file(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until it is cancelled. Started when all of them serve; SetupError: one cannot."""
        try:
            async with trio.open_nursery() as nursery:
                for child in self.children:
                    child.set_state("starting")
                    nursery.start_soon(self._keep, child)
                for child in self.children:
                    while child.state != "running":
                        await child.changed.wait()
                task_status.started()
        finally:
            with trio.CancelScope(shield=True):
                async with trio.open_nursery() as nursery:
                    for child in self.children:
                        nursery.start_soon(stop, child)

    async def _keep(self, child: Child) -> None:
        delay_s, served = DELAY_S, False
        while child.wanted:
            began_s = trio.current_time()
            status = await self._lifeline.run_once(child, self.log_file(child.name))
            served = served or child.state == "running"
            words = process.last_words(self.log_file(child.name)) or f"exit status {status}"
            if not served:
                raise SetupError(f"worker {child.name} did not start: {words} (log: {self.log_file(child.name)})")
            if trio.current_time() - began_s > DELAY_MAX_S:
                delay_s = DELAY_S
            child.restarts += 1
            child.set_state("restarting", words)
            log.warning("worker %s ended (%s); starting it again in %.1f s", child.name, words, delay_s)
            await trio.sleep(delay_s)
            delay_s = min(2 * delay_s, DELAY_MAX_S)
