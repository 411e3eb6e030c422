"""Two handles in two clients of one file against a bytearray: random writes, reads, truncates, appends, in random sizes around chunk borders.

Every operation is awaited before the next, and what one client did is reported (fsync) before the other goes on: then the file must be
exactly the model.
A second test lets one client do the same without any fsync: what it reads must be what it wrote, at every moment.
"""

from __future__ import annotations

from typing import Any

import trio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.unit.client.fakes import CHUNK, World, run, world

from kvfs.client.config import ClientConfig
from kvfs.client.file.open_file import OpenFile
from kvfs.client.file.stretch import Stretch

MIB = 1 << 20
CONFIG = ClientConfig(buffer_pool_bytes=8 * MIB, dirty_max_bytes=MIB, dirty_age_s=0.01, read_ahead_first_bytes=CHUNK, read_ahead_bytes=4 * CHUNK)
SMALL = CHUNK * 5
offsets = st.one_of(st.integers(0, SMALL), st.sampled_from([0, CHUNK - 1, CHUNK, 2 * CHUNK, 2 * CHUNK + 1]))
sizes = st.one_of(st.integers(0, 3 * CHUNK), st.sampled_from([1, 4096, CHUNK, 2 * CHUNK]))
steps = st.tuples(
    st.sampled_from(
        ["write", "write", "on", "on", "on", "read", "read", "into", "sequential", "truncate", "append", "flush", "fsync", "reopen", "span"]
    ),
    st.integers(0, 1),
    offsets,
    sizes,
    st.integers(0, 255),
)


def pattern(seed: int, size: int) -> bytes:
    block = bytes((seed + number * 7) % 251 for number in range(509))
    return (block * (size // 509 + 1))[:size]


class Model:
    def __init__(self, place: World, two_clients: bool) -> None:
        self.place = place
        self.two = two_clients
        self.data = bytearray()
        place.meta.make(7)
        self.files = [self.open(0), self.open(1)]
        self.stretches: list[Stretch | None] = [None, None]
        self.registered = place.client.register(4 * CHUNK)

    def open(self, which: int) -> OpenFile:
        client = self.place.clients[which if self.two else 0]
        return client.open_file(self.place.meta.copy(7), session=client.new_session(), read=True, write=True)

    async def step(self, kind: str, which: int, offset: int, size: int, seed: int) -> None:
        file = self.files[which]
        if kind in ("write", "span"):
            data = pattern(seed, size)
            if kind == "span":
                self.registered.view[:size] = data
                await file.pwrite(offset, [self.registered.span(0, size)])
            else:
                await file.pwrite(offset, [data[: size // 3], data[size // 3 :]])
            if size:
                self.grow(offset)
                self.data[offset : offset + size] = data
        elif kind == "on":
            stretch = self.stretches[which]
            at = offset if stretch is None else stretch.end
            await self.write_on(which, at, pattern(seed, size))
            if size:
                self.grow(at)
                self.data[at : at + size] = pattern(seed, size)
        elif kind == "append":
            data = pattern(seed, size)
            at = await file.append([data])
            assert at == len(self.data)
            self.data += data
        elif kind == "truncate":
            await file.truncate(offset)
            del self.data[offset:]
            self.grow(offset)
        elif kind == "flush":
            await file.flush()
        elif kind == "fsync":
            await file.fsync()
        elif kind == "reopen":
            await file.close()
            self.files[which] = self.open(which)
        elif kind == "read":
            assert bytes(await file.pread(offset, size)) == self.data[offset : offset + size]
        elif kind == "into":
            target = bytearray(b"\xaa" * size)
            views = [memoryview(target)[: size // 2], memoryview(target)[size // 2 :]]
            count = await file.pread_into(offset, views)
            assert count == max(0, min(size, len(self.data) - offset))
            assert target[:count] == self.data[offset : offset + count]
        elif kind == "sequential":
            part = max(size // 4, 1)
            for start in range(0, 6 * part, part):
                assert bytes(await file.pread(start, part)) == self.data[start : start + part]
        if self.two and kind in ("write", "on", "span", "append", "truncate"):
            await file.fsync()
            await self.place.meta.revoke(7)
        assert await file.current_length() == len(self.data)

    async def write_on(self, which: int, at: int, data: bytes) -> None:
        """As a raw file does in its writer's thread."""
        file, stretch, view = self.files[which], self.stretches[which], memoryview(data)
        taken = stretch.put(at, view) if stretch is not None else 0
        if taken < len(data):
            stretch = self.stretches[which] = await file.stretch(at + taken)
            taken += stretch.put(at + taken, view[taken:]) if stretch is not None else 0
        if taken < len(data):
            await file.pwrite(at + taken, [data[taken:]])
            self.stretches[which] = None

    def grow(self, length: int) -> None:
        self.data.extend(bytes(max(0, length - len(self.data))))

    async def end(self) -> None:
        for file in self.files:
            await file.close()
        assert self.place.content(7) == self.data
        for client in self.place.clients:
            with trio.move_on_after(5):  # what was being read ahead when its file was closed comes back when the service has answered
                while client.memory.pool.free_bytes < client.memory.pool.total_bytes:
                    await trio.sleep(0.001)
                    client.memory.reclaim()
            assert client.memory.pool.free_bytes == client.memory.pool.total_bytes
            assert client._back.dirty_bytes == 0


def check(plan: list[tuple[Any, ...]], two_clients: bool) -> None:
    async def test() -> None:
        async with world(clients=2 if two_clients else 1, config=CONFIG) as place:
            model = Model(place, two_clients)
            for step in plan:
                await model.step(*step)
            await model.end()

    run(test, 30)


relaxed = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@relaxed
@given(st.lists(steps, min_size=1, max_size=30))
def test_one_client_sees_its_own_writes(plan: list[tuple[Any, ...]]) -> None:
    check(plan, False)


@relaxed
@given(st.lists(steps, min_size=1, max_size=20))
# The end is where the other client put it, also for an append of no bytes.
@example([("append", 0, 0, 209, 1), ("write", 1, 0, 116_411, 3), ("append", 0, 0, 0, 1)])
def test_two_clients_see_what_the_other_reported(plan: list[tuple[Any, ...]]) -> None:
    check(plan, True)
