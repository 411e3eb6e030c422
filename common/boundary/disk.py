"""Disk boundary: one directory on one disk, its files, its lock, and an ordered map kept in it.

Owns the shape of every disk access in kvfs; real_disk.py and sim/disk.py are the two versions. Calls block: a service makes them inline only when
they are sure to be quick, else from a worker thread; all are safe to call from several threads. Names are relative to the directory, with "/" for
folders below it; a name that leads outside is an InvalidArgument. What was written is durable only after `sync` (of the file) and, for names that
were made, renamed or removed, `sync_directory`; `write_file` and `OrderedMap.commit` do both themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence


class ReadableFile(ABC):
    @abstractmethod
    def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Bytes placed; fewer than the buffers hold only at the end of the file."""

    @abstractmethod
    def try_read_into(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """The same without waiting for a device: None when some of the bytes are not in memory (the buffers may then hold a part)."""


class LentFile(ReadableFile):
    """A file of another process, which lent it for reading (`DiskFile.lend`). What is read may be anything by now: whoever reads checks it. It is
    closed when nobody refers to it any more, so that a thread that still reads never meets a descriptor that became another file."""

    @abstractmethod
    def will_need(self, offset: int, length: int) -> None:
        """The device may begin to bring this range into memory; returns at once."""


class DiskFile(ReadableFile):
    parallel = False
    """Whether several threads write faster than one: not in a simulation, which has only one."""

    def lend(self) -> int | None:
        """A new descriptor of this file, for reading only, to be passed to another process; the caller owns it. None where files have none
        (simulation)."""
        return None

    def read_stored(self, buffer: memoryview, offset: int) -> int:
        """As `read_into`, but from the device where that can be, past the memory that holds its pages: what a restart would find. The buffer begins
        at a page of memory (an mmap), and it and the offset are multiples of 4 KiB."""
        return self.read_into((buffer,), offset)

    @abstractmethod
    def write(self, buffers: Sequence[bytes | bytearray | memoryview], offset: int) -> None:
        """All of it, or an error (a part may then have been written)."""

    @abstractmethod
    def allocate(self, offset: int, length: int) -> None:
        """Reserves space, so that later writes there do not run out of it. The file grows to the end of the range, with zeros."""

    @abstractmethod
    def punch(self, offset: int, length: int) -> None:
        """Gives the range's space back; it reads as zeros."""

    @abstractmethod
    def truncate(self, length: int) -> None: ...

    @abstractmethod
    def size(self) -> int: ...

    @abstractmethod
    def sync(self) -> None:
        """What was written before this call survives power loss."""

    @abstractmethod
    def close(self) -> None: ...


class OrderedMap(ABC):
    """Crash-safe map in key order. A commit is atomic and synced; reads see the last commit, and what an opened map holds is synced, whoever was
    killed in the middle of writing it. Keys: 1 to 511 bytes."""

    @abstractmethod
    def get(self, key: bytes) -> bytes | None: ...

    @abstractmethod
    def range(self, begin: bytes, end: bytes | None, *, limit: int = 0, reverse: bool = False) -> list[tuple[bytes, bytes]]:
        """Rows with begin <= key < end (end None: to the last), at most `limit` (0: all), from the end with `reverse`."""

    @abstractmethod
    def commit(self, writes: Mapping[bytes, bytes | None]) -> None:
        """All of the writes, or none; a value of None removes the key."""

    @abstractmethod
    def count(self) -> int: ...

    @abstractmethod
    def check(self) -> Iterator[int]:
        """Read what the last commit left, from the device where that can be, and see that it is whole; beside other calls, commits too. Tells after
        each step how many bytes it has read. IndexCorrupt. Of values it knows nothing: who stores them must check them."""

    @abstractmethod
    def close(self) -> None: ...


class Disk(ABC):
    @abstractmethod
    def open(self, name: str, *, create: bool = False) -> DiskFile:
        """For reading and writing. NotFound if it is not there and `create` is not set."""

    @abstractmethod
    def exists(self, name: str) -> bool: ...

    @abstractmethod
    def list(self, name: str = "") -> list[str]:
        """Names in a folder, sorted."""

    @abstractmethod
    def makedirs(self, name: str) -> None:
        """The folder and those above it, durable when this returns; one that is there already is right."""

    @abstractmethod
    def rename(self, old: str, new: str) -> None: ...

    @abstractmethod
    def unlink(self, name: str) -> None: ...

    @abstractmethod
    def remove_tree(self, name: str) -> None:
        """A file, or a folder with all that is in it; nothing is there: nothing happens. Durable when this returns; a crash may leave a part."""

    @abstractmethod
    def sync_directory(self, name: str = "") -> None: ...

    @abstractmethod
    def read_file(self, name: str) -> bytes: ...

    @abstractmethod
    def write_file(self, name: str, data: bytes) -> None:
        """Atomic and durable: after a crash the file holds the old bytes or the new."""

    @abstractmethod
    def space(self) -> tuple[int, int]:
        """(capacity, free) in bytes, as the file system tells an ordinary writer."""

    @abstractmethod
    def lock(self) -> None:
        """Takes the directory for this process until it ends or `close`; DirectoryInUse when another has it. Removes what a `write_file` left that a
        crash ended, and makes the names durable that are found."""

    @abstractmethod
    def open_map(self, name: str, *, size_bytes: int) -> OrderedMap:
        """The ordered map in folder `name`, made if it is not there. `size_bytes` bounds its growth (address space, not disk space)."""

    @abstractmethod
    def close(self) -> None:
        """Gives the lock back. Files and maps are closed by their owners."""
