"""How a change of the namespace runs: one transaction with retries, what it asks to be done after, and the leases of others.

A change whose commit is durable as soon as it was taken, and of which nobody else has to be told, is answered at once, without a turn of the event
loop; else the outcome is awaited. Invariants: a change with a request id is applied once; a lease is granted inside the transaction whose attributes
it covers, so no later change can miss it; a change is answered only when every other holder of a lease on what changed has been told, or its lease
has run out; nothing of a lost attempt reaches anyone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from kvfs.common.boundary.clock import Clock
from kvfs.common.wire import meta_pb2 as pb
from kvfs.common.wire.server import Call
from kvfs.meta.gc.cuts import Cuts
from kvfs.meta.kv.engine import Engine
from kvfs.meta.kv.transaction import Transaction
from kvfs.meta.namespace import idempotency
from kvfs.meta.namespace.leases import LeaseTable, Waits, settle
from kvfs.meta.namespace.step import Step, Surroundings
from kvfs.meta.namespace.store import InodeNumbers

REMEMBERED = ("create", "append", "make", "link", "remove", "rename", "set_xattr", "remove_xattr", "set_attr", "open", "set_layout")
"""Operations that leave a request record, by the number that the record has for them: append only."""
ROOT = pb.User()

Outcome = tuple[Any, Step]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of change: what it does, and what its reply is."""

    operation: Callable[[Step, Any], Any]
    reply: type[Any]
    record: int = -1
    """Its number in REMEMBERED; -1: to do it twice is harmless, and it leaves no record."""
    grants: bool = True
    """Whether the reply's `inode` comes with a lease."""


def remembered(name: str, operation: Callable[[Step, Any], Any], reply: type[Any] = pb.InodeReply, *, grants: bool = True) -> Kind:
    return Kind(operation, reply, REMEMBERED.index(name), grants)


class Changes:
    def __init__(
        self,
        engine: Engine,
        clock: Clock,
        leases: LeaseTable,
        numbers: InodeNumbers,
        around: Surroundings,
        cuts: Cuts,
        on_garbage: Callable[[], None],
    ) -> None:
        self.around = around
        self.files = 0
        """How many there are, counted along."""
        self.commits = 0
        self.conflicts = 0
        self._engine = engine
        self._clock = clock
        self._leases = leases
        self._numbers = numbers
        self._cuts = cuts
        self._on_garbage = on_garbage
        self._open_from_s = 0.0
        self._stamp_ns = 0

    def hold(self, seconds: float) -> None:
        """After a start: leases of an earlier run may still be trusted for that long."""
        self._open_from_s = self._clock.monotonic() + seconds

    def now_ns(self) -> int:
        """The time for records: of two changes by this process the later has the greater one, whatever the clock does (caches compare ctimes)."""
        self._stamp_ns = max(self._stamp_ns + 1, self._clock.wall_ns())
        return self._stamp_ns

    def root_step(self, txn: Transaction) -> Step:
        return Step(txn, ROOT, b"", self.now_ns(), self.around)

    def committed(self, step: Step) -> None:
        """After a change of our own: what it made stale is told, and nobody waits for it."""
        self._follow(step, b"")

    def run(self, kind: Kind, request: Any, call: Call, *, cutting: int = 0) -> Outcome | Awaitable[Outcome]:
        """The reply and the step that made it."""
        client_id = call.peer.client_id
        context = request.context
        user = context.user
        request_id = context.request_id if kind.record >= 0 else b""
        tries = 0
        made: Step | None = None

        def attempt(txn: Transaction) -> Outcome:
            nonlocal tries, made
            tries += 1
            if tries > 1:
                self.conflicts += 1
            step = Step(txn, user, client_id, self.now_ns(), self.around, cutting=cutting)
            if request_id:
                earlier = idempotency.recall(step, request_id, kind.record, kind.reply)
                if earlier is not None:
                    # A try of ours whose outcome was not known: it was applied, and what it brings with it (cuts, leases, garbage) is yet to follow.
                    step = made or step
                    step.recalled = True
                    return earlier, step
            reply = kind.operation(step, request)
            if step.measure or step.wants_cut:
                return reply, step
            if request_id:
                idempotency.remember(step, request_id, kind.record, reply)
                made = step
            if kind.grants:
                self._leases.grant(reply.inode, client_id, self._clock.monotonic())
            return reply, step

        self.commits += 1
        if self._open_from_s or self._numbers.short():
            return self._run_later(attempt, client_id)
        outcome = self._engine.transact_at_once(attempt)
        if not isinstance(outcome, tuple):
            return self._finish(outcome, client_id)
        step = outcome[1]
        if step.cuts:
            return self._cut(outcome, client_id)
        waits = self._follow(step, client_id)
        return self._settle(outcome, waits) if waits else outcome

    async def _run_later(self, attempt: Callable[[Transaction], Outcome], client_id: bytes) -> Outcome:
        left_s = self._open_from_s - self._clock.monotonic()
        if left_s > 0:
            await self._clock.sleep(left_s)
        self._open_from_s = 0.0
        await self._numbers.ensure()
        return await self._finish(self._engine.transact(attempt), client_id)

    async def _finish(self, outcome: Awaitable[Outcome], client_id: bytes) -> Outcome:
        return await self._cut(await outcome, client_id)

    async def _cut(self, outcome: Outcome, client_id: bytes) -> Outcome:
        for number in outcome[1].cuts:
            await self._cuts.carry_out(number)
        waits = self._follow(outcome[1], client_id)
        return await self._settle(outcome, waits) if waits else outcome

    async def _settle(self, outcome: Outcome, waits: Waits) -> Outcome:
        await settle(waits, self._clock.monotonic)
        return outcome

    def _follow(self, step: Step, changer: bytes) -> Waits:
        """What a committed step brings with it. Who must be waited for before the change is answered."""
        self.files += step.files_made - step.files_gone
        if step.garbage:
            self._on_garbage()
        return self._leases.revoke(step.changed, changer, self._clock.monotonic()) if step.changed else []
