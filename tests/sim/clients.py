"""What clients do while things go wrong, and what they were told: the workload, and the promises that it leaves behind.

A client machine runs several of these at once over one AsyncClient, each one operation at a time:
- `Registers`: single chunks of a file that is there already, written, removed and read through the storage client, each key a linearizable register;
- `Files`: files that only this client changes: written, rewritten, cut, renamed, unlinked; what was acknowledged must be read by anyone;
- `Log`: one file to which everybody appends: offsets and the length are linearizable;
- `Blocks`: KV-cache blocks: put once, got, removed.
Everything that was acknowledged goes into the `Record`; everything whose outcome is unknown is written there as such.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

import trio
from tests.histories.history import History, fill, name_of
from tests.sim.machine import Main, Process
from tests.sim.world import KIB, MIB, World

from kvfs.client.async_client import AsyncClient, open_client
from kvfs.client.config import ClientConfig
from kvfs.client.placement import Placement
from kvfs.client.storage_reads import ChunkRead
from kvfs.client.storage_writes import ChunkWrite, WriteDone
from kvfs.client.user import User
from kvfs.common.boundary.random import Random
from kvfs.common.errors import KvfsError, NotFound
from kvfs.common.wire import storage_pb2
from kvfs.kvcache.cache import AsyncKVCache
from kvfs.kvcache.config import CacheConfig
from kvfs.kvcache.outcomes import Put
from kvfs.kvcache.params import SpaceParams

CHUNK_BYTES = 64 * KIB
REGISTERS = "/registers"
LOG = "/log"
SPACE = "blocks"
SPACE_PARAMS = SpaceParams(block_tokens=16, block_bytes=6000, model="sim")
SIZES = (300, 5_000, 40_000)
ROOT = User(0, 0)
CONFIG = ClientConfig(
    deadline_s=8.0,
    shared_memory=False,
    buffer_pool_bytes=16 * MIB,
    dirty_max_bytes=2 * MIB,
    write_batch_bytes=MIB,
    read_attempt_s=1.0,
    write_attempt_s=3.0,
    length_hint_s=1.0,
)
CACHE_CONFIG = CacheConfig()


@dataclass(frozen=True, slots=True)
class Pace:
    """Of all clients."""

    operations: int
    """Of each work."""
    pause_s: float
    """Between two operations of a work, at most."""
    keys: int
    """How many chunks the registers are."""


@dataclass(slots=True)
class Record:
    """What clients were promised. `history`: of registers, log and blocks. `files`: what each file may hold now; None: that it is not there."""

    history: History
    files: dict[str, set[bytes | None]] = field(default_factory=dict)
    operations: int = 0
    unknown: int = 0
    problems: list[str] = field(default_factory=list)
    """What a client saw that can never be right."""


class Work(ABC):
    """One operation after the other. Must never raise what a user would not meet."""

    def __init__(self, name: str, process: Process, client: AsyncClient, record: Record, pace: Pace) -> None:
        self.name = name
        self.pace = pace
        self.client = client
        self.record = record
        self.random: Random = process.random
        self.trace = process.machine.trace
        self.process = process
        self._count = 0

    async def begin(self) -> None:  # noqa: B027
        """What has to be there before the first operation."""

    @abstractmethod
    async def operate(self) -> None: ...

    async def run(self) -> None:
        for _ in range(self.pace.operations):
            await trio.sleep(self.random.uniform(0, self.pace.pause_s))
            self.record.operations += 1
            await self.operate()

    def value(self) -> str:
        """One that no other operation writes."""
        self._count += 1
        return f"{self.name}.{self.process.machine.lives}.{self._count}"

    def say(self, what: str) -> None:
        self.trace.event(self.process.machine.name, what)


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


class Log(Work):
    """Appends of one size, and questions for the length."""

    BYTES = 100

    async def operate(self) -> None:
        if self.random.randrange(3):
            await self.append()
        else:
            await self.length()

    async def append(self) -> None:
        value = self.value()
        call = self.record.history.call(self.name, "length of log", "append", self.BYTES)
        try:
            file = await self.client.open_path(LOG, os.O_WRONLY | os.O_APPEND)
            try:
                offset = await file.append([fill(value, self.BYTES)])
            finally:
                await file.close()
        except KvfsError as error:
            self.say(f"append {value}: {outcome(error)}")
            self.record.unknown += 1
            call.unknown(type(error).__name__)
            return
        self.say(f"append {value}: at {offset}")
        call.done(offset)
        self.record.files.setdefault(f"{LOG}@{offset}", set()).add(fill(value, self.BYTES))

    async def length(self) -> None:
        call = self.record.history.call(self.name, "length of log", "length")
        try:
            file = await self.client.open_path(LOG, os.O_RDONLY)
            try:
                length = await file.current_length()
            finally:
                await file.close()
        except KvfsError as error:
            self.say(f"length? {outcome(error)}")
            call.never()
            return
        self.say(f"length? {length}")
        call.done(length)


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

    async def _try(self, what: str, step: Callable[[], Awaitable[None]]) -> KvfsError | None:
        try:
            await step()
        except KvfsError as error:
            self.say(f"{what}: {outcome(error)}")
            return error
        self.say(f"{what}: done")
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

        error = await self._try(f"{path} = {value}, {size} bytes", step)
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

        error = await self._try(f"{path} at {start} = {value}, {len(piece)} bytes", step)
        self._settle(path, known, {after} if error is None else {ANYTHING}, error)

    async def cut(self, path: str, known: set[bytes | None]) -> None:
        if None in known or len(known) > 1 or ANYTHING in known:
            return
        [content] = known
        assert content is not None
        length = self.random.randrange(len(content) + CHUNK_BYTES)
        after = content[:length].ljust(length, b"\0")
        self.record.files[path] = known | {after, ANYTHING}
        error = await self._try(f"{path} truncated to {length}", lambda: self.client.truncate(path, length))
        self._settle(path, known, {after} if error is None else {after, ANYTHING}, error)

    async def unlink(self, path: str, known: set[bytes | None]) -> None:
        if None in known or len(known) > 1:
            return
        self.record.files[path] = known | {None}
        error = await self._try(f"{path} unlinked", lambda: self.client.unlink(path))
        if isinstance(error, NotFound):
            self.record.problems.append(f"{path} is not there, though it was written: {error.message}")
        self._settle(path, known, {None}, error)

    async def rename(self, path: str, to: str) -> None:
        known, other = self.record.files[path], self.record.files.setdefault(to, {None})
        if path == to or None in known or len(known) > 1:
            return
        self.record.files[path], self.record.files[to] = known | {None}, other | known
        error = await self._try(f"{path} renamed to {to}", lambda: self.client.rename(path, to))
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
        if found not in known and ANYTHING not in known:
            self.record.problems.append(f"{path} is {shown(found)}, and may be {', '.join(map(shown, known))}")


ANYTHING = b"(anything)"


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
            call.done(put.name.lower())

    async def remove(self, number: int) -> None:
        call = self.record.history.call(self.name, f"block {number}", "remove")
        [gone] = await self._space.remove([key(number)])
        self.say(f"remove block {number}: {gone}")
        if gone:
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
        call.done(value)
        return value


def key(number: int) -> bytes:
    return f"key {number}".encode().ljust(16, b".")


def block_bytes(number: int) -> int:
    return 500 + 700 * number


def outcome(done: WriteDone | KvfsError) -> str:
    return f"{type(done).__name__}: {done.message}" if isinstance(done, KvfsError) else f"version {done.version}"


def shown(content: bytes | None) -> str:
    if content is None:
        return "not there"
    return "anything" if content is ANYTHING else f"{len(content)} bytes of {name_of(content)}"


WORKS: tuple[type[Work], ...] = (Registers, Log, Files, Blocks)


def client_main(world: World, record: Record, works: tuple[type[Work], ...], pace: Pace, over: Callable[[], None]) -> Main:
    """The process of one client machine."""

    async def main(process: Process, started: Callable[[], None]) -> None:
        started()
        async with connected(world, process) as client, trio.open_nursery() as nursery:
            for number, work in enumerate(works):
                name = f"{process.machine.name}{work.__name__[0].lower()}{number}"
                made = work(name, process, client, record, pace)
                nursery.start_soon(_work, made)
        over()

    return main


async def _work(work: Work) -> None:
    while True:
        try:
            await work.begin()
            break
        except KvfsError:
            await trio.sleep(0.5)
    await work.run()


def connected(world: World, process: Process) -> AbstractAsyncContextManager[AsyncClient]:
    return open_client(world.address, user=ROOT, config=CONFIG, net=process.net, clock=process.clock, random=process.random)
