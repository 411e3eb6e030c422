"""What comes too late: of one chunk, a forward must have a higher sequence number than any before it; of one inode, what a truncation removes and
cuts must be of the latest turn at it.

A message can outlive its connection (it lies in a socket's buffer while its sender already retries on another), and a late one could bring back a
removed chunk. Bounded: only the chunks seen last are remembered; what falls out raises the floor under all others, so forgetting can only refuse
too much, and a refused forward is sent again with a new number.
"""

from __future__ import annotations

REMEMBERED = 65_536


class Fence:
    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        self._last: dict[bytes, int] = {}
        self._floor = 0

    def clear(self) -> None:
        """A new chain version: messages of the old one are refused anyway."""
        self._last.clear()
        self._floor = 0

    def admit(self, chunk_id: bytes, sequence: int) -> bool:
        last = self._last.pop(chunk_id, self._floor)
        if sequence <= last:
            if last != self._floor:
                self._last[chunk_id] = last
            return False
        self._last[chunk_id] = sequence
        if len(self._last) > self._remembered:
            oldest = next(iter(self._last))
            self._floor = max(self._floor, self._last.pop(oldest))
        return True


class Turns:
    """The latest turn at the truncation of each file, at the head of a chain.

    Whoever carries out a truncation takes a turn for each try (meta/gc/cuts.py). When one has ended, files are written anew: what another service, or
    an earlier try, still has under way would take those bytes. Kept over changes of the chain: the next turn may begin before the change is known.
    """

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        self._last: dict[int, int] = {}

    def admit(self, inode: int, turn: int) -> bool:
        """Asked when it comes, and again under the lock of the chunk. The inodes heard of last are remembered."""
        last = self._last.pop(inode, 0)
        self._last[inode] = max(turn, last)
        if len(self._last) > self._remembered:
            del self._last[next(iter(self._last))]
        return turn >= last
