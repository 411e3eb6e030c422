"""The driver of updates: carries out what the replica cores say, for whole batches at a time.

A round is a set of updates of different chunks: one lock ticket, one worker job per target for all local copies, one forward request per successor
node, one commit call per target; local copies and forwards run side by side. Invariants: every flight that a core hands out is driven to its Reply or
abandoned (then its pending version is carried on in the background); the locks are held for that long; when a round ends no thread and no peer
touches the caller's memory. It must decide nothing about the protocol: that is the core's.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence

import trio

from kvfs.common.errors import InternalError, KvfsError
from kvfs.common.ids import is_block
from kvfs.common.transport.region import Span
from kvfs.common.wire import storage_pb2 as pb
from kvfs.storage.chain import messages as m
from kvfs.storage.chain.flight import Flight
from kvfs.storage.chain.messages import Incoming, Result, TagKey, refusal
from kvfs.storage.engine.chunk import ChunkMeta
from kvfs.storage.engine.requests import Tag, Update, UpdateKind
from kvfs.storage.forwards import Forwarder
from kvfs.storage.host import Host
from kvfs.storage.target import Target
from kvfs.storage.workers import Job

log = logging.getLogger("kvfs.storage")

RETRY_S = 0.05
"""A flight that waits for the chain to change tries the same successor again after this long."""

INLINE_BYTES = 64 << 10
"""Local copies up to this, chunk and update together, are written without a thread: the hop would cost more than the writing."""
INLINE_UPDATES = 4

_Written = tuple[Flight, ChunkMeta | KvfsError | None]


class Item:
    """One update of a round."""

    __slots__ = ("chunk_id", "flight", "incoming", "io", "length", "result", "span", "tag", "target", "view")

    def __init__(
        self,
        target: Target,
        chunk_id: bytes,
        incoming: Incoming | None = None,
        io: pb.WriteIO | None = None,
        view: memoryview | None = None,
        span: Span | None = None,
    ) -> None:
        self.target = target
        self.chunk_id = chunk_id
        self.incoming = incoming
        """None: carry on the pending version, if there is one."""
        self.io = io
        self.view = view
        self.span = span
        self.tag: TagKey | None = incoming.tag if incoming is not None else None
        self.flight: Flight | None = None
        self.length = 0
        """Of the chunk, before the update."""
        self.result: Result | None = None


class Round:
    def __init__(self, host: Host, items: Sequence[Item], deadline: float) -> None:
        self._host = host
        self._items = items
        self._deadline = deadline
        self._owners: dict[Flight, Item] = {}
        self._forwarder = Forwarder(host, self._owners, deadline)

    async def run(self) -> None:
        """Every item has a result afterwards."""
        items = []
        for item in self._items:
            if item.incoming is not None:
                item.result = item.target.replica.screen(item.incoming)
            if item.result is None:
                items.append(item)
        if not items:
            return
        try:
            ticket = await self._host.lock([(item.target.target_id, item.chunk_id) for item in items], self._deadline)
        except KvfsError as error:
            for item in items:
                item.result = refusal(error, item.target.replica.version)
            return
        try:
            await self._drive(items)
        finally:
            for flight, item in list(self._owners.items()):
                item.target.replica.abandon(flight)
                self._leave_behind(item)
            self._host.unlock(ticket)

    async def _drive(self, items: Sequence[Item]) -> None:
        effects: list[m.FlightEffect] = []
        for item in items:
            effects += self._receive(item)
        while True:
            writes, forwards, waits = self._settle(effects)
            # What waited for its successor may have ended meanwhile: the chain lost that successor while the local copy was being written.
            waits = [wait for wait in waits if wait.flight in self._owners]
            if writes or forwards:
                effects = await self._carry_out(writes, forwards)
                effects += waits  # looked at again when nothing else is left to do
            elif waits:
                effects = await self._wait(waits)
            else:
                return

    def _receive(self, item: Item) -> list[m.FlightEffect]:
        replica = item.target.replica
        try:
            stored = item.target.stored(item.chunk_id, item.tag)
        except KvfsError as error:
            self._host.note_error(item.target, error)
            item.result = refusal(error, replica.version)
            return []
        item.length = stored.length
        if item.incoming is None:
            if not stored.pending_version:
                item.result = Result(chain_version=replica.version)
                return []
            flight, effects = replica.recover(item.chunk_id, stored)
        else:
            flight, effects = replica.receive(item.incoming, stored)
        item.flight = flight
        self._owners[flight] = item
        return effects

    # --- what is done at once --------------------------------------------------------------------------------------------------------

    def _settle(self, effects: list[m.FlightEffect]) -> tuple[list[m.Prepare | m.Apply], list[m.Forward], list[m.Wait]]:
        """Do what never waits; the rest, sorted."""
        writes: list[m.Prepare | m.Apply] = []
        forwards: list[m.Forward] = []
        waits: list[m.Wait] = []
        while effects:
            more: list[m.FlightEffect] = []
            commits: dict[Target, list[Flight]] = defaultdict(list)
            for effect in effects:
                if isinstance(effect, m.Commit):
                    commits[self._owners[effect.flight].target].append(effect.flight)
                elif isinstance(effect, m.Reply):
                    more += self._reply(effect)
                elif isinstance(effect, m.Prepare | m.Apply):
                    writes.append(effect)
                elif isinstance(effect, m.Forward):
                    forwards.append(effect)
                elif isinstance(effect, m.Wait):
                    waits.append(effect)
                elif isinstance(effect, m.Drop):
                    self._drop(self._owners[effect.flight])
                else:
                    self._host.link.report_now()
            for target, flights in commits.items():
                more += self._commit(target, flights)
            effects = more
        return writes, forwards, waits

    def _reply(self, effect: m.Reply) -> list[m.FlightEffect]:
        flight, result = effect.flight, effect.result
        item = self._owners.pop(flight)
        item.flight = None
        if is_block(item.chunk_id):
            at_head = item.incoming is not None and item.incoming.from_target == 0
            item.target.retention.settled(item.chunk_id, result.status, at_head=at_head)
        if flight.recovery and result.status == 0:
            if item.incoming is not None:
                return self._receive(item)  # now the update itself
        elif result.status and flight.forward_to:
            log.info("target %d: %r: %s", item.target.target_id, flight, result.message)
            self._leave_behind(item)
        item.result = result
        return []

    def _leave_behind(self, item: Item) -> None:
        """If a pending version stays, see to it in the background: until it is settled the chunk can be neither written nor read quickly."""
        target = item.target
        if not target.replica.takes_part:
            return  # resync drops it
        meta = target.engine.get(item.chunk_id)
        if meta is None or meta.pending is None:
            return
        if item.incoming is not None and not self._host.nursery.cancel_scope.cancel_called:
            self._host.nursery.start_soon(carry_on, self._host, target, [item.chunk_id])

    def _drop(self, item: Item) -> None:
        try:
            item.target.engine.drop_pending([item.chunk_id])
        except KvfsError as error:
            self._host.note_error(item.target, error)

    def _commit(self, target: Target, flights: list[Flight]) -> list[m.FlightEffect]:
        tags = []
        for flight in flights:
            item = self._owners[flight]
            tag = target.record(target.pending_tag(item.chunk_id) if flight.recovery else item.tag, flight.update_version)
            if tag is not None:
                tags.append(tag)
        replica = target.replica
        effects: list[m.FlightEffect] = []
        try:
            target.engine.commit([flight.chunk_id for flight in flights], replica.version, tags)
        except KvfsError as error:
            self._host.note_error(target, error)
            for flight in flights:
                effects += replica.commit_failed(flight, error)
        else:
            for flight in flights:
                effects += replica.committed(flight)
        return effects

    # --- what takes time -------------------------------------------------------------------------------------------------------------

    async def _carry_out(self, writes: list[m.Prepare | m.Apply], forwards: list[m.Forward]) -> list[m.FlightEffect]:
        """Local copies in worker threads, forwards over the network, side by side."""
        effects: list[m.FlightEffect] = []
        if len(writes) <= INLINE_UPDATES and all(self._small(effect.flight) for effect in writes):
            for target, work in self._works(writes):
                for flight, outcome in work():
                    effects += self._written(target, flight, outcome)
            return effects + await self._forwarder.send(forwards, None) if forwards else effects
        works = self._works(writes)
        jobs: list[tuple[Target, Job[list[_Written]]]] = []

        def begin() -> None:
            while works:
                target, work = works.pop(0)
                jobs.append((target, self._host.workers.submit(work)))

        try:
            if forwards:
                # Once they have left: on one machine our own copying would keep the next replicas from a processor.
                effects += await self._forwarder.send(forwards, begin)
            begin()
        finally:
            # Also when this task is being ended: the threads use memory that its caller takes back then.
            for target, job in jobs:
                for flight, outcome in await job.wait():
                    effects += self._written(target, flight, outcome)
        return effects

    def _small(self, flight: Flight) -> bool:
        item = self._owners[flight]
        if flight.kind is UpdateKind.REMOVE:
            return True
        return item.io is not None and item.length + item.io.offset + item.io.length <= INLINE_BYTES

    def _works(self, writes: list[m.Prepare | m.Apply]) -> list[tuple[Target, Callable[[], list[_Written]]]]:
        """What is to be written, for each target."""
        per_target: dict[Target, list[m.Prepare | m.Apply]] = defaultdict(list)
        for effect in writes:
            per_target[self._owners[effect.flight].target].append(effect)
        return [(target, self._work(target, effects)) for target, effects in per_target.items()]

    def _work(self, target: Target, effects: list[m.Prepare | m.Apply]) -> Callable[[], list[_Written]]:
        """What a worker thread does for one target; everything it needs is gathered here, in trio's thread."""
        engine, version = target.engine, target.replica.version
        prepares, applies, forced = [], [], []
        for effect in effects:
            flight = effect.flight
            item = self._owners[flight]
            update = _update(flight, item, version, waited_for=isinstance(effect, m.Apply))
            if isinstance(effect, m.Prepare):
                prepares.append((flight, update))
            elif effect.forced:
                forced.append((flight, update, target.record(item.tag, flight.update_version)))
            else:
                applies.append((flight, update, target.record(item.tag, flight.update_version)))

        def work() -> list[_Written]:
            written: list[_Written] = []
            if prepares:
                outcomes = _all_or_error(lambda: engine.prepare_many([update for _, update in prepares]), len(prepares))
                written += zip((flight for flight, _ in prepares), outcomes, strict=True)
            if applies:
                outcomes = _all_or_error(
                    lambda: engine.apply_many([update for _, update, _ in applies], version, [tag for _, _, tag in applies]), len(applies)
                )
                written += zip((flight for flight, _, _ in applies), outcomes, strict=True)
            for flight, update, tag in forced:
                tags = [tag] if tag is not None else []
                try:
                    if update.kind is UpdateKind.REMOVE:
                        engine.remove([update.chunk_id], tags)
                        written.append((flight, None))
                    else:
                        written.append((flight, engine.replace(update, tags)))
                        if update.damaged:
                            engine.sync()  # else an opening after a crash would take it for bytes that were never written
                except KvfsError as error:
                    written.append((flight, error))
            return written

        return work

    def _written(self, target: Target, flight: Flight, outcome: ChunkMeta | KvfsError | None) -> list[m.FlightEffect]:
        replica = target.replica
        if isinstance(outcome, KvfsError):
            self._host.note_error(target, outcome)
            return replica.prepare_failed(flight, outcome)
        if outcome is None:
            return replica.applied(flight, 0, 0)
        pending = outcome.pending
        if pending is None:
            return replica.applied(flight, outcome.length, outcome.checksum_of_list)
        return replica.prepared(flight, pending.length, 0 if pending.kind is UpdateKind.REMOVE else pending.checksum_of_list)

    async def _wait(self, waits: list[m.Wait]) -> list[m.FlightEffect]:
        """Until a chain changes, or a moment has passed."""
        host = self._host
        left_s = self._deadline - host.clock.monotonic()
        effects: list[m.FlightEffect] = []
        if left_s <= 0:
            for wait in waits:
                effects += self._owners[wait.flight].target.replica.give_up(wait.flight)
            return effects
        if any(wait.refresh for wait in waits):
            host.nursery.start_soon(_refresh, host)
        target = self._owners[waits[0].flight].target
        with trio.move_on_after(min(RETRY_S, left_s)):
            await target.moved.wait()
        for wait in waits:
            effects += self._owners[wait.flight].target.replica.resume(wait.flight)
        return effects


