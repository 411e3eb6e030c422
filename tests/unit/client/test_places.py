"""Reading data files from the places that a service on this machine tells: right bytes or the ordinary way, whatever happens to the places."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.unit.client.fakes import run
from tests.unit.client.whole import AsyncClient, Whole, whole

from kvfs.client.file.open_file import OpenFile
from kvfs.client.file.places import SLOT_BYTES, STALE_S, Reach
from kvfs.client.place import Place, Read
from kvfs.common.boundary.clock import SystemClock
from kvfs.common.boundary.real_disk import RealDisk
from kvfs.common.checksum import checksums
from kvfs.common.ids import chunk_id
from kvfs.common.wire.lending import BorrowedFiles
from kvfs.storage.engine.config import EngineConfig
from kvfs.storage.engine.engine import ChunkEngine
from kvfs.storage.engine.requests import Update, UpdateKind
from kvfs.storage.engine.superblock import Superblock

MIB = 1 << 20
ID = chunk_id(5, 0)


class Target:
    """A chunk engine on a real disk, and a caller to whom it lends its files."""

    def __init__(self, folder: Path) -> None:
        config = EngineConfig(background=False, reserve_bytes=1, group_bytes=MIB, files_per_class=1)
        self.engine = ChunkEngine(RealDisk(folder), SystemClock(), Superblock("c", 1, bytes(16)), config)
        self.files = BorrowedFiles("a test", 64)
        self.lent: dict[Any, int] = {}

    def write(self, offset: int, data: bytes, chunk: bytes = ID) -> None:
        self.engine.apply(Update(chunk, UpdateKind.WRITE, offset, len(data), memoryview(data), checksums(data, offset)), 1)

    def truncate(self, length: int) -> None:
        self.engine.apply(Update(ID, UpdateKind.TRUNCATE, length=length), 1)

    def place(self, offset: int, length: int) -> Place:
        found = self.engine.place(ID, offset, length)
        if found.file is not None and found.file not in self.lent:
            fd = found.file.lend()
            assert fd is not None
            self.lent[found.file] = len(self.lent) + 1
            self.files.arrived(self.lent[found.file], [fd])
        end = min(-(-(offset + length) // 32768) * 32768, found.chunk_length)
        number = self.lent[found.file] if found.file is not None else 0
        return Place(offset, end, self.files if number else None, number, found.file_offset, found.stored, found.checksums)


@pytest.fixture
def target(tmp_path: Path) -> Any:
    made = Target(tmp_path)
    yield made
    made.files.close()
    made.engine.close()


def test_every_range_of_a_place_reads_as_the_chunk_does(target: Target) -> None:
    rng = random.Random(1)
    target.write(0, rng.randbytes(100_000))
    target.write(150_000, rng.randbytes(50_001))  # a gap of zeros
    target.truncate(300_000)  # zeros that are nowhere stored
    whole_chunk = bytearray(MIB)
    target.engine.read(ID, 0, MIB, memoryview(whole_chunk))
    for first in (0, 32768, 131_072, 262_144):
        place = target.place(first, 400_000)
        for _ in range(200):
            offset = rng.randrange(first, 350_000)
            size = rng.choice([1, 100, 4096, 32768, 65536, 100_000, 299_999])
            if rng.random() < 0.3:
                offset -= offset % 32768
            into = memoryview(bytearray(b"x" * size))
            assert place.read(offset, into, nowait=rng.random() < 0.5) in (Read.DONE, Read.WAITS)
            assert place.read(offset, into) is Read.DONE
            assert bytes(into) == bytes(whole_chunk[offset : offset + size])


def test_a_place_whose_block_was_used_again_is_found_out(target: Target) -> None:
    old = random.Random(2).randbytes(200_000)
    target.write(0, old)
    place = target.place(0, 200_000)
    into = memoryview(bytearray(200_000))
    target.write(0, random.Random(3).randbytes(200_000))  # elsewhere: the old block waits for a sync
    assert place.read(0, into) is Read.DONE and bytes(into) == old, "the version that was told"
    target.engine.sync()
    for index in range(1, 12):
        target.write(0, random.Random(index).randbytes(200_000), chunk_id(5, index))
    assert place.read(0, into) is Read.STALE
    assert place.read(70_000, into[:10]) is Read.STALE
    target.files.close()
    assert place.read(0, into) is Read.STALE, "the connection is gone"


def test_an_append_in_place_does_not_touch_an_older_place(target: Target) -> None:
    data = random.Random(4).randbytes(50_000)
    target.write(0, data[:40_000])
    place = target.place(0, 65536)
    target.write(40_000, data[40_000:])
    into = memoryview(bytearray(50_000))
    assert place.read(0, into) is Read.DONE
    assert bytes(into) == data[:40_000] + bytes(10_000)


# --- whole clients -------------------------------------------------------------------------------------------------------------------


def direct_bytes(client: AsyncClient) -> int:
    return client.counters.direct_bytes


async def handle(client: AsyncClient, path: str, mode: str = "rb") -> OpenFile:
    """The open file below the file object."""
    flags = {"rb": os.O_RDONLY, "r+b": os.O_RDWR}[mode]
    return await client.open_path(path, flags)


def test_files_are_read_directly_where_the_storage_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs.client.file.places.STALE_S", 60)  # how long this takes shall not matter

    async def test() -> None:
        rng = random.Random(5)
        data = bytearray(rng.randbytes(5 * MIB + 12345))
        async with whole(storage=2, replicas=2) as cluster, cluster.client() as writer, cluster.client() as client:
            await writer.write_bytes("/f", data)
            await writer.truncate("/f", 7 * MIB)
            data += bytes(7 * MIB - len(data))
            file = await handle(client, "/f")
            for _ in range(300):
                offset, size = rng.randrange(len(data)), rng.choice([1, 4096, 100_000, 2 * MIB])
                assert bytes(await file.pread(offset, size)) == data[offset : offset + size]
                views = [memoryview(bytearray(part)) for part in (size // 3, 0, size)]
                count = await file.pread_into(offset, views)
                assert b"".join(views)[:count] == data[offset : offset + count] and count == min(size // 3 + size, len(data) - offset)
            assert client.counters.read_requests == 0, "not a byte came through the service"
            assert direct_bytes(client) > 10 * MIB and client.counters.places_stale == 0
            assert client.counters.place_requests < 30
            await file.close()

    run(test)


@pytest.mark.parametrize("reason", ["switched off", "another user"])
def test_who_is_told_no_places_reads_through_the_service(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason == "another user":
        monkeypatch.setattr("kvfs.common.boundary.system_net._peer_uid", lambda sock: os.geteuid() + 4321)

    async def test() -> None:
        data = random.Random(6).randbytes(3 * MIB + 17)
        async with whole(storage=1, replicas=1, direct_reads=reason != "switched off") as cluster, cluster.client() as client:
            await client.write_bytes("/f", data)
            file = await handle(client, "/f")
            assert bytes(await file.pread(0, len(data))) == data
            for offset in range(0, len(data), 99_999):
                assert bytes(await file.pread(offset, 5000)) == data[offset : offset + 5000]
            assert direct_bytes(client) == 0 and client.counters.read_requests > 0
            assert file.read_now(0, memoryview(bytearray(10))) == 0 and not file.tells_places
            await file.close()

    run(test)


def test_places_that_went_stale_are_read_through_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        data = random.Random(7).randbytes(3 * MIB)
        async with whole(storage=1, replicas=1) as cluster, cluster.client() as client:
            await client.write_bytes("/f", data)
            file = await handle(client, "/f")
            await file.find_places(0, len(data))
            places = file._state.places
            for key, slot in list(places._slots.items()):  # as if the blocks had other bytes by now
                places._slots[key] = slot._replace(place=slot.place._replace(file_offset=slot.place.file_offset + 4096))
            assert bytes(await file.pread(0, len(data))) == data
            assert client.counters.places_stale > 0 and client.counters.read_requests == 0, "a new question found them"
            told = client.storage.places

            async def late(ranges: Any) -> list[Place | None]:
                found = await told(ranges)
                return [place._replace(file_offset=place.file_offset + 4096) if place is not None else None for place in found]

            monkeypatch.setattr(client.storage, "places", late)
            places.clear()
            before = direct_bytes(client)
            assert bytes(await file.pread(0, len(data))) == data
            assert client.counters.read_requests > 0 and direct_bytes(client) == before
            into = memoryview(bytearray(len(data)))
            assert await file.pread_into(0, [into]) == len(data) and bytes(into) == data
            await file.close()

    run(test)


def test_a_storage_service_that_dies_takes_its_places_with_it() -> None:
    async def test() -> None:
        data = random.Random(8).randbytes(3 * MIB)
        async with whole(storage=2, replicas=2) as cluster, cluster.client() as client:
            await client.write_bytes("/f", data)
            file = await handle(client, "/f")
            assert bytes(await file.pread(0, len(data))) == data
            cluster.stop_storage(0)
            for _ in range(20):
                assert bytes(await file.pread(0, len(data))) == data
                await trio.sleep(0.05)
            await file.close()

    run(test)


def test_changes_of_another_client_are_seen() -> None:
    async def test() -> None:
        old = random.Random(9).randbytes(2 * MIB)
        async with whole(storage=1, replicas=1) as cluster, cluster.client() as writer, cluster.client() as reader:
            await writer.write_bytes("/f", old)
            file, other = await handle(reader, "/f"), await handle(writer, "/f", "r+b")
            assert bytes(await file.pread(0, 2 * MIB)) == old
            # Synced: at once.
            new = bytes(reversed(old))
            await other.pwrite(0, [new])
            await other.fsync()
            assert bytes(await file.pread(0, 2 * MIB)) == new
            into = memoryview(bytearray(2 * MIB))
            await file.find_places(0, 2 * MIB)
            assert file.read_now(0, into) == 2 * MIB
            # Cut: at once.
            await writer.truncate("/f", 1000)
            assert file.read_now(0, into) == 0, "what was borrowed is given up"
            assert bytes(await file.pread(0, 2 * MIB)) == new[:1000]
            # Acknowledged and not synced: after a moment.
            await file.find_places(0, 1000)
            await other.pwrite(0, [b"z" * 1000])
            await other.flush()
            await trio.sleep(STALE_S)
            assert bytes(await file.pread(0, 1000)) == b"z" * 1000
            assert direct_bytes(reader) > 4 * MIB
            await file.close()
            await other.close()

    run(test)


def test_places_are_used_only_while_the_lease_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who holds no lease is not told of changes: a synced write must be seen all the same."""
    monkeypatch.setattr("kvfs.client.file.places.STALE_S", 60)

    async def test() -> None:
        async with whole(storage=1, replicas=1) as cluster, cluster.client() as writer, cluster.client() as reader:
            await writer.write_bytes("/f", b"a" * 1000)
            file, other = await handle(reader, "/f"), await handle(writer, "/f", "r+b")
            into = memoryview(bytearray(1000))
            await file.find_places(0, 1000)
            assert file.read_now(0, into) == 1000
            assert file.places_until(0, 1000) <= file.lease_end
            await trio.sleep(1.1)  # longer than attr_lease_ms
            await other.pwrite(0, [b"z" * 1000])
            await other.fsync()
            assert file.read_now(0, into) == 0
            await file.find_places(0, 1000)
            assert file.read_now(0, into) == 1000 and bytes(into) == b"z" * 1000
            await file.close()
            await other.close()

    run(test)


