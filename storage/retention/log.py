"""The retention log of one target: a file in its directory that is appended to once a second and written anew when it has grown. Blocking.

Invariants: what stands in the file before an append is never touched by it; a rewrite replaces the file as a whole or not at all; a torn tail is cut
off before anything is appended. Nothing here is synced but a rewrite: after a power loss the order of the last seconds is that of the chunk index.
"""

from __future__ import annotations

import threading

from kvfs.common.boundary.disk import Disk, DiskFile
from kvfs.storage.retention import records

NAME = "retention.log"
_LEAST_BYTES = 1 << 20
"""A log under this size is never too long."""


class RetentionLog:
    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._file: DiskFile | None = None
        self._end = 0
        self._work = threading.Lock()
        """Appends and checks come from different threads."""

    def load(self) -> records.Replay:
        """What the log says; an empty one if there is none. A damaged one is reported in the answer. Raises FormatTooNew."""
        data = self._disk.read_file(NAME) if self._disk.exists(NAME) else b""
        found = records.replay(data)
        self._end = found.end
        return found

    def damaged(self) -> bool:
        """Whether the file is no longer what was written: then it has to be written anew."""
        with self._work:
            if not self._end:
                return False
            if not self._disk.exists(NAME):
                return True
            found = records.replay(self._disk.read_file(NAME))
            return found.problem is not None or found.end != self._end

    def append(self, data: bytes) -> None:
        with self._work:
            self._append(data)

    def _append(self, data: bytes) -> None:
        if not self._end:
            self._file = None
            self._disk.write_file(NAME, records.header() + data)
            self._end = records.HEADER_BYTES + len(data)
            return
        file = self._opened()
        file.write((data,), self._end)
        self._end += len(data)

    def rewrite(self, data: bytes) -> None:
        with self._work:
            self.close()
            self._disk.write_file(NAME, data)
            self._end = len(data)

    def too_long(self, blocks: int, spaces: int) -> bool:
        """Whether most of it is of the past."""
        return self._end > max(_LEAST_BYTES, 2 * (blocks * records.TOUCH_BYTES + spaces * 128))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self) -> DiskFile:
        if self._file is None:
            self._file = self._disk.open(NAME)
            self._file.truncate(self._end)  # what a crash tore off
        return self._file
