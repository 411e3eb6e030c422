"""The garbage queue: files without a name and session lose their chunks, then their records; directories cut off by a recursive removal are taken
apart entry by entry; a dropped KV-cache space loses its blocks on all its chains at once, and again after a grace, in which puts under way end; so
does a file whose writer was thought dead and may live: what it still sends would belong to nobody.

Invariants: an inode goes only after every chain of its layout that may hold a chunk has confirmed the removal; everything is done again after a crash
until the queue entry is cleared, which is part of the transaction that removes the inode. Entries wait `gc_delay_s` first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import trio

from kvfs.common.boundary.clock import Clock
from kvfs.common.errors import KvfsError
from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.gc.chunks import Chunks
from kvfs.meta.gc.together import together
from kvfs.meta.kv.engine import Engine
from kvfs.meta.kv.transaction import Transaction
from kvfs.meta.namespace import keys, records
from kvfs.meta.namespace.remove import cut_off
from kvfs.meta.namespace.spaces import SPACE_GRACE_NS
from kvfs.meta.namespace.step import LENGTH_MAX, Step

log = logging.getLogger(__name__)

PAGE = 128
AT_ONCE = 8
CHILDREN_A_TRANSACTION = 64
IDLE_S = 0.5
PAUSE_AFTER_FAILURE_S = 2.0


class Collector:
    def __init__(
        self, engine: Engine, chunks: Chunks, clock: Clock, new_step: Callable[[Transaction], Step], on_change: Callable[[Step], None]
    ) -> None:
        """`new_step`: a Step of root's. `on_change`: told of every step that was committed."""
        self._engine = engine
        self._chunks = chunks
        self._clock = clock
        self._new_step = new_step
        self._on_change = on_change
        self._wake = trio.Event()
        self._running = trio.Lock()

    def wake(self) -> None:
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                done, failed = await self.collect(self._clock.wall_ns())
            except KvfsError as error:
                log.warning("garbage collection: %s", error.message)
                done, failed = 0, 1
            if failed:
                await self._clock.sleep(PAUSE_AFTER_FAILURE_S)
            elif not done:
                self._wake = trio.Event()
                with trio.move_on_after(IDLE_S):
                    await self._wake.wait()
                await self._clock.sleep(IDLE_S / 5)

    async def collect(self, due_ns: int) -> tuple[int, int]:
        """Work off what is due, once through. (entries done, entries that failed and stay)."""
        done = failed = 0
        async with self._running:
            begin, _ = keys.span(keys.GARBAGE)
            end = keys.garbage(due_ns + 1, 0)
            more = True
            while more:
                rows, more = await self._engine.transact(lambda txn, start=begin: txn.snapshot_get_range(start, end, limit=PAGE))  # type: ignore[misc]
                if not rows:
                    break
                begin = rows[-1][0] + b"\0"
                results: list[bool] = []
                queue = list(reversed(rows))
                async with trio.open_nursery() as nursery:
                    for _ in range(min(AT_ONCE, len(rows))):
                        nursery.start_soon(self._work, queue, results)
                done += sum(results)
                failed += len(results) - sum(results)
        return done, failed

    async def collect_all(self) -> None:
        """Everything, due or not, until the queue is empty or only failures are left."""
        while True:
            done, _ = await self.collect((1 << 63) - 1)
            if not done:
                return

    async def _work(self, queue: list[tuple[bytes, bytes]], results: list[bool]) -> None:
        while queue:
            key, value = queue.pop()
            try:
                kind = records.decode_garbage(value)
                if kind == records.FILE_GARBAGE:
                    await self._free_file(key)
                elif kind == records.TREE_GARBAGE:
                    await self._take_apart(key)
                elif kind == records.SPACE_GARBAGE:
                    await self._empty_space(key, _await_puts)
                elif keys.garbage_parts(key)[0] > self._clock.wall_ns():
                    continue  # not even when everything is asked for: a put may still be under way
                elif kind == records.SWEPT_FILE_GARBAGE:
                    await self._free_file(key, swept=True)
                else:
                    await self._empty_space(key, _erase_removed)
                results.append(True)
            except KvfsError as error:
                log.warning("garbage of inode %d stays for now: %s", keys.garbage_parts(key)[1], error.message)
                results.append(False)

    async def _free_file(self, key: bytes, *, swept: bool = False) -> None:
        _, number = keys.garbage_parts(key)
        inode = await self._engine.transact(lambda txn: self._freeable(txn, key, number))
        if inode is None:
            return
        for chain_id in chains_with_chunks(inode):
            await self._remove(chain_id, number)
        again = inode.length == LENGTH_MAX and not swept
        then = partial(_again_later, records.SWEPT_FILE_GARBAGE) if again else _erase_removed
        await self._transact(lambda step: then(step, key, number))

    async def _remove(self, chain_id: int, number: int) -> None:
        await self._chunks.durably([chain_id], partial(self._chunks.remove, chain_id, number, 0), removals=True)

    def _freeable(self, txn: Transaction, key: bytes, number: int) -> pb.Inode | None:
        """The file, if it is to be freed now; a queue entry that is wrong is cleared."""
        step = self._new_step(txn)
        inode = step.peek(number)
        if inode is None or inode.nlink or inode.type != pb.FILE or step.keep_readers(number) or step.has_sessions(number):
            txn.clear(key)  # the end of its last session puts it into the queue again
            return None
        return inode

    async def _empty_space(self, key: bytes, then: Callable[[Step, bytes, int], bool]) -> None:
        _, number = keys.garbage_parts(key)
        inode = await self._engine.transact(lambda txn: self._new_step(txn).peek(number))
        if inode is not None:
            await together([partial(self._remove, chain_id, number) for chain_id in inode.space.chain_ids])
        await self._transact(lambda step: then(step, key, number))

    async def _take_apart(self, key: bytes) -> None:
        _, number = keys.garbage_parts(key)
        while await self._transact(lambda step: _remove_children(step, key, number)):
            pass

    async def _transact(self, body: Callable[[Step], bool]) -> bool:
        def attempt(txn: Transaction) -> tuple[bool, Step]:
            step = self._new_step(txn)
            return body(step), step

        more, step = await self._engine.transact(attempt)
        self._on_change(step)
        return more


