"""The blocks of one space on one target, least recently touched first. Pure: no I/O, no clock.

Owns: order, times, sizes, the space's policy and its counters. Invariants: the table holds exactly the blocks that are committed in the target's
chunk index (its owner tells it of every commit and removal); the order is the order of touches, and times never fall along it by more than a clock
that was set back made them. It must never decide what goes: that is policy.py's.

About 240 bytes a block: an OrderedDict's entry, a digest, and one integer that holds time and length.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from struct import iter_unpack

from kvfs.common.ids import DIGEST_BYTES
from kvfs.storage.engine.classes import BLOCK_ALIGNMENT_BYTES

_LENGTH_BITS = 27
_LENGTH_MASK = (1 << _LENGTH_BITS) - 1
_BITS = bytes([ord("0"), ord("1")]) + bytes(254)
_ENTRY = f"{DIGEST_BYTES}s"


@dataclass(frozen=True, slots=True)
class Policy:
    """What is known of a space besides its blocks; the newest version counts."""

    block_bytes: int = 0
    quota_bytes: int = 0
    """Of this target; 0: none."""
    ttl_ms: int = 0
    """Since the last touch; 0: none."""
    version: int = 0


COUNTERS = ("hits", "misses", "stored", "present", "evicted", "expired", "removed")


@dataclass(slots=True)
class Counts:
    """Since the space was made, over restarts. Each event is counted at one target only, so the sum over targets is the space's."""

    hits: int = 0
    misses: int = 0
    stored: int = 0
    present: int = 0
    evicted: int = 0
    expired: int = 0
    removed: int = 0

    def values(self) -> tuple[int, ...]:
        return tuple(getattr(self, name) for name in COUNTERS)


def pack_bits(flags: Sequence[bool]) -> bytes:
    """Flag i is bit i % 8 of byte i / 8."""
    if not flags:
        return b""
    return int(bytes(flags)[::-1].translate(_BITS), 2).to_bytes((len(flags) + 7) // 8, "little")


class SpaceTable:
    __slots__ = ("_blocks", "bytes", "counts", "inode", "policy", "slab_bytes")

    def __init__(self, inode: int) -> None:
        self.inode = inode
        self.policy = Policy()
        self.counts = Counts()
        self.bytes = 0
        """Of the contents."""
        self.slab_bytes = 0
        """What one block takes on the disk."""
        self._blocks: OrderedDict[bytes, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._blocks

    @property
    def block_space(self) -> int:
        return len(self._blocks) * self.slab_bytes

    @property
    def over_bytes(self) -> int:
        """Bytes over the quota."""
        quota = self.policy.quota_bytes
        return max(0, self.bytes - quota) if quota else 0

    def learn(self, policy: Policy) -> bool:
        """Whether it was news."""
        if policy.version <= self.policy.version:
            return False
        self.policy = policy
        self.slab_bytes = -(-policy.block_bytes // BLOCK_ALIGNMENT_BYTES) * BLOCK_ALIGNMENT_BYTES
        return True

    # --- changes -----------------------------------------------------------------------------------------------------------------------

    def put(self, digest: bytes, length: int, now_ms: int) -> bool:
        """The block is there, and counts as touched now. Whether it is new."""
        old = self._blocks.get(digest)
        self._blocks[digest] = now_ms << _LENGTH_BITS | length
        self.bytes += length
        if old is None:
            return True
        self.bytes -= old & _LENGTH_MASK
        self._blocks.move_to_end(digest)
        return False

    def drop(self, digest: bytes) -> bool:
        """The block is gone. Whether it was there."""
        old = self._blocks.pop(digest, None)
        if old is None:
            return False
        self.bytes -= old & _LENGTH_MASK
        return True

    def touch(self, digests: bytes, now_ms: int) -> list[bytes]:
        """In this order: the last one is the newest then. Those that are there."""
        blocks, move = self._blocks, self._blocks.move_to_end
        stamp = now_ms << _LENGTH_BITS
        touched = []
        for (digest,) in iter_unpack(_ENTRY, digests):
            value = blocks.get(digest)
            if value is not None:
                blocks[digest] = stamp | value & _LENGTH_MASK
                move(digest)
                touched.append(digest)
        return touched

    # --- questions ---------------------------------------------------------------------------------------------------------------------

    def probe(self, digests: bytes) -> list[bool]:
        blocks = self._blocks
        return [digest in blocks for (digest,) in iter_unpack(_ENTRY, digests)]

    def touched_ms(self, digest: bytes) -> int:
        return self._blocks[digest] >> _LENGTH_BITS

    def oldest(self) -> Iterator[tuple[bytes, int, int]]:
        """(digest, touched_ms, length), least recently touched first. The table must not change meanwhile."""
        return ((digest, value >> _LENGTH_BITS, value & _LENGTH_MASK) for digest, value in self._blocks.items())

    def digests(self, limit: int) -> list[bytes]:
        """The least recently touched."""
        return list(islice(self._blocks, limit))

    def order(self) -> list[tuple[bytes, int]]:
        """(digest, touched_ms) of all, least recently touched first: a copy."""
        return [(digest, value >> _LENGTH_BITS) for digest, value in self._blocks.items()]

    def arrange(self, touched: dict[bytes, int]) -> None:
        """Put the blocks into the order that a log tells: `touched` is digest -> time, in the order of touches; what it does not know keeps its time.
        Among equal times what the log does not know comes first."""
        blocks = self._blocks
        times = {digest: value >> _LENGTH_BITS for digest, value in blocks.items()}
        ranks = {digest: rank for rank, digest in enumerate(touched, 1)}
        times.update((digest, time) for digest, time in touched.items() if digest in blocks and time >= times[digest])
        ranks = {digest: rank for digest, rank in ranks.items() if times.get(digest) == touched[digest]}
        ordered = sorted(blocks, key=lambda digest: (times[digest], ranks.get(digest, 0)))
        self._blocks = OrderedDict((digest, times[digest] << _LENGTH_BITS | blocks[digest] & _LENGTH_MASK) for digest in ordered)