def test_a_reader_sees_its_own_writes_between_places() -> None:
    async def test() -> None:
        rng = random.Random(10)
        model = bytearray(rng.randbytes(4 * MIB))
        async with whole(storage=1, replicas=1) as cluster, cluster.client() as client:
            await client.write_bytes("/f", model)
            file = await handle(client, "/f", "r+b")
            for _ in range(400):
                offset, size = rng.randrange(len(model)), rng.choice([10, 4096, 50_000])
                if rng.random() < 0.3:
                    data = rng.randbytes(min(size, len(model) - offset))
                    await file.pwrite(offset, [data])
                    model[offset : offset + len(data)] = data
                elif rng.random() < 0.1:
                    await file.flush()
                else:
                    assert bytes(await file.pread(offset, size)) == model[offset : offset + size]
            await file.close()

    run(test)


def data_descriptors(cluster: Whole) -> int:
    """Data files that are open in this process, which is client and services in one."""
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            count += "/data/" in os.readlink(f"/proc/self/fd/{fd}").removeprefix(str(cluster.folder))
        except OSError:
            pass  # the descriptor of the listing itself
    return count


def test_every_descriptor_is_closed_with_its_client() -> None:
    async def test() -> None:
        async with whole(storage=2, replicas=1) as cluster:
            async with cluster.client() as client:
                await client.write_bytes("/f", random.Random(11).randbytes(8 * MIB))
                before = data_descriptors(cluster)
                file = await handle(client, "/f")
                await file.pread(0, 8 * MIB)
                assert before < data_descriptors(cluster) <= 2 * before
                kept = file
            assert data_descriptors(cluster) == before
            assert kept.closed and kept.read_now(0, memoryview(bytearray(10))) == 0

    run(test)


