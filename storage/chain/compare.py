"""Which chunks of a returning target differ from its predecessor's: two sorted lists, page by page.

Only says "look at this chunk": what to do is decided under the chunk's lock from what the predecessor has then, so a list may be old. Equal means
same version, length and checksum of all units. Pages hold ids in rising order; a page with `more` says nothing about ids after its last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Listed:
    chunk_id: bytes
    version: int
    length: int
    checksum: int


@dataclass(slots=True)
class Side:
    """One side's pages: ids up to and including `known` have been seen."""

    entries: dict[bytes, Listed]
    known: bytes = b""
    more: bool = True

    @classmethod
    def empty(cls) -> Side:
        return cls({})

    def add_page(self, page: Sequence[Listed], more: bool) -> None:
        for entry in page:
            self.entries[entry.chunk_id] = entry
        if page:
            self.known = page[-1].chunk_id
        self.more = more


def take_differences(local: Side, remote: Side) -> tuple[list[bytes], int]:
    """Ids that differ among those that both sides have listed, in order; and how many were compared. They are taken out of both sides."""
    bounds = [side.known for side in (local, remote) if side.more]
    bound = min(bounds) if bounds else None
    ready = sorted(chunk for chunk in local.entries.keys() | remote.entries.keys() if bound is None or chunk <= bound)
    differing = [chunk for chunk in ready if local.entries.pop(chunk, None) != remote.entries.pop(chunk, None)]
    return differing, len(ready)
