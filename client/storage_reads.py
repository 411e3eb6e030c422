"""Reading chunks: which replica, what when it fails, and the check of every byte.

Owns the read path. Invariants:
  - bytes count as read only after their checksums were verified here, fragment by fragment; a mismatch is counted and another replica is asked;
  - any serving replica may answer: first one on this machine (shared memory), spread by chunk, suspects last; a failed attempt goes to
    another replica
    at once, and only when all have failed it waits, with newer routing;
  - a chunk that is not there is a hole: length 0, no error;
  - a replica that did not answer in time may still write into the memory it was given. The bytes are then read again into other memory:
    `ReadDone.view` says where they are, and only that view is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from kvfs.client.arriving import ArrivingSums
from kvfs.client.batch import Group, group_by_node
from kvfs.client.config import ClientConfig
from kvfs.client.peers import Buffer, Peers
from kvfs.client.retry import Attempts, worth_retrying
from kvfs.common.checksum import checksums
from kvfs.common.errors import ChainError, ChecksumMismatch, ChunkNotFound, DataError, InputOutput, KvfsError, NoServingTarget, from_wire
from kvfs.common.ids import ChunkId
from kvfs.common.transport.region import Span
from kvfs.common.wire import storage_pb2 as pb
from kvfs.common.wire.service import method

READ = method("Storage", "Read")
DAMAGED_ROUNDS = 2
"""Bytes that fail their checksum at every replica so often again are damaged, not mangled on the way."""


@dataclass(slots=True)
class ChunkRead:
    """`length` bytes of a chunk from `offset`, to go into `into` (of that length)."""

    chain_id: int
    chunk_id: ChunkId
    offset: int
    length: int
    into: Span | memoryview
    counted: bool = False
    """Of a KV-cache block: its place was asked for just now, and that was counted as a read."""


@dataclass(slots=True)
class ReadDone:
    length: int
    """Bytes there are; less than asked: the rest is beyond the chunk's end."""
    view: memoryview
    """Where they are: `view[:length]`. The memory given, but for a replica that hangs (see above)."""
    moved: bool
    found: bool
    version: int
    chunk_length: int


class ReadPath:
    def __init__(self, peers: Peers, config: ClientConfig, in_background: Callable[[float], None]) -> None:
        """`in_background(limit_s)` starts a refresh of the routing that nobody waits for."""
        self._peers = peers
        self._config = config
        self._in_background = in_background

    async def read(self, reads: Sequence[ChunkRead], *, deadline_s: float | None = None) -> list[ReadDone]:
        """All of them, in order, or the error of one that could not be read."""
        run, attempts = self._begin(reads, deadline_s)
        while run.pending:
            await self._step(run, attempts)
        return [done for done in run.done if done is not None]

    async def read_each(self, reads: Sequence[ChunkRead], *, deadline_s: float | None = None) -> list[ReadDone | KvfsError]:
        """The outcome of each, in order. Never raises for a read that failed."""
        run, attempts = self._begin(reads, deadline_s)
        while run.pending:
            try:
                await self._step(run, attempts)
            except KvfsError as error:
                run.give_up(error)
        return [done or run.errors[index] for index, done in enumerate(run.done)]

    def _begin(self, reads: Sequence[ChunkRead], deadline_s: float | None) -> tuple[_Run, Attempts]:
        config, peers = self._config, self._peers
        attempts = Attempts(
            peers.clock,
            peers.random,
            deadline=peers.clock.monotonic() + (config.deadline_s if deadline_s is None else deadline_s),
            attempt_s=config.read_attempt_s,
            first_s=config.backoff_first_s,
            max_s=config.backoff_max_s,
        )
        peers.counters.reads += len(reads)
        return _Run(reads), attempts

    async def _step(self, run: _Run, attempts: Attempts) -> None:
        """One attempt at what is pending, at other replicas than before; or, where none is left, a wait for newer routing."""
        config, peers = self._config, self._peers
        groups, stuck = self._plan(run)
        if groups:
            timeout_s = attempts.timeout_s()
            if len(groups) == 1:
                await self._ask(run, groups[0], timeout_s)
            else:
                async with trio.open_nursery() as nursery:
                    for group in groups:
                        nursery.start_soon(self._ask, run, group, timeout_s)
            run.pending = [index for index in run.pending if run.done[index] is None]
        elif stuck is not None:
            final = run.final_error()
            if final is not None:
                raise final
            await peers.refresh(min(attempts.left_s(), config.read_attempt_s))
            await attempts.wait(stuck)
            run.tried.clear()
            run.rounds += 1

    def _plan(self, run: _Run) -> tuple[list[Group], KvfsError | None]:
        """Groups to ask now; without any, the error that everything is stuck on."""
        operations = []
        stuck: KvfsError | None = None
        for index in run.pending:
            read = run.reads[index]
            try:
                target = choose(self._peers, read.chain_id, read.chunk_id, run.tried.get(index, ()))
                where = self._peers.where(target)
            except KvfsError as error:
                stuck = run.errors.get(index, error)
                continue
            operations.append((index, target, where.node_id, where.addresses, read.length))
        return group_by_node(operations, max_ios=self._config.batch_max_ios, max_bytes=self._config.batch_max_bytes), stuck

    async def _ask(self, run: _Run, group: Group, timeout_s: float) -> None:
        """One request. Fills run.done for what came right, run.errors and run.tried for the rest."""
        counters = self._peers.counters
        counters.read_requests += 1
        request = pb.ReadRequest()
        memory: list[Buffer] = []
        add = request.reads.add
        for index, target in zip(group.indexes, group.targets, strict=True):
            read = run.reads[index]
            add(chain_id=read.chain_id, target_id=target, chunk_id=read.chunk_id, offset=read.offset, length=read.length, counted=read.counted)
            memory.append(run.memory(index))
        sums = ArrivingSums([run.reads[index].offset for index in group.indexes])
        try:
            reply = await self._peers.ask(group.addresses, READ, request, group.targets, timeout_s=timeout_s, receive=memory, arrivals=sums)
        except KvfsError as error:
            self._peers.suspect(group.node_id, error)
            for index, target in zip(group.indexes, group.targets, strict=True):
                self._failed(run, index, target, error)
            return
        if len(reply.results) != len(group.indexes):
            for index, target in zip(group.indexes, group.targets, strict=True):
                self._failed(run, index, target, InputOutput(f"a reply with {len(reply.results)} results for {len(group.indexes)} reads"))
            return
        self._peers.trust(group.node_id)
        for place, (index, target, buffer, result) in enumerate(zip(group.indexes, group.targets, memory, reply.results, strict=True)):
            self._take(run, index, target, buffer, result, sums.of(place, result.length))

    def _take(self, run: _Run, index: int, target: int, buffer: Buffer, result: pb.ReadResult, found: bytes | None) -> None:
        """`found`: the checksums of the bytes that came, where they were made on their way in."""
        read = run.reads[index]
        counters = self._peers.counters
        view = buffer.view if isinstance(buffer, Span) else memoryview(buffer)
        status, length = result.status, result.length
        if status == 0:
            due = max(0, min(read.length, result.chunk_length - read.offset))
            if length != due:  # what is missing would be taken for a hole
                self._failed(run, index, target, InputOutput(f"target {target} sent {length} of the {due} bytes of a chunk that it has"))
            elif result.checksums == (checksums(view[:length], read.offset) if found is None else found):
                counters.read_bytes += length
                run.done[index] = ReadDone(length, view, index in run.moved, True, result.version, result.chunk_length)
            else:
                counters.checksum_mismatches += 1
                self._failed(
                    run, index, target, ChecksumMismatch(f"target {target} sent bytes of chunk {read.chunk_id.hex()} that fail their checksum")
                )
        elif status == ChunkNotFound.code:
            counters.holes += 1
            run.done[index] = ReadDone(0, view, index in run.moved, False, 0, 0)
        else:
            self._failed(run, index, target, from_wire(status, f"target {target}, chunk {read.chunk_id.hex()}"))

    def _failed(self, run: _Run, index: int, target: int, error: KvfsError) -> None:
        self._peers.counters.read_failovers += 1
        run.errors[index] = error
        run.tried.setdefault(index, set()).add(target)
        if isinstance(error, ChainError):
            self._in_background(self._config.read_attempt_s)


