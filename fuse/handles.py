"""Open file and directory handles: the numbers that the kernel gives back, and what stands behind them.

Invariants: a handle number is never used twice in one mount (a late request meets EBADF, never another file); a number that is not open raises
BadHandle. The tables grow only with what programs hold open, which the kernel bounds by their file limits.
This module must never do I/O: closing what a handle holds is the caller's business.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from kvfs.client import OpenFile, User
from kvfs.client.file.block_file import BlockFile
from kvfs.common.errors import BadHandle, DeadlineExceeded
from kvfs.common.wire import meta_pb2 as pb

CURSOR_NAMES_MAX = 262_144
"""Names that a directory handle remembers for programs that seek back; older positions are found by their page."""


@dataclass(slots=True, eq=False)
class FileHandle:
    """One open(2): `file` shares its cached data and unflushed writes with every other handle of the inode in this mount."""

    inode: int
    flags: int
    user: User
    file: OpenFile | BlockFile
    strip_privileges: bool
    """The next write must clear setuid and setgid first: the opener is not root, and the kernel does it only for what goes through its page cache."""
    late: tuple[DeadlineExceeded, float] | None = None
    """A read ran out of time, and until when that is the answer to others too."""

    @property
    def readable(self) -> bool:
        return self.flags & os.O_ACCMODE in (os.O_RDONLY, os.O_RDWR)

    @property
    def writable(self) -> bool:
        return self.flags & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR)

    @property
    def direct(self) -> bool:
        """Its bytes do not go through the kernel's page cache."""
        return self.append or not self.readable

    @property
    def append(self) -> bool:
        return bool(self.flags & os.O_APPEND)


@dataclass(slots=True, eq=False)
class DirectoryHandle:
    """One opendir(3): a cursor over the entries in name order.

    A position is a number: 0 the start, 1 and 2 after "." and "..", then one more an entry handed out. The name behind each number is kept, so that a
    position stays right whatever is created or removed meanwhile: the listing goes on after that name.
    """

    inode: int
    user: User
    self_inode: pb.Inode | None = None
    parent_inode: pb.Inode | None = None
    names: list[bytes] = field(default_factory=list)
    """names[i] was handed out at position i + first_position."""
    first_position: int = 2
    page: list[pb.DirEntry] = field(default_factory=list)
    """Entries read ahead and not handed out: they follow position `page_position`."""
    page_position: int = 2
    page_more: bool = True

    def name_before(self, position: int) -> bytes:
        """The name of the entry at `position`: listing goes on after it."""
        index = position - self.first_position - 1
        if position <= 2:
            return b""
        if index < 0:  # older than what is remembered: the oldest that is, and the listing repeats rather than skips
            return self.names[0] if self.names else b""
        if index >= len(self.names):
            return self.names[-1] if self.names else b""
        return self.names[index]

    def handed_out(self, position: int, name: bytes) -> None:
        """The entry at `position` (its own number, one above the one before it) has been given to the kernel."""
        index = position - self.first_position - 1
        if index == len(self.names):
            self.names.append(name)
            if len(self.names) > CURSOR_NAMES_MAX:
                drop = CURSOR_NAMES_MAX // 4
                del self.names[:drop]
                self.first_position += drop
        elif 0 <= index < len(self.names):
            self.names[index] = name

    def rewind(self) -> None:
        """Start again with what is there now. The old names stay until new ones take their positions: a program may still seek to one."""
        self.page = []
        self.page_position = 2
        self.page_more = True
        self.self_inode = self.parent_inode = None


H = TypeVar("H")


class HandleTable(Generic[H]):
    """Numbers for open things. Numbers start at 1 and only grow."""

    def __init__(self) -> None:
        self._open: dict[int, H] = {}
        self._next = 1

    def add(self, handle: H) -> int:
        number = self._next
        self._next += 1
        self._open[number] = handle
        return number

    def get(self, number: int) -> H:
        handle = self._open.get(number)
        if handle is None:
            raise BadHandle(f"handle {number} is not open")
        return handle

    def remove(self, number: int) -> H:
        handle = self._open.pop(number, None)
        if handle is None:
            raise BadHandle(f"handle {number} is not open")
        return handle

    def numbers(self) -> list[int]:
        return list(self._open)

    def __iter__(self) -> Iterator[H]:
        return iter(list(self._open.values()))

    def __len__(self) -> int:
        return len(self._open)
