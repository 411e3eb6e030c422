"""fsck must find every fault that is planted here, and nothing in a sound target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from engine_world import IDENTITY, LogDisk, cid, noise, open_engine, truncate, write

from kvfs.common.boundary.clock import SystemClock
from kvfs.common.boundary.real_disk import RealDisk
from kvfs.common.errors import DirectoryInUse, WrongDataDirectory
from kvfs.storage.engine import chunk
from kvfs.storage.engine.check import meta_problems
from kvfs.storage.engine.chunk import ChunkMeta
from kvfs.storage.engine.classes import Block
from kvfs.storage.engine.engine import ChunkEngine
from kvfs.storage.engine.offline import check_directory

A, B = cid(0), cid(1)
Planted = tuple[LogDisk, ChunkEngine]


@pytest.fixture
def target() -> Planted:
    disk = LogDisk()
    engine = open_engine(disk)
    engine.apply(write(A, 0, noise(1, 100_000)), 1)
    engine.apply(write(B, 0, noise(2, 100_000)), 1)
    engine.apply(truncate(B, 50_000), 1)
    engine.prepare(write(B, 50_000, b"pending"))
    engine.apply(write(cid(2), 0, noise(3, 500)), 1)
    engine.sync()
    assert not engine.check(read_data=True).problems
    return disk, engine


def plant(engine: ChunkEngine, meta: ChunkMeta) -> None:
    """Put a meta into the index behind the engine's back."""
    engine._ledger.index.put({b"c" + meta.chunk_id: chunk.encode(meta)})
    engine._ledger._cache.clear()


def content_fault(**changes: object) -> Callable[[ChunkMeta], ChunkMeta]:
    return lambda meta: replace(meta, content=replace(meta.content, **changes))


@pytest.mark.parametrize(
    ("expected", "fault"),
    [
        ("has 76 bytes instead of 84", content_fault(checksums=b"x" * 24)),
        ("stores 100000 bytes of 99000", content_fault(length=99_000, checksums=b"x" * 32)),
        ("in a block of 0", content_fault(block=None)),
        ("lies outside its data file", content_fault(block=Block(131072, 0, 500))),
        ("lies outside its data file", content_fault(block=Block(131072, 17, 0))),
        ("holds a block without a byte", content_fault(stored=0)),
        ("neither a committed nor a pending", lambda meta: replace(meta, version=0)),
    ],
)
def test_a_wrong_meta_is_found(target: Planted, expected: str, fault: Callable[[ChunkMeta], ChunkMeta]) -> None:
    _, engine = target
    plant(engine, fault(engine.get(A)))
    assert any(expected in problem for problem in engine.check().problems), engine.check().problems


def test_a_checksum_list_of_the_wrong_size_is_found(target: Planted) -> None:
    _, engine = target
    assert meta_problems(content_fault(checksums=b"x" * 24)(engine.get(A))) == ["its committed length is 100000, but it has 3 unit checksums"]


def test_a_pending_version_that_does_not_follow_is_found(target: Planted) -> None:
    _, engine = target
    meta = engine.get(B)
    plant(engine, replace(meta, pending=replace(meta.pending, version=9)))
    assert any("does not follow" in problem for problem in engine.check().problems)


def test_two_chunks_on_one_block_are_found_and_damage_does_not_spread(target: Planted) -> None:
    disk, engine = target
    plant(engine, replace(engine.get(A), chunk_id=cid(9)))
    engine._ledger.chunks += 1
    problems = engine.check().problems
    assert len(problems) == 1 and "is also held by chunk" in problems[0] and A.hex() in problems[0]
    engine._ledger.checkpoint()
    reopened = open_engine(disk)
    assert any("is also held by" in problem for problem in reopened.check().problems)
    reopened.remove([cid(9)])
    reopened.sync()
    for index in range(20, 40):
        reopened.apply(write(cid(index), 0, noise(index, 100_000)), 1)
    assert not reopened.check(read_data=True).problems, "the block of a chunk that is still there was given to another one"


def test_a_leaked_block_is_found(target: Planted) -> None:
    _, engine = target
    block = engine._ledger.allocator.allocate(65536)
    engine._ledger.allocator.in_flight.discard(block)
    assert any("no chunk holds it" in problem for problem in engine.check().problems)


def test_a_held_block_that_the_allocator_has_free_is_found(target: Planted) -> None:
    _, engine = target
    engine._ledger.allocator._free(engine.get(A).block)
    assert any("the allocator has it free" in problem for problem in engine.check().problems)


def test_a_lost_index_entry_is_found(target: Planted) -> None:
    _, engine = target
    engine._ledger.index.put({b"c" + A: None})
    problems = engine.check().problems
    assert any("no chunk holds it" in problem for problem in problems) and any("counts 3 chunks" in problem for problem in problems)


def test_a_damaged_index_entry_is_found(target: Planted) -> None:
    _, engine = target
    value = bytearray(chunk.encode(engine.get(A)))
    value[20] ^= 1
    engine._ledger.index.put({b"c" + A: bytes(value)})
    assert any(f"index entry of chunk {A.hex()} is damaged" in problem for problem in engine.check().problems)


@pytest.mark.parametrize("which", ["committed", "pending"])
def test_a_flipped_data_bit_is_found(target: Planted, which: str) -> None:
    disk, engine = target
    meta = engine.get(B)
    block, place = (meta.block, 10_000) if which == "committed" else (meta.pending.content.block, 50_003)
    assert meta.block != meta.pending.content.block
    disk.files[f"data/{block.block_bytes}.{block.file}"].data[block.start + place] ^= 1
    assert not engine.check().problems
    problems = engine.check(read_data=True).problems
    assert any(f"its {which} version" in problem and B.hex() in problem for problem in problems), problems


def test_a_cut_data_file_is_found(target: Planted) -> None:
    disk, engine = target
    block = engine.get(A).block
    del disk.files[f"data/{block.block_bytes}.{block.file}"].data[block.start + 1000 :]
    assert any("outside its data file" in problem for problem in engine.check().problems)
    assert any("unit" in problem for problem in engine.check(read_data=True).problems)


def test_a_directory_is_checked_while_no_service_has_it(tmp_path: Path) -> None:
    engine = ChunkEngine(RealDisk(tmp_path / "7"), SystemClock(), IDENTITY)
    engine.apply(write(A, 0, noise(1, 100_000)), 1)
    with pytest.raises(DirectoryInUse):
        check_directory(tmp_path / "7")
    block = engine.get(A).block
    engine.close()
    assert check_directory(tmp_path / "7", read_data=True) == (1, 100_000, [])
    with open(tmp_path / "7" / "data" / f"{block.block_bytes}.{block.file}", "r+b") as file:
        file.seek(block.start + 5)
        file.write(b"damaged")
    assert len(check_directory(tmp_path / "7", read_data=True)[2]) == 1
    with pytest.raises(WrongDataDirectory, match="superblock"):
        check_directory(tmp_path)
