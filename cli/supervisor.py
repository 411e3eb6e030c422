"""The supervisor: starts the processes of a cluster directory, watches them, starts again those that die, and answers on the control socket.

Invariants: every child holds the read end of a lifeline pipe, so that none outlives the supervisor; a child that was stopped on purpose stays
stopped; one that exits with a setup error (a person must change something) is not started in a loop; the mount goes first when the cluster
stops, so that what it buffers still finds its servers. The supervisor holds no data: killing it loses nothing.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from kvfs.cli import process
from kvfs.cli.children import Child, Lifeline, kvfs_argv, stop
from kvfs.cli.cluster_dir import ClusterDir
from kvfs.cli.control import LINE_BYTES_MAX, is_running
from kvfs.common.boundary.real_disk import RealDisk
from kvfs.common.errors import DirectoryInUse, KvfsError, SetupError

log = logging.getLogger("kvfs.supervisor")

READY_TIMEOUT_S = 60.0
LOCK_TIMEOUT_S = 30.0
"""For another supervisor of the directory to end, or to listen."""
RESTART_DELAY_S = {"manager": 0.5, "meta": 0.5, "mount": 1.0, "storage": 5.0}
"""Metadata has one process each here, and everyone waits for it. A storage service is given time to be missed: chains go on without it, and an
immediate start would only meet its own recovery."""
RESTART_DELAY_MAX_S = 60.0
STOP_ORDER = ("mount", "meta", "storage", "manager")


def mount_child(cluster: ClusterDir, mount: str) -> Child:
    return Child("mount", "mount", kvfs_argv("mount", mount, "--cluster", str(cluster.path), "--foreground"), addresses=[mount])


def children_of(cluster: ClusterDir) -> list[Child]:
    def service(name: str, role: str) -> Child:
        return Child(name, role, kvfs_argv(role, "--config", str(cluster.config_file(name))))

    made = [service("manager", "manager")]
    made += [service(name, "storage") for name in cluster.storage_names()]
    made.append(service("meta", "meta"))
    if cluster.mount:
        made.append(mount_child(cluster, cluster.mount))
    return made


class Supervisor:
    """Owns the children of one cluster directory."""

    def __init__(self, cluster: ClusterDir, *, restart: bool, bring_up: Callable[[], Any], stay_when_failed: bool) -> None:
        """`stay_when_failed`: keep answering on the control socket after a failed start, for who started us in the background to ask why."""
        self.cluster = cluster
        self.restart = restart
        self._stay_when_failed = stay_when_failed
        self.children = {child.name: child for child in children_of(cluster)}
        self.phase = "starting"
        self.error = ""
        self._bring_up = bring_up
        self._lifeline = Lifeline()
        self._stopping = trio.Event()

    async def run(self) -> None:
        """Serve until asked to shut down. Raises DirectoryInUse when another supervisor has the directory."""
        self.cluster.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        held = await self._locked()
        try:
            listener = await self._listen()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.serve_listeners, self._answer, [listener])
                try:
                    await self._serve()
                finally:
                    # Whatever ends the supervisor, its children are asked to stop, in order, and get their grace.
                    with trio.CancelScope(shield=True):
                        await self._stop_all()
                nursery.cancel_scope.cancel()
        finally:
            self.cluster.control_socket.unlink(missing_ok=True)
            held.close()
        if self.error:
            raise SetupError(f"{self.error} (logs: {self.cluster.path / 'log'})")

    async def _serve(self) -> None:
        async with trio.open_nursery() as nursery:

            async def start_all() -> None:
                try:
                    await self._start_in_order(nursery)
                    self.phase = "ready"
                except KvfsError as error:
                    self.phase, self.error = "failed", error.message
                    log.error("the cluster did not come up: %s", error.message)
                    if not self._stay_when_failed:
                        self._stopping.set()

            nursery.start_soon(start_all)
            self._nursery = nursery
            await self._stopping.wait()
            nursery.cancel_scope.cancel()

    async def _start_in_order(self, nursery: trio.Nursery) -> None:
        for role in ("manager", "storage", "meta"):
            started = [child for child in self.children.values() if child.role == role]
            for child in started:
                nursery.start_soon(self._keep, child)
            if role != "storage":  # storage and meta come up side by side
                await self._wait_running(started)
        await self._wait_running([child for child in self.children.values() if child.role == "storage"])
        await self._bring_up()
        mount = self.children.get("mount")
        if mount is not None:
            nursery.start_soon(self._keep, mount)
            await self._wait_running([mount])

    async def _wait_running(self, children: list[Child]) -> None:
        """Until all of them serve. Raises SetupError with the first one's words when it cannot."""
        with trio.move_on_after(READY_TIMEOUT_S) as scope:
            for child in children:
                while child.state != "running":
                    if child.state == "failed":
                        raise SetupError(f"{child.name} did not start: {child.error}")
                    await child.changed.wait()
        if scope.cancelled_caught:
            slow = [child.name for child in children if child.state != "running"]
            raise SetupError(f"{', '.join(slow)} did not start within {READY_TIMEOUT_S:.0f} s: see {self.cluster.path / 'log'}")

    async def _keep(self, child: Child) -> None:
        """Start the child, and again when it dies, with a delay that doubles while it keeps dying early."""
        delay_s = RESTART_DELAY_S[child.role]
        while child.wanted:
            started_s = trio.current_time()
            status = await self._lifeline.run_once(child, self.cluster.log_file(child.name))
            if not child.wanted or status == 0:  # an operator's SIGTERM or umount is not a failure: leave it so
                break
            words = child.error or process.last_words(self.cluster.log_file(child.name)) or f"exit status {status}"
            never_served = self.phase == "starting" and child.state == "starting"  # at first start people wait: say so at once
            if status == process.EXIT_SETUP or not self.restart or never_served:
                child.set_state("failed", words)
                return
            if trio.current_time() - started_s > RESTART_DELAY_MAX_S:
                delay_s = RESTART_DELAY_S[child.role]
            log.warning("%s ended (%s); starting it again in %.1f s", child.name, words, delay_s)
            child.restarts += 1
            child.set_state("restarting", words)
            with trio.move_on_after(delay_s):
                while child.wanted and child.state == "restarting":
                    await child.changed.wait()
            delay_s = min(2 * delay_s, RESTART_DELAY_MAX_S)
        child.set_state("stopped")

    async def _stop_all(self) -> None:
        self.phase = "stopping"
        for role in STOP_ORDER:
            async with trio.open_nursery() as nursery:
                for child in self.children.values():
                    if child.role == role:
                        nursery.start_soon(stop, child)

    # --- the control socket ---

    async def _locked(self) -> RealDisk:
        """Holds the directory until it is closed. Of supervisors that start at once one gets it; the control socket cannot decide that: it is bound
        before it listens, and looks dead then."""
        held = RealDisk(self.cluster.run_dir)
        until = trio.current_time() + LOCK_TIMEOUT_S
        while not is_running(self.cluster.control_socket):
            try:
                held.lock()
                return held
            except DirectoryInUse:
                if trio.current_time() > until:
                    raise
                await trio.sleep(0.05)  # the other one ends, or will listen in a moment
        raise DirectoryInUse(f"{self.cluster.path} is already running: `kvfs status`, or `kvfs down` first")

    async def _listen(self) -> trio.SocketListener:
        self.cluster.control_socket.unlink(missing_ok=True)
        listening = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        await listening.bind(str(self.cluster.control_socket))
        os.chmod(self.cluster.control_socket, 0o600)
        listening.listen(16)
        return trio.SocketListener(listening)

    async def _answer(self, stream: trio.SocketStream) -> None:
        line = b""
        with trio.move_on_after(READY_TIMEOUT_S * 2):
            try:
                while not line.endswith(b"\n") and len(line) < LINE_BYTES_MAX:
                    part = await stream.receive_some(4096)
                    if not part:
                        return
                    line += part
                try:
                    reply = {"ok": True, **(await self._command(_request_of(line)))}
                except (KvfsError, ValueError, RecursionError) as error:
                    reply = {"ok": False, "error": error.message if isinstance(error, KvfsError) else f"not a command: {error}"}
                await stream.send_all(json.dumps(reply).encode() + b"\n")
                if self.phase == "shutdown":
                    self._stopping.set()
            except trio.BrokenResourceError:
                return

    async def _command(self, request: dict[str, Any]) -> dict[str, Any]:
        match request.get("command"):
            case "status":
                processes = [child.describe() for child in self.children.values()]
                return {"phase": self.phase, "error": self.error, "pid": os.getpid(), "processes": processes}
            case "start":
                child = self._child(request)
                child.wanted = True
                if child.state == "restarting":
                    child.set_state("starting")
                elif child.process is None:
                    child.set_state("starting")
                    self._nursery.start_soon(self._keep, child)
                await self._wait_running([child])
                return {"process": child.describe()}
            case "stop":
                child = self._child(request)
                await stop(child)
                return {"process": child.describe()}
            case "mount":
                path = _mount_path(request)
                child = self.children.setdefault("mount", mount_child(self.cluster, path))
                if child.process is not None and child.addresses != [path]:
                    raise SetupError(f"the cluster is mounted at {child.addresses[0]}: `kvfs umount` that first, or `kvfs mount {path}` for one more")
                child.argv, child.addresses, child.wanted = mount_child(self.cluster, path).argv, [path], True
                if child.process is None:
                    child.set_state("starting")
                    self._nursery.start_soon(self._keep, child)
                await self._wait_running([child])
                return {"process": child.describe()}
            case "shutdown":
                self.phase = "shutdown"
                return {}
            case other:
                raise SetupError(f"unknown command {other!r}")

    def _child(self, request: dict[str, Any]) -> Child:
        name = str(request.get("name", ""))
        if name not in self.children:
            raise SetupError(f"no process {name!r} here; there are: {', '.join(self.children)}")
        return self.children[name]


