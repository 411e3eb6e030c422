"""Opening: what is refused, with which words, and that nothing is touched then."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from engine_world import IDENTITY, SMALL, LogDisk, ManualClock, cid, content_of, noise, open_engine, write

from kvfs.common.boundary.clock import SystemClock
from kvfs.common.boundary.real_disk import RealDisk
from kvfs.common.checksum import xxh3_64
from kvfs.common.errors import DirectoryInUse, FormatTooNew, IndexCorrupt, InputOutput, WrongDataDirectory
from kvfs.common.sim.disk import SimDisk
from kvfs.storage.engine import superblock
from kvfs.storage.engine.engine import ChunkEngine
from kvfs.storage.engine.superblock import Superblock


def made(path: Path, identity: Superblock = IDENTITY) -> ChunkEngine:
    return ChunkEngine(RealDisk(path), SystemClock(), identity, replace(SMALL, index_bytes=64 << 20))


def snapshot(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file() and file.name not in ("LOCK", "lock.mdb")
    }


@pytest.fixture
def used(tmp_path: Path) -> Path:
    engine = made(tmp_path / "target")
    for index in range(60):
        engine.apply(write(cid(index), 0, noise(index, 3000)), 1)
    engine.close()
    return tmp_path / "target"


def test_a_target_opens_again(used: Path) -> None:
    engine = made(used)
    assert engine.space().chunks == 60
    assert not engine.check(read_data=True).problems
    engine.close()
    engine.close()


@pytest.mark.parametrize(
    ("identity", "word"),
    [
        (replace(IDENTITY, cluster_id="other"), "cluster"),
        (replace(IDENTITY, target_id=8), "target"),
        (replace(IDENTITY, node_uuid=b"m" * 16), "node"),
    ],
)
def test_a_directory_of_another_one_is_refused(used: Path, identity: Superblock, word: str) -> None:
    before = snapshot(used)
    with pytest.raises(WrongDataDirectory, match=f"belongs to {word}"):
        made(used, identity)
    assert snapshot(used) == before
    made(used).close()


def test_a_newer_format_is_refused(used: Path) -> None:
    data = bytearray((used / "superblock").read_bytes())
    data[8] = superblock.FORMAT + 1
    data[-8:] = xxh3_64(bytes(data[:-8])).to_bytes(8, "little")
    (used / "superblock").write_bytes(data)
    before = snapshot(used)
    with pytest.raises(FormatTooNew, match="upgrade"):
        made(used)
    assert snapshot(used) == before


def test_a_flipped_bit_of_the_superblock_is_mended(used: Path) -> None:
    """Any; but nothing that is more than that is taken for ours."""
    data = (used / "superblock").read_bytes()
    for bit in range(0, len(data) * 8, 7):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        (used / "superblock").write_bytes(damaged)
        made(used).close()
        assert (used / "superblock").read_bytes() == data
    (used / "superblock").write_bytes(replace(superblock.decode(data), target_id=IDENTITY.target_id + 1).encode())
    with pytest.raises(WrongDataDirectory):
        made(used)


@pytest.mark.parametrize("damage", [b"", b"short", b"not a superblock at all, but long enough to be one"])
def test_a_damaged_superblock_is_refused(used: Path, damage: bytes) -> None:
    (used / "superblock").write_bytes(damage)
    with pytest.raises(WrongDataDirectory):
        made(used)


def test_every_bit_of_a_superblock_counts() -> None:
    whole = IDENTITY.encode()
    assert superblock.decode(whole) == IDENTITY
    for place in range(len(whole)):
        bad = bytearray(whole)
        bad[place] ^= 1
        with pytest.raises((WrongDataDirectory, FormatTooNew)):
            superblock.decode(bytes(bad))


def test_somebody_elses_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("do not lose me")
    with pytest.raises(WrongDataDirectory, match="thesis"):
        made(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "do not lose me"
    assert not (tmp_path / "superblock").exists()


def test_a_directory_in_use_is_refused(used: Path) -> None:
    engine = made(used)
    with pytest.raises(DirectoryInUse):
        made(used)
    engine.close()
    made(used).close()


@pytest.mark.parametrize("lost", ["index", "an older index", "journal"])
def test_an_index_without_the_journal_that_goes_with_it_is_refused(used: Path, tmp_path: Path, lost: str) -> None:
    """Every chunk that only the lost part knew would read as a hole."""
    older = (used / "index" / "data.mdb").read_bytes()
    engine = made(used)
    engine.apply(write(cid(99), 0, noise(99, 3000)), 1)
    engine.close()
    newer = (used / "index" / "data.mdb").read_bytes()
    journal = {file: file.read_bytes() for file in (used / "journal").iterdir()}
    if lost == "index":
        (used / "index" / "data.mdb").unlink()
    elif lost == "an older index":
        (used / "index" / "data.mdb").write_bytes(older)
    else:
        for file in journal:
            file.unlink()
    data = {name: content for name, content in snapshot(used).items() if not name.startswith("index")}
    for _ in range(2):
        with pytest.raises(IndexCorrupt, match="Restore"):
            made(used)
        assert {name: content for name, content in snapshot(used).items() if not name.startswith("index")} == data
    (used / "index" / "data.mdb").write_bytes(newer)
    for file, content in journal.items():
        file.write_bytes(content)
    engine = made(used)
    assert engine.space().chunks == 61
    engine.close()


def test_a_corrupt_index_page_is_refused(used: Path) -> None:
    """Damage in LMDB's file: pages of rows, of the tree, of its head. Either LMDB or the check of each row finds it; nothing else is touched."""
    file = used / "index" / "data.mdb"
    whole = file.read_bytes()
    bad = bytearray(whole)
    place = whole.find(b"c" + cid(30))
    while place >= 0:  # also in pages that LMDB has left behind
        bad[place + 60] ^= 0x40
        place = whole.find(b"c" + cid(30), place + 1)
    file.write_bytes(bad)
    before = snapshot(used)
    with pytest.raises(IndexCorrupt):
        made(used)
    assert snapshot(used) == before
    file.write_bytes(b"\0" * 100 + whole[100:])
    before = snapshot(used)
    with pytest.raises(IndexCorrupt):
        made(used)
    assert snapshot(used) == before
    file.write_bytes(whole)
    made(used).close()


