"""Truncations on the chains: after the transaction that shortened a file, its chunks behind the new end are cut off.

An intent record (TRNC) is written with the new length and cleared when the chains are done, so that a truncation whose service died is carried out by
another, and one whose chains did not serve is tried again in the background (`undone`). Whoever carries it out takes a turn for each try, in the
record: a service that finds a turn of another one waits for its end, for as long as that one goes on trying, and takes the next one if it does not.
Invariants: of one file at most one truncation is under way in this process (`exclusive`); only who had the last turn clears the record, and what
comes late of earlier turns (the other service lives, or its messages do) is refused by the chains; the answer to a truncate comes after its cut,
which is on the replicas' disks, and while an intent is there nobody opens the file for writing or is given an end to append at (`Step.must_settle`):
bytes behind the end can never come back when the file grows again, also not with the power, and what is written then is never cut.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import trio

from kvfs.common.boundary.clock import Clock
from kvfs.common.boundary.random import Random
from kvfs.common.routing import Routing
from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.gc.chunks import Chunks, Turn
from kvfs.meta.gc.together import together
from kvfs.meta.kv.engine import Engine
from kvfs.meta.kv.transaction import Transaction
from kvfs.meta.namespace import keys, records

PAGE = 500
LOOK_S = 0.05
PATIENCE_S = 1.0
"""With a service that has taken a turn; up to PATIENCES times as long with one that has tried more often: two must not go on taking it away from
each other while the chains are slow."""
PATIENCES = 4
WAIT_S_MAX = 10.0
"""For another service in all: it may live and not reach the chains."""


class Cuts:
    def __init__(self, engine: Engine, chunks: Chunks, routing: Callable[[], Routing], clock: Clock, random: Random) -> None:
        self._engine = engine
        self._chunks = chunks
        self._routing = routing
        self._clock = clock
        self._random = random
        self._me = random.bytes(16)
        self._locks: dict[int, tuple[trio.Lock, list[int]]] = {}
        self.undone = trio.Event()
        """Set when a truncation may be left to carry out: at first, and after one failed."""
        self.undone.set()

    @asynccontextmanager
    async def exclusive(self, inode: int) -> AsyncIterator[None]:
        """No other truncation of this file begins while this one is under way."""
        lock, users = self._locks.setdefault(inode, (trio.Lock(), [0]))
        users[0] += 1
        try:
            async with lock:
                yield
        finally:
            users[0] -= 1
            if not users[0]:
                del self._locks[inode]

    @asynccontextmanager
    async def measured(self, inode: int) -> AsyncIterator[int]:
        """The length of a file as its chunks tell it, 0 if it is gone. True as long as this lasts: no truncation comes between."""
        async with self.exclusive(inode):
            await self.carry_out(inode)  # or what is to be cut off would be measured
            found = await self._engine.transact(lambda txn: _inode(txn, inode))
            yield await measure(self._chunks, found) if found is not None else 0

    async def carry_out(self, inode: int, overdue: records.Cut | None = None) -> None:
        """Do what the intent record of this file asks for, if there is one. The caller is in `exclusive`. `overdue`: what it was so long ago that
        nobody waits for its taker."""
        try:
            while not await self._chunks.retry(partial(self._try, inode, overdue)):
                pass
        except BaseException:
            self.undone.set()
            raise

    async def _try(self, inode: int, overdue: records.Cut | None) -> bool:
        """Take a turn. True: nothing is left to do. False: a later truncation, or turn, has changed the intent."""
        began_s = since_s = self._clock.monotonic()
        patience_s = 0.0
        seen: records.Cut | None = None
        while True:
            routing = self._routing()
            cut, found = await self._engine.transact(lambda txn, late=overdue: self._take(txn, inode, late))  # type: ignore[misc]
            if cut is None:
                return True
            if cut.taker == self._me:
                break
            now_s = self._clock.monotonic()
            if cut != seen:
                seen, since_s, patience_s = cut, now_s, self._patience_s(cut)
            if now_s - since_s > patience_s or now_s - began_s > WAIT_S_MAX:
                overdue = cut
            else:
                await self._clock.sleep(LOOK_S)
        if found is not None and found.layout.chain_ids:
            await cut_chunks(self._chunks, found, cut.length, Turn(cut.turn, routing))
        return await self._engine.transact(lambda txn: _clear(txn, inode, cut))

    def _take(self, txn: Transaction, inode: int, overdue: records.Cut | None) -> tuple[records.Cut | None, pb.Inode | None]:
        """The intent, with a turn of ours unless it is another service's turn."""
        data = txn.get(keys.cut(inode))
        if data is None:
            return None, None
        cut = records.decode_cut(data)
        if cut.taker in (b"", self._me) or cut == overdue:
            cut = replace(cut, tries=cut.tries + 1, taker=self._me)
            txn.set(keys.cut(inode), records.encode_cut(cut))
        return cut, _inode(txn, inode)

    def _patience_s(self, cut: records.Cut) -> float:
        return PATIENCE_S * min(cut.tries, PATIENCES) * self._random.uniform(1, 2)

    async def redo_all(self) -> int:
        """Carry out what an earlier run, or chains that did not serve, left. Gives how many there were."""
        self.undone = trio.Event()
        begin, end = keys.span(keys.CUT)
        done = 0
        more = True
        while more:
            rows, more = await self._engine.transact(lambda txn, start=begin: txn.snapshot_get_range(start, end, limit=PAGE))  # type: ignore[misc]
            cuts = [(key, records.decode_cut(data)) for key, data in rows]
            if others := [cut for _, cut in cuts if cut.taker not in (b"", self._me)]:
                # Patience with all of them together, not with one after the other.
                await self._clock.sleep(max(map(self._patience_s, others)))
            for key, cut in cuts:
                number = keys.owner(key)
                async with self.exclusive(number):
                    await self.carry_out(number, cut)
                done += 1
                begin = key + b"\0"
        return done


