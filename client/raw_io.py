"""A file of the cluster as Python's raw file object, so that io.BufferedReader, io.BufferedWriter and io.TextIOWrapper work over it.

Owns the position of a file object and what it has borrowed. Where the storage is on this machine and tells places (file/places.py), the caller's
own thread reads from there straight into the caller's memory; else it crosses to the client's thread. A reader in small steps reads many steps at
once, or borrows registered memory that was read ahead, and copies from it. All that is given up when the client hears of, or makes, any change of the
file (`OpenFile.token`), and after `STALE_S`: so long, a read may miss what another client has written and has neither closed nor synced.
A sequential writer puts its bytes into registered memory in its own thread too (a `Stretch`), and crosses once for several MiB.
Thread-safe as Python's own raw files are: the file object has no lock of its own, the position belongs to one thread at a time.
"""

from __future__ import annotations

import errno
import io
import os
from typing import TYPE_CHECKING, Any

from kvfs.client.file.memory import bytes_of
from kvfs.client.file.open_file import OpenFile
from kvfs.client.file.places import STALE_S
from kvfs.client.file.stretch import Stretch
from kvfs.common.boundary.clock import SystemClock
from kvfs.common.errors import KvfsError

if TYPE_CHECKING:
    from kvfs.client.sync_client import Client

