"""A unix socket for a thread that waits by itself, without an event loop.

Owns the socket. One thread at a time; `close` may come from any. Invariants: every call ends within its time; after an error, or a call that ran
out of time, the stream is of no use but to be closed. Belongs to the Net boundary: `Net.connect_thread` makes it.
"""

from __future__ import annotations

import array
import socket
from collections.abc import Sequence

from kvfs.common.errors import ConnectionLost, DeadlineExceeded, Unreachable


class ThreadStream:
    def __init__(self, path: str, timeout_s: float) -> None:
        self.peer = f"unix://{path}"
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._sock.settimeout(timeout_s)
            self._sock.connect(path)
        except OSError as error:
            self._sock.close()
            raise Unreachable(f"cannot connect to {self.peer}: {error.strerror or error}") from None

    def within(self, timeout_s: float) -> None:
        """How long each of the next calls may take."""
        self._sock.settimeout(timeout_s)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """All of it; the descriptors travel with the first byte."""
        try:
            if fds:
                sent = self._sock.sendmsg((data,), [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
                data = data[sent:]
            if data:
                self._sock.sendall(data)
        except OSError as error:
            raise self._lost(error) from None

    def receive(self, view: memoryview) -> int:
        """At least one byte. Descriptors that come along are closed: nobody asked for them."""
        try:
            count = self._sock.recv_into(view)
        except OSError as error:
            raise self._lost(error) from None
        if not count:
            raise ConnectionLost(f"{self.peer} closed the connection")
        return count

    def close(self) -> None:
        self._sock.close()

    def _lost(self, error: OSError) -> ConnectionLost | DeadlineExceeded:
        if isinstance(error, TimeoutError):
            return DeadlineExceeded(f"no answer from {self.peer} in time")
        return ConnectionLost(f"connection with {self.peer} lost: {error.strerror or error}")
