"""The real Net: sockets of the operating system, watched through `ReadWatch`.

Owns every socket of kvfs but those that threads wait on themselves (`thread_stream.py`). Must never block: what is not there yet is waited for by
trio. Every OSError leaves as a class of the tree.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import stat
import struct
from collections.abc import Sequence
from functools import cache
from typing import Final

import trio

from kvfs.common.boundary.net import MAX_FDS, ByteStream, Here, Listener, Net, ReadBuffer, parse_address
from kvfs.common.boundary.readiness import ReadWatch
from kvfs.common.boundary.thread_stream import ThreadStream
from kvfs.common.errors import AddressInUse, ConfigError, ConnectionLost, Unreachable, from_os

_IOV_MAX: Final = 1024
_BACKLOG: Final = 512
LOW_WATER_BYTES: Final = 128 << 10
"""Of bytes that are known to come over TCP so many are waited for at once: a wake-up costs as much as copying them (4 MiB of payload: half the
wake-ups, a tenth less of the receiver's time)."""
_CREDENTIALS: Final = struct.Struct("iII")
_FD_SPACE: Final = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)


@cache
def boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


class SystemNet(Net):
    @property
    def here(self) -> Here:
        return Here(boot_id(), socket.gethostname(), os.getpid())

    async def connect(self, address: str, *, timeout_s: float) -> ByteStream:
        family, where = parse_address(address)
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            with trio.fail_after(timeout_s):
                if family is not socket.AF_UNIX:
                    where = await _resolve(family, where)
                    _tune(sock)
                await _connect(sock, where)
            return SocketStream(sock, address)
        except trio.TooSlowError:
            sock.close()
            raise Unreachable(f"no answer from {address} within {timeout_s:g} s") from None
        except OSError as error:
            sock.close()
            raise Unreachable(f"cannot connect to {address}: {error.strerror or error}") from None
        except BaseException:
            sock.close()
            raise

    def connect_thread(self, path: str, *, timeout_s: float) -> ThreadStream | None:
        return ThreadStream(path, timeout_s)

    async def listen(self, address: str) -> Listener:
        family, where = parse_address(address)
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            if family is socket.AF_UNIX:
                assert isinstance(where, str)
                await _clear_stale_socket(where)
                sock.bind(where)
                os.chmod(where, 0o600)
                real = address
            else:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(await _resolve(family, where))
                host, port = sock.getsockname()[:2]
                real = f"tcp://[{host}]:{port}" if family is socket.AF_INET6 else f"tcp://{host}:{port}"
            sock.listen(_BACKLOG)
            return SocketListener(sock, real)
        except OSError as error:
            sock.close()
            if error.errno == errno.EADDRINUSE:
                raise AddressInUse(
                    f"{address} is in use by another process: stop it, or choose another address (port 0 takes any free one)"
                ) from None
            if error.errno in (errno.EADDRNOTAVAIL, errno.EACCES, errno.ENOENT) or isinstance(error, socket.gaierror):
                raise ConfigError(f"cannot listen on {address}: {error.strerror or error}") from None
            raise from_os(error, f"listen on {address}") from None
        except BaseException:
            sock.close()
            raise


