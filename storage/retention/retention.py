"""What one target knows of its KV-cache blocks: the face of retention to the rest of the service.

Owns the target's tables and what is to be told of them: touches not yet in the log, touches not yet told to the other replicas, policies and counters
that changed. Runs in trio's thread and never waits. Invariants: after `settled` the table says what the chunk index says; what is queued is bounded
by the number of blocks, since each block stands in a queue once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import trio

from kvfs.common.boundary.clock import Clock
from kvfs.common.errors import AlreadyExists, NoSpace
from kvfs.common.ids import DIGEST_BYTES, SPACE_BIT, chunk_inode
from kvfs.common.wire import storage_pb2 as pb
from kvfs.storage.engine.engine import ChunkEngine
from kvfs.storage.retention import records
from kvfs.storage.retention.log import RetentionLog
from kvfs.storage.retention.policy import Reason, Victim
from kvfs.storage.retention.table import Policy, SpaceTable

log = logging.getLogger("kvfs.storage")

_PAGE = 4096
_BEHIND_FILES = (SPACE_BIT - 1).to_bytes(8, "big") + b"\xff" * DIGEST_BYTES
"""Blocks come behind all chunks of files."""
_INODE_BYTES = 8
SPACES_MAX = 4096
"""Tables kept of spaces that may be empty."""


@dataclass(slots=True)
class News:
    """What happened in a second: each block stands here once, at its last touch."""

    touched: dict[int, dict[bytes, int]] = field(default_factory=dict)
    """inode -> digest -> touched_ms, in the order of the last touches: for the log, and of a head for its followers."""
    own: dict[int, dict[bytes, int]] = field(default_factory=dict)
    """Those that no other replica told of: for the head."""
    spaces: set[int] = field(default_factory=set)
    """Spaces whose policy or counters changed, or which were forgotten."""


class Retention:
    def __init__(self, clock: Clock, engine: ChunkEngine | None) -> None:
        self._clock = clock
        self._engine = engine
        self._now_ms = 0
        self.tables: dict[int, SpaceTable] = {}
        self._log = RetentionLog(engine.disk) if engine is not None else None
        self._log_damaged = False
        """It has to be written anew from the tables."""
        self._news = News()
        self.pressed = False
        """An update was refused for lack of space."""
        self.evicting = False
        self.evicted = 0
        """Since the target was opened."""
        self._progress = trio.Event()
        self.grown_bytes = 0
        """Taken by new blocks since the fullness of the target was looked at."""
        self.grown_limit_bytes = 0
        self.wake = trio.Event()
        """There may be something to evict."""
        self._doomed: dict[tuple[int, bytes], Reason] = {}

    def load(self) -> None:
        """Blocking, before anything else: the tables from the chunk index, in the order that the log tells. A block that it does not know counts as
        touched when it was written. Raises FormatTooNew."""
        if self._engine is None or self._log is None:
            return
        told = self._log.load()
        if told.problem is not None:
            log.warning("%s", told.problem.message)
        now_ms = self.now_ms()  # nothing was touched later, whatever a clock that was set back says
        found: dict[int, list[tuple[int, bytes, int]]] = {}
        slabs: dict[int, int] = {}
        after, more = _BEHIND_FILES, True
        while more:
            metas, more = self._engine.list(after=after, limit=_PAGE)
            for meta in metas:
                if meta.version:
                    inode: int = chunk_inode(meta.chunk_id)
                    found.setdefault(inode, []).append((meta.mtime_ns // 1_000_000, meta.chunk_id[_INODE_BYTES:], meta.length))
                    if meta.block is not None:
                        slabs[inode] = meta.block.block_bytes
            after = metas[-1].chunk_id if metas else after
        for inode, blocks in found.items():
            table = self.table(inode)
            table.slab_bytes = slabs.get(inode, 0)
            for touched_ms, digest, length in sorted(blocks):
                table.put(digest, length, min(touched_ms, now_ms))
        for inode, space in told.spaces.items():
            table = self.table(inode)
            table.learn(space.policy)
            table.counts = space.counts
            table.arrange({digest: min(touched_ms, now_ms) for digest, touched_ms in space.touched.items()})
        if told.problem is not None:
            self._log.rewrite(records.snapshot(self._snapshot()))

    def press(self) -> None:
        """Blocks have to go though the high watermark may not be reached."""
        self.pressed = True
        self.wake.set()

    def progressed(self) -> None:
        """A batch of blocks went, or an eviction ended."""
        self._progress.set()
        self._progress = trio.Event()

    async def progress(self) -> None:
        await self._progress.wait()

    def now_ms(self) -> int:
        """Never falls."""
        self._now_ms = max(self._now_ms, self._clock.wall_ns() // 1_000_000)
        return self._now_ms

    def table(self, inode: int) -> SpaceTable:
        table = self.tables.get(inode)
        if table is None:
            if len(self.tables) >= SPACES_MAX:
                self._forget_one()
            table = self.tables[inode] = SpaceTable(inode)
        return table

    def _forget_one(self) -> None:
        """Spaces that were dropped leave an empty table behind: the oldest of those goes, with its counters."""
        for inode, table in self.tables.items():
            if not len(table):
                del self.tables[inode]
                self._news.spaces.add(inode)
                return

    # --- what updates tell -------------------------------------------------------------------------------------------------------------

    def settled(self, chunk_id: bytes, status: int, *, at_head: bool) -> None:
        """An update of this block came to its end here."""
        inode, digest = chunk_inode(chunk_id), chunk_id[_INODE_BYTES:]
        reason = self._doomed.pop((inode, digest), None)
        if status == 0:
            self._look(inode, digest, chunk_id, at_head, reason)
        elif status == AlreadyExists.code:
            self.table(inode).counts.present += 1
            self._news.spaces.add(inode)
        elif status == NoSpace.code:
            self.press()

    def _look(self, inode: int, digest: bytes, chunk_id: bytes, at_head: bool, reason: Reason | None) -> None:
        assert self._engine is not None
        meta = self._engine.get(chunk_id)
        if meta is not None and meta.version:
            table = self.table(inode)
            if digest in table:
                return  # a retry, or the same again
            table.put(digest, meta.length, self.now_ms())
            if not table.slab_bytes and meta.block is not None:
                table.slab_bytes = meta.block.block_bytes
            if at_head:
                table.counts.stored += 1
                self._news.spaces.add(inode)
                self.grown_bytes += table.slab_bytes
                if table.policy.quota_bytes or self.grown_bytes > self.grown_limit_bytes:
                    self.wake.set()
            return
        known = self.tables.get(inode)
        if known is not None and known.drop(digest) and at_head:
            name = reason.value if reason is not None else "removed"
            setattr(known.counts, name, getattr(known.counts, name) + 1)
            self._news.spaces.add(inode)

    def doom(self, victims: Iterable[Victim]) -> None:
        """They are about to be removed for this reason."""
        for victim in victims:
            self._doomed[victim.inode, victim.digest] = victim.reason

    def spare(self, victims: Iterable[Victim]) -> None:
        """The round is over, whatever came of it."""
        for victim in victims:
            self._doomed.pop((victim.inode, victim.digest), None)

    # --- spaces ------------------------------------------------------------------------------------------------------------------------

    def learn(self, space: pb.KvSpace) -> None:
        known = self.tables.get(space.inode)
        if known is not None and known.policy.version >= space.version:
            return
        if self.table(space.inode).learn(Policy(space.block_bytes, space.quota_bytes, space.ttl_ms, space.version)):
            self._news.spaces.add(space.inode)
            self.wake.set()

    def tell_space(self, chunk_id: bytes, spaces: dict[int, pb.KvSpace]) -> None:
        """Add what is known of a block's space to a request that carries the block."""
        inode = chunk_inode(chunk_id)
        known = self.tables.get(inode)
        if inode not in spaces and known is not None and known.policy.version:
            policy = known.policy
            spaces[inode] = pb.KvSpace(
                inode=inode, block_bytes=policy.block_bytes, quota_bytes=policy.quota_bytes, ttl_ms=policy.ttl_ms, version=policy.version
            )

    # --- touches -----------------------------------------------------------------------------------------------------------------------

    def touch(self, inode: int, digests: bytes, *, told: bool = False, idle_ms: int = 0) -> None:
        """In the order given, so long ago. `told`: by another replica of the chain."""
        table = self.tables.get(inode)
        if table is None:
            return
        now_ms = max(0, self.now_ms() - idle_ms)
        touched = table.touch(digests, now_ms)
        _queue(self._news.touched, inode, touched, now_ms)
        if not told:
            _queue(self._news.own, inode, touched, now_ms)

    def count_hits(self, inode: int, hits: int) -> None:
        """Reads that were no requests."""
        table = self.tables.get(inode)
        if table is not None and hits:
            table.counts.hits += hits
            self._news.spaces.add(inode)

    def probe(self, inode: int, digests: bytes, *, touch: bool) -> list[bool]:
        table = self.tables.get(inode)
        if table is None:
            return [False] * (len(digests) // DIGEST_BYTES)
        found = table.probe(digests)
        hits = sum(found)
        table.counts.hits += hits
        table.counts.misses += len(found) - hits
        self._news.spaces.add(inode)
        if touch and hits:
            parts = [digests[at * DIGEST_BYTES : (at + 1) * DIGEST_BYTES] for at in range(len(found) - 1, -1, -1) if found[at]]
            self.touch(inode, b"".join(parts))
        return found

    def note_reads(self, chunk_ids: Sequence[bytes], missed: Sequence[bytes]) -> None:
        """Blocks that were read, in the order of the request (shallowest first), and blocks that were not there."""
        for inode, read in groupby(reversed(chunk_ids), chunk_inode):
            table = self.tables.get(inode)
            if table is not None:
                digests = [chunk_id[_INODE_BYTES:] for chunk_id in read]
                table.counts.hits += len(digests)
                self._news.spaces.add(inode)
                self.touch(inode, b"".join(digests))
        for chunk_id in missed:
            table = self.tables.get(chunk_inode(chunk_id))
            if table is not None:
                table.counts.misses += 1
                self._news.spaces.add(table.inode)

    # --- what is told --------------------------------------------------------------------------------------------------------------------

    def take_news(self) -> News:
        """What happened since the last call."""
        news, self._news = self._news, News()
        return news

    def write_log(self, news: News) -> Callable[[], None] | None:
        """What a worker thread has to do so that the log knows the news; None: nothing."""
        file = self._log
        if file is None or not (news.touched or news.spaces or self._log_damaged):
            return None
        if self._log_damaged or file.too_long(sum(map(len, self.tables.values())), len(self.tables)):
            self._log_damaged = False
            whole = self._snapshot()
            return lambda: file.rewrite(records.snapshot(whole))
        spaces = {inode: (self.tables[inode].policy, self.tables[inode].counts.values()) for inode in news.spaces if inode in self.tables}

        def append() -> None:
            parts = [records.space(inode, policy, counts) for inode, (policy, counts) in spaces.items()]
            for inode, touched in news.touched.items():
                parts += records.touches(inode, touched.items())
            parts += [records.forgotten(inode) for inode in news.spaces if inode not in spaces]
            file.append(b"".join(parts))

        return append

    def check_log(self) -> list[str]:
        """Blocking: read the log again. A damaged one is written anew with the next news; what was found, one sentence each."""
        if self._log is None or not self._log.damaged():
            return []
        self._log_damaged = True
        return ["the retention log was damaged"]

    def close(self) -> None:
        """Blocking."""
        if self._log is not None:
            self._log.close()

    def _snapshot(self) -> dict[int, tuple[Policy, tuple[int, ...], list[tuple[bytes, int]]]]:
        return {inode: (table.policy, table.counts.values(), table.order()) for inode, table in self.tables.items()}


def _queue(queues: dict[int, dict[bytes, int]], inode: int, digests: Sequence[bytes], now_ms: int) -> None:
    if not digests:
        return
    queue = queues.setdefault(inode, {})
    for digest in digests:
        queue.pop(digest, None)
        queue[digest] = now_ms
