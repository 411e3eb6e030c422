"""One update on its way through one replica.

Owns: what is known of it so far. A flight exists from the moment the chunk's lock is taken until its Reply; the core alone changes it.
"""

from __future__ import annotations

import enum

from kvfs.storage.chain.messages import Incoming, Result
from kvfs.storage.engine.requests import UpdateKind


class Local(enum.IntEnum):
    """How far the local copy is."""

    NONE = 0
    BUSY = 1
    """Being prepared (or applied)."""
    PREPARED = 2
    FAILED = 3
    COMMITTING = 4


class Flight:
    __slots__ = (
        "acked",
        "acked_by",
        "as_replace",
        "checksum",
        "chunk_id",
        "clean",
        "done",
        "error",
        "forward_to",
        "forward_version",
        "forwarding",
        "hopeless",
        "incoming",
        "kind",
        "length",
        "local",
        "recovery",
        "unsure",
        "update_version",
        "waiting",
    )

    def __init__(self, chunk_id: bytes, kind: UpdateKind, update_version: int, incoming: Incoming | None) -> None:
        self.chunk_id = chunk_id
        self.kind = kind
        self.update_version = update_version
        self.incoming = incoming
        self.recovery = incoming is None
        """Not an update that came in, but a pending version that was found: it is carried on to its end."""
        self.local = Local.NONE
        self.length = 0
        self.checksum = 0
        self.error: Result | None = None
        """Why it cannot be done: a local failure, or a clean refusal of the successor."""
        self.forwarding = False
        self.forward_to = 0
        self.forward_version = 0
        self.unsure = False
        """A successor may hold the update."""
        self.as_replace = False
        """The successor could not apply the update to what it has: it gets the whole chunk."""
        self.acked_by = 0
        self.acked = Result()
        self.clean = True
        """No pending version of an earlier try was here when it came."""
        self.waiting = False
        self.hopeless = False
        self.done = False

    def __repr__(self) -> str:
        return f"Flight({self.chunk_id.hex()} {self.kind.name} v{self.update_version} {self.local.name})"