def choose(peers: Peers, chain_id: int, chunk_id: ChunkId, tried: Sequence[int] | set[int]) -> int:
    """The target to read a chunk from, none of those that were tried. Raises NoServingTarget, ChainError."""
    serving = peers.routing.serving(chain_id)
    count = len(serving)
    if count == 1 and not tried:
        return serving[0]
    best, best_rank = 0, (2, 2)
    # Multiplied (Fibonacci hashing), since the plain index goes in step with the order of the chains.
    turn = ((chunk_id[-1] | chunk_id[-2] << 8) * 0x9E3779B1 & 0xFFFFFFFF) >> 16
    for step in range(count):
        target = serving[(turn + step) % count]
        if target in tried:
            continue
        where = peers.where(target)
        rank = (int(peers.suspected(where.node_id)), int(not where.here))
        if rank < best_rank:
            best, best_rank = target, rank
            if rank == (0, 0):
                break
    if not best:
        raise NoServingTarget(f"no replica of chain {chain_id} could be read")
    return best


class _Run:
    """The state of one call of `read`."""

    __slots__ = ("done", "errors", "moved", "pending", "reads", "rounds", "tried")

    def __init__(self, reads: Sequence[ChunkRead]) -> None:
        self.reads = reads
        self.done: list[ReadDone | None] = [None] * len(reads)
        self.pending = list(range(len(reads)))
        self.tried: dict[int, set[int]] = {}
        self.errors: dict[int, KvfsError] = {}
        self.moved: dict[int, memoryview] = {}
        self.rounds = 0
        """How often all replicas have failed."""

    def memory(self, index: int) -> Buffer:
        """Where the next attempt may put the bytes: not where an earlier one may still write."""
        given = self.reads[index].into
        if isinstance(given, Span) and (given.pinned if index in self.errors else False):
            return self.moved.setdefault(index, memoryview(bytearray(self.reads[index].length)))
        return self.moved.get(index, given)

    def final_error(self) -> KvfsError | None:
        """An error that no waiting will mend, where one read has met such from every replica."""
        return next((self.errors[index] for index in self.pending if self._final(index)), None)

    def _final(self, index: int) -> bool:
        error = self.errors.get(index)
        return error is not None and (not worth_retrying(error) or (isinstance(error, DataError) and self.rounds >= DAMAGED_ROUNDS))

    def give_up(self, error: KvfsError) -> None:
        """Those that met an error for good are over, the others go on; if there are none such, the error is everyone's."""
        final = [index for index in self.pending if self._final(index)]
        if not final:
            self.errors.update(dict.fromkeys(self.pending, error))
        self.pending = [index for index in self.pending if index not in final] if final else []
