"""The Worker service: what routers ask of the engine in this process.

Owns `WorkerService`. Invariants: an answer's tokens are told once and in order to the session that asked; a router that is gone leaves nothing
behind; a draining worker takes no new requests and ends those it has. Belongs to the engine's trio thread; it must never wait for the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import trio

from kvfs.common.boundary.clock import Clock
from kvfs.common.errors import InvalidArgument, ServiceStopping, StaleIncarnation
from kvfs.common.wire import base_pb2 as base
from kvfs.common.wire import inference_pb2 as pb
from kvfs.common.wire.server import Call
from kvfs.inference.engine.engine import Engine
from kvfs.inference.request import TokenEvent
from kvfs.inference.workers.messages import request_from_wire
from kvfs.inference.workers.sessions import Session, Sessions

log = logging.getLogger("kvfs.inference.worker")

WAIT_MS_MAX = 10_000
EVENTS_AT_ONCE = 4096
SESSION_BYTES = 16
WATCH_S = 1.0


class WorkerService:
    def __init__(self, incarnation: bytes, clock: Clock, *, model: str, role: str, space: str, waiting_max: int) -> None:
        self.incarnation = incarnation
        self.draining = False
        self._clock = clock
        self._facts = {"model": model, "role": role, "space": space, "waiting_max": waiting_max}
        self._sessions = Sessions()
        self._woken: dict[bytes, trio.Event] = {}
        self._handing_over: set[str] = set()
        self._engine: Engine | None = None
        self._counters: Callable[[], Mapping[str, float]] = dict

    def attach(self, engine: Engine, counters: Callable[[], Mapping[str, float]]) -> None:
        self._engine = engine
        self._counters = counters

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "attach comes before the service is served"
        return self._engine

    def on_events(self, events: list[TokenEvent]) -> None:
        """The engine's, after each step."""
        for event in events:
            name, _, request = event.request.partition(":")
            session = self._sessions.known(bytes.fromhex(name))
            over = event.finish is not None or event.request in self._handing_over
            if over:
                self._handing_over.discard(event.request)
            if session is not None:
                session.add(event, request, over)
                self._wake(bytes.fromhex(name))

    def _wake(self, name: bytes) -> None:
        event = self._woken.pop(name, None)
        if event is not None:
            event.set()

    async def watch(self) -> None:
        """Gives up the requests of routers that are gone."""
        while True:
            await self._clock.sleep(WATCH_S)
            for name, session in self._sessions.forsaken(self._clock.monotonic()):
                if session.requests:
                    log.warning("a router fetches no tokens any more: %d requests of it are given up", len(session.requests))
                for request in list(session.requests):
                    self._forget(name, request)
                self._wake(name)

    def _forget(self, name: bytes, request: str) -> None:
        engine_id = f"{name.hex()}:{request}"
        self._handing_over.discard(engine_id)
        self.engine.cancel(engine_id)

    def _session(self, name: bytes, incarnation: bytes, *, begin: bool = False) -> Session:
        if incarnation != self.incarnation:
            raise StaleIncarnation("this worker was started anew, and knows nothing of what was asked of the one before")
        if len(name) != SESSION_BYTES:
            raise InvalidArgument(f"a session's name has {SESSION_BYTES} bytes, not {len(name)}")
        session = self._sessions.of(name, self._clock.monotonic(), begin=begin)
        if session is None:
            raise StaleIncarnation("this worker has forgotten the session: nothing was heard of its router for too long")
        return session

    # --- methods -------------------------------------------------------------------------------------------------------------------------

    def submit(self, request: pb.SubmitRequest, call: Call) -> base.Empty:
        session = self._session(request.session, request.incarnation, begin=request.begin)
        if self.draining:
            raise ServiceStopping("this worker is drained: it takes no new requests")
        if not request.request.id:
            raise InvalidArgument("a request has an id")
        engine_id = f"{request.session.hex()}:{request.request.id}"
        asked = request_from_wire(request.request, engine_id)
        if session.begin(request.request.id):
            try:
                if asked.hand_over:
                    self._handing_over.add(engine_id)
                self.engine.submit(asked)
            except BaseException:
                self._handing_over.discard(engine_id)
                session.never_began(request.request.id)
                raise
        return base.Empty()

    async def next(self, request: pb.NextRequest, call: Call) -> pb.NextReply:
        session = self._session(request.session, request.incarnation)
        session.arrived(request.after)
        if not session.waiting:
            with trio.move_on_after(min(request.wait_ms, WAIT_MS_MAX) / 1000):
                while not session.waiting and self._sessions.known(request.session) is session:
                    await self._woken.setdefault(request.session, trio.Event()).wait()
        session.heard_s = self._clock.monotonic()
        first, events = session.take(EVENTS_AT_ONCE)
        return pb.NextReply(first=first, events=events)

    def cancel(self, request: pb.CancelRequest, call: Call) -> base.Empty:
        session = self._session(request.session, request.incarnation)
        for name in request.requests:
            if name in session.requests:
                self._forget(request.session, name)
        return base.Empty()

    def status(self, request: base.Empty, call: Call) -> pb.WorkerStatusReply:
        load = self.engine.load()
        return pb.WorkerStatusReply(
            incarnation=self.incarnation,
            draining=self.draining,
            context=self.engine.context,
            waiting=load.waiting,
            running=load.running,
            waiting_tokens=load.waiting_tokens,
            pages=load.pages,
            pages_used=load.pages_used,
            pages_cached=load.pages_cached,
            counters=dict(self._counters()),
            **self._facts,  # type: ignore[arg-type]
        )

    def drain(self, request: pb.WorkerDrainRequest, call: Call) -> base.Empty:
        if request.incarnation != self.incarnation:
            raise StaleIncarnation("this worker was started anew")
        self.draining = request.drain
        log.info("draining: no new requests are taken" if self.draining else "taking requests again")
        return base.Empty()

    def flush(self, request: base.Empty, call: Call) -> base.Empty:
        self.engine.flush()
        return base.Empty()
