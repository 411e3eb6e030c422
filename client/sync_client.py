"""The synchronous face: a client for threads.

Owns a background thread with an AsyncClient, started at the first call. Invariants: every method may be called from any thread; errors are
OSError subclasses
with an errno (os_errors.py), except those that a person must mend (SetupError); a forked child gets a thread and connections of its own at its first
call, and never touches its parent's.
"""

from __future__ import annotations

import atexit
import io
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from kvfs.client.async_client import AsyncClient, open_client
from kvfs.client.config import ClientConfig
from kvfs.client.file.memory import RegisteredBuffer
from kvfs.client.file.open_file import OpenFile
from kvfs.client.locate import ClusterAddress
from kvfs.client.os_errors import to_os_error
from kvfs.client.paths import Path, flags_of, shown
from kvfs.client.peers import Counters
from kvfs.client.portal import Portal
from kvfs.client.raw_io import RawFile
from kvfs.client.rings import IoRing
from kvfs.client.user import User
from kvfs.common.errors import BadHandle, KvfsError
from kvfs.common.wire import meta_pb2 as pb

T = TypeVar("T")
BUFFER_BYTES = 1 << 20
_living: weakref.WeakSet[Client] = weakref.WeakSet()


class Client:
    """`with Client("/path/of/cluster") as client: client.open("/a/b", "rb")`. Names and arguments are those of AsyncClient."""

    def __init__(
        self,
        cluster: str | os.PathLike[str] | ClusterAddress | None = None,
        *,
        user: User | None = None,
        role: str = "client",
        description: str = "",
        config: ClientConfig | None = None,
    ) -> None:
        self._make = lambda: open_client(cluster, user=user, role=role, description=description, config=config)
        self._lock = threading.Lock()
        self._portal: Portal | None = None
        self._closed = False
        self._rings: weakref.WeakSet[IoRing] = weakref.WeakSet()
        _living.add(self)

    # --- life ------------------------------------------------------------------------------------------------------------------------

    @property
    def portal(self) -> Portal:
        """The thread behind this client, in this process."""
        portal = self._portal
        if portal is not None and portal.pid == os.getpid() and not self._closed:
            return portal
        with self._lock:
            if self._closed:
                raise self.translate(BadHandle("the client is closed"))
            if self._portal is None or self._portal.pid != os.getpid():
                try:
                    self._portal = Portal(self._make)
                except KvfsError as error:
                    raise self.translate(error) from error
            return self._portal

    def connect(self) -> Client:
        """Connect now instead of at the first call."""
        _ = self.portal
        return self

    def close(self) -> None:
        """Close files left open, with what they hold, and the connections. A second close does nothing."""
        with self._lock:
            portal, self._portal = self._portal, None
            self._closed = True
        if portal is not None:
            try:
                portal.close()
            except KvfsError as error:
                raise self.translate(error) from error
            finally:
                for ring in list(self._rings):
                    ring.abandon()

    @property
    def alive(self) -> bool:
        """Whether the thread behind this client is there; false also before the first call."""
        portal = self._portal
        return portal is not None and portal.alive

    def __enter__(self) -> Client:
        return self.connect()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def translate(self, error: KvfsError, path: str | None = None) -> BaseException:
        return to_os_error(error, path)

    def _after_fork(self) -> None:
        """In the child: the lock may have been held by a thread that does not exist here."""
        self._lock = threading.Lock()
        for ring in list(self._rings):
            ring.reset()

    def call(self, function: Callable[[AsyncClient], Any]) -> Any:
        """Run an async function of the AsyncClient in its thread: for what has no method here."""
        return self._run(None, function)

    def _run(self, path: Path | None, function: Callable[[AsyncClient], Any]) -> Any:
        portal = self.portal
        try:
            return portal.call(function, portal.client)
        except KvfsError as error:
            raise self.translate(error, None if path is None else shown(path)) from error

    @property
    def counters(self) -> Counters:
        return self.portal.client.counters

    # --- files -----------------------------------------------------------------------------------------------------------------------

    def open(
        self,
        path: Path,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        *,
        layout: pb.Layout | None = None,
    ) -> Any:
        """As the built-in open. Binary and `buffering=0`: a RawFile; else the usual buffered or text object over one."""
        binary = "b" in mode
        if binary and (encoding is not None or errors is not None or newline is not None):
            raise ValueError("binary mode takes no encoding, errors or newline")
        if not binary and buffering == 0:
            raise ValueError("can't have unbuffered text I/O")
        raw = self.open_raw(path, flags_of(mode.replace("t", "")), layout=layout)
        if buffering == 0:
            return raw
        size = BUFFER_BYTES if buffering in (-1, 1) else buffering
        buffered: io.BufferedRandom | io.BufferedWriter | io.BufferedReader
        if raw.readable() and raw.writable():
            buffered = io.BufferedRandom(raw, size)
        elif raw.writable():
            buffered = io.BufferedWriter(raw, size)
        else:
            buffered = io.BufferedReader(raw, size)
        if binary:
            return buffered
        return io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)

    def open_raw(self, path: Path, flags: int, mode: int = 0o666, *, layout: pb.Layout | None = None) -> RawFile:
        """With the flags and mode of os.open."""
        file = self._run(path, lambda client: client.open_path(path, flags, mode, layout=layout))
        return RawFile(self, file, flags, shown(path))

    def reopen(self, file: OpenFile, flags: int) -> OpenFile:
        """The same inode, in a process that was forked off after it was opened."""
        return self._open_inode(file.inode, flags, file.user)

    def open_inode(self, inode: int, flags: int, *, user: User | None = None, name: str = "") -> RawFile:
        """A regular file by its number (st_ino on a mount), with the access mode and O_APPEND of `flags`; the mode bits must let `user` do so."""
        opened = self._open_inode(inode, flags, user)
        return RawFile(self, opened, flags, name or f"inode {inode}")

    def _open_inode(self, number: int, flags: int, user: User | None) -> OpenFile:
        access = flags & os.O_ACCMODE
        read, write = access != os.O_WRONLY, access != os.O_RDONLY

        async def by_number(client: AsyncClient) -> OpenFile:
            session = client.new_session()
            inode = await client.meta.open(number, session=session, read=read, write=write, user=user)
            return client.open_file(inode, session=session, read=read, write=write, append=bool(flags & os.O_APPEND), user=user)

        opened: OpenFile = self._run(None, by_number)
        return opened

    def make_ring(
        self, entries: int, *, for_read: bool = True, io_depth: int = 0, timeout_s: float | None = None, forbid_holes: bool = False
    ) -> IoRing:
        """A ring for reads or for writes of this client's files, with at most `entries` under way.

        `io_depth`: 0 issues what is submitted as one batch; N above 0 in batches of exactly N (a rest waits for more, at most `timeout_s` if that is
        given); below 0 in batches of at most -N. `forbid_holes`: a read of bytes that were never written is -ENODATA instead of zeros."""
        ring = IoRing(self, entries, for_read=for_read, io_depth=io_depth, timeout_s=timeout_s, forbid_holes=forbid_holes)
        self._rings.add(ring)
        return ring

    def register(self, size_bytes: int) -> RegisteredBuffer:
        """Memory that storage services on this host read and write directly: give its spans to RawFile.preadv and pwrite."""
        return RegisteredBuffer(size_bytes)

    def read_bytes(self, path: Path) -> bytes:
        data: bytes = self._run(path, lambda client: client.read_bytes(path))
        return data

    def write_bytes(self, path: Path, data: bytes | bytearray | memoryview) -> None:
        self._run(path, lambda client: client.write_bytes(path, data))

    # --- paths -----------------------------------------------------------------------------------------------------------------------

    def stat(self, path: Path) -> pb.Inode:
        inode: pb.Inode = self._run(path, lambda client: client.stat(path))
        return inode

    def lstat(self, path: Path) -> pb.Inode:
        inode: pb.Inode = self._run(path, lambda client: client.lstat(path))
        return inode

    def exists(self, path: Path) -> bool:
        return bool(self._run(path, lambda client: client.exists(path)))

    def listdir(self, path: Path = "/") -> list[str]:
        names: list[str] = self._run(path, lambda client: client.listdir(path))
        return names

    def scandir(self, path: Path = "/") -> list[tuple[str, pb.Inode]]:
        """(name, attributes) of every entry."""
        entries: list[tuple[str, pb.Inode]] = self._run(path, lambda client: client.scandir(path))
        return entries

    def walk(self, path: Path = "/") -> Iterator[tuple[str, list[str], list[str]]]:
        """As os.walk, top down."""
        directories: list[str] = []
        rest: list[str] = []
        for name, inode in self.scandir(path):
            (directories if inode.type == pb.DIRECTORY else rest).append(name)
        top = shown(path)
        yield top, directories, rest
        for name in directories:
            yield from self.walk(top.rstrip("/") + "/" + name)

    def mkdir(self, path: Path, mode: int = 0o777, *, layout: pb.Layout | None = None) -> None:
        self._run(path, lambda client: client.mkdir(path, mode, layout=layout))

    def makedirs(self, path: Path, mode: int = 0o777, *, exist_ok: bool = False) -> None:
        self._run(path, lambda client: client.makedirs(path, mode, exist_ok=exist_ok))

    def rmdir(self, path: Path) -> None:
        self._run(path, lambda client: client.rmdir(path))

    def rmtree(self, path: Path) -> None:
        """A directory and all below it: gone at once, the space comes back in the background."""
        self._run(path, lambda client: client.rmtree(path))

    def unlink(self, path: Path) -> None:
        self._run(path, lambda client: client.unlink(path))

    remove = unlink

    def rename(self, source: Path, destination: Path, *, no_replace: bool = False, exchange: bool = False) -> None:
        self._run(source, lambda client: client.rename(source, destination, no_replace=no_replace, exchange=exchange))

    def symlink(self, target: Path, path: Path) -> None:
        self._run(path, lambda client: client.symlink(target, path))

    def readlink(self, path: Path) -> str:
        target: str = self._run(path, lambda client: client.readlink(path))
        return target

    def link(self, source: Path, path: Path) -> None:
        self._run(path, lambda client: client.link(source, path))

    def chmod(self, path: Path, mode: int) -> None:
        self._run(path, lambda client: client.chmod(path, mode))

    def chown(self, path: Path, uid: int = -1, gid: int = -1, *, follow: bool = True) -> None:
        self._run(path, lambda client: client.chown(path, uid, gid, follow=follow))

    def utimens(self, path: Path, atime_ns: int | None = None, mtime_ns: int | None = None, *, follow: bool = True) -> None:
        self._run(path, lambda client: client.utimens(path, atime_ns, mtime_ns, follow=follow))

    def truncate(self, path: Path, length: int) -> None:
        self._run(path, lambda client: client.truncate(path, length))

    def getxattr(self, path: Path, name: str | bytes) -> bytes:
        value: bytes = self._run(path, lambda client: client.getxattr(path, name))
        return value

    def setxattr(self, path: Path, name: str | bytes, value: bytes, *, create: bool = False, replace: bool = False) -> None:
        self._run(path, lambda client: client.setxattr(path, name, value, create=create, replace=replace))

    def listxattr(self, path: Path) -> list[str]:
        names: list[str] = self._run(path, lambda client: client.listxattr(path))
        return names

    def removexattr(self, path: Path, name: str | bytes) -> None:
        self._run(path, lambda client: client.removexattr(path, name))

    def statfs(self) -> pb.StatFsReply:
        reply: pb.StatFsReply = self._run(None, lambda client: client.statfs())
        return reply


def _after_fork_in_child() -> None:
    for client in list(_living):
        client._after_fork()


def _at_exit() -> None:
    for client in list(_living):
        try:
            client.close()
        except OSError as error:
            import logging

            logging.getLogger("kvfs.client").error("at exit: %s", error)


os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_at_exit)
