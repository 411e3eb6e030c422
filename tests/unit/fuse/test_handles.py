"""Handle numbers, and the positions of a directory listing."""

from __future__ import annotations

import pytest

from kvfs.client import User
from kvfs.common.errors import BadHandle
from kvfs.fuse.handles import CURSOR_NAMES_MAX, DirectoryHandle, HandleTable


def test_numbers_are_never_used_twice() -> None:
    table: HandleTable[str] = HandleTable()
    first = table.add("a")
    assert table.remove(first) == "a"
    second = table.add("b")
    assert second != first and table.get(second) == "b" and len(table) == 1
    for call in (table.get, table.remove):
        with pytest.raises(BadHandle):
            call(first)


def test_position_names_the_entry_before_it() -> None:
    handle = DirectoryHandle(1, User(0, 0))
    for place, name in enumerate([b"a", b"b", b"c"]):
        handle.handed_out(3 + place, name)
    assert [handle.name_before(position) for position in (0, 1, 2, 3, 4, 5)] == [b"", b"", b"", b"a", b"b", b"c"]
    handle.handed_out(4, b"bb")
    assert handle.name_before(4) == b"bb"
    handle.rewind()
    assert handle.name_before(5) == b"c", "positions stay good after a rewind until they are handed out again"


def test_remembered_names_are_bounded_and_old_positions_repeat_rather_than_skip() -> None:
    handle = DirectoryHandle(1, User(0, 0))
    count = CURSOR_NAMES_MAX + 10
    for place in range(count):
        handle.handed_out(3 + place, b"%08d" % place)
    assert len(handle.names) <= CURSOR_NAMES_MAX
    assert handle.name_before(2 + count) == b"%08d" % (count - 1)
    assert handle.name_before(10) <= handle.names[0]