def _inode(txn: Transaction, inode: int) -> pb.Inode | None:
    stored = txn.snapshot_get(keys.inode(inode))
    return None if stored is None else records.decode_inode(stored)


def _clear(txn: Transaction, inode: int, done: records.Cut) -> bool:
    """True: nothing is left to do. False: a later truncation, or turn, has changed the intent."""
    data = txn.get(keys.cut(inode))
    if data is None:
        return True
    if records.decode_cut(data) != done:
        return False
    txn.clear(keys.cut(inode))
    return True


async def cut_chunks(chunks: Chunks, inode: pb.Inode, length: int, turn: Turn) -> None:
    """Nothing behind `length` is left on any chain of the file, nor comes back with the power: a file that grew over it would show it."""
    layout = inode.layout
    size = layout.chunk_size
    first = -(-length // size)
    chain_ids = sorted(set(layout.chain_ids))
    calls: list[Callable[[], Awaitable[None]]] = [partial(chunks.remove, chain_id, inode.inode, first, turn) for chain_id in chain_ids]
    if length % size:
        index = length // size
        chain_id = layout.chain_ids[index % len(layout.chain_ids)]
        calls.append(partial(chunks.cut, chain_id, inode.inode, index, length % size, size, turn))
    await chunks.durably(chain_ids, partial(together, calls), removals=not length % size, turn=turn)


async def measure(chunks: Chunks, inode: pb.Inode) -> int:
    """The length of a file as its chunks tell it."""
    layout = inode.layout
    ends = [0]

    async def one(chain_id: int) -> None:
        last = await chunks.last(chain_id, inode.inode)
        if last is not None:
            ends.append(last.index * layout.chunk_size + last.length)

    await together([partial(one, chain_id) for chain_id in set(layout.chain_ids)])
    return max(ends)
