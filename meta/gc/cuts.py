"""Truncations on the chains: after the transaction that shortened a file, its chunks behind the new end are cut off.

An intent record (TRNC) is written with the new length and cleared when the chains are done, so that a truncation whose service died is carried out by
the next, and one whose chains did not serve is tried again in the background (`undone`). Invariants: of one file at most one truncation is under way
in this process (`exclusive`); the answer to a truncate comes after its cut, which is on the replicas' disks, and while an intent is there nobody
opens the file for writing or is given an end to append at (`Step.must_settle`): bytes behind the end can never come back when the file grows again,
also not with the power, and what is written then is never cut.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import trio

from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.gc.chunks import Chunks
from kvfs.meta.gc.together import together
from kvfs.meta.kv.engine import Engine
from kvfs.meta.kv.transaction import Transaction
from kvfs.meta.namespace import keys, records

PAGE = 500


class Cuts:
    def __init__(self, engine: Engine, chunks: Chunks) -> None:
        self._engine = engine
        self._chunks = chunks
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
            _, found = await self._engine.transact(lambda txn: _load(txn, inode))
            yield await measure(self._chunks, found) if found is not None else 0

    async def carry_out(self, inode: int) -> None:
        """Do what the intent record of this file asks for, if there is one. The caller is in `exclusive`."""
        try:
            await self._carry_out(inode)
        except BaseException:
            self.undone.set()
            raise

    async def _carry_out(self, inode: int) -> None:
        while True:
            intent, found = await self._engine.transact(lambda txn: _load(txn, inode))
            if intent is None:
                return
            if found is not None and found.layout.chain_ids:
                await cut_chunks(self._chunks, found, intent.length)
            if await self._engine.transact(lambda txn, done=intent: _clear(txn, inode, done)):  # type: ignore[misc]
                return

    async def redo_all(self) -> int:
        """Carry out what an earlier run, or chains that did not serve, left. Gives how many there were."""
        self.undone = trio.Event()
        begin, end = keys.span(keys.CUT)
        done = 0
        more = True
        while more:
            rows, more = await self._engine.transact(lambda txn, start=begin: txn.snapshot_get_range(start, end, limit=PAGE))  # type: ignore[misc]
            for key, _ in rows:
                number = keys.owner(key)
                async with self.exclusive(number):
                    await self.carry_out(number)
                done += 1
                begin = key + b"\0"
        return done


def _load(txn: Transaction, inode: int) -> tuple[records.Cut | None, pb.Inode | None]:
    data = txn.snapshot_get(keys.cut(inode))
    stored = txn.snapshot_get(keys.inode(inode))
    return None if data is None else records.decode_cut(data), None if stored is None else records.decode_inode(stored)


def _clear(txn: Transaction, inode: int, done: records.Cut) -> bool:
    """True: nothing is left to do. False: a later truncation has changed the intent."""
    data = txn.get(keys.cut(inode))
    if data is None:
        return True
    if records.decode_cut(data) != done:
        return False
    txn.clear(keys.cut(inode))
    return True


async def cut_chunks(chunks: Chunks, inode: pb.Inode, length: int) -> None:
    """Nothing behind `length` is left on any chain of the file, nor comes back with the power: a file that grew over it would show it."""
    layout = inode.layout
    size = layout.chunk_size
    first = -(-length // size)
    chain_ids = sorted(set(layout.chain_ids))
    calls: list[Callable[[], Awaitable[None]]] = [partial(chunks.remove, chain_id, inode.inode, first) for chain_id in chain_ids]
    if length % size:
        index = length // size
        chain_id = layout.chain_ids[index % len(layout.chain_ids)]
        calls.append(partial(chunks.cut, chain_id, inode.inode, index, length % size, size))
    await chunks.durably(chain_ids, partial(together, calls), removals=not length % size)


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
