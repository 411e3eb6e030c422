"""Is an LMDB file whole? Read before LMDB maps it, because LMDB trusts what it maps: a damaged page ends the process instead of raising an error.

Walks the B-trees of a meta page with plain reads: every page that can be reached lies in the file, is the page it says it is, has the right kind, and
its nodes lie inside it, with keys in order and where a search from the root finds them; no page is reached twice; the counts are right. Costs about
15 us for a page of 4 KiB. `check_lmdb_file` takes the newest meta page, before the file is opened; past `NODE_BUDGET_BYTES` it reads only headers of
leaves, 4 us. `check_lmdb_snapshot` reads one transaction's pages, all of them and from the device where that can be, while the file is in use. Values
have no checksum in LMDB: who stores them must check them. Must never change the file.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from kvfs.common.errors import IndexCorrupt, from_os

NODE_BUDGET_BYTES: Final = 64 << 20

_MAGIC: Final = 0xBEEFC0DE
_DATA_VERSION: Final = 1
_NO_PAGE: Final = (1 << 64) - 1
_BRANCH, _LEAF, _OVERFLOW, _META = 1, 2, 4, 8
_BIG_DATA: Final = 1
_HEADER: Final = struct.Struct("<QHHHH")  # page number, -, flags, lower, upper (of an overflow page the last two are its number of pages)
_NODE: Final = struct.Struct("<HHHH")  # low and high half of the size (or child page), flags, key size
_META_HEAD: Final = struct.Struct("<IIQQ")  # magic, version, address, map size
_DB: Final = struct.Struct("<IHHQQQQQ")  # page size (of the free list's), flags, depth, branch, leaf and overflow pages, entries, root
_META_TAIL: Final = struct.Struct("<QQ")  # last page, transaction
_SMALLEST_PAGE: Final = 4096
_LARGEST_PAGE: Final = 65536


class _Damaged(Exception):
    pass


def check_lmdb_file(path: str | os.PathLike[str]) -> None:
    """IndexCorrupt if the file is damaged; one that is absent is whole. Nobody may be writing it."""
    path = Path(path)
    try:
        with open(path, "rb", buffering=0) as file:
            for _ in _Walk(file.fileno(), os.fstat(file.fileno()).st_size, NODE_BUDGET_BYTES).check():
                pass
    except FileNotFoundError:
        return
    except OSError as error:
        raise from_os(error, f"read {path}") from error
    except (_Damaged, struct.error) as error:
        raise IndexCorrupt(f"index {path} is damaged ({error}). {IndexCorrupt.ADVICE}") from error


def check_lmdb_snapshot(path: str | os.PathLike[str], transaction: int) -> Iterator[int]:
    """The same of the pages of one transaction, which somebody holds open for reading. Tells after each page how many bytes were read."""
    path = Path(path)
    fd = -1
    try:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            os.preadv(fd, [mmap.mmap(-1, _SMALLEST_PAGE)], 0)
        except OSError:  # a file system without: what memory has must do
            if fd >= 0:
                os.close(fd)
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        yield from _Walk(fd, os.fstat(fd).st_size, 1 << 62).check(transaction)
    except OSError as error:
        raise from_os(error, f"read {path}") from error
    except (_Damaged, struct.error) as error:
        raise IndexCorrupt(f"index {path} is damaged ({error}). {IndexCorrupt.ADVICE}") from error
    finally:
        if fd >= 0:
            os.close(fd)


class _Walk:
    def __init__(self, fd: int, size_bytes: int, node_budget_bytes: int) -> None:
        self._buffer = mmap.mmap(-1, _LARGEST_PAGE)  # at a page of memory, as direct reads want it
        self._fd = fd
        self._size_bytes = size_bytes
        self._page_bytes = _SMALLEST_PAGE
        self._seen: set[int] = set()
        self._nodes_left = node_budget_bytes

    def check(self, transaction: int | None = None) -> Iterator[int]:
        if self._size_bytes == 0:
            raise _Damaged("the file is empty")
        first = self._meta(0)
        self._page_bytes = first[1][0]
        if self._page_bytes < 512 or self._page_bytes > 65536 or self._page_bytes & (self._page_bytes - 1):
            raise _Damaged(f"a page size of {self._page_bytes}")
        metas = [first, self._meta(1)]
        if abs(metas[0][0] - metas[1][0]) > 1:
            raise _Damaged("the two meta pages do not follow each other")
        if transaction is None:
            transaction = max(metas[0][0], metas[1][0])
        for number, free, main in metas:
            if number == transaction:
                yield from self._tree(free, ordered=False)
                yield from self._tree(main, ordered=True)
                return
        # Two commits came in between: nothing is known of it, the next check will see.

    def _meta(self, number: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        page = self._read(number)
        if _HEADER.unpack_from(page)[2] & _META == 0:
            raise _Damaged(f"page {number} is not a meta page")
        at = _HEADER.size
        magic, version, _, _ = _META_HEAD.unpack_from(page, at)
        if magic != _MAGIC or version != _DATA_VERSION:
            raise _Damaged(f"page {number} is not of an LMDB file of version {_DATA_VERSION}")
        at += _META_HEAD.size
        free, main = _DB.unpack_from(page, at), _DB.unpack_from(page, at + _DB.size)
        _, transaction = _META_TAIL.unpack_from(page, at + 2 * _DB.size)
        return transaction, free, main

    def _tree(self, db: tuple[int, ...], *, ordered: bool) -> Iterator[int]:
        _, _, depth, branches, leaves, overflows, entries, root = db
        if root == _NO_PAGE:
            if entries:
                raise _Damaged(f"no root for {entries} entries")
            return
        if depth > 32:
            raise _Damaged(f"a tree {depth} levels deep")
        found = [0, 0, 0]  # branch, leaf and overflow pages
        found_entries = 0
        last_key = b""
        todo: list[tuple[int, int, bytes, bytes | None]] = [(root, 1, b"", None)]
        while todo:
            number, level, low_key, high_key = todo.pop()
            page = self._read(number)
            yield self._page_bytes
            own, _, flags, lower, upper = _HEADER.unpack_from(page)
            kind = _LEAF if level == depth else _BRANCH
            if own != number or flags & (_BRANCH | _LEAF | _OVERFLOW | _META) != kind:
                raise _Damaged(f"page {number} is not the page that belongs there")
            count = (lower - _HEADER.size) >> 1
            if not _HEADER.size <= lower <= upper <= self._page_bytes or (lower & 1) or count == 0:
                raise _Damaged(f"page {number} has bad bounds")
            found_entries += count if kind == _LEAF else 0
            found[kind >> 1] += 1
            if kind == _LEAF:
                self._nodes_left -= self._page_bytes
                if self._nodes_left < 0:
                    continue
            children: list[tuple[int, bytes]] = []
            for at in struct.unpack_from(f"<{count}H", page, _HEADER.size):
                if not upper <= at <= self._page_bytes - _NODE.size:
                    raise _Damaged(f"page {number} has a node outside it")
                low, high, node_flags, key_bytes = _NODE.unpack_from(page, at)
                key_end = at + _NODE.size + key_bytes
                if kind == _BRANCH:
                    children.append((low | high << 16 | node_flags << 32, page[at + _NODE.size : key_end] if children else low_key))
                    data_end = key_end
                elif node_flags & _BIG_DATA:
                    data_end = key_end + 8
                    if data_end <= self._page_bytes:
                        found[2] += self._overflow(int.from_bytes(page[key_end:data_end], "little"), low | high << 16)
                else:
                    data_end = key_end + (low | high << 16)
                if data_end > self._page_bytes:
                    raise _Damaged(f"page {number} has a node that ends outside it")
                if ordered and kind == _LEAF:
                    key = page[at + _NODE.size : key_end]
                    if key <= last_key:
                        raise _Damaged(f"page {number} has keys out of order")
                    if key < low_key or (high_key is not None and key >= high_key):
                        raise _Damaged(f"page {number} has keys that a search does not find")
                    last_key = key
            bounds = [*(key for _, key in children[1:]), high_key]
            todo.extend(
                (child, level + 1, key, bound) for (child, key), bound in reversed(list(zip(children, bounds, strict=True) if children else []))
            )
        if self._nodes_left >= 0 and (found != [branches, leaves, overflows] or found_entries != entries):
            raise _Damaged(f"{found_entries} entries where there should be {entries}")

    def _overflow(self, number: int, length: int) -> int:
        """The pages of one large value."""
        own, _, flags, low, high = _HEADER.unpack_from(self._read(number))
        pages = int(low | high << 16)
        if own != number or not flags & _OVERFLOW or pages * self._page_bytes < _HEADER.size + length:
            raise _Damaged(f"page {number} is not the large value that belongs there")
        if (number + pages) * self._page_bytes > self._size_bytes:
            raise _Damaged(f"page {number} is outside the file")
        return pages

    def _read(self, number: int) -> bytes:
        if number in self._seen:
            raise _Damaged(f"page {number} is used twice")
        self._seen.add(number)
        view = memoryview(self._buffer)[: self._page_bytes]
        if number * self._page_bytes >= self._size_bytes or os.preadv(self._fd, [view], number * self._page_bytes) < self._page_bytes:
            raise _Damaged(f"page {number} is outside the file")
        return bytes(view)
