"""The CRAQ replica: one target's part in its chain. A state machine without I/O; the service (storage/server.py) drives exactly this. Its place in
the chain is `member.py`; here are reads and updates.

For each chunk the driver holds a FIFO lock around receive() ... Reply, so at most one flight per chunk is under way. An update gets version
u = v + 1 at the head, is prepared at every replica (a replica may pass it on before its own copy is written), and is committed from the tail back.

Invariants, for the serving targets t1 (head) ... tn (tail) of a chain and any chunk:
- committed(t1) <= ... <= committed(tn) <= committed(t1) + 1;
- what tn has committed and ti has not, ti has as a flight or as a pending version: a version number, once it may have reached another replica,
  stays bound to one update. Only a clean refusal of the successor (it holds nothing, nor does anyone after it) frees the number;
- a replica commits what its successor acknowledged only when both have the same checksum of the whole chunk. One that finds itself different from a
  serving successor takes itself out of the chain ("ejects" itself), and comes back through resync: never silently wrong;
- a message of another chain version changes nothing; of one chunk, a forward overtaken by a later one of the same predecessor changes nothing.
Must never: reply success before everyone after this target in the chain has committed; serve reads when not serving.
"""

from __future__ import annotations

from dataclasses import replace

from kvfs.common import errors
from kvfs.common.ids import chunk_inode
from kvfs.storage.chain.fence import Fence, Turns
from kvfs.storage.chain.flight import Flight, Local
from kvfs.storage.chain.member import Member, Phase
from kvfs.storage.chain.messages import (
    Apply,
    Commit,
    Drop,
    FlightEffect,
    Forward,
    Incoming,
    Prepare,
    Reply,
    Report,
    Result,
    Stored,
    TargetEffect,
    Wait,
    from_record,
    newer,
    refusal,
)
from kvfs.storage.chain.view import ChainView, Successor
from kvfs.storage.engine.requests import UpdateKind

_HEAL_BY_REPLACE = frozenset((errors.MissingUpdate.code, errors.ChecksumMismatch.code))

BEHIND = -1
"""No target: see `ask_whom`."""


