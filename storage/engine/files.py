"""The data files of a target: data/<block bytes>.<number>, opened on first use and kept open.

There are at most `files_per_class` of them for each of the 11 sizes of blocks of file chunks, and for each size of KV-cache blocks of which there
are some: when the last block of a size has gone, so do its files (`remove`). Remembers which files were written since the last sync. Must never be
asked for a block that the allocator did not give out.
"""

from __future__ import annotations

import threading

from kvfs.common.boundary.disk import Disk, DiskFile
from kvfs.storage.engine.classes import data_file_name, parse_data_file_name

FOLDER = "data"
FileKey = tuple[int, int]
"""(block_bytes, number)"""


class DataFiles:
    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._open: dict[FileKey, DiskFile] = {}
        self._opening = threading.Lock()
        self.dirty: set[FileKey] = set()
        """Guarded by the engine's lock."""

    def existing(self) -> list[FileKey]:
        """The data files that lie in the directory."""
        if not self._disk.exists(FOLDER):
            return []
        keys = (parse_data_file_name(name) for name in self._disk.list(FOLDER))
        return sorted(key for key in keys if key is not None)

    def sync_names(self) -> None:
        """A process that was killed may have made a file and not its name durable."""
        if self._disk.exists(FOLDER):
            self._disk.sync_directory(FOLDER)

    def exists(self, block_bytes: int, number: int) -> bool:
        return (block_bytes, number) in self._open or self._disk.exists(data_file_name(block_bytes, number))

    def get(self, block_bytes: int, number: int) -> DiskFile:
        """The file, made durably when it is not there: a name that a power loss takes away would take the chunks with it."""
        key = (block_bytes, number)
        file = self._open.get(key)
        if file is None:
            with self._opening:
                file = self._open.get(key)
                if file is None:
                    name = data_file_name(block_bytes, number)
                    fresh = not self._disk.exists(name)
                    if fresh:
                        self._disk.makedirs(FOLDER)
                    file = self._disk.open(name, create=True)
                    if fresh:
                        self._disk.sync_directory(FOLDER)
                    self._open[key] = file
        return file

    def opened(self, key: FileKey) -> DiskFile | None:
        return self._open.get(key)

    def remove(self, key: FileKey) -> None:
        """Under the engine's lock: nothing is in this file. It is closed when the last who still looks at it lets go."""
        self.dirty.discard(key)
        self._open.pop(key, None)
        name = data_file_name(*key)
        if self._disk.exists(name):
            self._disk.unlink(name)  # not synced: a file that a power loss brings back is removed when the target is opened

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()
