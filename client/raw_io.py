"""A file of the cluster as Python's raw file object, so that io.BufferedReader, io.BufferedWriter and io.TextIOWrapper work over it.

Owns the position of a file object and its borrowed window: a reader in steps smaller than the client's read-ahead borrows a stretch of
registered memory
once and copies from it in its own thread, instead of crossing to the client's thread for each step. The stretch is given up by a write, a
seek outside of
it, a truncate, and after `STALE_S`: a raw file shows what others wrote no later than that, and what was written through it at once.
Thread-safe as Python's own raw files are: the file object has no lock of its own, the position belongs to one thread at a time.
"""

from __future__ import annotations

import io
import os
import time
from typing import TYPE_CHECKING, Any

from kvfs.client.file.memory import bytes_of
from kvfs.client.file.open_file import OpenFile
from kvfs.common.errors import KvfsError

if TYPE_CHECKING:
    from kvfs.client.sync_client import Client

BORROW_BYTES = 4 << 20
STALE_S = 0.2
SMALL_WRITE_BYTES = 256 << 10


class RawFile(io.RawIOBase):
    """Made by Client.open. `pread` and `pwrite` are there too, without a position."""

    def __init__(self, client: Client, file: OpenFile, flags: int, name: str) -> None:
        super().__init__()
        self._client = client
        self._file = file
        self._flags = flags
        self._pid = os.getpid()
        self._position = 0
        self._borrowed: memoryview | None = None
        self._borrowed_at = 0
        self._borrowed_until = 0.0
        self._steps = 0
        self.name = name
        access = flags & os.O_ACCMODE
        self._readable = access in (os.O_RDONLY, os.O_RDWR)
        self._writable = access in (os.O_WRONLY, os.O_RDWR)
        self.mode = "ab" if flags & os.O_APPEND else "rb+" if access == os.O_RDWR else "wb" if self._writable else "rb"
        if flags & os.O_APPEND:
            self._position = file.length

    # --- io.RawIOBase ----------------------------------------------------------------------------------------------------------------

    def readable(self) -> bool:
        return self._readable

    def writable(self) -> bool:
        return self._writable

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view = bytes_of(buffer)
        size = len(view)
        if not size:
            return 0
        count = self._from_borrowed(view)
        if not count:
            self._check(self._readable, "reading")
            if size >= BORROW_BYTES:
                self._give_back()
                count = self._call(self._handle().pread_into, self._position, [view])
            else:
                self._borrow(size)
                count = self._from_borrowed(view)
        self._position += count
        return count

    def _from_borrowed(self, view: memoryview) -> int:
        borrowed = self._borrowed
        if borrowed is None:
            return 0
        start = self._position - self._borrowed_at
        count = min(len(view), len(borrowed) - start)
        if start < 0 or count <= 0 or time.monotonic() > self._borrowed_until:
            self._give_back()
            return 0
        view[:count] = borrowed[start : start + count]
        return count

    def _borrow(self, size: int) -> None:
        # Small at first: a reader of a header shall not make the cluster read megabytes.
        self._steps += 1
        length = min(BORROW_BYTES, max(size, 128 << 10 if self._steps == 1 else BORROW_BYTES))
        self._borrowed = self._call(self._handle().pread, self._position, length)
        self._borrowed_at = self._position
        self._borrowed_until = time.monotonic() + STALE_S

    def _give_back(self) -> None:
        self._borrowed = None

    def readall(self) -> bytes:
        """Everything from the position on, in one piece of memory."""
        self._check(self._readable, "reading")
        parts = []
        while True:
            left = max(self._length_now() - self._position, 0)
            if not left:
                break
            part = bytearray(min(left, 1 << 30))
            count = self.readinto(part)
            while 0 < count < len(part):
                more = self.readinto(memoryview(part)[count:])
                if not more:
                    break
                count += more
            if not count:
                break
            parts.append(bytes(memoryview(part)[:count]))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, data: Any, /) -> int:
        self._check(self._writable, "writing")
        self._give_back()
        view = bytes_of(data)
        if self._flags & os.O_APPEND:
            self._position = self._call(self._handle().append, [view]) + len(view)
            return len(view)
        count: int = self._call(self._handle().pwrite, self._position, [view])
        self._position += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._check(True, "")
        if whence == os.SEEK_CUR:
            offset += self._position
        elif whence == os.SEEK_END:
            offset += self._length_now()
        elif whence != os.SEEK_SET:
            raise ValueError(f"no such whence: {whence}")
        if offset < 0:
            raise OSError(22, f"cannot seek to {offset}")
        self._position = offset
        return offset

    def tell(self) -> int:
        self._check(True, "")
        return self._position

    def truncate(self, size: int | None = None, /) -> int:
        self._check(self._writable, "writing")
        self._give_back()
        length = self._position if size is None else size
        self._call(self._handle().truncate, length)
        return length

    def flush(self) -> None:
        """Everything written is acknowledged by the storage; errors of earlier writes come out here."""
        if not self.closed and self._writable:
            self._call(self._handle().flush)

    def close(self) -> None:
        if self.closed:
            return
        self._give_back()
        try:
            if self._pid == os.getpid():
                self._call(self._file.close)
        finally:
            super().close()

    # --- more than io offers ---------------------------------------------------------------------------------------------------------

    @property
    def length(self) -> int:
        return self._file.length

    def pread(self, size: int, offset: int) -> memoryview:
        """As os.pread, without a copy where the bytes were read ahead: the memory is the client's until the last view of it is gone."""
        data: memoryview = self._call(self._handle().pread, offset, size)
        return data

    def preadv(self, buffers: Any, offset: int) -> int:
        """As os.preadv; Spans of a registered buffer are filled without a copy."""
        count: int = self._call(self._handle().pread_into, offset, list(buffers))
        return count

    def pwrite(self, data: Any, offset: int) -> int:
        """As os.pwrite; a Span of a registered buffer is sent from where it is."""
        self._give_back()
        count: int = self._call(self._handle().pwrite, offset, [data])
        return count

    def fsync(self) -> None:
        self._call(self._handle().fsync)

    def stat(self) -> Any:
        """Attributes as this client sees them."""
        return self._handle().attributes()

    # --- inside ----------------------------------------------------------------------------------------------------------------------

    def _length_now(self) -> int:
        length: int = self._call(self._handle().current_length)
        return length

    def _handle(self) -> OpenFile:
        """The open file; in a forked child, one of its own."""
        if self._pid != os.getpid():
            self._give_back()
            self._file = self._client.reopen(self._file, self._flags)
            self._pid = os.getpid()
        return self._file

    def _call(self, function: Any, *arguments: Any) -> Any:
        try:
            return self._client.portal.call(function, *arguments)
        except KvfsError as error:
            raise self._client.translate(error, self.name) from error

    def _check(self, allowed: bool, what: str) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")
        if not allowed:
            raise io.UnsupportedOperation(f"not open for {what}")
