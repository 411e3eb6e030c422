"""A chain of replica cores with model disks and a message queue that the test controls: the double of storage/server.py, without I/O.

Owns: what a driver must do for each effect, in its plainest form. Disk work happens at once unless the node is held; messages move only when told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import xxhash

from kvfs.common import errors
from kvfs.storage.chain import messages as m
from kvfs.storage.chain.compare import Listed
from kvfs.storage.chain.copying import AskStart, Copying, ListPage, Send, drained, sent_as
from kvfs.storage.chain.flight import Flight
from kvfs.storage.chain.locks import ChunkLocks, Ticket
from kvfs.storage.chain.messages import Incoming, Result, Stored, TagKey
from kvfs.storage.chain.replica import BEHIND, Replica
from kvfs.storage.chain.view import ChainView, PublicState
from kvfs.storage.engine.requests import UpdateKind

CHAIN = 1


def checksum(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data) & 0xFFFF


@dataclass(slots=True)
class Change:
    """The bytes of an update."""

    kind: UpdateKind
    data: bytes = b""
    offset: int = 0
    tag: TagKey | None = None
    turn: int = 0


@dataclass(slots=True)
class Pending:
    version: int
    removes: bool
    data: bytes
    tag: TagKey | None
    spoiled: bool = False
    """Its bytes do not have their checksum any more."""


class ModelDisk:
    """What survives the death of a process."""

    def __init__(self) -> None:
        self.chunks: dict[bytes, tuple[int, bytes]] = {}
        self.pending: dict[bytes, Pending] = {}
        self.tags: dict[tuple[bytes, int], tuple[int, bytes]] = {}
        self.fail_next: errors.KvfsError | None = None
        self.flip_next = False
        """The next write goes wrong unnoticed."""

    def stored(self, chunk: bytes, tag: TagKey | None) -> Stored:
        version, data = self.chunks.get(chunk, (0, b""))
        pending = self.pending.get(chunk)
        sequence, record = self.tags.get((tag.client_id, tag.channel), (-1, b"")) if tag else (-1, b"")
        stored = Stored(version, len(data), checksum(data) if version else 0, tag_sequence=sequence, tag_result=record)
        if pending is None:
            return stored
        return Stored(
            stored.version,
            stored.length,
            stored.checksum,
            pending.version,
            len(pending.data),
            0 if pending.removes else checksum(pending.data),
            pending.removes,
            sequence,
            record,
        )

    def prepare(self, chunk: bytes, version: int, change: Change) -> tuple[int, int]:
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        old = self.chunks.get(chunk, (0, b""))[1]
        data = b""
        if change.kind is UpdateKind.REPLACE:
            data = change.data
        elif change.kind is UpdateKind.TRUNCATE:
            length = len(change.data)
            data = old[:length].ljust(length, b".")
        elif change.kind is UpdateKind.WRITE:
            offset = len(old) if change.offset < 0 else change.offset  # below 0: appended, so that the content tells its history
            end = offset + len(change.data)
            data = old[:offset].ljust(offset, b".") + change.data + old[end:]
        if self.flip_next and data:
            data, self.flip_next = data[:-1] + b"?", False
        self.pending[chunk] = Pending(version, change.kind is UpdateKind.REMOVE, data, change.tag)
        return len(data), 0 if change.kind is UpdateKind.REMOVE else checksum(data)

    def commit(self, chunk: bytes) -> None:
        pending = self.pending.pop(chunk)
        if pending.removes:
            self.chunks.pop(chunk, None)
        else:
            self.chunks[chunk] = (pending.version, pending.data)
        if pending.tag is not None:
            key = (pending.tag.client_id, pending.tag.channel)
            if m.newer(pending.tag, self.tags.get(key, (-1, b""))[0]):
                self.tags[key] = (pending.tag.sequence, m.record_of(pending.version))


@dataclass(slots=True)
class Message:
    source: str
    to: str
    text: str
    deliver: Callable[[Node | None], None]
    """Called with the receiver, or None when it is dead or the message is lost."""


@dataclass(slots=True)
class Job:
    """One update's drive through one node: the double of the service's batch."""

    node: Node
    incoming: Incoming | None
    change: Change
    reply: Callable[[Result], None]
    ticket: Ticket | None = None
    first: Job | None = None


@dataclass(slots=True)
class Node:
    name: str
    target_id: int
    disk: ModelDisk
    replica: Replica
    locks: ChunkLocks = field(default_factory=ChunkLocks)
    jobs: dict[Flight, Job] = field(default_factory=dict)
    sequences: dict[Flight, int] = field(default_factory=dict)
    """Of the forward under way."""
    held: bool = False
    shelf: list[Callable[[], None]] = field(default_factory=list)
    waiting: list[Flight] = field(default_factory=list)
    resync: Iterator[object] | None = None
    resync_version: int = 0
    resync_ticket: Ticket | None = None
    alive: bool = True


class World:
    def __init__(self, names: str) -> None:
        self.lines: list[str] = []
        self.messages: list[Message] = []
        self.nodes = {name: Node(name, place + 1, ModelDisk(), Replica(place + 1, fresh=True)) for place, name in enumerate(names)}
        self.view: ChainView | None = None
        self.exits: list[str] = []
        self.careful = False
        self.asked: list[tuple[str, str, Callable[[Result | None], None]]] = []
        """Requests that were not answered: (asker, asked, what to tell the asker)."""

    def say(self, text: str) -> None:
        self.lines.append(text)

    def name_of(self, target_id: int) -> str:
        return next(name for name, node in self.nodes.items() if node.target_id == target_id)

    # --- commands --------------------------------------------------------------------------------------------------------------------

    def chain(self, version: int, states: list[tuple[str, PublicState]], only: str = "") -> None:
        view = ChainView.of(CHAIN, version, [(self.nodes[name].target_id, state) for name, state in states])
        self.view = view
        for name in only or self.nodes:
            if self.nodes[name].alive:
                self._show(self.nodes[name], view)

    def _show(self, node: Node, view: ChainView) -> None:
        before = node.replica.phase
        effects = node.replica.on_chain(view)
        if node.replica.phase is not before:
            self.say(f"{node.name}: {before.value} -> {node.replica.phase.value}")
        for effect in effects:
            self._target_effect(node, effect)
        successor = node.replica.successor.target_id if node.replica.successor is not None else 0
        for flight in list(node.jobs):
            # Nobody waits for whom is no longer the successor: it may be waiting for us.
            if flight.forwarding and flight.forward_to != successor:
                self._effects(node, node.replica.forward_failed(flight))
        for flight in list(node.waiting):
            self.resume(node, flight)

    def _target_effect(self, node: Node, effect: m.TargetEffect) -> None:
        if isinstance(effect, m.Exit):
            self.say(f"{node.name}: exit: {effect.reason}")
            self.exits.append(node.name)
        elif isinstance(effect, m.ResolveLeftovers):
            for chunk in sorted(node.disk.pending):
                if not node.locks.held((node.target_id, chunk)):
                    self.say(f"{node.name}: recover {chunk.decode()}")
                self._start(Job(node, None, Change(UpdateKind.WRITE), lambda result: None), chunk)
        elif isinstance(effect, m.DropLeftovers):
            for chunk in sorted(node.disk.pending):
                if chunk not in node.replica.flights:
                    self.say(f"{node.name}: drop {chunk.decode()} v{node.disk.pending.pop(chunk).version}")
        elif isinstance(effect, m.StartResync):
            self.say(f"{node.name}: resync of {self.name_of(effect.target_id)} at chain version {effect.chain_version}")
            self._stop_resync(node)
            node.resync_version = effect.chain_version
            node.resync = self._resync(node, effect.target_id, effect.chain_version)
            self._step(node)
        elif isinstance(effect, m.StopResync):
            self._stop_resync(node)

    def _stop_resync(self, node: Node) -> None:
        ticket, node.resync_ticket = node.resync_ticket, None
        node.resync, node.resync_version = None, 0
        if ticket is not None:
            self._leave(node, ticket)

    def update(self, name: str, chunk: bytes, change: Change, *, version: int | None = None, reply: Callable[[Result], None] | None = None) -> None:
        """A client's update arrives."""
        node = self.nodes[name]
        length = len(change.data)
        incoming = Incoming(chunk, change.kind, node.replica.version if version is None else version, length, change.tag, turn=change.turn)
        self._start(Job(node, incoming, change, reply or (lambda result: self.say(f"{name} -> client: {show(result)}"))), chunk)

    def read(self, name: str, chunk: bytes, answer: Callable[[int, bytes], None] | None = None) -> None:
        """A client's read, as the service does it."""
        node = self.nodes[name]
        done = answer or (lambda version, data: self.say(f"{name} -> client: v{version} {data!r}"))

        def refuse(why: str) -> None:
            self.say(f"{name} -> client: TargetNotServing, {why}")

        def here() -> tuple[int, bytes]:
            return node.disk.chunks.get(chunk, (0, b""))

        def settled(version: int) -> None:
            if not node.replica.serving or node.replica.committed_after(chunk, node.disk.stored(chunk, None), version):
                refuse("the update failed here")
            else:
                done(*here())

        def answered(version: int | None) -> None:
            if version is None:
                refuse("the tail does not answer")
            elif not node.replica.committed_after(chunk, node.disk.stored(chunk, None), version):
                done(*here())
            else:
                # It is committed, and our own copy is about to be.
                self._behind(node, chunk, lambda: settled(version))

        def truth() -> None:
            if not node.replica.serving or node.disk.stored(chunk, None).pending_version:
                refuse("the update did not end")
            else:
                done(*here())

        if not node.replica.serving:
            refuse(node.replica.phase.value)
            return
        tail = node.replica.ask_whom(chunk, node.disk.stored(chunk, None))
        if tail == 0:
            done(*here())
        elif tail == BEHIND:
            self._behind(node, chunk, truth)
        else:
            self._ask_version(node, tail, chunk, answered)

    def _behind(self, node: Node, chunk: bytes, then: Callable[[], None]) -> None:
        """After the update under way; one that nobody carries is carried to its end first."""
        self._start(Job(node, None, Change(UpdateKind.WRITE), lambda result: then()), chunk)

    def _ask_version(self, node: Node, tail: int, chunk: bytes, answered: Callable[[int | None], None]) -> None:
        """CRAQ 2.3: what has the last one committed?"""
        name = self.name_of(tail)

        def reply(version: int | None) -> None:
            text = f"version {chunk.decode()} v{version}" if version is not None else "not the tail"
            self.send(name, node.name, text, lambda back: answered(version if back else None))

        def deliver(receiver: Node | None) -> None:
            if receiver is None:
                answered(None)
                return

            def truth() -> None:
                stored = receiver.disk.stored(chunk, None)
                reply(None if not receiver.replica.knows_versions or stored.pending_version else stored.version)

            if not receiver.replica.knows_versions:
                reply(None)
            elif receiver.replica.ask_whom(chunk, receiver.disk.stored(chunk, None)) == BEHIND:
                self._behind(receiver, chunk, truth)
            else:
                reply(receiver.disk.stored(chunk, None).version)

        self.send(node.name, name, f"version? {chunk.decode()}", deliver)

    def kill(self, name: str) -> None:
        self.nodes[name].alive = False
        for asker, asked, _ in list(self.asked):
            if asked == name:
                self.break_connection(asker, asked)

    def break_connection(self, asker: str, asked: str) -> None:
        """The asker learns nothing more of its requests; what it sent may still arrive."""
        for entry in list(self.asked):
            if entry[:2] == (asker, asked):
                self.asked.remove(entry)
                self.send(asked, asker, "connection lost", lambda home, tell=entry[2]: tell(None))  # type: ignore[misc]

    def _ask(self, asker: Node, asked: str, tell: Callable[[Result | None], None]) -> Callable[[Result | None], None]:
        """A function that answers the asker, once."""
        entry: tuple[str, str, Callable[[Result | None], None]]

        def once(result: Result | None) -> None:
            nonlocal answered
            if not answered:
                answered = True
                if entry in self.asked:
                    self.asked.remove(entry)
                if asker.alive and self.nodes[asker.name] is asker:
                    tell(result)

        answered = False
        entry = (asker.name, asked, once)
        self.asked.append(entry)
        return once

    def restart(self, name: str) -> None:
        old = self.nodes[name]
        old.disk.pending = {chunk: pending for chunk, pending in old.disk.pending.items() if not pending.spoiled}  # engine/recovery.py
        self.nodes[name] = Node(name, old.target_id, old.disk, Replica(old.target_id, fresh=False))
        if self.view is not None:
            self._show(self.nodes[name], self.view)

    def hold(self, name: str) -> None:
        self.nodes[name].held = True

    def release(self, name: str) -> None:
        node = self.nodes[name]
        node.held = False
        shelf, node.shelf = node.shelf, []
        for work in shelf:
            work()

    def send(self, source: str, to: str, text: str, deliver: Callable[[Node | None], None]) -> None:
        self.messages.append(Message(source, to, text, deliver))

    def deliver(self, place: int, *, lose: bool = False, again: bool = False) -> None:
        message = self.messages[place] if again else self.messages.pop(place)
        node = self.nodes[message.to]
        lost = lose or not node.alive
        self.say(f"{message.source} -> {message.to}: {message.text}{'  (lost)' if lost else ''}")
        message.deliver(None if lost else node)

    def run(self, limit: int = 10_000) -> None:
        """Deliver everything, in order."""
        while self.messages and limit:
            self.deliver(0)
            limit -= 1
        assert limit, "the chain does not come to rest"

    # --- the driver ------------------------------------------------------------------------------------------------------------------

    def _start(self, job: Job, chunk: bytes) -> None:
        node = job.node
        if job.incoming is not None and (refused := node.replica.screen(job.incoming)) is not None:
            job.reply(refused)
            return
        job.ticket = node.locks.join([(node.target_id, chunk)])
        job.ticket.on_ready = lambda: self._locked(job, chunk)
        if job.ticket.ready:
            self._locked(job, chunk)

    def _locked(self, job: Job, chunk: bytes) -> None:
        if not job.node.alive:
            return
        replica, disk = job.node.replica, job.node.disk
        if job.incoming is None:
            stored = disk.stored(chunk, None)
            if not stored.pending_version:
                self._end(job, Result())
                return
            flight, effects = replica.recover(chunk, stored)
        else:
            # A disk that is about to refuse is not a roomy one; unless a dialogue says so, nothing is forwarded before such a disk was asked.
            incoming = replace(job.incoming, roomy=False) if self.careful and disk.fail_next is not None else job.incoming
            flight, effects = replica.receive(incoming, disk.stored(chunk, job.incoming.tag))
        if flight.recovery:
            pending = disk.pending[chunk]
            change = Change(UpdateKind.REMOVE if pending.removes else UpdateKind.REPLACE, pending.data, 0, pending.tag)
            first = Job(job.node, None, change, lambda result: None, first=job)
            job.node.jobs[flight] = first
        else:
            job.node.jobs[flight] = job
            if job.change.kind is UpdateKind.CREATE and not flight.done:
                job.change = replace(job.change, kind=flight.kind)  # what is written and forwarded is what the core made of it
        self._effects(job.node, effects)

    def _effects(self, node: Node, effects: list[m.FlightEffect]) -> None:
        for effect in effects:
            if not node.alive:
                return
            if isinstance(effect, m.Report):
                self.say(f"{node.name}: reports {node.replica.local_state.name.lower()}: {node.replica.problem}")
                continue
            job, flight = node.jobs[effect.flight], effect.flight
            what = f"{flight.chunk_id.decode()} v{flight.update_version}"
            if isinstance(effect, m.Prepare | m.Apply):
                self._disk(node, lambda e=effect: self._write(node, e))  # type: ignore[misc]
            elif isinstance(effect, m.Commit):
                self._disk(node, lambda f=flight: self._commit(node, f))  # type: ignore[misc]
            elif isinstance(effect, m.Drop):
                self.say(f"{node.name}: drop {what}")
                node.disk.pending.pop(flight.chunk_id, None)
            elif isinstance(effect, m.Forward):
                self._forward(node, effect, job)
            elif isinstance(effect, m.Wait):
                self.say(f"{node.name}: {what} waits for the chain to change{' (asks for routing)' if effect.refresh else ''}")
                node.waiting.append(flight)
            elif isinstance(effect, m.Reply):
                del node.jobs[flight]
                if job.first is not None:
                    if effect.result.status == 0:
                        self._locked(job.first, flight.chunk_id)
                    else:
                        self._end(job.first, effect.result)
                else:
                    self._end(job, effect.result)
        if node.alive:
            self._step(node)

    def _end(self, job: Job, result: Result) -> None:
        assert job.ticket is not None
        job.reply(result)
        self._leave(job.node, job.ticket)

    def _leave(self, node: Node, ticket: Ticket) -> None:
        for ready in node.locks.leave(ticket):
            assert ready.on_ready is not None
            ready.on_ready()

    def _disk(self, node: Node, work: Callable[[], None]) -> None:
        if node.held:
            node.shelf.append(lambda: work() if node.alive else None)
        else:
            work()

    def _write(self, node: Node, effect: m.Prepare | m.Apply) -> None:
        flight = effect.flight
        what = f"{flight.chunk_id.decode()} v{flight.update_version}"
        applies = isinstance(effect, m.Apply)
        try:
            length, digest = node.disk.prepare(flight.chunk_id, flight.update_version, node.jobs[flight].change)
        except errors.KvfsError as error:
            self.say(f"{node.name}: {what} failed: {type(error).__name__}")
            self._effects(node, node.replica.prepare_failed(flight, error))
            return
        if applies:
            node.disk.commit(flight.chunk_id)
        self.say(f"{node.name}: {'apply' if applies else 'prepare'} {what}")
        self._effects(node, (node.replica.applied if applies else node.replica.prepared)(flight, length, digest))

    def _commit(self, node: Node, flight: Flight) -> None:
        node.disk.commit(flight.chunk_id)
        self.say(f"{node.name}: commit {flight.chunk_id.decode()} v{flight.update_version}")
        self._effects(node, node.replica.committed(flight))

    def _forward(self, node: Node, effect: m.Forward, job: Job) -> None:
        flight, change = effect.flight, job.change
        if effect.kind is UpdateKind.REPLACE:
            if node.disk.pending[flight.chunk_id].spoiled:
                self.say(f"{node.name}: {flight.chunk_id.decode()} v{flight.update_version} is spoiled")
                self._effects(node, node.replica.spoiled(flight))
                return
            change = Change(UpdateKind.REPLACE, node.disk.pending[flight.chunk_id].data, 0, change.tag)
        incoming = Incoming(
            flight.chunk_id, effect.kind, effect.chain_version, len(change.data), change.tag, node.target_id, flight.update_version, effect.sequence
        )
        name = self.name_of(effect.target_id)
        node.sequences[flight] = effect.sequence
        text = f"{effect.kind.name.lower()} {flight.chunk_id.decode()} v{flight.update_version} of chain {effect.chain_version}"

        def answer(result: Result | None) -> None:
            if flight in node.jobs and flight.forwarding and node.sequences.get(flight) == effect.sequence:
                self._effects(node, node.replica.forward_failed(flight) if result is None else node.replica.forwarded(flight, result))

        self._request(node, name, text, incoming, change, answer)

    def _request(self, node: Node, name: str, text: str, incoming: Incoming, change: Change, answer: Callable[[Result | None], None]) -> None:
        once = self._ask(node, name, answer)

        def deliver(receiver: Node | None) -> None:
            if receiver is None:
                once(None)
                return

            def reply(result: Result) -> None:
                self.send(name, node.name, show(result), lambda back: once(result if back else None))

            self._start(Job(receiver, incoming, change, reply), incoming.chunk_id)

        self.send(node.name, name, text, deliver)

    def resume(self, node: Node, flight: Flight) -> None:
        node.waiting.remove(flight)
        if not flight.done:
            self._effects(node, node.replica.resume(flight))

    def give_up(self, node: Node, flight: Flight) -> None:
        node.waiting.remove(flight)
        self._effects(node, node.replica.give_up(flight))

    # --- resync ----------------------------------------------------------------------------------------------------------------------

    def _step(self, node: Node) -> None:
        """The resync goes on by itself except where it waits for an answer; 'barrier' is looked at again after every effect."""
        while node.resync is not None:
            waits = next(node.resync, "end")
            if waits == "end":
                node.resync = None
            if waits in ("message", "barrier", "end"):
                return

    def old_flights(self, node: Node) -> set[Flight]:
        """Updates that began before the successor was there, and do not pass to it."""
        return set(node.replica.flights.values())

    def _resync(self, node: Node, target_id: int, version: int) -> Iterator[object]:
        name = self.name_of(target_id)
        replica = node.replica
        before = self.old_flights(node)
        while not drained(before):
            yield "barrier"
        current = lambda: node.alive and node.resync_version == version  # noqa: E731
        results: list[Result | None] = []

        def ask(text: str, answer_of: Callable[[Node], Result]) -> None:
            def take(result: Result | None) -> None:
                if current():
                    results.append(result)
                    self._step(node)

            once = self._ask(node, name, take)

            def deliver(receiver: Node | None) -> None:
                if receiver is None:
                    once(None)
                    return
                result = answer_of(receiver)
                self.send(name, node.name, show(result), lambda home: once(result if home else None))

            self.send(node.name, name, text, deliver)

        def sync(step: str) -> Callable[[Node], Result]:
            def answer_of(receiver: Node) -> Result:
                if step == "sync_done":
                    for key, (sequence, record) in node.disk.tags.items():
                        if sequence > receiver.disk.tags.get(key, (-1, b""))[0]:
                            receiver.disk.tags[key] = (sequence, record)
                result, effects = getattr(receiver.replica, step)(version, node.target_id)
                for effect in effects:
                    self._target_effect(receiver, effect)
                return result

            return answer_of

        def copied(chunk: bytes) -> Iterator[object]:
            """Sends one chunk as it is now. Leaves the answer in `results`."""
            ticket = node.resync_ticket = node.locks.join([(node.target_id, chunk)])
            ticket.on_ready = lambda: self._step(node)
            while not ticket.ready:
                yield "barrier"
            update, data = node.disk.chunks.get(chunk, (0, b""))
            kind = sent_as(update)
            incoming = Incoming(chunk, kind, version, len(data), None, node.target_id, update, replica.next_sequence())

            def answer(result: Result | None) -> None:
                if current() and node.resync_ticket is ticket:
                    results.append(result)
                    node.resync_ticket = None
                    self._leave(node, ticket)
                    self._step(node)

            self._request(node, name, f"resync {kind.name.lower()} {chunk.decode()} v{update}", incoming, Change(kind, data), answer)

        listed: list[Listed] = []

        def list_chunks(of: Node) -> Result:
            listed[:] = [Listed(chunk, update, len(data), checksum(data)) for chunk, (update, data) in sorted(of.disk.chunks.items())]
            return Result()

        while True:  # from the beginning until it went through without a loss
            results.clear()
            copying = Copying(at_once=1, batch_bytes=1 << 20, batch_chunks=1)
            effects = copying.begin()
            while effects:
                effect = effects.pop(0)
                if isinstance(effect, ListPage) and effect.here:
                    list_chunks(node)
                    effects += copying.page(True, listed, b"", False)
                    continue
                if isinstance(effect, AskStart):
                    ask("sync-start", sync("sync_start"))
                elif isinstance(effect, ListPage):
                    ask("list", list_chunks)
                elif isinstance(effect, Send):
                    yield from copied(*effect.chunks)
                else:
                    ask("sync-done", sync("sync_done"))
                while not results:
                    yield "message"
                result = results.pop()
                if result is None or result.status:
                    break
                if isinstance(effect, AskStart):
                    effects += copying.started()
                elif isinstance(effect, ListPage):
                    effects += copying.page(False, listed, b"", False)
                elif isinstance(effect, Send):
                    effects += copying.sent(effect.chunks)
                else:
                    effects += copying.done()
            if copying.over:
                return


def show(result: Result) -> str:
    if result.status:
        return errors.BY_CODE[result.status].__name__
    return f"ok v{result.version} {result.length} bytes" if result.version else "ok"
