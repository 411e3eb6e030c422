"""Where blocks of a space lie on this machine's disks, for a short time, and the touches of those that are read there.

Blocks never change, so a place that was right stays right for as long as its bytes have their checksums (client/place.py checks them at every read).
What must not last is that a block which was removed can still be found: a place is used for at most KNOWN_S from before it was asked for.
A service does not see such reads. They are noted here, and told to it a moment later (`take_touches`).
Invariants: bounded in bytes and in time; only the client's thread changes the table, any thread may look and note.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from kvfs.client.place import Place

KNOWN_S = 1.5
KNOWN_BYTES = 16 << 20
ENTRY_BYTES = 512
"""One entry takes about so much, besides its checksums."""
TOUCHES_MAX = 65_536
"""Blocks whose touches wait to be told; more than that are not noted, touches are advice."""


class _Known(NamedTuple):
    place: Place
    until: float


class KnownPlaces:
    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._places: dict[bytes, _Known] = {}
        """By digest, oldest first."""
        self._bytes = 0
        self._stale: deque[bytes] = deque()
        """Other bytes were found there, in whatever thread."""
        self._touched: dict[bytes, int] = {}
        """Digest -> reads since it was told, in the order of the last ones."""

    def __len__(self) -> int:
        return len(self._places)

    # --- in any thread -----------------------------------------------------------------------------------------------------------------------

    def find(self, digests: Iterable[bytes]) -> list[Place | None]:
        """One each; None where it is not known, or no more."""
        now, get = self._now(), self._places.get
        return [known.place if (known := get(digest)) is not None and now < known.until else None for digest in digests]

    def touch(self, digests: Iterable[bytes]) -> None:
        """These blocks were read, in this order: the deepest first."""
        touched = self._touched
        if len(touched) < TOUCHES_MAX:
            for digest in digests:
                touched[digest] = touched.pop(digest, 0) + 1

    def stale(self, digest: bytes) -> None:
        self._stale.append(digest)

    # --- in the client's thread --------------------------------------------------------------------------------------------------------------

    def learn(self, digest: bytes, place: Place, until: float) -> None:
        self._forget(digest)
        self._places[digest] = _Known(place, until)
        self._bytes += ENTRY_BYTES + len(place.checksums)
        while self._bytes > KNOWN_BYTES:
            self._forget(next(iter(self._places)))

    def forget(self, digests: Iterable[bytes]) -> None:
        """They may be gone."""
        for digest in digests:
            self._forget(digest)

    def tidy(self) -> bool:
        """Forget what is stale or too old; whether something is left."""
        while self._stale:
            self._forget(self._stale.popleft())
        now = self._now()
        while self._places and next(iter(self._places.values())).until <= now:
            self._forget(next(iter(self._places)))
        return bool(self._places)

    def clear(self) -> None:
        self._places.clear()
        self._bytes = 0

    def take_touches(self) -> dict[bytes, int]:
        """Digest -> reads, since the last call, in the order of the touches."""
        touched, self._touched = self._touched, {}
        return dict(touched)  # a reader may be at the old one still

    def _forget(self, digest: bytes) -> None:
        known = self._places.pop(digest, None)
        if known is not None:
            self._bytes -= ENTRY_BYTES + len(known.place.checksums)
