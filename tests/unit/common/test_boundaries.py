"""One suite for each boundary, run on the real version and on the simulated one."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from kvfs.common.boundary.clock import Clock, SystemClock
from kvfs.common.boundary.disk import Disk
from kvfs.common.boundary.net import Net
from kvfs.common.boundary.random import Random, SeededRandom, SystemRandom
from kvfs.common.boundary.real_disk import RealDisk, RealLentFile
from kvfs.common.boundary.system_net import SystemNet
from kvfs.common.errors import (
    AddressInUse,
    ConfigError,
    ConnectionLost,
    DirectoryInUse,
    IndexCorrupt,
    InputOutput,
    InvalidArgument,
    KvfsError,
    NoSpace,
    NotFound,
    Unreachable,
)
from kvfs.common.sim.clock import SimClock
from kvfs.common.sim.disk import SimDisk
from kvfs.common.sim.net import SimFabric

# --- Clock ---


@pytest.mark.parametrize("make", [SystemClock, SimClock])
def test_clock(make: Callable[[], Clock]) -> None:
    async def main() -> None:
        clock = make()
        before, wall = clock.monotonic(), clock.wall_ns()
        await clock.sleep(0.01)
        assert 0.009 <= clock.monotonic() - before < 5
        assert clock.wall_ns() - wall >= 9_000_000
        assert clock.wall_ns() > 1_600_000_000_000_000_000
        with trio.move_on_after(0.01) as scope:
            await clock.sleep(1000)
        assert scope.cancelled_caught

    trio.run(main)


def test_simulated_clock_jumps() -> None:
    async def main() -> None:
        clock = SimClock(start_s=7.0)
        await clock.sleep(3600)
        assert clock.monotonic() >= 3607

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


# --- Random ---


@pytest.mark.parametrize("make", [SystemRandom, lambda: SeededRandom(5)])
def test_random(make: Callable[[], Random]) -> None:
    random = make()
    assert len(random.bytes(16)) == 16 and random.bytes(16) != random.bytes(16)
    assert {random.randrange(3) for _ in range(200)} == {0, 1, 2}
    assert all(2 <= random.uniform(2, 3) <= 3 for _ in range(100))
    items = list(range(50))
    random.shuffle(items)
    assert items != list(range(50)) and sorted(items) == list(range(50))
    assert random.choice("abc") in "abc"


def test_seeded_random_repeats() -> None:
    assert SeededRandom(9).bytes(32) == SeededRandom(9).bytes(32) != SeededRandom(10).bytes(32)


# --- Disk ---


@pytest.fixture(params=["real", "sim"])
def disk(request: Any, tmp_path: Path) -> Disk:
    return RealDisk(tmp_path) if request.param == "real" else SimDisk()


def read(disk: Disk, name: str, offset: int, length: int) -> bytes:
    file = disk.open(name)
    data = bytearray(length)
    count = file.read_into([memoryview(data)], offset)
    file.close()
    return bytes(data[:count])


def test_files_read_what_was_written(disk: Disk) -> None:
    file = disk.open("f", create=True)
    file.write([b"hello ", memoryview(b"world")], 5000)
    assert file.size() == 5011
    first, second = bytearray(6), bytearray(100)
    assert file.read_into([memoryview(first), memoryview(second)], 4998) == 13
    assert bytes(first) == b"\0\0hell" and bytes(second[:7]) == b"o world"
    assert file.read_into([memoryview(first)], 6000) == 0
    assert file.try_read_into([memoryview(second)], 5000) in (11, None)
    file.truncate(5005)
    assert read(disk, "f", 5000, 50) == b"hello"
    file.truncate(5010)
    assert read(disk, "f", 5000, 50) == b"hello" + bytes(5)
    file.allocate(0, 20000)
    assert file.size() == 20000
    file.write([bytes([7]) * 12000], 0)
    file.punch(1000, 9000)
    assert read(disk, "f", 0, 12000) == bytes([7]) * 1000 + bytes(9000) + bytes([7]) * 2000
    assert file.size() == 20000
    file.sync()
    file.close()


def test_a_lent_file_shows_what_is_written_and_takes_nothing(disk: Disk) -> None:
    file = disk.open("f", create=True)
    fd = file.lend()
    if fd is None:
        assert isinstance(disk, SimDisk), "only simulated files have no descriptor"
        return
    lent = RealLentFile(fd, "a test")
    file.write([bytes(5000), b"hello"], 0)
    data = bytearray(10)
    lent.will_need(0, 5005)
    assert lent.read_into([memoryview(data)], 5000) == 5 and data[:5] == b"hello"
    assert lent.try_read_into([memoryview(data)], 4995) in (10, None)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(fd, b"x")
    file.close()
    assert lent.read_into([memoryview(data)], 5000) == 5, "it stays open by itself"
    del lent
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    inside, outside = os.pipe()
    with pytest.raises(InvalidArgument, match="no file"):
        RealLentFile(inside, "a test")
    os.close(outside)


def test_many_buffers_at_once(disk: Disk) -> None:
    file = disk.open("f", create=True)
    file.write([bytes([index % 251]) for index in range(3000)], 0)
    parts = [memoryview(bytearray(1)) for _ in range(3001)]
    assert file.read_into(parts, 0) == 3000
    assert [part[0] for part in parts[:3000]] == [index % 251 for index in range(3000)]


def test_names(disk: Disk) -> None:
    disk.makedirs("a/b")
    disk.makedirs("a/b")
    disk.open("a/b/x", create=True).write([b"1"], 0)
    assert disk.list("a/b") == ["x"] and disk.exists("a/b/x") and not disk.exists("a/c")
    disk.rename("a/b/x", "a/y")
    assert disk.list("a") == ["b", "y"] and disk.list("a/b") == []
    disk.write_file("a/y", b"new")
    assert disk.read_file("a/y") == b"new" and disk.list("a") == ["b", "y"]
    disk.sync_directory("a")
    disk.unlink("a/y")
    for missing in (
        lambda: disk.open("a/y"),
        lambda: disk.unlink("a/y"),
        lambda: disk.read_file("q"),
        lambda: disk.list("z"),
        lambda: disk.rename("q", "r"),
    ):
        with pytest.raises(NotFound):
            missing()
    for outside in ("/etc/passwd", "../x", "a/../../x"):
        with pytest.raises(InvalidArgument):
            disk.open(outside)
    capacity, free = disk.space()
    assert 0 < free <= capacity


def test_a_tree_is_removed_as_a_whole(disk: Disk) -> None:
    disk.makedirs("a/b/c")
    for name in ("a/one", "a/b/two", "kept"):
        disk.write_file(name, b"x")
    disk.remove_tree("a")
    assert not disk.exists("a") and disk.exists("kept")
    disk.remove_tree("kept")
    disk.remove_tree("never/there")
    assert disk.list() == []
    with pytest.raises(InvalidArgument):
        disk.remove_tree("../elsewhere")


def test_lock_is_exclusive(disk: Disk) -> None:
    disk.lock()
    disk.lock()
    other = RealDisk(disk.path) if isinstance(disk, RealDisk) else disk.reopen()  # type: ignore[attr-defined]
    with pytest.raises(DirectoryInUse, match="stop it first"):
        other.lock()
    disk.close()
    other.lock()
    other.close()


def test_ordered_map(disk: Disk) -> None:
    rows = disk.open_map("index", size_bytes=1 << 24)
    rows.commit({bytes([key]): str(key).encode() for key in range(1, 20)})
    rows.commit({b"\x05": None, b"\x06": b"six", b"nothing": None})
    assert (rows.get(b"\x05"), rows.get(b"\x06"), rows.count()) == (None, b"six", 18)
    assert [key[0] for key, _ in rows.range(b"\x03", b"\x08")] == [3, 4, 6, 7]
    assert [key[0] for key, _ in rows.range(b"\x03", b"\x08", reverse=True)] == [7, 6, 4, 3]
    assert [key[0] for key, _ in rows.range(b"\x03", None, limit=2)] == [3, 4]
    assert [key[0] for key, _ in rows.range(b"", None, limit=2, reverse=True)] == [19, 18]
    assert rows.range(b"\x30", b"\x40", reverse=True) == [] == rows.range(b"\x05", b"\x05")
    with pytest.raises(InvalidArgument):
        rows.commit({b"ok": b"1", b"": b"2"})
    assert rows.get(b"ok") is None
    rows.close()
    again = disk.open_map("index", size_bytes=1 << 24)
    assert again.get(b"\x06") == b"six"
    again.close()


def test_map_reads_from_several_threads(disk: Disk) -> None:
    rows = disk.open_map("index", size_bytes=1 << 24)
    rows.commit({b"k": b"v"})
    found: list[bytes | None] = []
    threads = [threading.Thread(target=lambda: found.append(rows.get(b"k"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"v"] * 8
    rows.close()


def test_a_full_map_says_so(tmp_path: Path) -> None:
    rows = RealDisk(tmp_path).open_map("index", size_bytes=1 << 16)
    with pytest.raises(NoSpace, match="size is full"):
        rows.commit({index.to_bytes(4, "big"): bytes(1000) for index in range(1000)})
    assert rows.count() == 0
    rows.close()


@pytest.mark.parametrize("damage", ["truncate", "garbage", "empty page"])
def test_a_damaged_map_is_refused_and_left_alone(tmp_path: Path, damage: str) -> None:
    disk = RealDisk(tmp_path)
    rows = disk.open_map("index", size_bytes=1 << 24)
    rows.commit({index.to_bytes(4, "big"): bytes(3000) for index in range(100)})
    rows.close()
    path = tmp_path / "index" / "data.mdb"
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        data = data[:100]
    elif damage == "garbage":
        data[:8192] = os.urandom(8192)
    else:
        data[8192:] = bytes([255]) * (len(data) - 8192)
    path.write_bytes(data)
    with pytest.raises(IndexCorrupt, match="Nothing was changed"):
        rows = disk.open_map("index", size_bytes=1 << 24)
        rows.range(b"", None)
    assert path.read_bytes() == data


def test_what_a_killed_process_left_half_written_is_in_nobodys_way(tmp_path: Path) -> None:
    half, index = tmp_path / "superblock.77-139710.tmp", tmp_path / "index" / "data.mdb.new"
    index.parent.mkdir()
    for left in (half, index):
        left.write_bytes(b"half of")
    (tmp_path / "notes.tmp").write_bytes(b"somebody's")
    disk = RealDisk(tmp_path)
    disk.lock()
    rows = disk.open_map("index", size_bytes=1 << 24)
    rows.commit({b"k": b"v"})
    rows.close()
    disk.close()
    assert disk.list() == ["LOCK", "index", "notes.tmp"]
    assert disk.list("index") == ["data.mdb", "lock.mdb"]


def test_real_errors_are_typed(tmp_path: Path) -> None:
    disk = RealDisk(tmp_path)
    file = disk.open("f", create=True)
    file.close()
    with pytest.raises(KvfsError) as caught:
        file.write([b"x"], 0)
    assert caught.value.errno == 9  # EBADF


# --- SimDisk: what a crash takes ---


def test_a_crash_takes_what_was_not_synced() -> None:
    disk = SimDisk()
    file = disk.open("f", create=True)
    file.write([b"a" * 5000], 0)
    file.sync()
    disk.sync_directory()
    file.write([b"b" * 5000], 0)
    disk.open("g", create=True).sync()
    disk.write_file("h", b"kept")
    disk.open_map("m", size_bytes=1 << 20).commit({b"k": b"v"})
    disk.rename("f", "f2")
    disk.crash()
    with pytest.raises(InputOutput):
        file.write([b"x"], 0)
    with pytest.raises(InputOutput):
        disk.open("f")
    disk = disk.reopen()
    assert disk.list() == ["f", "g", "h", "m"]  # write_file synced the folder, and with it the name g
    assert disk.read_file("f") == b"a" * 5000 and disk.read_file("h") == b"kept"
    assert disk.open_map("m", size_bytes=1 << 20).get(b"k") == b"v"


def test_an_unsynced_name_is_lost() -> None:
    disk = SimDisk()
    disk.open("g", create=True).sync()
    disk.crash()
    assert disk.reopen().list() == []


def test_a_crash_with_chance_keeps_some_pages_in_any_order() -> None:
    outcomes = set()
    for seed in range(64):
        disk = SimDisk()
        file = disk.open("f", create=True)
        file.write([b"a" * 8192], 0)
        file.sync()
        disk.sync_directory()
        file.write([b"b" * 8192], 0)
        disk.crash(SeededRandom(seed))
        data = disk.reopen().read_file("f")
        outcomes.add(data[:1] + data[4096:4097])
    assert outcomes == {b"aa", b"ab", b"ba", b"bb"}


def test_faults_are_raised_where_the_hook_says() -> None:
    def hook(operation: str, name: str) -> None:
        if operation == "sync":
            raise InputOutput("planted")

    disk = SimDisk(hook=hook)
    file = disk.open("f", create=True)
    file.write([b"x"], 0)
    with pytest.raises(InputOutput, match="planted"):
        file.sync()


def test_a_small_simulated_disk_fills_up() -> None:
    disk = SimDisk(capacity_bytes=64 << 10)
    file = disk.open("f", create=True)
    file.allocate(0, 32 << 10)
    with pytest.raises(NoSpace):
        file.write([bytes(40 << 10)], 32 << 10)
    file.write([bytes(32 << 10)], 0)
    assert disk.space() == (64 << 10, 32 << 10)
    file.punch(0, 16 << 10)
    assert disk.space() == (64 << 10, 48 << 10)


# --- Net ---


class Place:
    """A net and the addresses to test it with."""

    def __init__(self, net: Net, tcp: str, unix: str) -> None:
        self.net, self.tcp, self.unix = net, tcp, unix


def on_each_net(tmp_path: Path, test: Callable[[Place], Any]) -> None:
    trio.run(test, Place(SystemNet(), "tcp://127.0.0.1:0", f"unix://{tmp_path}/s.sock"))

    async def simulated() -> None:
        await test(Place(SimFabric(SeededRandom(1), latency_s=(0.001, 0.01)).host("a"), "tcp://a:0", "unix:///s.sock"))

    trio.run(simulated, clock=trio.testing.MockClock(autojump_threshold=0))


async def pair(place: Place, address: str) -> tuple[Any, Any, Any]:
    listener = await place.net.listen(address)
    near = await place.net.connect(listener.address, timeout_s=5)
    far = await listener.accept()
    return listener, near, far


async def take(stream: Any, size: int) -> bytes:
    data = bytearray()
    buffer = memoryview(bytearray(65536))
    while len(data) < size:
        count = await stream.receive_into(buffer[: size - len(data)])
        assert count, "the stream ended early"
        data += buffer[:count]
    return bytes(data)


def test_streams_carry_bytes_both_ways_in_order(tmp_path: Path) -> None:
    async def main(place: Place) -> None:
        for address in (place.tcp, place.unix):
            listener, near, far = await pair(place, address)
            data = os.urandom(3 << 20)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(near.send, [data[: 1 << 20], memoryview(data)[1 << 20 :]])
                nursery.start_soon(far.send, [b"back"])
                assert await take(far, len(data)) == data
                assert await take(near, 4) == b"back"
            near.close_sending()
            assert await far.receive_into(memoryview(bytearray(10))) == 0
            await far.send([b"still"])
            assert await take(near, 5) == b"still"
            await far.aclose()
            assert await near.receive_into(memoryview(bytearray(10))) == 0
            await near.aclose()
            await near.aclose()
            with pytest.raises(ConnectionLost):
                near.send_now([b"x"])
            await listener.aclose()

    on_each_net(tmp_path, main)


def test_descriptors_travel_over_unix_sockets(tmp_path: Path) -> None:
    async def main(place: Place) -> None:
        listener, near, far = await pair(place, place.unix)
        assert near.carries_fds and far.carries_fds and near.trusted and far.trusted
        inside, outside = os.pipe()
        await near.send([b"before"])
        await near.send([b"after"], [outside])
        os.close(outside)
        assert await take(far, 11) == b"beforeafter"
        (received,) = far.taken_fds()
        os.write(received, b"through")
        assert os.read(inside, 10) == b"through"
        os.close(inside)
        os.close(received)
        for stream in (near, far, listener):
            await stream.aclose()

    on_each_net(tmp_path, main)


def test_errors_of_addresses_are_typed(tmp_path: Path) -> None:
    async def main(place: Place) -> None:
        for address in (place.tcp, place.unix):
            listener = await place.net.listen(address)
            with pytest.raises(AddressInUse, match="in use"):
                await place.net.listen(listener.address)
            real = listener.address
            await listener.aclose()
            with pytest.raises(Unreachable, match="cannot connect"):
                await place.net.connect(real, timeout_s=1)
            again = await place.net.listen(real)
            await again.aclose()
        for wrong in ("127.0.0.1:80", "tcp://", "tcp://host:99999", "unix://relative", "http://x:1", "tcp://x:²"):
            with pytest.raises(ConfigError):
                await place.net.connect(wrong, timeout_s=1)

    on_each_net(tmp_path, main)


def test_waits_can_be_cancelled_and_closing_ends_them(tmp_path: Path) -> None:
    async def main(place: Place) -> None:
        listener, near, far = await pair(place, place.tcp)
        with trio.move_on_after(0.01) as scope:
            await near.receive_into(memoryview(bytearray(10)))
        assert scope.cancelled_caught
        with trio.move_on_after(0.2) as scope:
            await near.send([bytes(64 << 20)])
        assert scope.cancelled_caught
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                with pytest.raises(ConnectionLost):
                    while True:
                        await near.receive_into(memoryview(bytearray(10)))

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            near.close()
        await far.aclose()
        await listener.aclose()

    on_each_net(tmp_path, main)


def test_a_socket_file_left_behind_is_replaced_but_no_other_file(tmp_path: Path) -> None:
    async def main() -> None:
        import socket

        left = socket.socket(socket.AF_UNIX)
        left.bind(f"{tmp_path}/s.sock")
        left.close()
        listener = await SystemNet().listen(f"unix://{tmp_path}/s.sock")
        await listener.aclose()
        assert not (tmp_path / "s.sock").exists()
        (tmp_path / "file").write_text("precious")
        with pytest.raises(AddressInUse):
            await SystemNet().listen(f"unix://{tmp_path}/file")
        assert (tmp_path / "file").read_text() == "precious"

    trio.run(main)


def test_partitions_hold_bytes_and_breaks_lose_the_stream() -> None:
    async def main() -> None:
        fabric = SimFabric(SeededRandom(3), latency_s=(0.0, 0.05))
        a, b = fabric.host("a"), fabric.host("b")
        listener = await b.listen("tcp://b:1")
        near = await a.connect("tcp://b:1", timeout_s=5)
        far = await listener.accept()
        fabric.partition(["a"], ["b"])
        await near.send([b"late"])
        with trio.move_on_after(10) as scope:
            await take(far, 4)
        assert scope.cancelled_caught
        with pytest.raises(Unreachable):
            await a.connect("tcp://b:1", timeout_s=3)
        fabric.heal()
        assert await take(far, 4) == b"late"
        fabric.break_streams("a", "b")
        with pytest.raises(ConnectionLost):
            await take(far, 1)
        with pytest.raises(ConnectionLost):
            near.send_now([b"x"])

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_what_is_sent_to_an_end_that_was_reset_is_never_read_there() -> None:
    async def main() -> None:
        fabric = SimFabric(SeededRandom(3), latency_s=(0.05, 0.05))
        listener = await fabric.host("b").listen("tcp://b:1")
        near = await fabric.host("a").connect("tcp://b:1", timeout_s=5)
        far = await listener.accept()
        far.reset()
        far.dead = True  # its process was killed, and is being unwound: nothing of it tells the sender so
        near.send_now([b"late"])
        for _ in range(2):  # before it arrives, and after
            with trio.fail_after(0.01), pytest.raises(ConnectionLost):
                await far.wait_readable()
            with pytest.raises(ConnectionLost):
                far.receive_now([memoryview(bytearray(4))])
            await trio.sleep(0.1)
        far.dead = False
        with pytest.raises(ConnectionLost):
            near.send_now([b"later"])

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_machine_has_another_id_once_it_has_lost_power_and_not_when_a_process_dies() -> None:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        assert SystemNet().here.host_id == file.read().strip()
    fabric = SimFabric()
    first = fabric.host("a").here.host_id
    assert fabric.host("b").here.host_id != first
    fabric.crash_host("a")
    assert fabric.host("a").here.host_id == first
    fabric.crash_host("a", silent=True)
    assert fabric.host("a").here.host_id != first