def chains_with_chunks(inode: pb.Inode) -> list[int]:
    """The chains that may hold a chunk of a file. Chunks lie round-robin: a short one whose length is exact has some on the first chains only."""
    chain_ids = list(inode.layout.chain_ids)
    if not chain_ids or not inode.chunks_possible:
        return []
    if inode.more_possible:
        return list(dict.fromkeys(chain_ids))
    count = -(-min(inode.length, LENGTH_MAX) // inode.layout.chunk_size)
    return list(dict.fromkeys(chain_ids[: max(1, min(count, len(chain_ids)))]))


def _again_later(kind: int, step: Step, key: bytes, number: int) -> bool:
    step.txn.clear(key)
    step.discard(number, kind, delay_ns=SPACE_GRACE_NS)
    return False


_await_puts = partial(_again_later, records.SWEPT_SPACE_GARBAGE)


def _erase_removed(step: Step, key: bytes, number: int) -> bool:
    step.txn.clear(key)
    inode = step.peek(number)
    if inode is not None and inode.nlink == 0:
        step.erase(inode)
    return False


def _remove_children(step: Step, key: bytes, number: int) -> bool:
    """Some entries of a cut-off directory; with the last, the directory. Whether there are more."""
    directory = step.peek(number)
    if directory is None or directory.nlink:
        step.txn.clear(key)
        return False
    rows, more = step.txn.get_range(*keys.entries(number), limit=CHILDREN_A_TRANSACTION)
    for name, value in rows:
        child = step.peek(records.decode_entry(value).inode)
        if child is not None and child.type == pb.DIRECTORY:
            cut_off(step, child)
        elif child is not None:
            step.drop_link(child)
        step.txn.clear(name)
    if not more:
        step.txn.clear(key)
        step.erase(directory)
    return more
