"""Files that a service lends to a caller on the same machine, for reading: both ends of the FILE frame.

A service that answers where bytes lie, instead of moving them, lends the file in which they lie once a connection: a descriptor for reading
only, under a number that later answers name. Only to callers whom the kernel vouches for (`ByteStream.trusted`): who has a descriptor reads all
of the file. Invariants: at most `Limits.files` at a time a connection; a number is never used twice; the frame leaves before any answer that names
its number. What was lent ends with the connection, or when the service has no such file any more and lends another: a FILE frame with a status, and
without a descriptor, says so. The caller forgets it then, and each descriptor is closed with the last place that refers to it.
Must never be taken for a promise about the bytes: the caller checks what it reads.
"""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakKeyDictionary, ref

from kvfs.common.boundary.disk import LentFile
from kvfs.common.boundary.real_disk import RealLentFile
from kvfs.common.errors import ConnectionLost, InvalidArgument, KvfsError, MalformedFrame, NotFound
from kvfs.common.wire.connection import Connection
from kvfs.common.wire.frame import Kind, encode


class Lendable(Protocol):
    """A boundary.disk.DiskFile."""

    def lend(self) -> int | None: ...


class Lender:
    """The service's end, one a connection."""

    def __init__(self, connection: Connection, limit: int) -> None:
        self._connection = connection
        self._limit = limit
        self._numbers: WeakKeyDictionary[Lendable, int] = WeakKeyDictionary()
        """Weak: a file that its owner lets go is closed, whoever borrowed it."""
        self._lent: dict[int, ref[Lendable]] = {}
        self._last = 0

    def number(self, file: Lendable) -> int:
        """Under which number the caller knows the file, which is lent now if it was not yet. 0: it cannot be had."""
        number = self._numbers.get(file)
        if number is None:
            try:
                self._take_back()
                if len(self._lent) >= self._limit:
                    return 0
                fd = file.lend()
                if fd is None:
                    return 0
                number = self._last + 1
                send_descriptor(self._connection, encode(Kind.FILE, number), fd)
            except KvfsError:  # no descriptor left in this process, or the connection is lost
                return 0
            self._numbers[file] = self._last = number
            self._lent[number] = ref(file)
        return number

    def _take_back(self) -> None:
        for number in [number for number, file in self._lent.items() if file() is None]:
            self._connection.send([encode(Kind.FILE, number, status=NotFound.code)])
            del self._lent[number]


class BorrowedFiles:
    """The caller's end, one a connection."""

    def __init__(self, lender: str, limit: int) -> None:
        self._lender = lender
        self._limit = limit
        self._files: dict[int, LentFile | None] = {}
        self._last = 0

    def arrived(self, number: int, fds: list[int]) -> None:
        """Takes the descriptors over. Without one (this process may have no more) the file counts as not lent."""
        if number <= self._last or len(self._files) >= self._limit or len(fds) > 1:
            for fd in fds:
                os.close(fd)
            raise MalformedFrame(f"{self._lender} lent file {number} with {len(fds)} descriptors, {len(self._files)} files are lent already")
        self._last = number
        try:
            self._files[number] = RealLentFile(fds[0], self._lender) if fds else None
        except InvalidArgument as error:
            raise MalformedFrame(error.message) from None

    def gone(self, number: int) -> None:
        self._files.pop(number, None)

    def get(self, number: int) -> LentFile | None:
        return self._files.get(number)

    def close(self) -> None:
        self._files.clear()


def send_descriptor(connection: Connection, frame: bytes, fd: int) -> None:
    """Sends a frame with a descriptor, which is closed here once it is sent, or cannot be."""
    try:
        connection.send([frame], fds=(fd,), on_sent=lambda: os.close(fd))
    except ConnectionLost:
        os.close(fd)
        raise
