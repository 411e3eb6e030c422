"""Acknowledged bytes that all replicas lost before they were synced: fsync says so, once a handle, and never for anything else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.unit.client.fakes import CHUNK, World, run, world
from tests.unit.client.handles import opened
from tests.unit.client.whole import Whole, whole

from kvfs.client.config import ClientConfig
from kvfs.client.file.memory import RegisteredBuffer
from kvfs.client.file.unsynced import Unsynced
from kvfs.common.errors import TargetNotServing, UnsyncedLost


def test_notes() -> None:
    notes = Unsynced()
    assert notes.synced({1: 5}, notes.mark) == [], "nothing was written"
    notes.note(1, 5)
    notes.note(1, 6)
    notes.note(2, 5)
    mark = notes.mark
    notes.note(1, 6)  # while the sync is under way
    assert notes.synced({1: 6, 2: 5}, mark) == [1]
    assert list(notes.chains) == [1]
    assert notes.synced({1: 6}, notes.mark) == [], "that has been told"
    assert not list(notes.chains)
    notes.note(1, 7)
    notes.note(1, 6)  # the answer came late
    assert notes.synced({1: 7}, notes.mark) == [1]


def lose(place: World, chain: int = 0) -> None:
    """All replicas of a chain lose power and are back."""
    place.routing.message.chains[chain].loss += 1
    place.routing.message.chains[chain].version += 1
    place.routing.update()


def test_every_handle_hears_of_it_once() -> None:
    async def test() -> None:
        async with world() as place:
            place.meta.make(7)
            one, other, reader = opened(place, 7), opened(place, 7), opened(place, 7)
            await one.pwrite(0, [b"a" * 3 * CHUNK])
            await one.flush()
            lose(place)
            for file in (one, other, reader):
                with pytest.raises(UnsyncedLost, match="write again"):
                    await file.fsync()
            late = opened(place, 7)
            for file in (one, other, reader, late):
                await file.fsync()
            await one.pwrite(0, [b"b" * 3 * CHUNK])
            await one.fsync()
            lose(place)
            for file in (one, other, reader, late):
                await file.fsync()  # it was synced before
                await file.close()

    run(test)


def test_what_is_written_or_acknowledged_after_the_loss_is_not_lost() -> None:
    async def test() -> None:
        async with world() as place:
            place.meta.make(7)
            file = opened(place, 7)
            await file.pwrite(0, [b"a" * 10])  # buffered: the chain acknowledges when it is back
            place.storage[1].fail_writes.append(TargetNotServing("it has no power"))
            place.routing.on_refresh = lambda: lose(place) if not place.routing.message.chains[0].loss else None
            await file.flush()
            assert place.routing.message.chains[0].loss == 1
            await file.fsync()
            await file.close()

    run(test)


@pytest.mark.parametrize("way", ["buffered", "registered memory", "punched"])
def test_however_it_was_written(way: str) -> None:
    async def test() -> None:
        async with world() as place:
            place.meta.make(7)
            file = opened(place, 7)
            await file.pwrite(0, [b"a" * CHUNK])
            await file.fsync()
            if way == "registered memory":
                await file.pwrite(0, [RegisteredBuffer(CHUNK).span()])
            elif way == "punched":
                await file.punch(0, CHUNK)
            else:
                await file.pwrite(0, [b"b"])
                await file.flush()
            lose(place)
            with pytest.raises(UnsyncedLost):
                await file.fsync()
            await file.close()

    run(test)


async def strike(cluster: Whole, *, power: bool, saved: Path) -> None:
    """All storage services end and come back: with what was on the disks when they were saved, if it is power that went."""
    for number in range(2):
        cluster.stop_storage(number)
    for number in range(2):
        await cluster.over[number].wait()
        if power:
            shutil.rmtree(cluster.folder / f"storage-{number}")
            shutil.copytree(saved / f"storage-{number}", cluster.folder / f"storage-{number}")
    for number in range(2):
        await cluster.start_storage(number, boot="another" if power else "")


def save(cluster: Whole, into: Path) -> None:
    for number in range(2):
        shutil.copytree(cluster.folder / f"storage-{number}", into / f"storage-{number}")


@pytest.mark.parametrize("power", [True, False], ids=["power", "killed"])
def test_all_replicas_at_once(tmp_path: Path, power: bool) -> None:
    async def test() -> None:
        async with whole(storage=2) as cluster, cluster.client(config=ClientConfig(buffer_pool_bytes=64 << 20, deadline_s=60)) as client:
            async with await client.open("/f", "w+b") as file:
                await file.write(b"old")
                await file.file.fsync()
                save(cluster, tmp_path)
                file.seek(0)
                await file.write(b"new")
                await file.file.flush()
                await strike(cluster, power=power, saved=tmp_path)
                if power:
                    with pytest.raises(UnsyncedLost, match="write again"):
                        await file.file.fsync()
                    assert await client.read_bytes("/f") == b"old"
                    file.seek(0)
                    await file.write(b"new")
                await file.file.fsync()
            assert await client.read_bytes("/f") == b"new"

    run(test)
