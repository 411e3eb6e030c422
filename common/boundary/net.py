"""Net boundary: byte streams over TCP and unix sockets, with file descriptors on the latter.

Owns what a stream, a listener and an address are; `system_net.py` has the real ones, `common/sim/net.py` the simulated ones. A stream is used by one
reader and one writer task at a time. The `_now` calls never block and never reach a trio checkpoint: the wire code calls them first and waits only
when it must, which is what makes a call cheap. Closing is idempotent; after it, and after a reset by the peer, every call raises ConnectionLost (an
orderly end of the peer's bytes is a count of 0 instead).

Addresses: "tcp://127.0.0.1:7001" (port 0: any free one), "tcp://[::1]:7001", "unix:///run/kvfs/storage.sock".
"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import trio

from kvfs.common.boundary.thread_stream import ThreadStream
from kvfs.common.errors import ConfigError

ReadBuffer = bytes | bytearray | memoryview
"""What can be sent."""

MAX_FDS: Final = 16


class ByteStream(ABC):
    peer: str
    carries_fds: bool
    """Whether file descriptors can travel (unix sockets and their simulated kin)."""
    trusted: bool
    """Whether the kernel says that the other end is a process of this machine that may do what this one may: of the same user, or of root."""

    @abstractmethod
    def send_now(self, buffers: Sequence[ReadBuffer], fds: Sequence[int] = ()) -> int:
        """Bytes taken without waiting; 0 when the stream is full. The descriptors travel with the first byte taken."""

    @abstractmethod
    def receive_now(self, views: Sequence[memoryview]) -> int | None:
        """Bytes placed into the views, in order; 0 at the end of the stream; None when nothing is there yet."""

    @abstractmethod
    async def wait_writable(self) -> None: ...

    @abstractmethod
    async def wait_readable(self) -> None: ...

    def expect(self, count: int) -> None:
        """So many bytes at least are about to come: `wait_readable` may wait until a good part of them is here. 1: no more."""
        return

    def take_over(self, task: trio.lowlevel.Task) -> bool:
        """Wakes `task`, which is about to wait, in place of the task in `wait_readable`: see ReadWatch. False: not here, or nobody waits now."""
        return False

    def give_back(self) -> bool:
        """Undoes `take_over`. False: its task was woken already."""
        return True

    def hand_back(self, error: BaseException | None = None) -> None:
        """Ends the reader's wait, with an error if there is one. For the task in its place, once woken."""
        raise NotImplementedError

    @abstractmethod
    def taken_fds(self) -> list[int]:
        """Descriptors received since the last call, in order; the caller owns them now."""

    @abstractmethod
    def close_sending(self) -> None:
        """Tells the peer that no more bytes will come; receiving goes on."""

    @abstractmethod
    def close(self) -> None: ...

    async def send(self, buffers: Sequence[ReadBuffer], fds: Sequence[int] = ()) -> None:
        """All of it. If cancelled, a part may have been sent: the stream is then of no use."""
        rest = [memoryview(part).cast("B") for part in buffers if len(part)]
        await trio.lowlevel.checkpoint()
        while rest:
            taken = self.send_now(rest, fds)
            if taken:
                fds = ()
                rest = after(rest, taken)
            else:
                await self.wait_writable()

    async def receive_into(self, view: memoryview) -> int:
        """At least one byte; 0 at the end of the stream."""
        await trio.lowlevel.checkpoint()
        views = (view,)
        while (count := self.receive_now(views)) is None:
            await self.wait_readable()
        return count

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()


class Listener(ABC):
    address: str
    """With the real port."""

    @abstractmethod
    async def accept(self) -> ByteStream: ...

    @abstractmethod
    async def aclose(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Here:
    """Which process on which machine this is, as it tells others."""

    host_id: str
    """Names this run of this machine's kernel: equal on both sides means that memory can be shared."""
    hostname: str
    pid: int


class Net(ABC):
    @property
    @abstractmethod
    def here(self) -> Here: ...

    @abstractmethod
    async def connect(self, address: str, *, timeout_s: float) -> ByteStream: ...

    @abstractmethod
    async def listen(self, address: str) -> Listener: ...

    def connect_thread(self, path: str, *, timeout_s: float) -> ThreadStream | None:
        """To a unix socket, for a thread that waits itself. None: this network has none. Raises Unreachable."""
        return None


def after(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of `buffers` once the first `count` bytes are gone."""
    for index, part in enumerate(buffers):
        size = part.nbytes
        if count < size:
            return [part[count:], *buffers[index + 1 :]]
        count -= size
    return []


def parse_address(address: str) -> tuple[socket.AddressFamily, tuple[str, int] | str]:
    """Socket family and socket address. Raises ConfigError: addresses come from people."""
    if address.startswith("unix://"):
        path = address[len("unix://") :]
        if not path.startswith("/"):
            raise ConfigError(f"address {address!r}: a unix address is unix:// and an absolute path, such as unix:///run/kvfs/storage.sock")
        return socket.AF_UNIX, path
    if address.startswith("tcp://"):
        host, colon, port = address[len("tcp://") :].rpartition(":")
        if colon and host and port.isascii() and port.isdigit() and int(port) < 65536:
            if host.startswith("[") and host.endswith("]"):
                return socket.AF_INET6, (host[1:-1], int(port))
            return socket.AF_INET, (host, int(port))
    raise ConfigError(f"address {address!r}: expected tcp://HOST:PORT or unix:///PATH")
