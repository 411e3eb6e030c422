"""Big directories: every entry once, whatever changes meanwhile; long names; positions that programs come back to."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

import pytest
import trio
from tests.mount.cluster import Cluster

from kvfs.client import open_client
from kvfs.common.wire import meta_pb2

AT_ONCE = 64


def fill(cluster: Cluster, directory: Path, count: int) -> None:
    """Through the native client: faster than the mount, and the mount must see it all the same."""
    number = os.stat(directory).st_ino

    async def main() -> None:
        async with open_client(str(cluster.path)) as client:
            numbers = iter(range(count))

            async def make() -> None:
                for index in numbers:
                    await client.meta.make(number, b"entry-%06d" % index, meta_pb2.FILE, 0o644)

            async with trio.open_nursery() as nursery:
                for _ in range(AT_ONCE):
                    nursery.start_soon(make)

    trio.run(main)


def check_listing(directory: Path, count: int) -> None:
    expected = {f"entry-{index:06d}" for index in range(count)}
    names = os.listdir(directory)
    assert len(names) == count and set(names) == expected
    started = time.monotonic()
    with os.scandir(directory) as entries:
        assert sum(entry.is_file() for entry in entries) == count
    print(f"scandir of {count}: {time.monotonic() - started:.2f} s")
    assert (directory / f"entry-{count - 1:06d}").exists() and not (directory / f"entry-{count:06d}").exists()


def test_ten_thousand_entries(cluster: Cluster, work: Path) -> None:
    fill(cluster, work, 10_000)
    check_listing(work, 10_000)


@pytest.mark.slow
def test_a_hundred_thousand_entries(cluster: Cluster, work: Path) -> None:
    started = time.monotonic()
    fill(cluster, work, 100_000)
    print(f"100,000 entries made in {time.monotonic() - started:.0f} s")
    check_listing(work, 100_000)


def test_listing_while_entries_come_and_go(cluster: Cluster, work: Path, second_mount: Path) -> None:
    """What is there from beginning to end is listed exactly once."""
    fill(cluster, work, 3000)
    other = second_mount / work.name
    seen: list[str] = []
    with os.scandir(work) as entries:
        for position, entry in enumerate(entries):
            seen.append(entry.name)
            if position % 50 == 0:
                (other / f"entry-{position:06d}-new").touch()
                for gone in (position + 7, position + 1511):
                    (other / f"entry-{gone:06d}").unlink(missing_ok=True)
    assert len(seen) == len(set(seen))
    stable = set(os.listdir(work)) & {f"entry-{index:06d}" for index in range(3000)}
    assert stable <= set(seen)


def test_removal_of_everything_while_listing(cluster: Cluster, work: Path) -> None:
    """rm -r removes what it has just read."""
    fill(cluster, work, 2500)
    with os.scandir(work) as entries:
        for entry in entries:
            os.unlink(entry.path)
    assert os.listdir(work) == []
    work.rmdir()


def test_names_of_255_bytes_and_any_byte(work: Path) -> None:
    base = os.fsencode(work) + b"/"
    names = {b"x" * 255, "ü".encode() * 127, bytes(byte for byte in range(1, 256) if byte != 0x2F), b" ", b"-", b"\xff\xfe", b"...", b"new\nline"}
    for name in names:
        with open(base + name, "wb") as file:
            file.write(name)
    assert set(os.listdir(os.fsencode(work))) == names
    for name in names:
        with open(base + name, "rb") as file:
            assert file.read() == name


class _Entry(ctypes.Structure):
    _fields_ = (("ino", ctypes.c_ulong), ("off", ctypes.c_long), ("length", ctypes.c_ushort), ("type", ctypes.c_ubyte), ("name", ctypes.c_char * 256))


def test_positions_to_come_back_to(cluster: Cluster, work: Path) -> None:
    """telldir, seekdir, rewinddir of the C library, across pages of the listing."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.opendir.restype = ctypes.c_void_p
    libc.readdir.restype = ctypes.POINTER(_Entry)
    libc.telldir.restype = ctypes.c_long
    fill(cluster, work, 2500)
    stream = ctypes.c_void_p(libc.opendir(os.fsencode(work)))
    read: list[bytes] = []
    places: list[int] = []
    while True:
        places.append(libc.telldir(stream))
        entry = libc.readdir(stream)
        if not entry:
            break
        read.append(entry.contents.name)
    assert b"." in read and b".." in read and len(read) == 2502
    for at in (2400, 0, 1, 2, 3, 1027, 130, 2501, 1500):
        libc.seekdir(stream, ctypes.c_long(places[at]))
        assert libc.readdir(stream).contents.name == read[at]
    os.unlink(os.fsencode(work) + b"/" + read[700])
    libc.seekdir(stream, ctypes.c_long(places[1200]))
    assert libc.readdir(stream).contents.name == read[1200], "a removal before it does not move a position"
    libc.rewinddir(stream)
    again = []
    while entry := libc.readdir(stream):
        again.append(entry.contents.name)
    assert sorted(again) == sorted(set(read) - {read[700]})
    libc.closedir(stream)


def test_dots_name_the_directory_and_its_parent(work: Path) -> None:
    (work / "a" / "b").mkdir(parents=True)
    assert os.stat(work / "a" / "b" / "..").st_ino == os.stat(work / "a").st_ino
    assert os.stat(work / "a" / ".").st_ino == os.stat(work / "a").st_ino
