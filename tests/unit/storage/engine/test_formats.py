"""Encodings: the worked bytes of docs/format.md are what is written and read; every value comes back; nothing else is taken for one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.document import worked_bytes

from kvfs.common.checksum import checksums
from kvfs.common.errors import IndexCorrupt
from kvfs.common.ids import chunk_id
from kvfs.storage.engine import chunk, journal, superblock, tags
from kvfs.storage.engine.chunk import ChunkMeta, Content, PendingMeta, units_of
from kvfs.storage.engine.classes import Block
from kvfs.storage.engine.requests import Tag, UpdateKind
from kvfs.storage.engine.superblock import Superblock

TAG = Tag(b"0123456789abcdef", 3, 77, b"ok")
SECOND = 1_000_000_000


def test_the_superblock_of_the_document() -> None:
    written = Superblock("demo", 1001, bytes(range(16)))
    assert written.encode() == worked_bytes("superblock")
    assert superblock.decode(worked_bytes("superblock")) == written


def test_the_index_value_of_the_document() -> None:
    block = Block(65536, 1, 3)
    committed = Content(7, 7, block, checksums(b"hello, "), False)
    pending = PendingMeta(5, UpdateKind.WRITE, Content(12, 12, block, checksums(b"hello, world"), False), 1_700_000_001 * SECOND)
    meta = ChunkMeta(chunk_id(42, 2), 4, 9, 1_700_000_000 * SECOND, committed, pending)
    assert chunk.encode(meta) == worked_bytes("index")
    assert chunk.decode(chunk_id(42, 2), worked_bytes("index")) == meta


def test_the_journal_record_of_the_document() -> None:
    rows = {b"c" + chunk_id(42, 3): None, tags.key_of(TAG.client_id, TAG.channel): tags.encode(TAG)}
    assert journal.encode_record(120, 118, 100, rows) == worked_bytes("chunk journal")
    found = journal.decode_record(memoryview(worked_bytes("chunk journal") + b"more"))
    assert found == (journal.Record(120, 118, 100, rows), len(worked_bytes("chunk journal")))


CONTENTS = st.integers(0, 200_000).flatmap(
    lambda length: st.builds(
        Content,
        st.just(length),
        st.integers(0, length),
        st.none() | st.builds(Block, st.integers(1, 16384).map(lambda pages: pages * 4096), st.integers(0, 65535), st.integers(0, 2**32 - 1)),
        st.just(bytes(range(8)) * units_of(length)),
        st.booleans(),
    )
)
U64 = st.integers(0, 2**64 - 1)
TIMES = st.integers(-(2**63), 2**63 - 1)
METAS = st.builds(
    ChunkMeta,
    st.binary(min_size=24, max_size=24),
    U64,
    U64,
    TIMES,
    CONTENTS,
    st.none() | st.builds(PendingMeta, U64, st.sampled_from(UpdateKind), CONTENTS, TIMES),
)


@given(METAS)
def test_metas_come_back(meta: ChunkMeta) -> None:
    assert chunk.decode(meta.chunk_id, chunk.encode(meta)) == meta


@given(METAS, st.data())
def test_a_changed_byte_of_a_meta_is_seen(meta: ChunkMeta, data: st.DataObject) -> None:
    value = bytearray(chunk.encode(meta))
    place = data.draw(st.integers(0, len(value) - 1))
    value[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(IndexCorrupt):
        chunk.decode(meta.chunk_id, bytes(value))


ROWS = st.dictionaries(st.binary(min_size=1, max_size=30), st.none() | st.binary(max_size=200), max_size=8)


@given(U64, U64, U64, ROWS)
def test_records_come_back(sequence: int, settled: int, durable: int, rows: dict[bytes, bytes | None]) -> None:
    data = journal.encode_record(sequence, settled, durable, rows)
    assert len(data) % 8 == 0
    assert journal.decode_record(memoryview(data)) == (journal.Record(sequence, settled, durable, rows), len(data))


@given(ROWS, st.data())
def test_a_damaged_record_is_none(rows: dict[bytes, bytes | None], data: st.DataObject) -> None:
    whole = journal.encode_record(1, 2, 3, rows)
    used = journal.HEADER_BYTES + sum(6 + len(key) + len(value or b"") for key, value in rows.items())
    bad = bytearray(whole)
    bad[data.draw(st.integers(0, used - 1))] ^= data.draw(st.integers(1, 255))
    assert journal.decode_record(memoryview(bad)) is None
    assert journal.decode_record(memoryview(whole)[: data.draw(st.integers(0, used - 1))]) is None


def test_tags_come_back() -> None:
    assert tags.decode(tags.key_of(TAG.client_id, TAG.channel), tags.encode(TAG)) == TAG
    for key, value in ((b"tx", bytes(8)), (tags.key_of(TAG.client_id, 1), b"short")):
        with pytest.raises(IndexCorrupt):
            tags.decode(key, value)