def test_reads_side_by_side_ask_once_for_each_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs.client.file.places.STALE_S", 60)

    async def test() -> None:
        async with whole(storage=1, replicas=1) as cluster, cluster.client() as client:
            await client.write_bytes("/f", bytes(4 * MIB))
            file = await handle(client, "/f")
            told, asked = client.storage.places, []

            async def counted(ranges: Any) -> list[Place | None]:
                asked.extend(ranges)
                return await told(ranges)

            monkeypatch.setattr(client.storage, "places", counted)
            async with trio.open_nursery() as nursery:
                for place in range(8):
                    nursery.start_soon(file.pread, place % 4 * MIB, MIB)
            assert len(asked) == len(set(asked)) == 4 and direct_bytes(client) == 8 * MIB
            await file.close()

    run(test)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfs.client.file.places.SLOTS_MAX", 6)

    async def test() -> None:
        async with whole(storage=1, replicas=1) as cluster, cluster.client() as client:
            files = []
            for number in range(5):
                await client.write_bytes(f"/{number}", bytes([number]) * (4 * MIB))
                files.append(await handle(client, f"/{number}"))
            for _ in range(2):
                for number, file in enumerate(files):
                    assert bytes(await file.pread(MIB, 100)) == bytes([number]) * 100
                    assert sum(len(other._state.places) for other in files) <= 6
            for file in files:
                await file.close()
            assert sum(len(other._state.places) for other in files) == 0

    run(test)