def _update(flight: Flight, item: Item, chain_version: int, *, waited_for: bool) -> Update:
    io = item.io
    assert io is not None, "only an update that came in is written"
    return Update(
        chunk_id=item.chunk_id,
        kind=flight.kind,
        offset=io.offset,
        length=io.length,
        data=item.view,
        checksums=io.checksums,
        update_version=flight.update_version,
        chunk_size=io.chunk_size,
        chain_version=chain_version,
        mtime_ns=io.mtime_ns,
        slab_bytes=io.slab_bytes,
        damaged=io.damaged,
        tag=Tag(item.tag.client_id, item.tag.channel, item.tag.sequence) if item.tag is not None else None,
        waited_for=waited_for,
    )


def _all_or_error(call: Callable[[], Sequence[ChunkMeta | KvfsError | None]], count: int) -> Sequence[ChunkMeta | KvfsError | None]:
    """An error of the whole call is an error of each of its updates."""
    try:
        return call()
    except KvfsError as error:
        return [error] * count
    except Exception as error:
        log.exception("the chunk engine failed in an unforeseen way")
        return [InternalError(f"the chunk engine failed: {error}")] * count


async def _refresh(host: Host) -> None:
    try:
        await host.link.refresh(timeout_s=2.0)
    except KvfsError as error:
        log.debug("refreshing the routing: %s", error.message)


async def carry_on(host: Host, target: Target, chunk_ids: Sequence[bytes]) -> None:
    """Bring pending versions that nobody carries to their end: down the chain, or committed here when this is its last target."""
    deadline = host.clock.monotonic() + host.config.give_up_ms / 1000
    items = [Item(target, chunk_id) for chunk_id in chunk_ids]
    await Round(host, items, deadline).run()
    for item in items:
        if item.result is not None and item.result.status:
            log.warning("target %d: pending version of chunk %s stays: %s", target.target_id, item.chunk_id.hex(), item.result.message)