def _request_of(line: bytes) -> dict[str, Any]:
    """Raises ValueError and RecursionError: whoever may open the socket may write anything into it, and the cluster goes on."""
    request = json.loads(line)
    if not isinstance(request, dict):
        raise ValueError(f"an object is expected, not {type(request).__name__}")
    return request


def _mount_path(request: dict[str, Any]) -> str:
    """One that a process can be started with."""
    path = str(request.get("path", ""))
    os.fsencode(path)  # or ValueError
    if not os.path.isabs(path) or "\0" in path:
        raise SetupError(f"a mount point is an absolute path, not {path!a}")
    return path


def run_supervisor(cluster: ClusterDir, *, restart: bool, bring_up: Callable[[], Any], stay_when_failed: bool) -> int:
    async def main(ready: process.Ready) -> None:
        await Supervisor(cluster, restart=restart, bring_up=bring_up, stay_when_failed=stay_when_failed).run()

    return process.run_process(main)


def spawn_supervisor(path: Path, *, restart: bool) -> subprocess.Popen[bytes]:
    """Start the supervisor of a cluster directory detached from this terminal; its words go to log/supervisor.log."""
    arguments = ["supervise", str(path)] + ([] if restart else ["--no-restart"])
    with open(path / "log" / "supervisor.log", "ab") as out:
        return subprocess.Popen(kvfs_argv(*arguments), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, cwd="/")
