"""The put of one block by the thread that calls it: hashed, sent and answered there, when the head of its chain is on this machine.

Owns nothing: it is the short way past the client's thread for blocks in registered memory. Invariants: it is taken only where nothing needs to be
asked or waited for first (the space was seen lately, no chain rests); what it does not know for sure goes the ordinary way after it, in the time that
is left. In any thread.
"""

from __future__ import annotations

from kvfs.client.block_placement import BlockPlacement
from kvfs.client.lines import Lines
from kvfs.common.boundary.clock import Clock
from kvfs.common.checksum import checksums
from kvfs.common.errors import AlreadyExists, KvfsError
from kvfs.common.ids import block_id
from kvfs.common.transport.region import Span
from kvfs.common.wire import storage_pb2 as pb
from kvfs.kvcache.chains import Chains
from kvfs.kvcache.life import Life
from kvfs.kvcache.outcomes import Put
from kvfs.kvcache.parcels import Parcel


class Alone:
    def __init__(
        self, lines: Lines | None, space: pb.KvSpace, slab_bytes: int, placement: BlockPlacement, chains: Chains, life: Life, clock: Clock
    ) -> None:
        self._lines = lines
        self._space = space
        self._slab_bytes = slab_bytes
        self._placement = placement
        self._chains = chains
        self._life = life
        self._clock = clock
        self._counters = chains.counters

    def put(self, digest: bytes, parcel: Parcel, limit_s: float) -> tuple[Put | None, float]:
        """What became of it, None: go the ordinary way; and how many seconds are left."""
        if self._lines is None or not self._life.fresh or self._chains.resting:
            return None, limit_s
        end_s = self._clock.monotonic() + limit_s
        return self._put(self._lines, digest, parcel, limit_s), max(0.0, end_s - self._clock.monotonic())

    def _put(self, lines: Lines, digest: bytes, parcel: Parcel, limit_s: float) -> Put | None:
        left_s = min(limit_s, self._life.left_s())
        data = parcel.data
        if left_s <= 0 or not isinstance(data, Span):
            return None
        parcel.checksums = checksums(parcel.memory.view)
        space = self._space
        write = pb.WriteIO(
            chunk_id=block_id(space.inode, digest),
            kind=pb.CREATE,
            length=data.length,
            chunk_size=space.block_bytes,
            checksums=parcel.checksums,
            slab_bytes=self._slab_bytes,
        )
        outcome = lines.create(self._placement.chain(digest), write, space, data, left_s)
        if outcome is None or (isinstance(outcome, KvfsError) and not isinstance(outcome, AlreadyExists)):
            return None
        result = Put.PRESENT if isinstance(outcome, KvfsError) else Put.STORED
        counters = self._counters
        counters.puts += 1
        counters.present += result is Put.PRESENT
        counters.stored += result is Put.STORED
        counters.stored_bytes += data.length if result is Put.STORED else 0
        return result
