"""Files lent to a caller on the same machine: to whom, how many, and that every descriptor is closed in the end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.unit.common.rpc_world import READ, TRANSPORTS, World, on_transport, read

from kvfs.common.boundary.disk import DiskFile
from kvfs.common.boundary.real_disk import RealDisk
from kvfs.common.boundary.system_net import SocketStream
from kvfs.common.errors import ConnectionLost, InputOutput
from kvfs.common.sim.disk import SimDisk
from kvfs.common.wire import storage_pb2
from kvfs.common.wire.channel import ChannelPool
from kvfs.common.wire.frame import Limits


class Library:
    """A handler that answers with the number of a file of its disk: the one whose place in the list is the request's first offset."""

    def __init__(self, files: list[DiskFile]) -> None:
        self.files = files

    def read(self, request: Any, call: Any) -> Any:
        file = self.files[request.reads[0].offset]
        return storage_pb2.ReadReply(results=[storage_pb2.ReadResult(file=call.files.number(file) if call.files else 99)])


def opened(folder: Path, count: int) -> list[DiskFile]:
    disk = RealDisk(folder)
    files = []
    for number in range(count):
        file = disk.open(str(number), create=True)
        file.write([b"file %d" % number], 0)
        files.append(file)
    return files


async def ask(pool: ChannelPool, where: list[str], place: int) -> int:
    request = read()
    request.reads.add(offset=place)
    reply = await pool.call(where, READ, request, timeout_s=5)
    return int(reply.results[0].file)


def open_descriptors(folder: Path) -> int:
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{fd}").startswith(str(folder))
        except OSError:
            pass  # the descriptor of the listing itself
    return count


def test_a_file_is_lent_once_a_connection_and_closed_at_its_end(tmp_path: Path) -> None:
    async def main(world: World) -> None:
        files = opened(tmp_path, 3)
        async with world.serve(Library(files), lends_files=True) as where:
            async with world.pool() as pool:
                assert [await ask(pool, where, place) for place in (0, 2, 0, 1, 2)] == [1, 2, 1, 3, 2]
                borrowed = await pool.borrowed(where, timeout_s=5)
                assert borrowed is not None
                data = bytearray(6)
                for number, name in ((1, b"file 0"), (2, b"file 2"), (3, b"file 1")):
                    file = borrowed.get(number)
                    assert file is not None and file.read_into([memoryview(data)], 0) == 6 and data == name
                assert borrowed.get(4) is None
                assert open_descriptors(tmp_path) == 3 + 3
                kept = file
            assert borrowed.get(1) is None, "what was lent ended with the connection"
            assert kept is not None and kept.read_into([memoryview(data)], 0) == 6, "but for what is being read"
            assert open_descriptors(tmp_path) == 3 + 1
            del kept, file
            assert open_descriptors(tmp_path) == 3
            async with world.pool() as pool:
                assert await ask(pool, where, 2) == 1, "the next connection counts anew"

    on_transport("shm", main)


def test_files_that_are_gone_make_room_for_others(tmp_path: Path) -> None:
    """A service that lets files go all the time lends new ones for ever, and its callers keep no descriptors of the old ones."""

    async def main(world: World) -> None:
        files = opened(tmp_path, 3)
        async with world.serve(Library(files), lends_files=True, limits=Limits(files=4)) as where, world.pool() as pool:
            assert [await ask(pool, where, place) for place in range(3)] == [1, 2, 3]
            borrowed = await pool.borrowed(where, timeout_s=5)
            assert borrowed is not None
            for number in range(4, 20):
                folder = tmp_path / f"again{number}"
                folder.mkdir()
                files[1] = opened(folder, 2)[1]
                assert await ask(pool, where, 1) == number
                data, file = bytearray(6), borrowed.get(number)
                assert file is not None and file.read_into([memoryview(data)], 0) == 6 and data == b"file 1"
                assert borrowed.get(2) is None and (number == 4 or borrowed.get(number - 1) is None)
            del file
            assert open_descriptors(tmp_path) == 3 + 3
            assert await ask(pool, where, 0) == 1

    on_transport("shm", main)


def test_a_burst_of_files_arrives_whole(tmp_path: Path) -> None:
    """Requests sent together are answered together: the frames with descriptors go out between the others."""

    async def main(world: World) -> None:
        files = opened(tmp_path, 40)
        async with world.serve(Library(files), lends_files=True) as where, world.pool() as pool:
            numbers: dict[int, int] = {}

            async def one(place: int) -> None:
                numbers[place] = await ask(pool, where, place)

            async with trio.open_nursery() as nursery:
                for place in range(40):
                    nursery.start_soon(one, place)
            assert sorted(numbers.values()) == list(range(1, 41))
            borrowed = await pool.borrowed(where, timeout_s=5)
            assert borrowed is not None
            for place, number in numbers.items():
                file, data = borrowed.get(number), bytearray(20)
                assert file is not None
                assert data[: file.read_into([memoryview(data)], 0)] == b"file %d" % place

    on_transport("shm", main)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("reason", ["not offered", "not trusted", "no descriptor", "too many", "none left"])
def test_who_gets_no_file_is_told_so(transport: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(world: World) -> None:
        files = opened(tmp_path, 2)
        if reason == "no descriptor":
            files = [SimDisk().open("f", create=True)]
        limits = Limits(files=1) if reason == "too many" else Limits()
        if reason == "not trusted":
            monkeypatch.setattr("kvfs.common.boundary.system_net._peer_uid", lambda sock: os.geteuid() + 4321)
            monkeypatch.setattr("kvfs.common.sim.net.SimStream.trusted", property(lambda self: False, lambda self, value: None), raising=False)
        async with world.serve(Library(files), limits=limits, lends_files=reason != "not offered") as where, world.pool() as pool:
            if reason == "too many":
                assert await ask(pool, where, 0) == (1 if world.shares_memory else 99)
            if reason == "none left":

                def fail() -> int:
                    raise InputOutput("planted")

                monkeypatch.setattr(files[-1], "lend", fail)
            answer = await ask(pool, where, len(files) - 1)
            offered = world.shares_memory and reason not in ("not offered", "not trusted")
            assert answer == (0 if offered else 99)
            assert (await pool.borrowed(where, timeout_s=5) is not None) == offered
            assert (await ask(pool, where, 0)) in (0, 1, 99), "the connection goes on"

    on_transport(transport, main)


def test_a_descriptor_that_did_not_arrive_is_a_file_that_was_not_lent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when this process may open no more: the kernel drops the descriptor on the way."""

    async def main(world: World) -> None:
        async with world.serve(Library(opened(tmp_path, 1)), lends_files=True) as where, world.pool() as pool:
            taken = SocketStream.taken_fds

            def none(stream: SocketStream) -> list[int]:
                for fd in taken(stream):
                    os.close(fd)
                return []

            monkeypatch.setattr(SocketStream, "taken_fds", none)
            assert await ask(pool, where, 0) == 1
            borrowed = await pool.borrowed(where, timeout_s=5)
            assert borrowed is not None and borrowed.get(1) is None
            assert open_descriptors(tmp_path) == 1

    on_transport("shm", main)


def test_a_descriptor_that_is_no_file_ends_the_connection(tmp_path: Path) -> None:
    class Pipe:
        def lend(self) -> int:
            inside, outside = os.pipe()
            os.close(outside)
            return inside

    async def main(world: World) -> None:
        async with world.serve(Library([Pipe()]), lends_files=True) as where, world.pool() as pool:  # type: ignore[list-item]
            with pytest.raises(ConnectionLost, match="no file"):
                await ask(pool, where, 0)

    on_transport("shm", main)