def test_what_cannot_be_read_without_waiting_is_left_to_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's thread never waits for a disk."""
    from kvfs.common.boundary.real_disk import RealLentFile

    monkeypatch.setattr(RealLentFile, "try_read_into", lambda self, buffers, offset: None)

    async def test() -> None:
        data = random.Random(12).randbytes(3 * MIB)
        async with whole(storage=1, replicas=1) as cluster, cluster.client() as client:
            await client.write_bytes("/f", data)
            file = await handle(client, "/f")
            for offset in range(0, len(data), 100_000):
                assert bytes(await file.pread(offset, 100_000)) == data[offset : offset + 100_000]
            assert direct_bytes(client) == 0
            assert client.counters.window_fetches > 0, "and is read ahead there"
            assert file.read_now(0, memoryview(bytearray(MIB))) == MIB, "a thread of its own may wait"
            await file.close()

    run(test)


class Nowhere:
    """For Reach, which only asks for the size of slots and whether any were of use."""

    slot_bytes = SLOT_BYTES
    hits = 0


def test_how_much_is_asked_for_follows_the_reader() -> None:
    places: Any = Nowhere()
    reach = Reach()
    asked = []
    offset = 0
    while offset < 500 * MIB:  # goes on: further and further
        start, offset = reach.next(places, offset, offset + MIB, 0)
        asked.append((offset - start) // MIB)
    assert asked[:3] == [4, 16, 64] and set(asked[3:]) == {64}
    start, stop = reach.next(places, 700 * MIB + 5, 700 * MIB + 10, 1)
    assert (start, stop) == (700 * MIB, 701 * MIB), "while the file changes: what is read, no more"
    sizes = []
    rng = random.Random(1)
    for _ in range(50):  # jumps about in vain
        offset = rng.randrange(1 << 20) * MIB
        start, stop = reach.next(places, offset, offset + 1, 1)
        assert start <= offset < stop
        sizes.append((stop - start) // MIB)
    assert sizes[:5] == [2, 4, 8, 16, 32] and max(sizes) == 32 and sum(sizes) / 50 < 20
    for _ in range(10):  # and with success
        places.hits += 5
        offset = rng.randrange(1 << 20) * MIB
        start, stop = reach.next(places, offset, offset + 1, 1)
    assert stop - start == 64 * MIB
