"""The check of LMDB files: never wrong about a whole one, whatever was done to it, and right about damaged ones."""

from __future__ import annotations

import os
import random
from pathlib import Path

import lmdb
import pytest

from kvfs.common.boundary import lmdb_check
from kvfs.common.boundary.lmdb_check import check_lmdb_file
from kvfs.common.errors import IndexCorrupt


@pytest.mark.parametrize("budget_bytes", [1 << 30, 100_000, 0])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_whole_file_is_never_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, budget_bytes: int) -> None:
    monkeypatch.setattr(lmdb_check, "NODE_BUDGET_BYTES", budget_bytes)
    choose = random.Random(seed)
    environment = lmdb.open(str(tmp_path), map_size=1 << 30, sync=False)
    check_lmdb_file(tmp_path / "data.mdb")
    for _ in range(60):
        with environment.begin(write=True) as txn:
            for _ in range(choose.choice([1, 10, 300])):
                key = choose.randbytes(choose.choice([1, 2, 20, 500]))
                if choose.random() < 0.35:
                    with txn.cursor() as cursor:
                        if cursor.set_range(key):
                            cursor.delete()
                else:
                    txn.put(key, choose.randbytes(choose.choice([0, 10, 200, 2000, 5000, 90_000 if choose.random() < 0.05 else 1])))
        check_lmdb_file(tmp_path / "data.mdb")
    with environment.begin(write=True) as txn, txn.cursor() as cursor:
        cursor.first()
        while cursor.delete():
            pass
    check_lmdb_file(tmp_path / "data.mdb")
    environment.close()


def test_an_absent_file_is_whole(tmp_path: Path) -> None:
    check_lmdb_file(tmp_path / "data.mdb")


@pytest.fixture(scope="module")
def sample(module_path: Path) -> bytes:
    path = module_path
    choose = random.Random(7)
    environment = lmdb.open(str(path), map_size=1 << 30)
    for _ in range(3):
        with environment.begin(write=True) as txn:
            for _ in range(150):
                txn.put(choose.randbytes(16), choose.randbytes(choose.choice([20, 100, 200, 200, 200, 5000 if choose.random() < 0.3 else 50])))
    environment.close()
    return (path / "data.mdb").read_bytes()


def refused(tmp_path: Path, data: bytes) -> str | None:
    file = tmp_path / "data.mdb"
    file.write_bytes(data)
    try:
        check_lmdb_file(file)
    except IndexCorrupt as error:
        assert file.read_bytes() == data
        return error.message
    return None


def test_the_sample_is_whole(tmp_path: Path, sample: bytes) -> None:
    assert refused(tmp_path, sample) is None


@pytest.mark.parametrize("length", [0, 1, 100, 4096, 8192, 12288, -1, -4096])
def test_a_short_file(tmp_path: Path, sample: bytes, length: int) -> None:
    assert "damaged" in (refused(tmp_path, sample[:length]) or "")


def test_something_else(tmp_path: Path) -> None:
    assert "not a meta page" in (refused(tmp_path, b"not a database\n" * 1000) or "")
    assert refused(tmp_path, bytes(100_000)) is not None


def test_a_page_in_the_place_of_another(tmp_path: Path, sample: bytes) -> None:
    """As when a disk wrote to the wrong place: each page is good by itself."""
    pages = len(sample) // 4096
    found = 0
    for page in range(2, pages, 5):
        other = 2 + (page * 7) % (pages - 2)
        if other != page:
            moved = sample[: page * 4096] + sample[other * 4096 : other * 4096 + 4096] + sample[page * 4096 + 4096 :]
            found += refused(tmp_path, moved) is not None
    assert found > pages / 5 / 4, "the rest are inside large values, or not in use"


def test_flipped_bits_never_make_lmdb_crash(tmp_path: Path, sample: bytes) -> None:
    """Each flip in the header of a page is found, or LMDB reads the file to its end without harm: run in a child, which would die."""
    choose = random.Random(11)
    passed = []
    for number in range(100):
        at = choose.randrange(2, len(sample) // 4096) * 4096 + choose.randrange(40)
        data = bytearray(sample)
        data[at] ^= 1 << choose.randrange(8)
        if refused(tmp_path, bytes(data)) is None:
            folder = tmp_path / str(number)
            folder.mkdir()
            (folder / "data.mdb").write_bytes(data)
            passed.append(folder)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for folder in passed:
                environment = lmdb.open(str(folder), map_size=1 << 30)
                with environment.begin() as txn:
                    for _ in txn.cursor():
                        pass
                environment.close()
            code = 0
        except lmdb.Error:
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(passed) < 80
