"""Keys and records: their order, their bytes as docs/format.md shows them, newer formats refused."""

from __future__ import annotations

import pytest
from tests.unit.document import FORMAT

from kvfs.common.errors import FormatTooNew
from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.namespace import keys, records


def test_the_worked_example_of_the_format_document() -> None:
    section = FORMAT.read_text().split("## Metadata keys")[1].split("```")[1]
    rows = [bytes.fromhex(line.split("#")[0]) for line in section.strip().splitlines()]
    stamp_ns = 1_700_000_000 * 10**9
    assert rows == [keys.entry(1, b"f"), records.encode_entry(66, pb.FILE), keys.directory_times(1), records.encode_times(stamp_ns, stamp_ns)]


def test_the_format_document_names_every_kind() -> None:
    section = FORMAT.read_text().split("## Metadata keys")[1].split("## ")[0]
    kinds = {value for name, value in vars(keys).items() if name.isupper() and isinstance(value, bytes) and len(value) == 4}
    assert len(kinds) == 10
    for kind in kinds - {keys.GENERAL}:
        assert f"| `{kind.decode()}` " in section
    assert "| `META` `format` |" in section and "| `META` `next-inode` |" in section


def test_keys_sort_by_number_then_name() -> None:
    in_order = [keys.entry(1, b"z"), keys.entry(2, b""), keys.entry(2, b"a"), keys.entry(2, b"\xff"), keys.entry(255, b"a"), keys.entry(256, b"a")]
    assert sorted(in_order) == in_order
    begin, end = keys.entries(2)
    assert [key for key in in_order if begin <= key < end] == in_order[1:4]
    begin, end = keys.span(keys.ENTRY)
    assert all(begin <= key < end for key in in_order)
    assert not begin <= keys.inode(1) < end
    assert keys.owner(in_order[-1]) == 256 and keys.tail(in_order[-1]) == b"a"
    assert keys.garbage_parts(keys.garbage(7, 8)) == (7, 8)
    assert keys.garbage(1, 2**60) < keys.garbage(2, 1)


def test_records_come_back() -> None:
    inode = pb.Inode(inode=5, type=pb.FILE, mode=0o644, nlink=2, mtime_ns=-5, writers=3, attr_lease_ms=1000)
    back = records.decode_inode(records.encode_inode(inode))
    assert (back.inode, back.mtime_ns, back.writers, back.attr_lease_ms) == (5, -5, 0, 0)
    assert records.decode_entry(records.encode_entry(2**60, 7)) == records.Entry(2**60, 7)
    assert records.decode_times(records.encode_times(-1, 2**62)) == (-1, 2**62)
    assert records.decode_links(records.encode_links(70_000)) == 70_000
    session = records.Session(b"c" * 16, True, 12345)
    assert records.decode_session(records.encode_session(session)) == session
    for cut in (records.Cut(2**40, 3), records.Cut(5, 3, 7, b"t" * 16)):
        assert records.decode_cut(records.encode_cut(cut)) == cut
    assert records.Cut(5, 3, 7).turn < records.Cut(5, 3, 8).turn < records.Cut(5, 4).turn
    assert records.decode_garbage(records.encode_garbage(records.TREE_GARBAGE)) == 2
    assert records.decode_number(records.encode_number(9)) == 9


@pytest.mark.parametrize("name", ["inode", "entry", "times", "links", "session", "garbage", "cut", "number"])
def test_a_newer_format_is_refused(name: str) -> None:
    with pytest.raises(FormatTooNew):
        getattr(records, f"decode_{name}")(b"\2" + b"\0" * 40)
