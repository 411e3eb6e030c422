"""Work on single chunks of one file that is there already: each key a linearizable register, written, removed and read through the storage client."""

from __future__ import annotations

from typing import Final

from tests.histories.history import fill, name_of
from tests.sim.work import CHUNK_BYTES, Work, outcome

from kvfs.client.placement import Placement
from kvfs.client.storage_reads import ChunkRead
from kvfs.client.storage_writes import ChunkWrite
from kvfs.common.errors import KvfsError
from kvfs.common.wire import storage_pb2

REGISTERS: Final = "/registers"
SIZES: Final = (300, 5_000, 40_000)


class Registers(Work):
    """Keys: "chunk N" with its chunk removed now and then; "chunk N left" and "chunk N right", two halves of one chunk."""

    _placement: Placement

    async def begin(self) -> None:
        self._placement = Placement.of(await self.client.stat(REGISTERS))

    async def operate(self) -> None:
        index = self.random.randrange(self.pace.keys)
        size = self.size(index)
        halves = index % 2
        right = halves and self.random.randrange(2)
        key = f"chunk {index}" + (" right" if right else " left" if halves else "")
        offset = size if right else 0
        what = self.random.randrange(10)
        if what < 5:
            await self.write(key, index, offset, size)
        elif what == 5 and not halves:
            await self.remove(key, index)
        else:
            await self.read(key, index, offset, size)

    @staticmethod
    def size(index: int) -> int:
        """Of a chunk's value, or of each of its halves."""
        return SIZES[index % len(SIZES)]

    async def write(self, key: str, index: int, offset: int, size: int) -> None:
        value = self.value()
        call = self.record.history.call(self.name, key, "write", value)
        place = self._placement
        write = ChunkWrite(place.chain(index), place.chunk(index), offset, size, CHUNK_BYTES, fill(value, size))
        [done] = await self.client.storage.write_each([write])
        self.say(f"{key} = {value}: {outcome(done)}")
        if isinstance(done, KvfsError):
            self.record.unknown += 1
            call.unknown(type(done).__name__)
        else:
            self.record.done["write of a chunk"] += 1
            call.done()

    async def remove(self, key: str, index: int) -> None:
        call = self.record.history.call(self.name, key, "remove")
        place = self._placement
        [done] = await self.client.storage.write_each(
            [ChunkWrite(place.chain(index), place.chunk(index), 0, 0, CHUNK_BYTES, kind=storage_pb2.REMOVE)]
        )
        self.say(f"{key} removed: {outcome(done)}")
        if isinstance(done, KvfsError):
            self.record.unknown += 1
            call.unknown(type(done).__name__)
        else:
            self.record.done["remove of a chunk"] += 1
            call.done()

    async def read(self, key: str, index: int, offset: int, size: int) -> bool:
        call = self.record.history.call(self.name, key, "read")
        place = self._placement
        into = memoryview(bytearray(size))
        [done] = await self.client.storage.read_each([ChunkRead(place.chain(index), place.chunk(index), offset, size, into)])
        if isinstance(done, KvfsError):
            self.say(f"{key}? {outcome(done)}")
            call.never()
            return False
        value = name_of(done.view[: done.length]) if done.found else None
        if value is not None and not any(done.view[: done.length]):
            value = None  # the other half was written first
        if value is not None and done.length != size:
            value = f"SHORT {value}: {done.length} bytes of {size}"
        self.say(f"{key}? {value} (version {done.version})")
        self.record.done["read of a chunk"] += value is not None
        call.done(value)
        return True

    async def read_all(self) -> bool:
        """Every key once."""
        well = True
        for index in range(self.pace.keys):
            size = self.size(index)
            if index % 2:
                well &= await self.read(f"chunk {index} left", index, 0, size)
                well &= await self.read(f"chunk {index} right", index, size, size)
            else:
                well &= await self.read(f"chunk {index}", index, 0, size)
        return well
