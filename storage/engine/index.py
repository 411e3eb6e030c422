"""The index of a target: ordered rows, the newest in memory (the overlay), the rest in an OrderedMap (LMDB).

Rows: b"c" + chunk id -> chunk.encode, b"t" + client id + channel -> tags.encode; in the map alone b"s" -> the sequence of the first journal record
that is not in the map (`floor`). Everything in the overlay also stands in the journal. A checkpoint freezes the overlay, moves it into the map in
slices, the floor with the last, and drops it; reads look through overlay, frozen overlay and map, in this order. Called under the engine's lock, but
for `write_frozen`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from sortedcontainers import SortedDict

from kvfs.common.boundary.disk import OrderedMap
from kvfs.common.checksum import xxh3_64
from kvfs.common.errors import IndexCorrupt

_SLICE_ROWS = 2000
_PAGE_ROWS = 256
_FLOOR_KEY = b"s"
_FLOOR = struct.Struct("<QI")  # and its check: the low 32 bits of XXH3-64 over key and floor
Row = tuple[bytes, bytes]
Change = tuple[bytes, bytes | None]


class Index:
    def __init__(self, base: OrderedMap) -> None:
        self._base = base
        self._overlay: SortedDict = SortedDict()
        self._frozen: SortedDict | None = None
        floor = base.get(_FLOOR_KEY)
        self.floor = _floor_of(floor) if floor is not None else 1
        """The journal must have every record from this one on."""

    def __len__(self) -> int:
        """Rows of the overlay."""
        return len(self._overlay)

    def get(self, key: bytes) -> bytes | None:
        value: bytes | None = self._overlay.get(key, b"")
        if value != b"":
            return value
        if self._frozen is not None:
            value = self._frozen.get(key, b"")
            if value != b"":
                return value
        return self._base.get(key)

    def put(self, rows: dict[bytes, bytes | None]) -> None:
        self._overlay.update(rows) if len(rows) > 1000 else self._put_each(rows)

    def _put_each(self, rows: dict[bytes, bytes | None]) -> None:
        overlay = self._overlay
        for key, value in rows.items():
            overlay[key] = value

    # --- scanning ---

    def scan(self, begin: bytes, end: bytes, *, reverse: bool = False, wanted: int = _PAGE_ROWS) -> Iterator[Row]:
        """Rows with begin <= key < end. The index must not change while the iterator is in use. `wanted`: about so many will be taken."""
        streams: list[Iterator[Change]] = [self._map_rows(begin, end, reverse, min(wanted, _PAGE_ROWS))]
        streams += [_overlay_rows(overlay, begin, end, reverse) for overlay in (self._frozen, self._overlay) if overlay]
        return _merge(streams, reverse)

    def _map_rows(self, begin: bytes, end: bytes, reverse: bool, page_rows: int) -> Iterator[Change]:
        while True:
            page = self._base.range(begin, end, limit=page_rows, reverse=reverse)
            yield from page
            if len(page) < page_rows:
                return
            page_rows = _PAGE_ROWS
            if reverse:
                end = page[-1][0]
            else:
                begin = page[-1][0] + b"\0"

    # --- checkpoint ---

    def freeze(self) -> None:
        """Rows that a failed checkpoint left frozen come first."""
        if self._frozen is None:
            self._frozen, self._overlay = self._overlay, SortedDict()
        else:
            self._frozen.update(self._overlay)
            self._overlay = SortedDict()

    def write_frozen(self, floor: int) -> None:
        """Move the frozen rows into the map, synced: the journal's records below `floor` are not needed then. In slices: a half-moved overlay is
        whole again by the journal, which is still there."""
        items: list[Change] = list((self._frozen or {}).items())
        if floor != self.floor or not self.floor_is_intact():
            items.append((_FLOOR_KEY, _floor_row(floor)))
        for at in range(0, len(items), _SLICE_ROWS):
            self._base.commit(dict(items[at : at + _SLICE_ROWS]))
        self.floor = floor

    def drop_frozen(self) -> None:
        self._frozen = None

    # --- scrub ---

    def check(self) -> Iterator[int]:
        """Read the map as it is on the disk; how many bytes, step by step. IndexCorrupt."""
        return self._base.check()

    def floor_is_intact(self) -> bool:
        """Whether the next opening will find it in the map."""
        row = self._base.get(_FLOOR_KEY)
        try:
            return self.floor == 1 if row is None else _floor_of(row) > 0
        except IndexCorrupt:
            return False

    def close(self) -> None:
        self._base.close()


def _floor_row(floor: int) -> bytes:
    return _FLOOR.pack(floor, xxh3_64(_FLOOR_KEY + floor.to_bytes(8, "little")) & 0xFFFFFFFF)


def _floor_of(row: bytes) -> int:
    floor = int.from_bytes(row[:8], "little")
    if len(row) != 8 and row != _floor_row(floor):  # 8 bytes: written by the first versions
        raise IndexCorrupt(f"the index does not say with which record of the journal it goes on. {IndexCorrupt.ADVICE}")
    return floor


def _overlay_rows(overlay: SortedDict, begin: bytes, end: bytes, reverse: bool) -> Iterator[Change]:
    for key in overlay.irange(begin, end, inclusive=(True, False), reverse=reverse):
        yield key, overlay[key]


def _merge(streams: list[Iterator[Change]], reverse: bool) -> Iterator[Row]:
    """Later streams win; removed rows are left out."""
    if len(streams) == 1:
        yield from (row for row in streams[0] if row[1] is not None)  # type: ignore[misc]
        return
    heads = [next(stream, None) for stream in streams]
    while True:
        keys = [head[0] for head in heads if head is not None]
        if not keys:
            return
        key = max(keys) if reverse else min(keys)
        value: bytes | None = None
        for place, head in enumerate(heads):
            if head is not None and head[0] == key:
                value = head[1]
                heads[place] = next(streams[place], None)
        if value is not None:
            yield key, value
