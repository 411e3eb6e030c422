"""Child processes of a command: started with a pipe that tells when they serve and one whose end tells them that their parent is gone.

Owns `Child` and `Lifeline`. Invariants: every child holds the read end of the lifeline, so that none outlives its parent; each runs in a session of
its own, so that a Ctrl-C at the terminal is heard by the parent alone, which ends them in its order; one that does not stop within its grace is
killed.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import trio

log = logging.getLogger("kvfs.supervisor")

STOP_GRACE_S = 20.0


@dataclass(slots=True)
class Child:
    """One supervised process. `state`: starting, running, restarting, stopped or failed."""

    name: str
    role: str
    argv: list[str]
    node_id: int = 0
    state: str = "stopped"
    pid: int | None = None
    addresses: list[str] = field(default_factory=list)
    wanted: bool = True
    restarts: int = 0
    error: str = ""
    changed: trio.Event = field(default_factory=trio.Event)
    process: trio.Process | None = None

    def set_state(self, state: str, error: str = "") -> None:
        self.state, self.error = state, error
        self.changed.set()
        self.changed = trio.Event()

    def describe(self) -> dict[str, object]:
        return {
            "role": self.role,
            "id": self.name,
            "node_id": self.node_id,
            "pid": self.pid,
            "address": self.addresses[0] if self.addresses else "",
            "addresses": self.addresses,
            "state": self.state,
            "restarts": self.restarts,
            "error": self.error,
        }


def kvfs_argv(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kvfs.cli.main", *arguments]


class Lifeline:
    """A parent's side. Its end, however it comes, is heard by all children."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_inheritable(self._write, False)

    async def run_once(self, child: Child, log_file: Path) -> int:
        """Start the child and wait for its end; its exit status. `child.state` is running from the moment it says that it serves."""
        read, write = os.pipe()
        environment = {**os.environ, "KVFS_READY_FD": str(write), "KVFS_LIFELINE_FD": str(self._read)}
        with open(log_file, "ab") as out:
            try:
                running = await trio.lowlevel.open_process(
                    child.argv,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    env=environment,
                    pass_fds=(write, self._read),
                    start_new_session=True,
                )
            finally:
                os.close(write)
        child.process, child.pid = running, running.pid
        child.set_state("starting")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_read_ready, child, trio.lowlevel.FdStream(read))
            status = await running.wait()
            nursery.cancel_scope.cancel()
        child.process, child.pid = None, None
        return status


async def _read_ready(child: Child, pipe: trio.lowlevel.FdStream) -> None:
    async with pipe:
        line = b""
        while not line.endswith(b"\n"):
            part = await pipe.receive_some(4096)
            if not part:
                return
            line += part
    info = json.loads(line)
    child.addresses = [str(address) for address in info.get("addresses", child.addresses)]
    child.node_id = int(info.get("node_id", child.node_id))
    child.set_state("running")


async def stop(child: Child) -> None:
    """SIGTERM, and SIGKILL if it does not help."""
    child.wanted = False
    running = child.process
    if running is None:
        child.set_state("stopped")
        return
    running.terminate()
    with trio.move_on_after(STOP_GRACE_S):
        await running.wait()
    if running.returncode is None:
        log.warning("%s did not stop within %.0f s: killing it", child.name, STOP_GRACE_S)
        running.kill()
        await running.wait()
    child.process, child.pid = None, None
    child.set_state("stopped")