class Replica(Member):
    def __init__(self, target_id: int, *, fresh: bool) -> None:
        super().__init__(target_id, fresh=fresh)
        self.flights: dict[bytes, Flight] = {}
        self._fence = Fence()
        self._turns = Turns()
        self._sequence = 0

    def on_chain(self, view: ChainView) -> list[TargetEffect]:
        """As Member's. Flights that wait are resumed by the driver afterwards."""
        if view.version > self.version:
            self._fence.clear()
        return super().on_chain(view)

    # --- reads -----------------------------------------------------------------------------------------------------------------------

    def ask_whom(self, chunk_id: bytes, stored: Stored) -> int:
        """Before a read, or an answer to another's question: the target to ask for the committed version (CRAQ 2.3); 0: nobody, what is committed
        here is the truth; BEHIND: nobody, but the update must end first.

        An update under way counts as pending from its first moment, since it may be committed further down before it is written here. The last
        serving target knows, except of an update that it forwarded or found: a tail that is gone may have committed it and shown it to readers. (A
        target that is syncing is never asked: it may not have got the chunk yet.)
        """
        flight = self.flights.get(chunk_id)
        if flight is None and not stored.pending_version:
            return 0
        assert self.view is not None
        last = self.view.serving[-1]
        if last != self.target_id:
            return last
        return BEHIND if flight is None or flight.unsure or not flight.clean else 0

    @property
    def knows_versions(self) -> bool:
        """Whether this is the target that others ask for committed versions: the last one serving."""
        return self.serving and (self.successor is None or self.successor.syncing)

    def committed_after(self, chunk_id: bytes, stored: Stored, tail_version: int) -> bool:
        """The tail answered: whether it has committed more than is committed here now, so that the read must come after the update."""
        flight = self.flights.get(chunk_id)
        if flight is not None and flight.kind is UpdateKind.REMOVE:
            return stored.version != 0 and tail_version == 0
        if stored.pending_version and stored.pending_removes:
            return tail_version == 0
        return tail_version > stored.version

    # --- updates ---------------------------------------------------------------------------------------------------------------------

    def screen(self, incoming: Incoming) -> Result | None:
        """Why this update cannot be taken whatever the chunk holds; None: go on. Asked before the lock is waited for, and again under it."""
        if self.view is None or not self.takes_part:
            error: type[errors.KvfsError] = errors.TargetOffline if self.phase is Phase.FAILED else errors.TargetNotServing
            return refusal(error, self.version, self.problem or f"target {self.target_id} is {self.public.name.lower()}, {self.phase.value}")
        if incoming.chain_version != self.version:
            return refusal(errors.ChainVersionMismatch, self.version, f"chain version {incoming.chain_version}, here {self.version}")
        if incoming.from_target == 0:
            if not self.serving or self.predecessor != 0:
                return refusal(errors.NotChainHead, self.version)
            if incoming.kind is UpdateKind.REPLACE:
                return refusal(errors.BadRequest, self.version, "REPLACE is for replicas")
            if incoming.turn and not self._turns.admit(chunk_inode(incoming.chunk_id), incoming.turn):
                return refusal(errors.StaleUpdate, self.version, f"turn {incoming.turn} of a truncation: another metadata service has a later one")
        elif incoming.kind is UpdateKind.CREATE:
            return refusal(errors.BadRequest, self.version, "CREATE is for the head")
        elif incoming.from_target != self.predecessor:
            return refusal(errors.ChainVersionMismatch, self.version, f"target {incoming.from_target} is not before {self.target_id}")
        return None

    def receive(self, incoming: Incoming, stored: Stored) -> tuple[Flight, list[FlightEffect]]:
        """An update has the chunk's lock. A flight with `recovery` set comes first: run it to its reply, read `stored` anew, call again."""
        answer = self.screen(incoming)
        if answer is None and incoming.from_target == 0:
            if stored.pending_version and self._duplicate(incoming, stored) is None:
                return self.recover(incoming.chunk_id, stored)
            answer = self._screen_client(incoming, stored)
        elif answer is None:
            answer = self._screen_forward(incoming, stored)
        version = incoming.update_version if incoming.from_target else stored.version + 1
        kind = UpdateKind.WRITE if incoming.kind is UpdateKind.CREATE else incoming.kind  # the question was answered here, at the head
        flight = Flight(incoming.chunk_id, kind, version, incoming)
        if answer is not None:
            flight.done = True
            effects: list[FlightEffect] = [Reply(flight, answer)]
            return flight, [Report(), *effects] if self.phase is Phase.EJECTED else effects
        flight.clean = stored.pending_version == 0
        self.flights[flight.chunk_id] = flight
        return flight, self._advance(flight)

    def recover(self, chunk_id: bytes, stored: Stored) -> tuple[Flight, list[FlightEffect]]:
        """A pending version that nobody carries (its driver gave up, or the process died): carry it to its end. Needs the chunk's lock."""
        kind = UpdateKind.REMOVE if stored.pending_removes else UpdateKind.REPLACE
        flight = Flight(chunk_id, kind, stored.pending_version, None)
        flight.local, flight.length, flight.checksum = Local.PREPARED, stored.pending_length, stored.pending_checksum
        flight.clean, flight.as_replace = False, kind is not UpdateKind.REMOVE
        self.flights[chunk_id] = flight
        return flight, self._advance(flight)

    def _duplicate(self, incoming: Incoming, stored: Stored) -> Result | None:
        if incoming.tag is None or newer(incoming.tag, stored.tag_sequence):
            return None
        if incoming.tag.sequence == stored.tag_sequence:
            return from_record(stored.tag_result, self.version, stored)
        return refusal(errors.StaleUpdate, self.version, f"sequence {incoming.tag.sequence} came after {stored.tag_sequence}")

    def _screen_client(self, incoming: Incoming, stored: Stored) -> Result | None:
        duplicate = self._duplicate(incoming, stored)
        if duplicate is not None:
            return duplicate
        nothing = incoming.kind is UpdateKind.REMOVE or (incoming.kind is UpdateKind.TRUNCATE and incoming.length == 0)
        if nothing and stored.version == 0:
            return Result(chain_version=self.version)
        if not nothing and stored.version == 0 and not incoming.whole and self.view is not None and self.view.lost(incoming.chunk_id):
            # The bytes around would read as zeros from then on.
            return refusal(errors.ChunkLost, self.version, f"chunk {incoming.chunk_id.hex()} was lost: remove its file and write it anew")
        if incoming.kind is UpdateKind.CREATE and stored.version:
            refused = refusal(errors.AlreadyExists, self.version, f"chunk {incoming.chunk_id.hex()} is there already")
            return replace(refused, version=stored.version, length=stored.length, checksum=stored.checksum)
        return None

    def _screen_forward(self, incoming: Incoming, stored: Stored) -> Result | None:
        update, here = incoming.update_version, stored.version
        if not self._fence.admit(incoming.chunk_id, incoming.sequence):
            return refusal(errors.StaleUpdate, self.version, "a later forward of this chunk came first")
        if self.syncing:
            # The predecessor is right whatever is here; but only what does not depend on what is here can be taken.
            if incoming.kind in (UpdateKind.REPLACE, UpdateKind.REMOVE) or (incoming.kind is UpdateKind.TRUNCATE and here == update - 1 and here):
                return None
            return refusal(errors.MissingUpdate, self.version, "syncing: send the whole chunk")
        if incoming.kind is UpdateKind.REMOVE and here == 0 and stored.pending_version == 0:
            return Result(0, update, self.version)
        if update == here + 1:
            return None
        if update == here:
            # Committed here, and the acknowledgement was lost: the sender compares the checksums.
            return Result(0, here, self.version, stored.length, stored.checksum)
        if update > here + 1:
            # The predecessor committed what this target acknowledged and does not have: it lost something. Out, and back through resync.
            self.eject(f"target {self.target_id} lacks version {update - 1} of chunk {incoming.chunk_id.hex()}: it has {here}")
            return self._absent()
        return Result(errors.StaleUpdate.code, here, self.version, message=f"version {update} came, {here} is committed here")

    def prepared(self, flight: Flight, length: int, checksum: int) -> list[FlightEffect]:
        flight.local, flight.length, flight.checksum = Local.PREPARED, length, checksum
        return self._advance(flight)

    def prepare_failed(self, flight: Flight, error: errors.KvfsError) -> list[FlightEffect]:
        flight.local, flight.error = Local.FAILED, refusal(error, self.version)
        return self._advance(flight)

    def applied(self, flight: Flight, length: int, checksum: int) -> list[FlightEffect]:
        flight.length, flight.checksum = length, checksum
        return self.committed(flight)

    def forwarded(self, flight: Flight, result: Result) -> list[FlightEffect]:
        """The successor answered."""
        flight.forwarding = False
        if result.status == 0:
            flight.acked_by, flight.acked = flight.forward_to, result
            return self._advance(flight)
        if flight.forward_version != self.version:
            return self._advance(flight)  # it spoke of a chain that is no more
        refused = result.clean and flight.clean
        if refused:
            flight.unsure = False
        if result.status in _HEAL_BY_REPLACE and flight.error is None and not flight.as_replace and flight.kind is not UpdateKind.REMOVE:
            # It cannot apply the update to what it has, or the bytes went wrong on the way: it gets the whole chunk, if all is well here.
            flight.as_replace = True
            return self._advance(flight)
        if refused:
            if flight.error is None:
                flight.error = result
            return self._advance(flight)
        if result.status == errors.StaleUpdate.code and result.version > flight.update_version:
            here = f"version {flight.update_version} of chunk {flight.chunk_id.hex()} was about to be written"
            return self._diverged(flight, f"{here}, its successor has {result.version}")
        return self._wait(flight, refresh=result.chain_version > self.version)

    def forward_failed(self, flight: Flight) -> list[FlightEffect]:
        """No answer: the successor may have done it or not."""
        flight.forwarding = False
        if flight.forward_version != self.version:
            return self._advance(flight)
        return self._wait(flight, refresh=False)

    def spoiled(self, flight: Flight) -> list[FlightEffect]:
        """Nothing was sent: the pending version here does not have its checksums any more. Whoever has the bytes must not be kept out by the lock."""
        flight.forwarding = False
        if not flight.recovery:
            # What came is still at hand: it is prepared once more. The number stays bound by what was prepared before.
            flight.local, flight.clean = Local.NONE, False
        elif self.predecessor and self.takes_part:
            # The predecessor has it too, and sends it again.
            what = f"version {flight.update_version} of chunk {flight.chunk_id.hex()} does not have its checksums"
            return self._finish(flight, refusal(errors.ForwardFailed, self.version, what))
        # A head must not leave the chain for it: a successor that it filled meanwhile may have kept the update's tag without the update, and would
        # answer the client's retry.
        return self._wait(flight, refresh=False)

    def committed(self, flight: Flight) -> list[FlightEffect]:
        return self._finish(flight, Result(0, flight.update_version, self.version, flight.length, flight.checksum))

    def commit_failed(self, flight: Flight, error: errors.KvfsError) -> list[FlightEffect]:
        return self._finish(flight, refusal(errors.TargetOffline, self.version, error.message))

    def resume(self, flight: Flight) -> list[FlightEffect]:
        """After Wait: the chain changed or time passed."""
        flight.waiting = False
        return self._advance(flight)

    def give_up(self, flight: Flight) -> list[FlightEffect]:
        """Its time is over: it ends at the next point where it can. A pending version stays, to be recovered."""
        flight.hopeless = True
        return self._advance(flight)

    def abandon(self, flight: Flight) -> None:
        """Its driver is being ended. A pending version stays, to be recovered."""
        flight.done = True
        if self.flights.get(flight.chunk_id) is flight:
            del self.flights[flight.chunk_id]

    def _advance(self, flight: Flight) -> list[FlightEffect]:
        """Everything that this flight can do now."""
        if flight.done or flight.local is Local.COMMITTING:
            return []
        idle = flight.local is not Local.BUSY and not flight.forwarding  # the lock must cover what is under way
        if not self.takes_part:
            return self._finish(flight, self._absent()) if idle else []
        if flight.error is not None:
            return self._end_failed(flight) if idle else []
        if flight.hopeless and flight.waiting:
            return self._finish(flight, refusal(errors.ForwardFailed, self.version, "the successor did not answer in time")) if idle else []
        successor = self.successor
        if successor is None or flight.acked_by == successor.target_id:
            if flight.local is Local.PREPARED:
                if successor is not None and flight.acked.checksum != flight.checksum:
                    return self._disagree(flight, successor)
                flight.local = Local.COMMITTING
                return [Commit(flight)]
            if flight.local is Local.NONE:
                flight.local = Local.BUSY
                return [self._apply(flight) if successor is None else Prepare(flight)]
            return []
        effects: list[FlightEffect] = []
        if not flight.forwarding and not flight.waiting and (flight.local is Local.PREPARED or self._may_overlap(flight, successor)):
            effects.append(self._forward(flight, successor))
        if flight.local is Local.NONE:
            flight.local = Local.BUSY
            effects.append(Prepare(flight))
        return effects

    def _apply(self, flight: Flight) -> Apply:
        return Apply(flight, forced=self.syncing and flight.kind in (UpdateKind.REPLACE, UpdateKind.REMOVE))

    def _may_overlap(self, flight: Flight, successor: Successor) -> bool:
        """Send it on before the local copy is written: when nothing but a failing disk could keep us from writing it."""
        incoming = flight.incoming
        if incoming is None or not incoming.roomy or flight.as_replace:
            return False
        return not successor.syncing and flight.kind is not UpdateKind.REPLACE

    def _forward(self, flight: Flight, successor: Successor) -> Forward:
        kind = flight.kind
        if flight.as_replace or (successor.syncing and kind is UpdateKind.WRITE):
            kind, flight.as_replace = UpdateKind.REPLACE, True
        self._sequence += 1
        flight.forwarding, flight.unsure = True, True
        flight.forward_to, flight.forward_version = successor.target_id, self.version
        return Forward(flight, successor.target_id, kind, self.version, self._sequence, successor.syncing)

    def next_sequence(self) -> int:
        """For what resync sends: it shares the fence with forwards."""
        self._sequence += 1
        return self._sequence

    def _wait(self, flight: Flight, *, refresh: bool) -> list[FlightEffect]:
        flight.waiting = True
        return self._advance(flight) if flight.hopeless else [Wait(flight, refresh)]

    def _end_failed(self, flight: Flight) -> list[FlightEffect]:
        assert flight.error is not None
        if flight.local is Local.PREPARED:  # the successor refused: nobody after us has it
            return [Drop(flight), *self._finish(flight, flight.error)]
        successor = self.successor
        if flight.unsure and successor is not None and not successor.syncing:
            here = f"version {flight.update_version} of chunk {flight.chunk_id.hex()} failed: {flight.error.message}"
            return self._diverged(flight, f"{here}; its successor may have it")
        if not flight.clean and flight.error.clean:
            return self._finish(flight, refusal(errors.ForwardFailed, self.version, flight.error.message))
        return self._finish(flight, flight.error)

    def _disagree(self, flight: Flight, successor: Successor) -> list[FlightEffect]:
        """The successor committed other bytes than are here."""
        if not flight.as_replace and successor.syncing and flight.kind is not UpdateKind.REMOVE:
            flight.as_replace, flight.acked_by = True, 0
            return self._advance(flight)
        what = f"chunk {flight.chunk_id.hex()} version {flight.update_version}"
        text = f"checksum of {what} is {flight.checksum:016x}, its successor has {flight.acked.checksum:016x}"
        if successor.syncing:
            return self._finish(flight, refusal(errors.ForwardFailed, self.version, text))
        return self._diverged(flight, text)

    def _diverged(self, flight: Flight, problem: str) -> list[FlightEffect]:
        self.eject(f"target {self.target_id} differs from its successor: {problem}")
        return [Report(), *self._finish(flight, self._absent())]

    def _absent(self) -> Result:
        error = errors.TargetOffline if self.phase is Phase.FAILED else errors.TargetNotServing
        return refusal(error, self.version, self.problem or f"target {self.target_id} left the chain")

    def _finish(self, flight: Flight, result: Result) -> list[FlightEffect]:
        self.abandon(flight)
        return [Reply(flight, result)]
