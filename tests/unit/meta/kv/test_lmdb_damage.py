"""The LMDB engine and data directories that are damaged, too new, or in use: refused or mended, and never a wrong value."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import lmdb
import pytest
import trio
from tests.unit.meta.kv.lmdb_store import everything, put

from kvfs.common.errors import (
    DirectoryInUse,
    FormatTooNew,
    IndexCorrupt,
)
from kvfs.meta.kv import open_engine
from kvfs.meta.kv.lmdb_engine import HEADER_KEY, _seal


def snapshot_of(path: Path) -> dict[str, bytes]:
    """Every file but lock files, which are written by opening."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file() and "lock" not in file.name.lower()}


@pytest.fixture
def filled(tmp_path: Path, open_lmdb) -> Path:
    """A store with 300 rows in the map and 50 in the journal, as a killed process leaves it."""
    path = tmp_path / "filled"

    async def main():
        engine = open_lmdb(tmp_path / "first")
        await engine.transact(lambda txn: [txn.set(b"map%03d" % number, os.urandom(100)) for number in range(300)])
        await engine.transact(put(b"large", os.urandom(60_000)))
        engine.close()
        engine = open_lmdb(tmp_path / "first")
        for number in range(50):
            await engine.transact(put(b"journal%03d" % number))
        shutil.copytree(tmp_path / "first", path)
        engine.close()

    trio.run(main)
    return path


async def refused(path: Path, error: type[Exception], text: str) -> None:
    before = snapshot_of(path)
    with pytest.raises(error, match=text):
        open_engine(f"lmdb:{path}")
    assert snapshot_of(path) == before, "nothing may be changed"


def damage(file: Path, at: int, data: bytes) -> None:
    with open(file, "r+b") as stream:
        stream.seek(at)
        stream.write(data)


def test_the_filled_store_is_whole(filled, open_lmdb):
    async def main():
        engine = open_lmdb(filled)
        assert len(await everything(engine)) == 351
        engine.close()

    trio.run(main)


@pytest.mark.parametrize("keep", [0, 0.1, 0.5, 0.9])
def test_a_truncated_map_is_refused(filled, keep):
    file = filled / "map" / "data.mdb"
    os.truncate(file, int(file.stat().st_size * keep))
    trio.run(refused, filled, IndexCorrupt, "damaged")


def test_every_garbage_page_is_found_or_harmless(filled, tmp_path, open_lmdb):
    """Garbage in any page of the map: refused when opening, or in a page that is not in use."""
    file = filled / "map" / "data.mdb"
    pages = file.stat().st_size // 4096
    refusals = 0
    for page in range(0, pages, 3):
        copy = tmp_path / f"page{page}"
        shutil.copytree(filled, copy)
        damage(copy / "map" / "data.mdb", page * 4096, os.urandom(4096))

        async def main(copy: Path = copy) -> int:
            try:
                engine = open_lmdb(copy)
            except IndexCorrupt:
                return 1
            try:
                assert len(await everything(engine)) == 351
            except IndexCorrupt:
                return 1  # the inside of a large value
            finally:
                engine.close()
            return 0

        refusals += trio.run(main)
        shutil.rmtree(copy)
    assert refusals >= pages // 3 // 2


def test_a_flipped_bit_in_a_value_is_never_served(filled, open_lmdb):
    environment = lmdb.open(str(filled / "map"), map_size=1 << 30)
    with environment.begin(write=True) as txn:
        sealed = bytearray(txn.get(b"map007"))
        sealed[50] ^= 1
        txn.put(b"map007", bytes(sealed))
    environment.close()

    async def main():
        engine = open_lmdb(filled)
        assert await engine.transact(lambda txn: txn.get(b"map006")) is not None
        with pytest.raises(IndexCorrupt, match="map007"):
            await engine.transact(lambda txn: txn.get(b"map007"))
        with pytest.raises(IndexCorrupt, match="map007"):
            await everything(engine)
        engine.close()

    trio.run(main)


def test_a_damaged_journal_is_refused(filled):
    for segment in filled.glob("journal-*"):
        damage(segment, 4096 * 20 + 10, b"\xff\xff\xff")
    trio.run(refused, filled, IndexCorrupt, "journal-0 is damaged at byte 81920")


def test_a_torn_last_record_is_dropped(filled, open_lmdb):
    for segment in filled.glob("journal-*"):
        damage(segment, 4096 * 49 + 10, b"\xff\xff\xff")

    async def main():
        engine = open_lmdb(filled)
        assert len(await everything(engine)) == 350
        engine.close()

    trio.run(main)


def test_a_lost_map_is_refused(filled):
    shutil.rmtree(filled / "map")
    with pytest.raises(IndexCorrupt, match="lost its header"):
        open_engine(f"lmdb:{filled}")


def test_a_newer_format_is_refused(filled):
    environment = lmdb.open(str(filled / "map"), map_size=1 << 30)
    with environment.begin(write=True) as txn:
        txn.put(HEADER_KEY, _seal(HEADER_KEY, (2).to_bytes(4, "little") + b"whatever comes then", 0))
    environment.close()
    trio.run(refused, filled, FormatTooNew, "format 2, this kvfs knows 1: upgrade")


def test_a_directory_in_use_is_refused_and_free_again_after_close(tmp_path, open_lmdb):
    async def main():
        engine = open_lmdb(tmp_path / "kv")
        with pytest.raises(DirectoryInUse, match="stop it first"):
            open_engine(f"lmdb:{tmp_path / 'kv'}")
        await engine.transact(put(b"k"))
        engine.close()
        open_engine(f"lmdb:{tmp_path / 'kv'}").close()

    trio.run(main)


def test_a_refused_open_lets_go_of_the_directory(filled, open_lmdb):
    file = filled / "map" / "data.mdb"
    whole = file.read_bytes()
    os.truncate(file, 5000)

    async def main():
        with pytest.raises(IndexCorrupt):
            open_lmdb(filled)
        file.write_bytes(whole)
        open_lmdb(filled).close()

    trio.run(main)
