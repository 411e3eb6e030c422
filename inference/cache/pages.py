"""Who holds which page of the pool, and which pages can be found again by what they hold.

Owns `Pages`. Invariants:
  - a page is free (nobody holds it) or held, by as many as its count says; only a page that nobody holds is handed out anew;
  - a page has a key only once all its tokens' latents are in it, and then nobody writes to it: it may have many holders. A page without a key has one
    holder who writes (others may hold it only to read what is finished, as the store does);
  - a key names one page at most, and a page has one key at most: the index is never larger than the pool;
  - what is known to be in the store is noted for keys of the index only;
  - free pages without a key go first, then those with one, least recently released first; of one release the last page goes first, so the tail of
    a prefix is gone before its head.
Belongs to the engine's trio thread. This module knows no torch: pages are numbers, their bytes lie in the pool.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from kvfs.common.errors import InvalidArgument


def _nothing() -> None: ...


class Pages:
    def __init__(self, count: int) -> None:
        if count < 1:
            raise InvalidArgument(f"{count} pages: at least 1")
        self.count = count
        self.on_freed: Callable[[], None] = _nothing
        """Called whenever there are more free pages than before: whoever waits for some may look again."""
        self._holders = [0] * count
        self._keys: list[bytes | None] = [None] * count
        self._named: dict[bytes, int] = {}
        self._stored: set[bytes] = set()
        self._blank = list(range(count - 1, -1, -1))
        """Free, and nothing can be found in them."""
        self._kept: OrderedDict[int, None] = OrderedDict()
        """Free, and found by their keys: the least recently released first."""

    @property
    def free(self) -> int:
        return len(self._blank) + len(self._kept)

    @property
    def used(self) -> int:
        return self.count - self.free

    @property
    def named(self) -> int:
        """Pages that can be found by a key."""
        return len(self._named)

    def holders(self, page: int) -> int:
        return self._holders[page]

    def take(self, count: int) -> list[int] | None:
        """So many pages for the caller alone to write to, or None if so many aren't free."""
        if count > self.free:
            return None
        taken = []
        for _ in range(count):
            page = self._blank.pop() if self._blank else self._oldest()
            self._holders[page] = 1
            taken.append(page)
        return taken

    def hold(self, pages: Iterable[int]) -> None:
        """One holder more for each: of pages just found, or that someone holds."""
        for page in pages:
            if not self._holders[page]:
                del self._kept[page]  # a KeyError: the page is blank, there is nothing in it to hold
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less for each. `pages` in the order of their tokens: the last one is given away first."""
        freed = False
        for page in reversed(pages):
            holders = self._holders[page] - 1
            assert holders >= 0, f"page {page} is released more often than it was held"
            self._holders[page] = holders
            if not holders:
                freed = True
                if self._keys[page] is None:
                    self._blank.append(page)
                else:
                    self._kept[page] = None
        if freed:
            self.on_freed()

    def name(self, page: int, key: bytes) -> bool:
        """The page is full and stays as it is: it is found by `key` from now on. False: another page is already."""
        assert self._holders[page] and self._keys[page] is None, f"page {page} is not its writer's to name"
        if key in self._named:
            return False
        self._named[key] = page
        self._keys[page] = key
        return True

    def find(self, key: bytes) -> int | None:
        return self._named.get(key)

    def prefix(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest prefix of `keys` that is here; not held yet."""
        found = []
        for key in keys:
            page = self._named.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def stored(self, key: bytes) -> bool:
        """Whether the store has that page, or is about to."""
        return key in self._stored

    def mark_stored(self, keys: Iterable[bytes], stored: bool) -> None:
        for key in keys:
            if stored and key in self._named:
                self._stored.add(key)
            else:
                self._stored.discard(key)

    def forget(self) -> None:
        """No page is found any more. Those that are held stay as they are: who knows them goes on reading them."""
        for page in self._named.values():
            self._keys[page] = None
        self._named.clear()
        self._stored.clear()
        self._blank += self._kept
        self._kept.clear()

    def _oldest(self) -> int:
        page, _ = self._kept.popitem(last=False)
        key = self._keys[page]
        assert key is not None
        del self._named[key]
        self._stored.discard(key)
        self._keys[page] = None
        return page
