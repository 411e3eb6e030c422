"""Which pages are offered to the store.

Owns `Offers`. Invariants: a page is offered when it has become full, unless the store has it; what was dropped (too much waited to be written,
storage did not take it) is offered again by the next request that has it in memory, before its own pages; behind a page that was dropped the same
request offers nothing: nobody could get to it. Belongs to the scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence as Series

from kvfs.inference.cache.pages import Pages
from kvfs.inference.engine.sequence import Sequence, Write


class Offers:
    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def there(self, keys: Series[bytes]) -> None:
        """The store was seen to have these."""
        self._pages.mark_stored(keys, True)

    def of(self, sequence: Sequence, places: Series[int]) -> Write | None:
        """Pages of these places have become full. What is to be written holds its pages until `written`."""
        if not places:
            return None
        if not sequence.offered:
            sequence.offered = True
            places = range(places[-1] + 1)
        elif places[0] and not self._pages.stored(sequence.key(places[0] - 1)):
            return None
        chosen = []
        for place in places:
            page = self._pages.find(sequence.key(place))
            if page is not None and not self._pages.stored(sequence.key(place)):
                chosen.append((place, page))
        if not chosen:
            return None
        keys, pages = [sequence.key(place) for place, _ in chosen], [page for _, page in chosen]
        self._pages.hold(pages)
        self._pages.mark_stored(keys, True)
        return Write(keys, pages, sequence.keys[: chosen[0][0]])

    def written(self, write: Write, stored: int) -> None:
        """So many of its pages, from the first on, are in the store; the others were given up. Once for each write."""
        self._pages.mark_stored(write.keys[stored:], False)
        self._pages.release(write.pages)
