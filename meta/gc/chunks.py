"""Chunks as the meta service sees them: remove, cut, measure. Everything it asks of the storage services goes through here.

`Chunks` is the interface, `StorageChunks` the real one over the wire. Invariants: a change goes to the head of its chain with the chain version
that this process knows, and carries an idempotency tag that stays the same over its retries; a refusal of the chain leads to fresh routing and
another try, until the deadline. What belongs to a `Turn` is sent once, with the chains as the turn knows them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

import trio

from kvfs.common.boundary.clock import Clock
from kvfs.common.boundary.random import Random
from kvfs.common.errors import ChainError, ChainVersionMismatch, KvfsError, TransportError, from_wire
from kvfs.common.ids import chunk_id
from kvfs.common.membership import ManagerLink
from kvfs.common.routing import Routing
from kvfs.common.wire import base_pb2, storage_pb2
from kvfs.common.wire.channel import ChannelPool
from kvfs.common.wire.service import method
from kvfs.meta.gc.together import together

REMOVE_RANGE: Final = method("Storage", "RemoveRange")
WRITE: Final = method("Storage", "Write")
SYNC: Final = method("Storage", "Sync")
LAST_CHUNK: Final = method("Storage", "LastChunk")

DEADLINE_S = 30.0
TRY_S = 5.0
BACKOFF_FIRST_S = 0.02
BACKOFF_LAST_S = 1.0
CHANNELS = 64
"""Changes under way at most: one a tag channel."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LastChunk:
    """The highest chunk of an inode on one chain."""

    index: int
    length: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One try at a truncation: the chains refuse what comes of it after something of a later turn (storage/chain/fence.py)."""

    number: int
    routing: Routing
    """As it was before the turn was taken: who took it away before that knew chains that are as new, or older."""


class Chunks(ABC):
    @abstractmethod
    async def remove(self, chain_id: int, inode: int, first_index: int, turn: Turn | None = None) -> None:
        """Remove every chunk of the inode from `first_index` on, on one chain."""

    @abstractmethod
    async def cut(self, chain_id: int, inode: int, index: int, length: int, chunk_size: int, turn: Turn) -> None:
        """Make one chunk no longer than `length` bytes."""

    @abstractmethod
    async def last(self, chain_id: int, inode: int) -> LastChunk | None:
        """The highest chunk of the inode on one chain; None if it has none there."""

    async def durably(self, chain_ids: Collection[int], change: Callable[[], Awaitable[None]], *, removals: bool, turn: Turn | None = None) -> None:
        """Run `change`, which removes and cuts chunks on these chains, so that a loss of power brings nothing back: before the last record of what
        there was is erased. Without a turn it may be run again, so it must do no harm twice. `removals`: it removes whole chunks only."""
        await change()

    async def retry(self, once: Callable[[], Awaitable[T]]) -> T:
        """Run it until the chains do what it asks for, or the deadline is over."""
        return await once()


class StorageChunks(Chunks):
    def __init__(self, link: ManagerLink, pool: ChannelPool, clock: Clock, random: Random, client_id: bytes) -> None:
        self._link = link
        self._pool = pool
        self._clock = clock
        self._random = random
        self._client_id = client_id
        self._sequence = 0
        self._free = list(range(CHANNELS, 0, -1))
        self._limit = trio.CapacityLimiter(CHANNELS)

    async def remove(self, chain_id: int, inode: int, first_index: int, turn: Turn | None = None) -> None:
        more = True
        while more:
            more = await self._tagged(lambda tag: self._remove_once(chain_id, inode, first_index, tag, turn), turn)

    async def durably(self, chain_ids: Collection[int], change: Callable[[], Awaitable[None]], *, removals: bool, turn: Turn | None = None) -> None:
        async def once() -> None:
            # A chain that changed since may have lost its power with the change: then it is made again.
            routing = turn.routing if turn is not None else self._link.routing
            versions = {chain_id: routing.chain(chain_id).version for chain_id in chain_ids}
            await change()
            await self._sync(versions, removals)

        await (self.retry(once) if turn is None else once())

    async def _sync(self, versions: Mapping[int, int], removals: bool) -> None:
        """On every target that holds these chains, in these versions of them."""
        routing = self._link.routing
        requests: dict[int, storage_pb2.SyncRequest] = {}
        for chain_id, version in versions.items():
            now = routing.chain(chain_id).version
            if now != version:
                raise ChainVersionMismatch(f"chain {chain_id} is at version {now}, what is to be synced was done at {version}")
            for target_id in routing.holding(chain_id):
                node_id = routing.node_of_target(target_id).node_id
                request = requests.setdefault(node_id, storage_pb2.SyncRequest(removals=removals))
                request.target_ids.append(target_id)
                request.chain_versions.append(version)

        async def one(request: storage_pb2.SyncRequest) -> None:
            await self._pool.call(routing.addresses_of_target(request.target_ids[0]), SYNC, request, timeout_s=TRY_S)

        await together([partial(one, request) for request in requests.values()])

    async def _remove_once(self, chain_id: int, inode: int, first_index: int, tag: base_pb2.Tag, turn: Turn | None) -> bool:
        routing = turn.routing if turn is not None else self._link.routing
        head = routing.head(chain_id)
        request = storage_pb2.RemoveRangeRequest(
            chain_id=chain_id, chain_version=routing.chain(chain_id).version, target_id=head, inode=inode, first_index=first_index, tag=tag
        )
        if turn is not None:
            request.turn = turn.number
        reply = await self._pool.call(routing.addresses_of_target(head), REMOVE_RANGE, request, timeout_s=TRY_S)
        return bool(reply.more)

    async def cut(self, chain_id: int, inode: int, index: int, length: int, chunk_size: int, turn: Turn) -> None:
        await self._tagged(lambda tag: self._cut_once(chain_id, chunk_id(inode, index), length, chunk_size, tag, turn), turn)

    async def _cut_once(self, chain_id: int, chunk: bytes, length: int, chunk_size: int, tag: base_pb2.Tag, turn: Turn) -> None:
        routing = turn.routing
        head = routing.head(chain_id)
        io = storage_pb2.WriteIO(
            chain_id=chain_id,
            chain_version=routing.chain(chain_id).version,
            chunk_id=chunk,
            kind=storage_pb2.TRUNCATE,
            length=length,
            chunk_size=chunk_size,
            tag=tag,
            target_id=head,
            turn=turn.number,
        )
        reply = await self._pool.call(routing.addresses_of_target(head), WRITE, storage_pb2.WriteRequest(writes=[io]), timeout_s=TRY_S)
        result = reply.results[0]
        if result.status:
            raise from_wire(result.status, result.message)

    async def last(self, chain_id: int, inode: int) -> LastChunk | None:
        async def once() -> LastChunk | None:
            routing = self._link.routing
            tail = routing.tail(chain_id)  # what is at the tail is committed everywhere
            request = storage_pb2.LastChunkRequest(chain_id=chain_id, target_id=tail, inode=inode)
            reply = await self._pool.call(routing.addresses_of_target(tail), LAST_CHUNK, request, timeout_s=TRY_S)
            return LastChunk(reply.index, reply.length) if reply.found else None

        return await self.retry(once)

    async def _tagged(self, once: Callable[[base_pb2.Tag], Awaitable[T]], turn: Turn | None) -> T:
        """Run one change with a tag of its own, retries included: those of a turn are other turns."""
        async with self._limit:
            channel = self._free.pop()
            self._sequence += 1
            tag = base_pb2.Tag(client_id=self._client_id, channel=channel, sequence=self._sequence)
            try:
                return await (self.retry(lambda: once(tag)) if turn is None else once(tag))
            finally:
                self._free.append(channel)

    async def retry(self, once: Callable[[], Awaitable[T]]) -> T:
        give_up_s = self._clock.monotonic() + DEADLINE_S
        backoff_s = BACKOFF_FIRST_S
        while True:
            try:
                return await once()
            except (ChainError, TransportError) as error:
                if not _worth_another_try(error) or self._clock.monotonic() + backoff_s > give_up_s:
                    raise
            await self._clock.sleep(backoff_s * self._random.uniform(0.7, 1.3))
            backoff_s = min(backoff_s * 2, BACKOFF_LAST_S)
            try:
                await self._link.refresh(timeout_s=TRY_S)
            except KvfsError:
                pass  # no manager answers: the routing that is known may still do


def _worth_another_try(error: KvfsError) -> bool:
    return error.retryable or isinstance(error, (ChainError, TransportError))
