"""Work on files that only this client changes: written, rewritten, cut, renamed, unlinked. What was acknowledged must be read by anyone."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable

from tests.histories.history import fill
from tests.sim.work import ANYTHING, CHUNK_BYTES, Work, outcome, shown

from kvfs.common.errors import KvfsError, NotFound


class Files(Work):
    """Files of this client's own. After each acknowledged operation exactly one content is right; after one of unknown outcome two are."""

    async def operate(self) -> None:
        path = self._path()
        what = self.random.randrange(10)
        known = self.record.files.setdefault(path, {None})
        if what < 4:
            await self.replace(path, known)
        elif what < 6:
            await self.overwrite(path, known)
        elif what == 6:
            await self.cut(path, known)
        elif what == 7:
            await self.unlink(path, known)
        elif what == 8:
            await self.rename(path, self._path())
        else:
            await self.read(path, known)

    def _path(self) -> str:
        """Of this life of the client: what an earlier one had under way may still arrive."""
        return f"/{self.name}.{self.process.machine.lives}-{self.random.randrange(3)}"

    async def _try(self, kind: str, what: str, step: Callable[[], Awaitable[None]]) -> KvfsError | None:
        try:
            await step()
        except KvfsError as error:
            self.say(f"{what}: {outcome(error)}")
            return error
        self.say(f"{what}: done")
        self.record.done[f"{kind} of a file"] += 1
        return None

    def _settle(self, path: str, before: set[bytes | None], after: set[bytes | None], error: KvfsError | None) -> None:
        """`before` stays possible when the outcome is unknown."""
        if error is not None:
            self.record.unknown += 1
        self.record.files[path] = after if error is None else before | after

    async def replace(self, path: str, known: set[bytes | None]) -> None:
        value, size = self.value(), self.random.randrange(3 * CHUNK_BYTES)
        data = fill(value, size)
        self.record.files[path] = known | {ANYTHING}

        async def step() -> None:
            async with await self.client.open(path, "wb") as file:
                await file.write(data)

        error = await self._try("write", f"{path} = {value}, {size} bytes", step)
        # A write of which only a part was acknowledged leaves any of the bytes.
        self._settle(path, known, {data} if error is None else {ANYTHING}, error)

    async def overwrite(self, path: str, known: set[bytes | None]) -> None:
        """Some bytes in the middle, synced."""
        if None in known or len(known) > 1 or ANYTHING in known:
            return
        [content] = known
        assert content is not None
        value, start = self.value(), self.random.randrange(len(content) + 1000)
        piece = fill(value, 1 + self.random.randrange(CHUNK_BYTES))
        after = content[:start].ljust(start, b"\0") + piece + content[start + len(piece) :]
        self.record.files[path] = known | {ANYTHING}

        async def step() -> None:
            file = await self.client.open_path(path, os.O_RDWR)
            try:
                await file.pwrite(start, [piece])
                await file.fsync()
            finally:
                await file.close()

        error = await self._try("synced write", f"{path} at {start} = {value}, {len(piece)} bytes", step)
        self._settle(path, known, {after} if error is None else {ANYTHING}, error)

    async def cut(self, path: str, known: set[bytes | None]) -> None:
        if None in known or len(known) > 1 or ANYTHING in known:
            return
        [content] = known
        assert content is not None
        length = self.random.randrange(len(content) + CHUNK_BYTES)
        after = content[:length].ljust(length, b"\0")
        self.record.files[path] = known | {after, ANYTHING}
        error = await self._try("truncate", f"{path} truncated to {length}", lambda: self.client.truncate(path, length))
        self._settle(path, known, {after} if error is None else {after, ANYTHING}, error)

    async def unlink(self, path: str, known: set[bytes | None]) -> None:
        if None in known or len(known) > 1:
            return
        self.record.files[path] = known | {None}
        error = await self._try("unlink", f"{path} unlinked", lambda: self.client.unlink(path))
        if isinstance(error, NotFound):
            self.record.problems.append(f"{path} is not there, though it was written: {error.message}")
        self._settle(path, known, {None}, error)

    async def rename(self, path: str, to: str) -> None:
        known, other = self.record.files[path], self.record.files.setdefault(to, {None})
        if path == to or None in known or len(known) > 1:
            return
        self.record.files[path], self.record.files[to] = known | {None}, other | known
        error = await self._try("rename", f"{path} renamed to {to}", lambda: self.client.rename(path, to))
        if isinstance(error, NotFound):
            self.record.problems.append(f"{path} is not there, though it was written: {error.message}")
        self._settle(path, known, {None}, error)
        self._settle(to, other, known, error)

    async def read(self, path: str, known: set[bytes | None]) -> None:
        try:
            found: bytes | None = await self.client.read_bytes(path)
        except NotFound:
            found = None
        except KvfsError as error:
            self.say(f"{path}? {outcome(error)}")
            return
        self.say(f"{path}? {shown(found)}")
        self.record.done["read of a file"] += found is not None
        if found not in known and ANYTHING not in known:
            self.record.problems.append(f"{path} is {shown(found)}, and may be {', '.join(map(shown, known))}")
