"""A `kvfs serve` that a command starts for itself and stops again: benchmarks of a model, and the inference demo.

Owns `OwnServer`. Invariants: it never outlives the command (it holds a lifeline), and whatever happens it has ended, with its workers, when the
`with` block is left; one that does not start is an error with its own words.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvfs.cli.children import kvfs_argv
from kvfs.cli.process import last_words
from kvfs.common.errors import SetupError

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class OwnServer:
    url: str
    """Without /v1."""
    workers: dict[str, int]
    """Name -> process id."""


@contextmanager
def own_server(model: Path, arguments: Sequence[str], directory: Path) -> Iterator[OwnServer]:
    """`arguments` of `kvfs serve` behind the model; `directory`: new, for logs and sockets."""
    directory.mkdir()
    ready_read, ready_write = os.pipe()
    life_read, life_write = os.pipe()
    argv = kvfs_argv("serve", str(model), "--port", "0", "--log-dir", str(directory), *arguments)
    environment = {**os.environ, "KVFS_READY_FD": str(ready_write), "KVFS_LIFELINE_FD": str(life_read)}
    log_file = directory / "serve.log"
    try:
        with open(log_file, "ab") as out:
            running = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, pass_fds=(ready_write, life_read), start_new_session=True
            )
        os.close(ready_write)
        os.close(life_read)
        try:
            yield _started(ready_read, running, log_file)
        finally:
            _stop(running)
    finally:
        os.close(ready_read)
        os.close(life_write)


def _started(ready: int, running: subprocess.Popen[bytes], log_file: Path) -> OwnServer:
    line = b""
    while not line.endswith(b"\n"):
        if not select.select([ready], [], [], START_TIMEOUT_S)[0]:
            raise SetupError(f"the server does not answer after {START_TIMEOUT_S:.0f} s: see {log_file}")
        part = os.read(ready, 65536)
        if not part:
            status = running.wait()
            raise SetupError(last_words(log_file) or f"the server ended at once (status {status}): see {log_file}")
        line += part
    info = json.loads(line)
    return OwnServer(str(info["addresses"][0]), {str(name): int(pid) for name, pid in info.get("workers", {}).items()})


def _stop(running: subprocess.Popen[bytes]) -> None:
    """Also while an interrupt is being handled: a second one only makes it quicker."""
    if running.poll() is None:
        running.send_signal(signal.SIGTERM)
        try:
            running.wait(STOP_TIMEOUT_S)
        except BaseException as error:
            running.kill()  # its workers hear it by their own lifeline
            running.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
