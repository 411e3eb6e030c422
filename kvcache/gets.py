"""Reading blocks: those on this machine from the page cache by their places, in the caller's thread; the others through their services.

Owns the way of one batch: `begin`; `take_known`, the blocks whose places are known already; `find`, the places of the others, and the bytes of those
that no service here has; `read`, the bytes at the places; `fetch`, through the services, what was not there any more or is not in memory; `finish`.
Invariants:
  - bytes count only when they have their checksums; where a place turns out wrong, the service is asked, and its word stands: right or a miss;
  - reading by places never waits for a device, so deadlines hold and the client's thread may do it; when it is over no thread touches the buffers;
  - a block is read by its place for a short time without asking (known.py); those reads are told to the services as touches.
`find` and `fetch` belong to the client's thread; everything else to any thread, one at a time for a batch.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Sequence
from math import inf
from typing import Any

from kvfs.client.async_client import AsyncClient
from kvfs.client.block_placement import BlockPlacement
from kvfs.client.place import Place, Read
from kvfs.client.storage_blocks import Touch
from kvfs.client.storage_places import ChunkRange
from kvfs.client.storage_reads import ChunkRead, ReadDone
from kvfs.common.errors import DataError, InvalidArgument, KvfsError
from kvfs.common.ids import block_id
from kvfs.kvcache import keys as hashing
from kvfs.kvcache.buffers import Memory, to_fill
from kvfs.kvcache.chains import Chains
from kvfs.kvcache.known import KNOWN_S, KnownPlaces
from kvfs.kvcache.local_reads import LocalReads
from kvfs.kvcache.outcomes import SpaceCounters
from kvfs.kvcache.spoilt import Spoilt

TELL_S = 0.05
REST_S = 1.0
"""Where no places are told, none are asked for so long."""


class Batch:
    """One get under way."""

    __slots__ = ("asked", "begun", "digests", "end_s", "found", "length", "offset", "pending", "placed", "views", "whole")

    def __init__(self, digests: list[bytes], views: list[memoryview], offset: int, length: int, whole: bool, end_s: float) -> None:
        self.digests = digests
        self.views = views
        self.offset = offset
        self.length = length
        self.whole = whole
        """A block that is longer than its buffer is a miss."""
        self.end_s = end_s
        self.found: list[int | None] = [None] * len(digests)
        self.pending = list(range(len(digests)))
        """Of which nothing is known yet."""
        self.placed: list[tuple[int, Place]] = []
        """Whose places are known."""
        self.asked: set[int] = set()
        """Whose places were asked for just now: the service counted them."""
        self.begun: set[int] = set()
        """Chains that were asked for something."""

    def size(self, index: int) -> int:
        return min(self.length, len(self.views[index]))


class Gets:
    def __init__(
        self,
        client: AsyncClient,
        inode: int,
        block_bytes: int,
        placement: BlockPlacement,
        chains: Chains,
        counters: SpaceCounters,
        readable: Callable[[int, float], Awaitable[bool]],
        fresh: Callable[[], bool],
    ) -> None:
        """`readable(count, end_s)`: whether the space may be read; `fresh()`: whether that is known without asking."""
        self._client = client
        self._storage = client.storage
        self._transfers = client.storage.counters
        self._inode = inode
        self._block_bytes = block_bytes
        self._placement = placement
        self._chains = chains
        self._counters = counters
        self._counting = threading.Lock()
        self._readable = readable
        self._fresh = fresh
        self._now = client.clock.monotonic
        self.known = KnownPlaces(self._now)
        self._spoilt = Spoilt(client, inode, block_bytes)
        self._rests_until = -inf
        self._telling = False

    # --- in any thread -----------------------------------------------------------------------------------------------------------------------

    def begin(self, keys: Sequence[bytes], into: Sequence[Any], offset: int, length: int, need: int, *, whole: bool, limit_s: float) -> Batch:
        """`need`: what a buffer must hold."""
        digests = hashing.digests(keys)
        if len(into) != len(keys):
            raise InvalidArgument(f"{len(keys)} keys and {len(into)} buffers: one for each")
        views = [to_fill(buffer, place, need) for place, buffer in enumerate(into)]
        return Batch(digests, views, offset, length, whole, self._now() + limit_s)

    def take_known(self, batch: Batch) -> None:
        if not len(self.known) or not self._fresh():
            return
        places = self.known.find(batch.digests)
        batch.placed = [(index, place) for index, place in enumerate(places) if place is not None]
        if len(batch.placed) == len(places):
            batch.pending = []
        elif batch.placed:
            batch.pending = [index for index, place in enumerate(places) if place is None]

    def read(self, batch: Batch) -> None:
        """What has a place, in this thread and those that help it."""
        reads = self._plan(batch)
        reads.read()
        self._settle(batch, reads)

    async def read_in_task(self, batch: Batch) -> None:
        """The same for a task in the client's thread: in other threads, if it is much."""
        reads = self._plan(batch)
        await reads.read_elsewhere()
        self._settle(batch, reads)

    def finish(self, batch: Batch) -> list[int | None]:
        """What each has; counted."""
        found = batch.found
        hits = [count for count in found if count is not None]
        counters = self._counters
        with self._counting:
            counters.gets += len(found)
            counters.hits += len(hits)
            counters.hit_bytes += sum(hits)
            counters.misses += len(found) - len(hits)
        return found

    def _plan(self, batch: Batch) -> LocalReads:
        """What is to be read. What needs no reading is found, or a miss."""
        reads = LocalReads(self._now, batch.end_s, alone=len(batch.placed) == 1)
        offset, length, whole, found, views = batch.offset, batch.length, batch.whole, batch.found, batch.views
        for index, place in batch.placed:
            view = views[index]
            size = len(view)
            if size > length:
                size = length
            end = place.end
            if end <= size:
                count = end - offset
            elif whole:
                continue  # it is longer than its buffer
            else:
                count = min(size, end - offset)
            if count > 0:
                found[index] = count
                reads.add(index, place, offset, view if count == len(view) else view[:count])
            else:
                found[index] = 0
        return reads

    def _settle(self, batch: Batch, reads: LocalReads) -> None:
        placed, batch.placed = batch.placed, []
        found, asked, digests, failed = batch.found, batch.asked, batch.digests, reads.failed
        self._transfers.direct_bytes += reads.total
        for index, outcome in failed.items():
            self._transfers.direct_bytes -= found[index] or 0
            found[index] = None
            batch.pending.append(index)
            if outcome is Read.STALE:
                self._transfers.places_stale += 1
                self.known.stale(digests[index])
        if len(asked) < len(placed):
            touched = [digests[index] for index, _ in placed if index not in asked and found[index] is not None]
            touched.reverse()
            self.known.touch(touched)

    # --- in the client's thread --------------------------------------------------------------------------------------------------------------

    async def find(self, batch: Batch) -> None:
        """What is here is placed afterwards, or a miss. The rest is pending; or found or a miss too, when nothing is here: those who have to wait
        for others are to read first what they can."""
        pending, batch.pending = batch.pending, []
        if not pending or not await self._readable(len(pending), batch.end_s):
            return
        asked_s = self._now()
        ask_places = asked_s >= self._rests_until

        async def ask(chains: Sequence[int], limit_s: float) -> None:
            end_s = self._now() + limit_s
            batch.begun.update(chains)
            members = _members(groups, chains)
            others = members
            if ask_places:
                others = await self._ask_places(batch, members, asked_s + KNOWN_S, limit_s / 2)
            if batch.placed:
                batch.pending += [index for index, _ in others]
            elif others:
                await self._fetch(batch, others, end_s - self._now())

        groups = self._groups(batch, pending)
        await self._chains.ask(groups, ask, batch.end_s)

    async def fetch(self, batch: Batch) -> None:
        """Everything pending is found or a miss afterwards."""
        pending, batch.pending = batch.pending, []
        self.known.tidy()
        if not pending or not await self._readable(len(pending), batch.end_s):
            return

        async def ask(chains: Sequence[int], limit_s: float) -> None:
            await self._fetch(batch, _members(groups, chains), limit_s)

        groups = self._groups(batch, sorted(pending))
        await self._chains.ask(groups, ask, batch.end_s, begun=batch.begun)

    def _groups(self, batch: Batch, indexes: Sequence[int]) -> dict[int, list[int]]:
        groups = self._placement.group([batch.digests[index] for index in indexes])
        return {chain: [indexes[place] for place in places] for chain, places in groups.items()}

    async def _ask_places(self, batch: Batch, members: list[tuple[int, int]], until: float, limit_s: float) -> list[tuple[int, int]]:
        """Those of which no place was told."""
        ranges = [ChunkRange(chain, block_id(self._inode, batch.digests[index]), 0, self._block_bytes) for index, chain in members]
        places = await self._storage.places(ranges, limit_s=limit_s)
        others = []
        known = self.known
        known.tidy()
        told: set[int] = set()
        for member, place in zip(members, places, strict=True):
            index, chain = member
            if place is None:
                others.append(member)
                continue
            told.add(chain)
            batch.asked.add(index)
            if place.end:
                batch.placed.append((index, place))
                known.learn(batch.digests[index], place, until)
        for chain in told:
            self._chains.well(chain)
        if len(others) == len(members):
            self._rests_until = self._now() + REST_S
        elif len(known) and not self._telling:
            self._telling = True
            self._client.in_background(self._tell)
        return others

    async def _fetch(self, batch: Batch, members: Sequence[tuple[int, int]], limit_s: float) -> None:
        """Ask for the bytes. Members are in the order of the keys: the service touches what one request read from its end on, so the deepest block
        comes first."""
        memories = {index: Memory(batch.views[index], direct=True) for index, _ in members}
        reads = []
        for index, chain in members:
            size = batch.size(index)
            chunk = block_id(self._inode, batch.digests[index])
            reads.append(ChunkRead(chain, chunk, batch.offset, size, memories[index].part(size), counted=index in batch.asked))
        try:
            outcomes = await self._storage.read_each(reads, deadline_s=max(0.0, limit_s))
        except BaseException:  # cancelled
            for index, _ in members:
                memories[index].settle()
            raise
        for (index, chain), read, outcome in zip(members, reads, outcomes, strict=True):
            batch.found[index] = self._arrived(chain, memories[index], outcome, read.length if batch.whole else None, limit_s)
            if isinstance(outcome, DataError):
                self._spoilt.look_at(chain, batch.digests[index])

    def _arrived(self, chain: int, memory: Memory, outcome: ReadDone | KvfsError, longest: int | None, limit_s: float) -> int | None:
        memory.settle()
        if isinstance(outcome, KvfsError):
            self._chains.trouble(chain, outcome, 1, limit_s)
            return None
        self._chains.well(chain)
        if not outcome.found or (longest is not None and outcome.chunk_length > longest):
            return None
        if outcome.moved:
            self._counters.moved += 1
            memory.view[: outcome.length] = outcome.view[: outcome.length]
        return outcome.length

    async def _tell(self) -> None:
        """While places are known: what was read by them."""
        try:
            while True:
                await self._client.clock.sleep(TELL_S)
                touched = self.known.take_touches()
                if touched:
                    self._touch(touched)
                elif not self.known.tidy():
                    return
        finally:
            self._telling = False

    def _touch(self, touched: dict[bytes, int]) -> None:
        digests = list(touched)
        touches = []
        for chain, places in self._placement.group(digests).items():
            mine = [digests[place] for place in places]
            touches.append(Touch(chain, self._inode, b"".join(mine), sum([touched[digest] for digest in mine])))
        self._storage.touch(touches)


def _members(groups: dict[int, list[int]], chains: Sequence[int]) -> list[tuple[int, int]]:
    """(index, chain) of everything on these chains, in the order of the keys."""
    return sorted((index, chain) for chain in chains for index in groups[chain])
