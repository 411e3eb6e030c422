"""Closing files for clients that are gone: the manager no longer lists them.

The length of a file that was open for writing is taken from its chunks: what the client wrote and did not report counts. Invariants: a session is
pruned only when its client was missing from every list of `grace_s` seconds; without a list nothing is pruned.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from kvfs.common.boundary.clock import Clock
from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.gc.cuts import Cuts
from kvfs.meta.kv.engine import Engine
from kvfs.meta.kv.transaction import Transaction
from kvfs.meta.namespace import keys, records
from kvfs.meta.namespace.open_files import OpenFiles
from kvfs.meta.namespace.step import LENGTH_MAX, Step

log = logging.getLogger(__name__)

PAGE = 500


class Pruner:
    def __init__(
        self,
        engine: Engine,
        cuts: Cuts,
        clock: Clock,
        open_files: OpenFiles,
        new_step: Callable[[Transaction], Step],
        list_clients: Callable[[], Awaitable[set[bytes]]],
        on_change: Callable[[Step], None],
        *,
        grace_s: float,
    ) -> None:
        """`on_change`: told of every step that was committed (leases to revoke, garbage to collect)."""
        self._engine = engine
        self._cuts = cuts
        self._clock = clock
        self._open_files = open_files
        self._new_step = new_step
        self._list_clients = list_clients
        self._on_change = on_change
        self._grace_s = grace_s
        self._missing_since_s: dict[bytes, float] = {}

    async def round(self) -> int:
        """One look at all stored sessions; how many were pruned."""
        listed = await self._list_clients()
        now_s = self._clock.monotonic()
        held: dict[bytes, list[tuple[int, bytes, bool]]] = {}
        begin, end = keys.span(keys.SESSION)
        more = True
        while more:
            rows, more = await self._engine.transact(lambda txn, start=begin: txn.snapshot_get_range(start, end, limit=PAGE))  # type: ignore[misc]
            for key, value in rows:
                session = records.decode_session(value)
                if session.client_id not in listed:
                    held.setdefault(session.client_id, []).append((keys.owner(key), keys.tail(key), session.write))
                begin = key + b"\0"
        for client_id in self._open_files.clients() - listed:
            held.setdefault(client_id, [])
        self._missing_since_s = {client_id: self._missing_since_s.get(client_id, now_s) for client_id in held}
        pruned = 0
        for client_id, sessions in held.items():
            if now_s - self._missing_since_s[client_id] < self._grace_s:
                continue
            self._open_files.forget_client(client_id)
            for number, session_name, write in sessions:
                await self._prune(number, session_name, write)
                pruned += 1
        if pruned:
            log.info("closed %d files of clients that are gone", pruned)
        return pruned

    async def _prune(self, number: int, name: bytes, write: bool) -> None:
        measured: int | None = None

        def attempt(txn: Transaction) -> Step:
            step = self._new_step(txn)
            close_for_dead(step, number, name, write=write, measured=measured)
            return step

        inode = await self._engine.transact(lambda txn: self._new_step(txn).peek(number))
        if write and inode is not None and inode.nlink:
            async with self._cuts.measured(number) as measured:
                step = await self._engine.transact(attempt)
        else:
            step = await self._engine.transact(attempt)
        self._on_change(step)


def close_for_dead(step: Step, number: int, name: bytes, *, write: bool, measured: int | None) -> None:
    """End one session of a client that is gone."""
    if step.txn.get(keys.session(number, name)) is None:
        return
    step.txn.clear(keys.session(number, name))
    inode = step.peek(number)
    if inode is None or inode.type != pb.FILE:
        return
    if write:
        inode.chunks_possible = inode.more_possible = True
        if inode.nlink == 0:
            inode.length = LENGTH_MAX  # nobody measures it any more: look for its chunks everywhere
        elif measured is not None and measured > inode.length:
            inode.length = measured
            inode.data_version += 1
            inode.mtime_ns = inode.ctime_ns = step.now_ns
        step.put(inode)
    if inode.nlink == 0 and not step.has_sessions(number) and not step.around.readers(number):
        step.release(inode)
