"""A worker as a router sees it: its address, how it is, and the requests that are with it.

Owns `RemoteWorker`. Invariants: tokens of a request come out once and in order, whatever answers got lost on the way; when the worker is lost (it
does not answer for LOST_S, or is another incarnation), every request that was with it hears WorkerLost, exactly once, and nothing of them is
expected any more; a request that is given up is cancelled there in the background. Belongs to the router's trio thread.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from math import inf

import trio

from kvfs.common.boundary.clock import Clock
from kvfs.common.boundary.random import Random
from kvfs.common.errors import ConnectionLost, DeadlineExceeded, KvfsError, StaleIncarnation, Unreachable
from kvfs.common.wire import base_pb2 as base
from kvfs.common.wire import inference_pb2 as pb
from kvfs.common.wire.channel import ChannelPool
from kvfs.common.wire.service import method
from kvfs.inference.cache.format import PAGE_TOKENS
from kvfs.inference.request import Request, TokenEvent
from kvfs.inference.workers.messages import event_from_wire, request_to_wire
from kvfs.inference.workers.placement import Prefixes, Sent

log = logging.getLogger("kvfs.inference.router")

SUBMIT = method("Worker", "Submit")
NEXT = method("Worker", "Next")
CANCEL = method("Worker", "Cancel")
STATUS = method("Worker", "Status")
DRAIN = method("Worker", "Drain")
FLUSH = method("Worker", "Flush")
CALL_S = 2.0
WAIT_MS = 1000
LOST_S = 4.0
"""Without an answer. A step of a large model may take a second, but the service answers beside it."""
STATUS_EVERY_S = 0.3
RETRY_S = 0.2
CANCELS_MAX = 10_000


class WorkerLost(Exception):
    """What was with the worker is lost, and goes on elsewhere. Never leaves the router."""


class RemoteWorker:
    def __init__(self, name: str, addresses: Sequence[str], pool: ChannelPool, clock: Clock, random: Random) -> None:
        self.name = name
        self.addresses = tuple(addresses)
        self.prefixes = Prefixes()
        self.sent = Sent()
        self.status = pb.WorkerStatusReply()
        self.changed = trio.Event()
        """Set, and replaced, when its status is new."""
        self._pool = pool
        self._clock = clock
        self._random = random
        self._session = b""
        self._begun = False
        """The worker knows the session: it may be asked for tokens, and is, also while there are none to come, lest it forgets."""
        self._after = 0
        self._up = False
        self._answers: dict[str, trio.MemorySendChannel[tuple[TokenEvent, bool]]] = {}
        self._asked = trio.Event()
        self._cancels: list[tuple[bytes, str]] = []
        self._heard_s = 0.0

    @property
    def serving(self) -> bool:
        """It answers, and takes new requests."""
        return self._up and not self.status.draining

    @property
    def requests(self) -> int:
        """Of this router."""
        return len(self._answers)

    # --- requests --------------------------------------------------------------------------------------------------------------------------

    async def submit(self, request: Request, new_tokens: int = 0) -> trio.MemoryReceiveChannel[tuple[TokenEvent, bool]]:
        """Its events, each with whether the worker has done its part; the channel ends early when the worker is lost. Raises what the worker
        says (Overloaded, InvalidArgument, ServiceStopping), or WorkerLost. `new_tokens`: of its prompt that are probably not in the worker's memory.
        """
        if not self._up:
            raise WorkerLost(f"worker {self.name} does not answer")
        session, incarnation = self._session, self.status.incarnation
        # As large as the answer: the loop that fills it never waits for who reads it.
        send, receive = trio.open_memory_channel[tuple[TokenEvent, bool]](inf)
        self._answers[request.id] = send
        self.sent.add(request.id, new_tokens, -(-(len(request.prompt) + len(request.answered)) // PAGE_TOKENS))
        message = pb.SubmitRequest(session=session, incarnation=incarnation, request=request_to_wire(request), begin=not self._begun)
        try:
            while True:
                try:
                    await self._pool.call(self.addresses, SUBMIT, message, timeout_s=CALL_S)
                    break
                except StaleIncarnation as error:
                    if self._session == session:
                        self._lost(error.message)
                    raise WorkerLost(f"worker {self.name}: {error.message}") from None
                except KvfsError as error:
                    if not _nobody_said_no(error):
                        raise
                    if not self._up or self._session != session:
                        raise WorkerLost(f"worker {self.name} does not answer") from None
                    await self._clock.sleep(RETRY_S)  # the same id again is the same request
        except BaseException:
            self.sent.forget(request.id)
            if self._answers.pop(request.id, None) is not None:
                self._cancel(session, request.id)
            raise
        self.sent.taken(request.id, self._clock.monotonic())
        if self._session == session:
            self._begun = True
            self._asked.set()
        return receive

    def give_up(self, request: str) -> None:
        """Nobody wants the rest of its answer. Nothing if it has ended."""
        self.sent.forget(request)
        if self._answers.pop(request, None) is not None:
            self._cancel(self._session, request)

    def _cancel(self, session: bytes, request: str) -> None:
        if len(self._cancels) < CANCELS_MAX:
            self._cancels.append((session, request))

    # --- background ----------------------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until it is cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            nursery.start_soon(self._send_cancels)
            while True:
                while not (self._up and self._begun):
                    self._asked = trio.Event()
                    await self._asked.wait()
                session = self._session
                try:
                    await self._fetch(session)
                except KvfsError as error:
                    if self._session != session:
                        continue  # a late answer to an earlier one: nothing of the present one is lost
                    if isinstance(error, StaleIncarnation | ConnectionLost | Unreachable):
                        self._lost(error.message)
                    else:
                        log.info("worker %s: tokens were not fetched: %s", self.name, error.message)
                        await self._clock.sleep(RETRY_S)

    async def _fetch(self, session: bytes) -> None:
        ask = pb.NextRequest(session=session, incarnation=self.status.incarnation, after=self._after, wait_ms=WAIT_MS)
        reply = await self._pool.call(self.addresses, NEXT, ask, timeout_s=CALL_S + WAIT_MS / 1000)
        if self._session != session:
            return
        self._heard_s = self._clock.monotonic()
        for number, message in enumerate(reply.events, reply.first):
            if number <= self._after:
                continue  # of an answer that was lost on the way
            self._after = number
            answer = self._answers.get(message.request)
            if answer is not None:
                answer.send_nowait((event_from_wire(message), message.over))
                self.sent.begun(message.request)
                if message.over:
                    self.sent.forget(message.request)
                    del self._answers[message.request]
                    answer.close()

    async def _send_cancels(self) -> None:
        while True:
            if not self._cancels:
                await self._clock.sleep(0.02)
                continue
            if not self._up:  # what was lost with a connection may be going on there
                await self._clock.sleep(RETRY_S)
                continue
            session = self._cancels[0][0]
            batch = [request for of, request in self._cancels if of == session]
            self._cancels = [cancel for cancel in self._cancels if cancel[0] != session]
            message = pb.CancelRequest(session=session, incarnation=self.status.incarnation, requests=batch)
            try:
                await self._pool.call(self.addresses, CANCEL, message, timeout_s=CALL_S)
            except KvfsError as error:
                log.info("worker %s: %d requests were not cancelled: %s", self.name, len(batch), error.message)

    async def _watch(self) -> None:
        while True:
            asked_s = self._clock.monotonic()
            try:
                status = await self._pool.call(self.addresses, STATUS, base.Empty(), timeout_s=CALL_S)
            except KvfsError as error:
                # Better once too often: what goes on elsewhere finds its prefix in the store.
                if self._up and (not isinstance(error, DeadlineExceeded) or self._clock.monotonic() - self._heard_s > LOST_S):
                    self._lost(error.message)
                await self._clock.sleep(RETRY_S)
                continue
            self._heard_s = self._clock.monotonic()
            if self._up and status.incarnation != self.status.incarnation:
                self._lost("was started anew")
            self.status = status
            self.sent.told(asked_s)
            if not self._up:
                self._session, self._begun, self._after, self._up = self._random.bytes(16), False, 0, True
                log.info("worker %s (%s) serves at %s", self.name, status.role, self.addresses[-1])
            self._tell()
            await self._clock.sleep(STATUS_EVERY_S)

    def _tell(self) -> None:
        event, self.changed = self.changed, trio.Event()
        event.set()

    def _lost(self, why: str) -> None:
        if not self._up:
            return
        log.warning("worker %s is lost (%s); %d requests go on elsewhere", self.name, why, len(self._answers))
        self._up = self._begun = False
        self.prefixes.clear()
        self.sent.clear()
        answers, self._answers = self._answers, {}
        for request, answer in answers.items():
            answer.close()
            self._cancel(self._session, request)
        self._tell()

    async def drain(self, drain: bool = True) -> None:
        """No new requests, or new ones again."""
        await self._pool.call(self.addresses, DRAIN, pb.WorkerDrainRequest(incarnation=self.status.incarnation, drain=drain), timeout_s=CALL_S)

    async def flush(self) -> None:
        """It forgets the prefixes that it has in memory."""
        self.prefixes.clear()
        await self._pool.call(self.addresses, FLUSH, base.Empty(), timeout_s=CALL_S)


def _nobody_said_no(error: KvfsError) -> bool:
    """The worker did not answer; it may have heard."""
    return isinstance(error, ConnectionLost | DeadlineExceeded | Unreachable)
