"""Pure: which chains have bytes of a file that were acknowledged and are not synced, and what a sync says of them.

Every replica has an acknowledged byte, but all of them may lose their power before it is on a disk; the chain then goes on with another `loss` (see
cluster.proto). So a note has the `loss` under which a chain acknowledged, and a sync that was answered under another one did not save what was noted
before it. Invariants: one note a chain, however many bytes; a note goes only with a sync that began after the write was acknowledged; of one loss
a file is told once. As an NFS client's write verifiers (RFC 1813, section 3.3.21), but that the bytes are not kept to be sent again: who called fsync
is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(slots=True)
class _Note:
    loss: int
    """Of the oldest write."""
    last: int
    """The number of the newest."""


class Unsynced:
    """Of one file, by all its handles in this client."""

    def __init__(self) -> None:
        self._notes: dict[int, _Note] = {}
        self.mark = 0
        """How many writes were noted so far."""

    @property
    def chains(self) -> Iterable[int]:
        return self._notes.keys()

    def note(self, chain: int, loss: int) -> None:
        """A write was acknowledged under `loss`."""
        self.mark += 1
        known = self._notes.get(chain)
        if known is None:
            self._notes[chain] = _Note(loss, self.mark)
        else:
            known.loss, known.last = min(known.loss, loss), self.mark

    def synced(self, losses: Mapping[int, int], mark: int) -> list[int]:
        """A sync of these chains, begun at `mark`, was answered under these losses. Gives the chains that may have lost bytes before it."""
        lost = []
        for chain, loss in losses.items():
            note = self._notes.get(chain)
            if note is None:
                continue
            if note.loss < loss:
                lost.append(chain)
            if note.last <= mark:
                del self._notes[chain]
            else:
                note.loss = max(note.loss, loss)  # what came meanwhile: the loss before it has been told
        return lost