class SocketStream(ByteStream):
    def __init__(self, sock: socket.socket, peer: str) -> None:
        self._sock = sock
        self.peer = peer
        self.carries_fds = sock.family is socket.AF_UNIX
        self.trusted = self.carries_fds and _peer_uid(sock) in (0, os.geteuid())
        self._fds: list[int] = []
        self._watch = ReadWatch(sock.fileno())
        self._expected = 1
        self._write_fd = -1
        """A second descriptor of the socket: trio arms a descriptor for reading and writing together, and reading is the watch's."""

    def send_now(self, buffers: Sequence[ReadBuffer], fds: Sequence[int] = ()) -> int:
        try:
            if fds:
                return self._sock.sendmsg(buffers, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
            if len(buffers) == 1:
                return self._sock.send(buffers[0])
            return self._sock.sendmsg(buffers if len(buffers) <= _IOV_MAX else buffers[:_IOV_MAX])
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._lost(error) from None

    def receive_now(self, views: Sequence[memoryview]) -> int | None:
        try:
            if self.carries_fds:
                return self._receive_with_fds(views)
            if len(views) == 1:
                return self._sock.recv_into(views[0])
            return self._sock.recvmsg_into(views if len(views) <= _IOV_MAX else views[:_IOV_MAX])[0]
        except BlockingIOError:
            return None
        except OSError as error:
            raise self._lost(error) from None

    def _receive_with_fds(self, views: Sequence[memoryview]) -> int:
        count, ancillary, _flags, _address = self._sock.recvmsg_into(views[:_IOV_MAX], _FD_SPACE, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(data[: len(data) - len(data) % received.itemsize])
                self._fds.extend(received)
        if len(self._fds) > MAX_FDS:
            raise OSError(errno.EPROTO, "too many file descriptors")
        return count

    async def wait_writable(self) -> None:
        try:
            if self._write_fd < 0:
                self._write_fd = os.dup(self._sock.fileno())
            await trio.lowlevel.wait_writable(self._write_fd)
        except (trio.ClosedResourceError, OSError, ValueError) as error:
            raise self._lost(error) from None

    async def wait_readable(self) -> None:
        try:
            await self._watch.wait()
        except (trio.ClosedResourceError, OSError, ValueError) as error:
            raise self._lost(error) from None

    def expect(self, count: int) -> None:
        count = min(count, LOW_WATER_BYTES)
        if count != self._expected and not self.carries_fds:
            self._expected = count
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)

    def take_over(self, task: trio.lowlevel.Task) -> bool:
        return self._watch.take_over(task)

    def give_back(self) -> bool:
        return self._watch.give_back()

    def hand_back(self, error: BaseException | None = None) -> None:
        self._watch.hand_back(error)

    def taken_fds(self) -> list[int]:
        fds, self._fds = self._fds, []
        return fds

    def close_sending(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            self._watch.close()
            if self._write_fd >= 0:
                trio.lowlevel.notify_closing(self._write_fd)
                os.close(self._write_fd)
                self._write_fd = -1
            self._sock.close()
        for fd in self.taken_fds():
            os.close(fd)

    def _lost(self, error: Exception) -> ConnectionLost:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it was closed here"
        return ConnectionLost(f"connection with {self.peer} lost: {reason}")


class SocketListener(Listener):
    def __init__(self, sock: socket.socket, address: str) -> None:
        self._sock = sock
        self.address = address
        self._path = sock.getsockname() if sock.family is socket.AF_UNIX else None
        self._inode = os.stat(self._path).st_ino if self._path else 0

    async def accept(self) -> ByteStream:
        while True:
            try:
                await trio.lowlevel.wait_readable(self._sock)
                sock, where = self._sock.accept()
            except BlockingIOError:
                continue
            except trio.ClosedResourceError:
                raise ConnectionLost(f"listener {self.address} was closed") from None
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    await trio.sleep(0.1)  # out of descriptors: others may free some, and the caller waits in the backlog meanwhile
                    continue
                if error.errno in (errno.ECONNABORTED, errno.EPROTO, errno.EPERM):
                    continue
                raise ConnectionLost(f"listener {self.address}: {error.strerror}") from None
            sock.setblocking(False)
            if sock.family is socket.AF_UNIX:
                return SocketStream(sock, f"{self.address}#{sock.fileno()}")
            _tune(sock)
            return SocketStream(sock, f"tcp://{where[0]}:{where[1]}")

    async def aclose(self) -> None:
        if self._sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()
            if self._path is not None:
                with contextlib.suppress(OSError):
                    if os.stat(self._path).st_ino == self._inode:  # not the socket of a successor that took the path
                        os.unlink(self._path)
        await trio.lowlevel.checkpoint()


def _peer_uid(sock: socket.socket) -> int:
    """Of the process that connected, or listened, at the other end."""
    _pid, uid, _gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(uid)


def _tune(sock: socket.socket) -> None:
    """No Nagle delay; a peer that vanished without a word is noticed within about 15 s, whether we wait for it or send to it."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 6)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 15_000)


async def _resolve(family: socket.AddressFamily, where: tuple[str, int] | str) -> tuple[str, int]:
    """Numeric addresses at once, names through trio's resolver thread."""
    assert isinstance(where, tuple)
    try:
        socket.inet_pton(family, where[0])
        return where
    except OSError:
        found = await trio.socket.getaddrinfo(where[0], where[1], family, socket.SOCK_STREAM)
        return str(found[0][4][0]), where[1]


async def _connect(sock: socket.socket, where: tuple[str, int] | str) -> None:
    try:
        sock.connect(where)
    except BlockingIOError:
        if sock.family is socket.AF_UNIX:  # the backlog is full; a unix socket does not go on by itself
            while True:
                await trio.sleep(0.01)
                try:
                    sock.connect(where)
                    return
                except BlockingIOError:
                    continue
        await trio.lowlevel.wait_writable(sock)
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code)) from None
        if sock.getsockname() == sock.getpeername():  # a TCP quirk: connecting to a free local port may meet oneself
            raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED)) from None
    else:
        await trio.lowlevel.checkpoint()


async def _clear_stale_socket(path: str) -> None:
    """Removes a socket file that a dead process left. A living one, or a file that is no socket, stays and makes bind fail."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except FileNotFoundError:
        return
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        probe.connect(path)
    except ConnectionRefusedError:
        os.unlink(path)
    except OSError:
        pass
    finally:
        probe.close()
    await trio.lowlevel.checkpoint()