_CLOCK = SystemClock()
_EMPTY = memoryview(b"")
BORROW_BYTES = 4 << 20
STEPS_BYTES = 512 << 10
"""Read at once for small steps: fits the processor's cache."""
DIRECT_BYTES = 64 << 10
"""From so many on, a step is read into the caller's memory itself."""
OWN_MEMORY_BYTES = 256 << 10
"""Up to so many, `pread` makes its memory here; above, that of the client is warmer."""
FIRST_BORROW_BYTES = 128 << 10
READ_ALL_STEP_BYTES = 64 << 20


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
        self._steps_memory = _EMPTY
        self._borrowed_at = 0
        self._borrowed_until = 0.0
        self._borrowed_token = 0
        self._steps = 0
        self._sequential_end = 0
        self._stretch: Stretch | None = None
        self._written_end = 0
        self._closing = False
        self._orphaned: list[tuple[int, bytes]] = []
        """Written by a buffer's finalizer that ran in the client's own thread: goes out with the close that follows."""
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
        """Fill the buffer; the count is short only at the end of the file."""
        view = bytes_of(buffer)
        size = len(view)
        done = 0
        if size >= DIRECT_BYTES:
            self._check(self._readable, "reading")
            done, ended = self._direct(self._position, view)
            self._position += done
            self._sequential_end = self._position
            if ended:
                return done
        while done < size:
            part = self._next(size - done)
            if part is None:
                self._give_back()
                count: int = self._call(self._handle().pread_into, self._position, [view[done:]])
                self._position += count
                return done + count
            if not part:
                break
            view[done : done + len(part)] = part
            done += len(part)
            self._position += len(part)
        return done

    def read(self, size: int | None = -1, /) -> bytes:
        """`size` bytes, fewer only at the end of the file; everything from here on without a size."""
        if size is None or size < 0:
            return self.readall()
        part = self._next(size) if size else memoryview(b"")
        if part is None:
            part = self._call(self._handle().pread, self._position, size)
        elif len(part) < size:
            whole = bytearray(size)
            return bytes(memoryview(whole)[: self.readinto(whole)])
        self._position += len(part)
        return bytes(part)

    def _next(self, size: int) -> memoryview | None:
        """Bytes at the position, at most `size`, none at the end of the file; None: too many to borrow."""
        borrowed = self._borrowed
        if borrowed is not None:
            start = self._position - self._borrowed_at
            fresh = self._borrowed_token == self._file.token and _CLOCK.monotonic() < self._borrowed_until and not self.closed
            if fresh and 0 <= start < len(borrowed):
                part = borrowed[start : start + size]
                self._sequential_end = self._position + len(part)
                return part
            self._give_back()
        self._check(self._readable, "reading")
        if size >= BORROW_BYTES:
            self._sequential_end = self._position + size
            return None
        part = self._borrow(size)[:size]
        self._sequential_end = self._position + len(part)
        return part

    def _borrow(self, size: int) -> memoryview:
        # Small at first: a reader of a header shall not make the cluster read megabytes; and no more than asked for where the reader jumped to.
        self._steps = self._steps + 1 if self._position == self._sequential_end else 0
        ahead = (0, FIRST_BORROW_BYTES, BORROW_BYTES)[min(self._steps, 2)]
        length = min(BORROW_BYTES, max(size, ahead))
        handle = self._handle()
        self._borrowed_token = handle.token  # before the read: what changes meanwhile makes it stale
        if size <= STEPS_BYTES and handle.tells_places:
            room = min(length, STEPS_BYTES)
            if len(self._steps_memory) < room:
                self._steps_memory = memoryview(bytearray(room))
            done, ended = self._direct(self._position, self._steps_memory[:room])
            if done >= size or ended:
                self._borrowed_until = handle.places_until(self._position, self._position + done)
                self._borrowed, self._borrowed_at = self._steps_memory[:done], self._position
                return self._borrowed
        until = _CLOCK.monotonic() + STALE_S
        borrowed: memoryview = self._call(handle.pread, self._position, length)
        self._borrowed, self._borrowed_at = borrowed, self._position
        self._borrowed_until = min(until, handle.lease_end)
        return borrowed

    def _direct(self, offset: int, into: memoryview) -> tuple[int, bool]:
        """Bytes read in this thread, and whether there are no more to be had: the room is full, or the file ends."""
        size = len(into)
        done = self._file.read_now(offset, into)
        while done < size:
            handle = self._handle()
            if not handle.tells_places:
                return done, False
            end = self._call(handle.find_places, offset + done, size - done)
            count = handle.read_now(offset + done, into[done:])
            done += count
            if not count:
                return done, offset + done >= end
        if self._file.wants_more(offset + done) and self._pid == os.getpid():
            self._client.portal.post(self._file.find_more, offset + done)
        return done, True

    def _give_back(self) -> None:
        self._borrowed = None

    def readall(self) -> bytes:
        """Everything from the position on, in one piece of memory."""
        self._check(self._readable, "reading")
        parts: list[bytes] = []
        while left := max(self._length_now() - self._position, 0):
            part = self.read(min(left, READ_ALL_STEP_BYTES))
            if not part:
                break
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, data: Any, /) -> int:
        self._check(self._writable, "writing")
        self._give_back()
        view = bytes_of(data)
        if self._client.portal.inside:
            self._orphaned.append((self._position, bytes(view)))
            self._position += len(view)
            return len(view)
        if self._flags & os.O_APPEND:
            self._position = self._call(self._handle().append, [view]) + len(view)
            return len(view)
        handle = self._handle()
        done = self._put(handle, view)
        if done < len(view):
            self._call(handle.pwrite, self._position + done, [view[done:] if done else view])
        self._position = self._written_end = self._position + len(view)
        return len(view)

    def _put(self, handle: OpenFile, view: memoryview) -> int:
        """Write in this thread what can be; how much that was. Who goes on where his last write ended gets memory for more."""
        done = 0
        sequential = self._position == self._written_end and self._position > 0
        while done < len(view):
            stretch = self._stretch
            taken = stretch.put(self._position + done, view[done:]) if stretch is not None else 0
            done += taken
            if done == len(view):
                break
            if not taken and stretch is not None and not stretch.end > stretch.start:
                self._stretch = None
                break  # made for nothing, others are at the file
            if not sequential:
                break
            self._stretch = self._call(handle.stretch, self._position + done)
            if self._stretch is None:
                break
        return done

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
        if self._writable and not self._closing and not self.closed and not self._client.portal.inside:
            self._call(self._handle().flush)

    def close(self) -> None:
        if self.closed:
            return
        self._give_back()
        self._closing = True
        try:
            if self._pid == os.getpid() and not self._file.closed:
                if self._client.portal.inside:  # collected by chance in the client's own thread
                    self._client.portal.post(self._close_orphan)
                else:
                    self._call(self._file.close)
        finally:
            super().close()

    async def _close_orphan(self) -> None:
        try:
            for position, data in self._orphaned:
                if self._flags & os.O_APPEND:
                    await self._file.append([data])
                else:
                    await self._file.pwrite(position, [data])
        finally:
            await self._file.close()

    # --- more than io offers ---------------------------------------------------------------------------------------------------------

    @property
    def client(self) -> Client:
        return self._client

    @property
    def length(self) -> int:
        return self._file.length

    def pread(self, size: int, offset: int) -> memoryview:
        """As os.pread, without a copy where the bytes were read ahead: the memory is the client's until the last view of it is gone."""
        if 0 < size <= OWN_MEMORY_BYTES:
            memory = memoryview(bytearray(size))
            done, ended = self._direct(offset, memory)
            if ended:
                return memory[:done].toreadonly()
        data: memoryview = self._call(self._handle().pread, offset, size)
        return data

    def preadv(self, buffers: Any, offset: int) -> int:
        """As os.preadv; Spans of a registered buffer are filled without a copy."""
        buffers = list(buffers)
        if len(buffers) == 1 and len(view := bytes_of(buffers[0])):
            done, ended = self._direct(offset, view)
            if ended:
                return done
        count: int = self._call(self._handle().pread_into, offset, buffers)
        return count

    def pwrite(self, data: Any, offset: int) -> int:
        """As os.pwrite; a Span of a registered buffer is sent from where it is."""
        self._give_back()
        count: int = self._call(self._handle().pwrite, offset, [data])
        return count

    def punch(self, start: int, end: int) -> None:
        """Whole chunks [start, end), the last one up to the file's end, become a hole."""
        self._check(self._writable, "writing")
        self._give_back()
        self._call(self._handle().punch, start, end)

    def fsync(self) -> None:
        self._call(self._handle().fsync)

    def opened(self, *, reading: bool) -> OpenFile:
        """The file behind this object, for a ring that reads or writes it. OSError: EBADF when it is closed or not open for that."""
        if self.closed or not (self._readable if reading else self._writable) or self._flags & os.O_APPEND:
            raise OSError(errno.EBADF, f"{self.name} is not open for {'reading' if reading else 'writing at an offset'}")
        return self._handle()

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
            self._stretch = None
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
