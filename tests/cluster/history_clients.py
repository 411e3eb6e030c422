"""Clients that read and write ten keys of a real cluster and write down what they did: chunks, KV-cache blocks and files.

Chunks are read through the service, and by places asked for in the same operation. A value's bytes tell its name anywhere in them
(tests/histories/history.py), so what is read is a name, nothing, or torn. Outcomes that an error leaves open are unknown; a read that failed saw
nothing. What is promised of which key: `model_of`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio
from tests.histories.history import Call, History, fill, name_of
from tests.histories.models import CreateOnce, Model, Register

from kvfs.client.async_client import AsyncClient
from kvfs.client.file.memory import zero
from kvfs.client.place import Read
from kvfs.client.placement import Placement
from kvfs.client.storage_places import ChunkRange
from kvfs.client.storage_reads import ChunkRead
from kvfs.client.storage_writes import ChunkWrite
from kvfs.common.errors import ChunkNotFound, KvfsError
from kvfs.common.wire import storage_pb2 as pb
from kvfs.kvcache import CacheConfig, SpaceParams
from kvfs.kvcache.async_space import AsyncSpace
from kvfs.kvcache.cache import AsyncKVCache
from kvfs.kvcache.known import KNOWN_S

CHUNK_BYTES = (3_000, 40_000, 70_000, 200_000)
"""Of each chunk key: one unit, several, and more than is read inline."""
FILE_BYTES = 50_000
BLOCK_BYTES = 100_000
KEYS = [*(f"chunk-{number}" for number in range(4)), *(f"block-{number}" for number in range(4)), *(f"file-{number}" for number in range(2))]
FIRST = "first"
"""What the files hold before anyone looks."""
CACHE = CacheConfig(rest_s=0.2, rest_max_s=0.5)


def model_of(healed_s: float) -> Callable[[str], Model]:
    """Misses of blocks are free until the trouble ended: a reader gets the right bytes or a miss."""
    blocks = CreateOnce(stale_s=KNOWN_S, free_misses_until_s=healed_s)
    return lambda key: blocks if key.startswith("block") else Register(initial=FIRST if key.startswith("file") else None)


@dataclass
class World:
    """What all clients of a run share."""

    history: History
    placement: Placement
    """Of the file whose chunks are the chunk keys."""
    written: int = 0
    errors: dict[str, int] = field(default_factory=dict)

    def new_value(self, client: str) -> str:
        self.written += 1
        return f"{client}.{self.written}"

    def failed(self, error: KvfsError) -> None:
        name = type(error).__name__
        self.errors[name] = self.errors.get(name, 0) + 1


async def prepare(client: AsyncClient, history: History) -> World:
    """The space, the files."""
    await AsyncKVCache(client, CACHE).create("s", SpaceParams(block_tokens=16, block_bytes=BLOCK_BYTES, model="m", dtype="bf16"))
    for number in range(2):
        await client.write_bytes(f"/file-{number}", fill(FIRST, FILE_BYTES))
    await client.write_bytes("/chunks", b"")
    await client.truncate("/chunks", len(CHUNK_BYTES) << 20)
    return World(history, Placement.of(await client.stat("/chunks")))


class HistoryClient:
    def __init__(self, name: str, client: AsyncClient, space: AsyncSpace, world: World, seed: str) -> None:
        self.name = name
        self._client = client
        self._space = space
        self._world = world
        self._chance = random.Random(seed)

    async def run(self, count: int, pause_s: float, limit_s: float) -> None:
        """So many operations, with pauses of about that length; fewer if the time is up."""
        end_s = trio.current_time() + limit_s
        for _ in range(count):
            if trio.current_time() > end_s:
                return
            await self.one(self._chance.choice(KEYS))
            await trio.sleep(self._chance.expovariate(1 / pause_s))

    async def read_all(self) -> None:
        for key in KEYS:
            for _ in range(2):
                await self._look(key)

    async def one(self, key: str) -> None:
        chance, kind = self._chance, key.split("-")[0]
        if chance.random() < 0.5:
            await self._look(key)
            return
        # Some are given up very early, when they may be anywhere on their way.
        limit_s = chance.uniform(0.001, 0.05) if chance.random() < 0.05 else chance.uniform(5, 12)
        value = self._world.new_value(self.name)
        if kind == "chunk":
            if chance.random() < 0.1:
                await self._update("remove", key, None, limit_s, self._remove_chunk)
            else:
                await self._update("write", key, value, limit_s, self._write_chunk)
        elif kind == "block":
            if chance.random() < 0.3:
                await self._update("remove", key, None, limit_s, self._remove_block)
            else:
                await self._update("put", key, value, limit_s, self._put)
        else:
            await self._update("write", key, value, limit_s, self._write_file)

    async def _update(self, what: str, key: str, value: str | None, limit_s: float, act: Callable[[Call, str, str, float], Awaitable[None]]) -> None:
        call = self._world.history.call(self.name, key, what, value)
        with trio.move_on_after(limit_s):
            try:
                await act(call, key, value or "", limit_s)
            except KvfsError as error:
                self._world.failed(error)
                call.unknown(type(error).__name__)
        if not call.ended:
            call.unknown("given up")

    async def _look(self, key: str) -> None:
        kind = key.split("-")[0]
        by_place = kind == "chunk" and self._chance.random() < 0.5
        asks = kind == "block" and self._chance.random() < 0.3
        call = self._world.history.call(self.name, key, "exists" if asks else "get" if kind == "block" else "read")
        with trio.move_on_after(15):
            try:
                if kind == "chunk":
                    await self._read_chunk(call, key, by_place=by_place)
                elif kind == "file":
                    call.done(name_of(await self._client.read_bytes("/" + key)))
                elif asks:
                    call.done((await self._space.exists([block_key(key)]))[0])
                else:
                    into = bytearray(BLOCK_BYTES)
                    [length] = await self._space.get([block_key(key)], [into])
                    call.done(None if length is None else name_of(into[:length]))
            except KvfsError as error:
                self._world.failed(error)
        if not call.ended:
            call.never()

    # --- chunks ----------------------------------------------------------------------------------------------------------------------

    def _chunk(self, key: str) -> tuple[int, bytes, int]:
        index = int(key.split("-")[1])
        placement = self._world.placement
        return placement.chain(index), placement.chunk(index), CHUNK_BYTES[index]

    async def _write_chunk(self, call: Call, key: str, value: str, limit_s: float) -> None:
        chain, chunk, size = self._chunk(key)
        await self._client.storage.write([ChunkWrite(chain, chunk, 0, size, 1 << 20, fill(value, size))], deadline_s=limit_s)
        call.done()

    async def _remove_chunk(self, call: Call, key: str, value: str, limit_s: float) -> None:
        chain, chunk, _ = self._chunk(key)
        try:
            await self._client.storage.write([ChunkWrite(chain, chunk, 0, 0, 1 << 20, kind=pb.REMOVE)], deadline_s=limit_s)
        except ChunkNotFound:
            pass  # as good as removed
        call.done()

    async def _read_chunk(self, call: Call, key: str, *, by_place: bool) -> None:
        chain, chunk, size = self._chunk(key)
        into = memoryview(bytearray(size))
        if by_place:
            [place] = await self._client.storage.places([ChunkRange(chain, chunk, 0, size)])
            if place is not None and (not place.end or place.read(0, into) is Read.DONE):
                call.done(name_of(into[: place.end]))
                return
            zero(into)
        [done] = await self._client.storage.read([ChunkRead(chain, chunk, 0, size, into)])
        call.done(name_of(done.view[: done.length]))

    # --- blocks ----------------------------------------------------------------------------------------------------------------------

    async def _put(self, call: Call, key: str, value: str, limit_s: float) -> None:
        size = 5_000 + int(hashlib.sha256(value.encode()).hexdigest(), 16) % (BLOCK_BYTES - 5_000)
        [outcome] = await self._space.put([block_key(key)], [fill(value, size)], deadline_s=limit_s)
        if outcome:
            call.done(outcome.value)
        else:
            call.unknown("refused")

    async def _remove_block(self, call: Call, key: str, value: str, limit_s: float) -> None:
        [gone] = await self._space.remove([block_key(key)], deadline_s=limit_s)
        if gone:
            call.done()
        else:
            call.unknown("not known to be gone")

    # --- files -----------------------------------------------------------------------------------------------------------------------

    async def _write_file(self, call: Call, key: str, value: str, limit_s: float) -> None:
        async with await self._client.open("/" + key, "r+b") as file:
            await file.write(fill(value, FILE_BYTES))
        call.done()


def block_key(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
