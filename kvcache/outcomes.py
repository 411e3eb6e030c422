"""What operations on a space tell: the outcome of a put, the counters of a handle, the statistics of a space.

Plain values; this module must never do I/O.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from kvfs.client.spaces import space_sums
from kvfs.common.wire import storage_pb2
from kvfs.kvcache.params import SpaceParams


class Put(enum.Enum):
    """What became of one block of a put."""

    STORED = "stored"
    PRESENT = "present"
    """There already, from this client or another: its bytes are the first writer's."""
    REFUSED = "refused"
    """Not stored, or not known to be: storage is down, late, full, or the space was dropped."""

    def __bool__(self) -> bool:
        """Whether the block is there now."""
        return self is not Put.REFUSED


@dataclass(slots=True)
class SpaceCounters:
    """What happened through this handle."""

    lookups: int = 0
    """Keys asked for by exists and match."""
    found: int = 0
    gets: int = 0
    hits: int = 0
    hit_bytes: int = 0
    misses: int = 0
    """All that was not a hit, for whatever reason; the next ones are reasons."""
    late: int = 0
    """Lookups, gets, puts and removals that the deadline cut off."""
    resting: int = 0
    """Not even tried: their chain has not answered lately."""
    corrupt: int = 0
    failed: int = 0
    """Any other trouble with storage."""
    dropped: int = 0
    """Operations on blocks of a space that is no longer there."""
    puts: int = 0
    stored: int = 0
    stored_bytes: int = 0
    present: int = 0
    refused: int = 0
    full: int = 0
    """Refused for lack of space."""
    unchecked: int = 0
    """Refused because nobody could say whether the space is still there."""
    moved: int = 0
    """Hits that came by another replica while the first still hung."""


@dataclass(frozen=True, slots=True)
class SpaceStats:
    """A space as its storage services see it: sums over the heads of its chains, and over all replicas where it says so."""

    name: str
    inode: int
    params: SpaceParams
    chains: int
    blocks: int
    bytes: int
    """Of block contents."""
    block_space: int
    """Blocks times what one takes on disk."""
    allocated_bytes: int
    """What they have taken from the disks, groups of blocks and all."""
    hits: int
    """Lookups and reads, at all replicas, as the next."""
    misses: int
    stored: int
    present: int
    evicted: int
    expired: int
    removed: int
    targets: int
    """That could be asked and hold blocks of the space."""

    @classmethod
    def of(cls, name: str, inode: int, params: SpaceParams, chains: int, told: Iterable[storage_pb2.KvSpaceStats]) -> SpaceStats:
        return cls(name, inode, params, chains, **space_sums(told))
