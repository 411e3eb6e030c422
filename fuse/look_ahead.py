"""When to list a directory because its entries are being looked up one after another (find, rsync, make, a loop of stat): one call brings hundreds.

After MISSES lookups in a row that needed a call, the first page of the directory is listed; when the misses go on, the next page, and so
on. What a page
brings is true for one lease, so a round of pages ends with it. A directory of more than PAGES_MAX pages is left alone for PAUSE_S then: listing all
of it would cost more than its lookups.
Invariant: bounded tables, bounded work. It never does I/O, and never decides what is true: that is the entry cache's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

PAGE_ENTRIES = 512
MISSES = 8
ROUND_S = 0.9
"""Misses further apart than this are not in a row; pages older than this are no longer true."""
PAGES_MAX = 16
PAUSE_S = 10.0
DIRECTORIES_MAX = 256


@dataclass(slots=True)
class _Watched:
    misses: int = 0
    last_miss_s: float = float("-inf")
    round_s: float = float("-inf")
    after: bytes | None = b""
    """Where the next page of this round begins; None: it has been listed to the end."""
    pages: int = 0
    quiet_until_s: float = float("-inf")


class LookAhead:
    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._watched: OrderedDict[int, _Watched] = OrderedDict()

    def missed(self, directory: int) -> bytes | None:
        """A lookup in the directory needed a call. Not None: list a page behind this name now, and tell `listed`."""
        now_s = self._now()
        watched = self._watched.get(directory)
        if watched is None:
            watched = self._watched[directory] = _Watched()
            if len(self._watched) > DIRECTORIES_MAX:
                self._watched.popitem(last=False)
        self._watched.move_to_end(directory)
        watched.misses = watched.misses + 1 if now_s - watched.last_miss_s < ROUND_S else 1
        watched.last_miss_s = now_s
        if watched.misses < MISSES or now_s < watched.quiet_until_s:
            return None
        watched.misses = 0
        if now_s - watched.round_s >= ROUND_S:
            watched.round_s, watched.after, watched.pages = now_s, b"", 0
        return watched.after

    def listed(self, directory: int, last: bytes, more: bool) -> None:
        """The page ended with the name `last`."""
        watched = self._watched.get(directory)
        if watched is None:
            return
        watched.after = last if more else None
        watched.pages += 1
        if watched.pages >= PAGES_MAX and more:
            watched.quiet_until_s = self._now() + PAUSE_S
