"""What clients do in runs that stress: few chunks, files and blocks whose versions stay small, cuts while targets return, unlinks of open files."""

from __future__ import annotations

import os

import trio
from tests.histories.history import fill
from tests.sim.blocks import Blocks
from tests.sim.files import Files
from tests.sim.registers import Registers
from tests.sim.work import ANYTHING, CHUNK_BYTES, Work

from kvfs.common.errors import KvfsError, NotFound, StaleHandle


class Churn(Registers):
    """Chunks that are removed as often as they are written: their versions are always small ones, whatever their bytes are."""

    async def operate(self) -> None:
        index = self.random.randrange(self.pace.keys)
        size = self.size(index)
        if index % 2 == 0 and self.random.randrange(2):
            await self.remove(f"chunk {index}", index)
        elif index % 2 == 0:
            await self.write(f"chunk {index}", index, 0, size)
        else:
            await self.write(f"chunk {index} left", index, 0, size)


class Watch(Registers):
    """Only reads: so a client whose writes are held up, since it does not know the chain as it is, looks at what it can reach all the same."""

    async def operate(self) -> None:
        index = self.random.randrange(self.pace.keys)
        await self.read(f"chunk {index}" + (" left" if index % 2 else ""), index, 0, self.size(index))


class Cuts(Files):
    """Small files that are cut, written and read in turn."""

    async def operate(self) -> None:
        path = self._path()
        known = self.record.files.setdefault(path, {None})
        await self.read(path, known)
        if None in known or len(known) > 1:
            await self.replace(path, known)
        elif self.random.randrange(3):
            await self.cut(path, known)
        else:
            await self.overwrite(path, known)


class Recycled(Blocks):
    """Blocks that are put and removed in turn: their versions are always small ones, whatever their bytes are."""

    async def operate(self) -> None:
        number = self.random.randrange(2)
        what = self.random.randrange(5)
        await (self.put(number) if what < 2 else self.remove(number) if what < 4 else self.get(number))


class Opened(Work):
    """A file is unlinked while it is opened for writing. Who has it open keeps it, with what he writes, until he closes it."""

    LONGER_THAN_GARBAGE_S = 1.5

    async def operate(self) -> None:
        path = f"/{self.name}.{self.process.machine.lives}-{self.random.randrange(1 << 30)}"
        try:
            async with await self.client.open(path, "wb"):
                pass
        except KvfsError as error:
            self.record.unknown += 1
            self.say(f"{path}: {type(error).__name__}")
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._unlink, path)
            nursery.start_soon(self._use, path)

    async def _unlink(self, path: str) -> None:
        await trio.sleep(self.random.uniform(0, 0.02))
        self.record.files[path] = {None, b"", ANYTHING}
        try:
            await self.client.unlink(path)
        except KvfsError as error:
            self.record.unknown += 1
            self.say(f"{path} unlinked: {type(error).__name__}")
        else:
            self.say(f"{path} unlinked")
            self.record.files[path] = {None}

    async def _use(self, path: str) -> None:
        await trio.sleep(self.random.uniform(0, 0.02))
        data = fill(self.value(), 1 + self.random.randrange(2 * CHUNK_BYTES))
        try:
            file = await self.client.open_path(path, os.O_RDWR)
            try:
                await file.pwrite(0, [data])
                await file.fsync()
                await trio.sleep(self.random.uniform(0, self.LONGER_THAN_GARBAGE_S))
                found = bytes(await file.pread(0, len(data)))
                if found != data:
                    self.record.problems.append(
                        f"{path}, held open, has lost what was written and synced: {len(found)} bytes are left of {len(data)}"
                    )
                self.say(f"{path} used")
                self.record.done["use of an unlinked file"] += 1
            finally:
                await file.close()
        except (NotFound, StaleHandle) as error:  # unlinked before it was opened, or the client was thought dead
            self.say(f"{path} used: {error.message}")
        except KvfsError as error:
            self.record.unknown += 1
            self.say(f"{path} used: {type(error).__name__}: {error.message}")
