"""A space on trio: match, get, put and the rest, straight between this client and the storage services.

Owns the handle of one space. Invariants:
  - every operation is a batch with a deadline; results stand at the positions of their keys, whatever came back in which order;
  - a wrong argument is an exception before anything is sent; trouble with storage is a miss or a refusal, and counted, never an exception;
  - a reader gets exactly the bytes that were put under that key, verified, or a miss; after a miss no service writes into the buffer any more;
  - blocks used together are touched deepest first, and a put touches its prefix and its blocks after they are stored: a prefix is never older than
    what hangs on it;
  - no put outlives its space: the handle is checked with the metadata service every few seconds, in the background. Nothing else asks it anything.
Belongs to its client's trio thread; threads use `space.Space`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isnan
from typing import Any

import trio

from kvfs.client.async_client import AsyncClient
from kvfs.client.block_placement import BlockPlacement
from kvfs.client.storage_blocks import Probe, Touch
from kvfs.client.storage_writes import ChunkWrite, WriteDone
from kvfs.common.errors import AlreadyExists, ArgumentTooBig, ChunkNotFound, InvalidArgument, KvfsError
from kvfs.common.ids import block_id
from kvfs.common.wire import meta_pb2, storage_pb2
from kvfs.kvcache import keys as hashing
from kvfs.kvcache.alone import Alone
from kvfs.kvcache.buffers import BlockBuffers, Memory, to_send
from kvfs.kvcache.chains import Chains
from kvfs.kvcache.config import CacheConfig
from kvfs.kvcache.gets import Batch, Gets
from kvfs.kvcache.keys import Tokens
from kvfs.kvcache.life import Life
from kvfs.kvcache.outcomes import Put, SpaceCounters, SpaceStats
from kvfs.kvcache.params import SpaceParams
from kvfs.kvcache.parcels import Parcel, give_back, make_ready

SLAB_UNIT_BYTES = 4096
ASK_FIRST_BYTES = 64 << 10
"""Blocks of this size are looked for first when they would travel."""
PART_BLOCKS = 1024
PART_BYTES = 512 << 20
"""Of a put: more is sent in parts, one after the other."""
EVICT_MAX = 1 << 48
Key = bytes


_FLAGS = [[bool(byte >> bit & 1) for bit in range(8)] for byte in range(256)]


def flags(bitmap: bytes) -> list[bool]:
    """Bit i % 8 of byte i / 8 is flag i."""
    return [flag for byte in bitmap for flag in _FLAGS[byte]]


def _parts(places: Sequence[int], parcels: Sequence[Parcel]) -> Iterator[list[int]]:
    """In pieces of at most PART_BLOCKS and, unless a single one is longer, PART_BYTES."""
    part: list[int] = []
    size = 0
    for place in places:
        length = len(parcels[place].memory.view)
        if part and (len(part) == PART_BLOCKS or size + length > PART_BYTES):
            yield part
            part, size = [], 0
        part.append(place)
        size += length
    if part:
        yield part


class AsyncSpace:
    """Made by AsyncKVCache.create and open."""

    def __init__(self, client: AsyncClient, name: str, inode: meta_pb2.Inode, config: CacheConfig) -> None:
        self._client = client
        self._storage = client.storage
        self._config = config
        self._clock = client.clock
        record = inode.space
        self.name = name
        self.inode: int = inode.inode
        self.params = SpaceParams.from_wire(record)
        self.block_bytes: int = record.block_bytes
        self.block_tokens: int = record.block_tokens
        self.counters = SpaceCounters()
        self._placement = BlockPlacement(record.chain_ids)
        self._slab_bytes = -(-self.block_bytes // SLAB_UNIT_BYTES) * SLAB_UNIT_BYTES
        share = record.quota_bytes // len(record.chain_ids)
        self._wire = storage_pb2.KvSpace(
            inode=self.inode, block_bytes=self.block_bytes, quota_bytes=share, ttl_ms=record.ttl_ms, version=max(1, record.version)
        )
        self._chains = Chains(self._storage, config, self._clock, self.counters)
        self.life = Life(client, name, self.inode, config)
        self.alone = Alone(client.lines, self._wire, self._slab_bytes, self._placement, self._chains, self.life, self._clock)
        self.gets = Gets(client, self.inode, self.block_bytes, self._placement, self._chains, self.counters, self._readable, lambda: self.life.fresh)

    @property
    def dropped(self) -> bool:
        """Whether the space is known to be gone."""
        return self.life.over

    @property
    def chain_ids(self) -> tuple[int, ...]:
        return self._placement.chain_ids

    def keys(self, tokens: Tokens, salt: bytes = b"") -> list[Key]:
        """The keys of all full blocks of a prompt, in order (keys.py: our own chain)."""
        return hashing.chain(tokens, self.block_tokens, salt=salt)

    def buffers(self, count: int) -> BlockBuffers:
        """Registered memory for so many blocks."""
        return BlockBuffers(count, self.block_bytes)

    # --- questions -----------------------------------------------------------------------------------------------------------------------

    async def match(self, tokens: Tokens, salt: bytes = b"", *, deadline_s: float | None = None) -> int:
        """How many tokens from the start on are in the cache, in whole blocks. What was found counts as used."""
        return await self.match_keys(self.keys(tokens, salt), deadline_s=deadline_s) * self.block_tokens

    async def match_keys(self, keys: Sequence[Key], *, deadline_s: float | None = None) -> int:
        """How many of these keys, from the first on, are there without a gap. What was found counts as used."""
        found = await self._probe(hashing.digests(keys), touch=True, deadline_s=deadline_s)
        return found.index(False) if False in found else len(found)

    async def exists(self, keys: Sequence[Key], *, deadline_s: float | None = None) -> list[bool]:
        """Whether each block is there. Nothing counts as used."""
        return await self._probe(hashing.digests(keys), touch=False, deadline_s=deadline_s)

    async def _probe(self, digests: Sequence[bytes], *, touch: bool, deadline_s: float | None) -> list[bool]:
        found = [False] * len(digests)
        self.counters.lookups += len(digests)
        end_s = self._end(deadline_s, self._config.get_deadline_s)
        if not digests or not await self._readable(len(digests), end_s):
            return found
        groups = self._placement.group(digests)

        async def ask(chains: Sequence[int], limit_s: float) -> None:
            probes = [Probe(chain, self.inode, b"".join([digests[place] for place in groups[chain]]), touch) for chain in chains]
            for chain, outcome in zip(chains, await self._storage.probe(probes, deadline_s=limit_s), strict=True):
                places = groups[chain]
                if isinstance(outcome, KvfsError):
                    self._chains.trouble(chain, outcome, len(places), limit_s)
                    continue
                self._chains.well(chain)
                for place, there in zip(places, flags(outcome), strict=False):  # the last byte's spare bits are nobody's
                    found[place] = there

        await self._chains.ask(groups, ask, end_s)
        self.counters.found += sum(found)
        return found

    # --- get -------------------------------------------------------------------------------------------------------------------------------

    async def get(self, keys: Sequence[Key], into: Sequence[Any], *, shorter: bool = False, deadline_s: float | None = None) -> list[int | None]:
        """Read blocks, each into its buffer: how many bytes it has, or None for a miss (then the buffer's content is unspecified).

        Each buffer must hold the largest block of the space; with `shorter` it may be smaller, and a block that is longer is a miss. Buffers must
        not overlap: nobody could say what is in them afterwards."""
        return await self._get(self.begin_get(keys, into, shorter, deadline_s))

    async def get_range(
        self, keys: Sequence[Key], offset: int, length: int, into: Sequence[Any], *, deadline_s: float | None = None
    ) -> list[int | None]:
        """The same bytes of each block (some layers of it), verified without reading the rest. A block that ends before is read as far as it goes."""
        return await self._get(self.begin_range(keys, offset, length, into, deadline_s))

    def begin_get(self, keys: Sequence[Key], into: Sequence[Any], shorter: bool, deadline_s: float | None) -> Batch:
        """In any thread, as the next: what `get` is asked, checked. How it goes on: gets.py."""
        need = 1 if shorter else self.block_bytes
        return self.gets.begin(keys, into, 0, self.block_bytes, need, whole=True, limit_s=self._limit(deadline_s, self._config.get_deadline_s))

    def begin_range(self, keys: Sequence[Key], offset: int, length: int, into: Sequence[Any], deadline_s: float | None) -> Batch:
        if not (isinstance(offset, int) and isinstance(length, int)) or offset < 0 or length < 1 or offset + length > self.block_bytes:
            raise InvalidArgument(f"{length} bytes from {offset} of a block: blocks of space {self.name} have at most {self.block_bytes}")
        return self.gets.begin(keys, into, offset, length, length, whole=False, limit_s=self._limit(deadline_s, self._config.get_deadline_s))

    async def _get(self, batch: Batch) -> list[int | None]:
        gets = self.gets
        gets.take_known(batch)
        if batch.pending:
            await gets.find(batch)
        else:
            await trio.lowlevel.checkpoint()
        if batch.placed:
            await gets.read_in_task(batch)
        if batch.pending:
            await gets.fetch(batch)
        return gets.finish(batch)

    # --- put -------------------------------------------------------------------------------------------------------------------------------

    async def put(self, keys: Sequence[Key], blocks: Sequence[Any], prefix: Sequence[Key] = (), *, deadline_s: float | None = None) -> list[Put]:
        """Store blocks that are not there yet, in the order of the prompt. `prefix`: the keys before them, which count as used too.

        Blocks are immutable: what is there stays as the first writer put it. Their memory must not change until the call returns."""
        return await self.put_parcels(keys, self.parcels(keys, blocks), prefix, deadline_s)

    def parcels(self, keys: Sequence[Key], blocks: Sequence[Any]) -> list[Parcel]:
        """In any thread: the blocks of a put, checked."""
        if len(blocks) != len(keys):
            raise InvalidArgument(f"{len(keys)} keys and {len(blocks)} blocks: one for each")
        return [Parcel(self._checked(to_send(block, place), place)) for place, block in enumerate(blocks)]

    def put_limit_s(self, deadline_s: float | None) -> float:
        return self._limit(deadline_s, self._config.put_deadline_s)

    async def put_parcels(self, keys: Sequence[Key], parcels: Sequence[Parcel], prefix: Sequence[Key], deadline_s: float | None) -> list[Put]:
        digests, above = hashing.digests(keys), hashing.digests(prefix)
        results = [Put.REFUSED] * len(keys)
        counters = self.counters
        counters.puts += len(keys)
        end_s = self._end(deadline_s, self._config.put_deadline_s)
        first = {digest: place for place, digest in reversed(list(enumerate(digests)))}
        for part in _parts(sorted(first.values()), parcels):
            # Each only so long as the space is known to be there: a large batch may take longer than that.
            left_s = await self._writable(len(part), end_s)
            if left_s > 0:
                await self._put_part(part, digests, parcels, results, min(end_s, self._clock.monotonic() + left_s))
        for place, digest in enumerate(digests):
            if first[digest] != place:
                results[place] = Put.PRESENT if results[first[digest]] else Put.REFUSED
        used = [*above, *(digest for digest, result in zip(digests, results, strict=True) if result)]
        # One new block alone was touched when it was stored: there is no order to tell.
        if len(used) > len(above) and (len(used) > 1 or Put.PRESENT in results):
            self._touch(used)
        counters.stored += results.count(Put.STORED)
        counters.present += results.count(Put.PRESENT)
        counters.refused += results.count(Put.REFUSED)
        return results

    async def _put_part(self, part: Sequence[int], digests: Sequence[bytes], parcels: Sequence[Parcel], results: list[Put], end_s: float) -> None:
        """The blocks of these places, no key twice."""
        groups = self._placement.group([digests[place] for place in part])

        async def ask(chains: Sequence[int], limit_s: float) -> None:
            places = sorted((part[number], chain) for chain in chains for number in groups[chain])
            asked_s = self._clock.monotonic()
            places = await self._absent(places, digests, parcels, results, limit_s)
            sent = [parcels[place] for place, chain in places if self._storage.nearby(chain)]
            try:
                await make_ready(sent, self._client.memory)
                left_s = max(0.0, limit_s - (self._clock.monotonic() - asked_s))
                writes = [self._write(chain, digests[place], parcels[place]) for place, chain in places]
                outcomes = await self._storage.write_each(writes, deadline_s=left_s)
            finally:
                give_back(sent)
            for (place, chain), outcome in zip(places, outcomes, strict=True):
                results[place] = self._taken(chain, outcome, len(parcels[place].memory.view), limit_s)

        await self._chains.ask(groups, ask, end_s)

    def _checked(self, memory: Memory, place: int) -> Memory:
        length = len(memory.view)
        if length > self.block_bytes:
            raise ArgumentTooBig(f"block {place} has {length} bytes: blocks of space {self.name} have at most {self.block_bytes}")
        if not length:
            raise InvalidArgument(f"block {place} is empty")
        return memory

    async def _absent(
        self, places: list[tuple[int, int]], digests: Sequence[bytes], parcels: Sequence[Parcel], results: list[Put], limit_s: float
    ) -> list[tuple[int, int]]:
        """Without those that are there already, where the bytes would travel to be refused: on this machine they would not even be looked at."""
        far = [(place, chain) for place, chain in places if len(parcels[place].memory.view) >= ASK_FIRST_BYTES and not self._storage.nearby(chain)]
        if not far:
            return places
        groups: dict[int, list[int]] = {}
        for place, chain in far:
            groups.setdefault(chain, []).append(place)
        probes = [Probe(chain, self.inode, b"".join(digests[place] for place in members)) for chain, members in groups.items()]
        present: set[int] = set()
        for members, outcome in zip(groups.values(), await self._storage.probe(probes, deadline_s=limit_s), strict=True):
            if not isinstance(outcome, KvfsError):
                present.update(place for place, there in zip(members, flags(outcome), strict=False) if there)
        for place in present:
            results[place] = Put.PRESENT
        return [(place, chain) for place, chain in places if place not in present]

    def _write(self, chain: int, digest: bytes, parcel: Parcel) -> ChunkWrite:
        return ChunkWrite(
            chain,
            block_id(self.inode, digest),
            0,
            len(parcel.memory.view),
            self.block_bytes,
            parcel.data,
            storage_pb2.CREATE,
            self._slab_bytes,
            self._wire,
            parcel.checksums,
        )

    def _taken(self, chain: int, outcome: WriteDone | KvfsError, length: int, limit_s: float) -> Put:
        if isinstance(outcome, AlreadyExists):
            self._chains.well(chain)
            return Put.PRESENT
        if isinstance(outcome, KvfsError):
            self._chains.trouble(chain, outcome, 1, limit_s)
            return Put.REFUSED
        self._chains.well(chain)
        self.counters.stored_bytes += length
        return Put.STORED

    # --- touch, remove, evict ----------------------------------------------------------------------------------------------------------------

    async def touch(self, keys: Sequence[Key]) -> None:
        """These blocks, in the order of their prompt, count as used. Told in the background."""
        self._touch(hashing.digests(keys))
        await trio.lowlevel.checkpoint()

    def _touch(self, digests: Sequence[bytes]) -> None:
        deepest_first = digests[::-1]
        groups = self._placement.group(deepest_first)
        self._storage.touch([Touch(chain, self.inode, b"".join([deepest_first[place] for place in places])) for chain, places in groups.items()])

    async def remove(self, keys: Sequence[Key], *, deadline_s: float | None = None) -> list[bool]:
        """Whether each block is known to be gone now (also one that never was there)."""
        digests = hashing.digests(keys)
        gone = [False] * len(keys)
        end_s = self._end(deadline_s, self._config.put_deadline_s)
        if not digests or not await self._readable(len(digests), end_s):
            return gone
        groups = self._placement.group(digests)
        self.gets.known.forget(digests)

        async def ask(chains: Sequence[int], limit_s: float) -> None:
            places = [(place, chain) for chain in chains for place in groups[chain]]
            writes = [
                ChunkWrite(chain, block_id(self.inode, digests[place]), 0, 0, self.block_bytes, kind=storage_pb2.REMOVE) for place, chain in places
            ]
            for (place, chain), outcome in zip(places, await self._storage.write_each(writes, deadline_s=limit_s), strict=True):
                if isinstance(outcome, KvfsError) and not isinstance(outcome, ChunkNotFound):
                    self._chains.trouble(chain, outcome, 1, limit_s)
                else:
                    self._chains.well(chain)
                    gone[place] = True

        try:
            await self._chains.ask(groups, ask, end_s)
        finally:
            self.gets.known.forget(digests)  # what was asked for meanwhile
        return gone

    async def evict(self, blocks: int) -> int:
        """Remove about so many blocks, least recently touched first on each chain; how many went. For administration: errors of storage come out."""
        if blocks < 0:
            raise InvalidArgument(f"{blocks} blocks to evict")
        blocks = min(blocks, EVICT_MAX)
        chains = self.chain_ids
        gone = 0
        while gone < blocks and chains:
            # Where one chain has fewer than its share, the others have to give more.
            left = blocks - gone
            went = [
                await self._storage.evict(chain, self.inode, left // len(chains) + (number < left % len(chains))) if number < left else 0
                for number, chain in enumerate(chains)
            ]
            gone += sum(went)
            chains = tuple(chain for number, chain in enumerate(chains) if went[number] or number >= left)
        self.gets.known.clear()
        return gone

    async def stats(self) -> SpaceStats:
        """What the storage services say of the space now; those that cannot be asked are left out."""
        return SpaceStats.of(self.name, self.inode, self.params, len(self.chain_ids), await self._storage.space_stats(self.inode))

    def _end(self, deadline_s: float | None, usual_s: float) -> float:
        """When an operation that begins now is over."""
        return self._clock.monotonic() + self._limit(deadline_s, usual_s)

    def _limit(self, deadline_s: float | None, usual_s: float) -> float:
        if deadline_s is None:
            return usual_s
        if not isinstance(deadline_s, int | float) or isnan(deadline_s):
            raise InvalidArgument(f"a deadline of {deadline_s!r}: a number of seconds is needed")
        return deadline_s

    async def _readable(self, count: int, end_s: float) -> bool:
        """False: the space is known to be gone."""
        there = await self.life.readable(end_s)
        if not there:
            self.counters.dropped += count
        return there

    async def _writable(self, count: int, end_s: float) -> float:
        """For how many seconds from now on a put may go on; 0: not at all."""
        if not await self._readable(count, end_s):
            return 0.0
        left_s = self.life.left_s()
        if not left_s:
            self.counters.unchecked += count
        return left_s
