"""Work on KV-cache blocks of one space: put once, got, removed."""

from __future__ import annotations

from typing import Final

from tests.histories.history import fill, name_of
from tests.sim.work import Work

from kvfs.kvcache.cache import AsyncKVCache
from kvfs.kvcache.config import CacheConfig
from kvfs.kvcache.outcomes import Put
from kvfs.kvcache.params import SpaceParams

SPACE: Final = "blocks"
SPACE_PARAMS: Final = SpaceParams(block_tokens=16, block_bytes=6000, model="sim")
CACHE_CONFIG: Final = CacheConfig()


class Blocks(Work):
    """Puts, gets and removes of one block at a time."""

    async def begin(self) -> None:
        self._space = await AsyncKVCache(self.client, CACHE_CONFIG).open(SPACE)

    async def operate(self) -> None:
        number = self.random.randrange(8)
        what = self.random.randrange(10)
        if what < 4:
            await self.put(number)
        elif what < 5:
            await self.remove(number)
        else:
            await self.get(number)

    async def put(self, number: int) -> None:
        value = self.value()
        call = self.record.history.call(self.name, f"block {number}", "put", value)
        [put] = await self._space.put([key(number)], [fill(value, block_bytes(number))])
        self.say(f"put block {number} = {value}: {put.name.lower()}")
        if put is Put.REFUSED:
            self.record.unknown += 1
            call.unknown("refused")
        else:
            self.record.done["put of a block"] += 1
            call.done(put.name.lower())

    async def remove(self, number: int) -> None:
        call = self.record.history.call(self.name, f"block {number}", "remove")
        [gone] = await self._space.remove([key(number)])
        self.say(f"remove block {number}: {gone}")
        if gone:
            self.record.done["remove of a block"] += 1
            call.done()
        else:
            self.record.unknown += 1
            call.unknown("refused")

    async def get(self, number: int) -> str | None:
        call = self.record.history.call(self.name, f"block {number}", "get")
        into = bytearray(SPACE_PARAMS.block_bytes)
        [count] = await self._space.get([key(number)], [into])
        value = name_of(into[:count]) if count is not None else None
        if value is not None and count != block_bytes(number):
            value = f"SHORT {value}: {count} bytes"
        self.say(f"get block {number}: {value}")
        self.record.done["get of a block"] += value is not None
        call.done(value)
        return value


def key(number: int) -> bytes:
    return f"key {number}".encode().ljust(16, b".")


def block_bytes(number: int) -> int:
    return 500 + 700 * number
