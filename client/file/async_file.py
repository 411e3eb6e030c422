"""A file object for trio: a position over an OpenFile.

Owns the position, nothing else. Not meant for use by several tasks at once (an OpenFile is).
"""

from __future__ import annotations

import os
from types import TracebackType

from kvfs.client.file.open_file import OpenFile
from kvfs.client.peers import Buffer
from kvfs.common.errors import InvalidArgument


class AsyncFile:
    def __init__(self, file: OpenFile, *, position: int = 0) -> None:
        self.file = file
        self._position = position

    async def read(self, size: int = -1) -> memoryview:
        """At most `size` bytes (all that is left, if negative), fewer only at the end. See OpenFile.pread for how long to keep them."""
        if size < 0:
            size = max(0, self.file.length - self._position)
        data = await self.file.pread(self._position, size)
        self._position += len(data)
        return data

    async def readinto(self, view: Buffer) -> int:
        count = await self.file.pread_into(self._position, [view])
        self._position += count
        return count

    async def write(self, data: Buffer) -> int:
        if self.file.appending:
            offset = await self.file.append([data])
            count = len(data)
            self._position = offset + count
            return count
        count = await self.file.pwrite(self._position, [data])
        self._position += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.file.length}.get(whence)
        if base is None or base + offset < 0:
            raise InvalidArgument(f"cannot seek to {offset} from {whence}")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    async def truncate(self, size: int | None = None) -> int:
        length = self._position if size is None else size
        await self.file.truncate(length)
        return length

    async def flush(self) -> None:
        await self.file.flush()

    async def fsync(self) -> None:
        await self.file.fsync()

    async def aclose(self) -> None:
        await self.file.close()

    async def __aenter__(self) -> AsyncFile:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()