def test_a_row_that_is_not_a_meta_is_refused() -> None:
    disk = LogDisk()
    engine = open_engine(disk)
    engine.apply(write(cid(0), 0, b"x"), 1)
    engine.close()
    good = disk.maps["index"][b"c" + cid(0)]
    for bad in (b"", b"x", good[:-1], good + b"\0", b"\x02" + good[1:], good[:9] + b"\xff" + good[10:]):
        disk.maps["index"][b"c" + cid(0)] = bad
        with pytest.raises(IndexCorrupt):
            ChunkEngine(disk, ManualClock(), IDENTITY, SMALL)
    disk.maps["index"][b"c" + cid(1)] = good  # right bytes under the wrong name
    disk.maps["index"][b"c" + cid(0)] = good
    with pytest.raises(IndexCorrupt):
        ChunkEngine(disk, ManualClock(), IDENTITY, SMALL)


def test_a_tag_row_that_is_not_one_is_refused() -> None:
    disk = LogDisk()
    open_engine(disk).close()
    disk.maps["index"][b"tshort"] = b"x"
    with pytest.raises(IndexCorrupt):
        open_engine(disk)


def test_the_check_of_a_superblock_covers_what_it_says() -> None:
    data = IDENTITY.encode()
    assert xxh3_64(data[:-8]).to_bytes(8, "little") == data[-8:]


def test_a_disk_that_cannot_be_read_costs_nothing_once_it_can() -> None:
    """Seed 10008 of the simulation: what could not be read when a target was opened was taken for torn, and its blocks were given back."""
    disk = SimDisk()
    engine = open_engine(disk)
    for index in range(20):
        engine.apply(write(cid(index), 0, noise(index, 3000)), 1)
    disk.kill()
    failing = True

    def hook(operation: str, name: str) -> None:
        if failing and operation == "read" and name.startswith("data/"):
            raise InputOutput("planted")

    with pytest.raises(InputOutput):
        open_engine(disk.reopen(hook))
    failing = False
    disk.kill()
    engine = open_engine(disk.reopen(hook))
    assert [content_of(engine, cid(index)) for index in range(20)] == [noise(index, 3000) for index in range(20)]
    assert not engine.check(read_data=True).problems
