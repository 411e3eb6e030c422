"""The supervisor's control socket: one JSON object a line each way, over a unix socket that only the owner may open.

Requests: {"command": "status" | "shutdown"}, {"command": "start" | "stop", "name": ...}, {"command": "mount", "path": ...}.
Replies: {"ok": true, ...} or {"ok": false, "error": "..."}. Owns the wire form of it; the supervisor decides what commands do.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from kvfs.common.errors import ClusterNotFound, DeadlineExceeded, SetupError

LINE_BYTES_MAX = 1 << 20


def request(control_socket: Path, command: str, *, timeout_s: float = 10.0, **arguments: object) -> dict[str, Any]:
    """Ask the supervisor. Raises ClusterNotFound when none runs, SetupError with its words when it refuses."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(str(control_socket))
            connection.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
            line = b""
            while not line.endswith(b"\n"):
                part = connection.recv(65536)
                if not part:
                    raise ClusterNotFound("the supervisor ended before it answered: see log/supervisor.log in the cluster's directory")
                line += part
                if len(line) > LINE_BYTES_MAX:
                    raise SetupError("the supervisor's answer is too long")
        except TimeoutError:
            raise DeadlineExceeded(
                f"the supervisor did not answer within {timeout_s:.0f} s: see log/supervisor.log in the cluster's directory"
            ) from None
        except (FileNotFoundError, ConnectionError):
            raise ClusterNotFound("the cluster is not running: start it with `kvfs up`") from None
    reply: dict[str, Any] = json.loads(line)
    if not reply.get("ok"):
        raise SetupError(str(reply.get("error", "refused")))
    return reply


def is_running(control_socket: Path) -> bool:
    """Whether a supervisor listens there. A socket file that a killed one left behind does not count."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(str(control_socket))
        except OSError:
            return False
    return True
