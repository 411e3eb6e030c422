"""What each router asked of this worker, and the tokens it has not fetched yet: a core without I/O.

Owns `Sessions` and `Session`. Invariants: an event leaves only when the router has said that it arrived, so a lost answer loses nothing; events are
numbered from 1 without a gap; a request is submitted once, however often that is asked (also after its end, for the last DONE_MAX of them); what a
session holds is bounded: a router that does not fetch for SILENT_S, or lets EVENTS_MAX events wait, has its requests given up.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable

from kvfs.common.errors import Overloaded
from kvfs.common.wire import inference_pb2 as pb
from kvfs.inference.request import TokenEvent
from kvfs.inference.workers.messages import event_to_wire

SESSIONS_MAX = 256
EVENTS_MAX = 200_000
SILENT_S = 30.0
DONE_MAX = 4096


class Session:
    def __init__(self, now_s: float) -> None:
        self.requests: set[str] = set()
        """Under way, by the router's ids."""
        self.heard_s = now_s
        self._done: OrderedDict[str, None] = OrderedDict()
        self._events: deque[pb.InferenceEvent] = deque()
        self._first = 1
        """Number of the first event that is kept."""

    def begin(self, request: str) -> bool:
        """False: it is under way, or was answered."""
        if request in self.requests or request in self._done:
            return False
        self.requests.add(request)
        return True

    def never_began(self, request: str) -> None:
        self.requests.discard(request)

    def add(self, event: TokenEvent, request: str, over: bool) -> None:
        self._events.append(event_to_wire(event, request, over))
        if over:
            self.requests.discard(request)
            self._done[request] = None
            if len(self._done) > DONE_MAX:
                self._done.popitem(last=False)

    def arrived(self, number: int) -> None:
        """Everything up to there has reached the router."""
        while self._events and self._first <= number:
            self._events.popleft()
            self._first += 1

    def take(self, limit: int) -> tuple[int, list[pb.InferenceEvent]]:
        """The oldest events, and the number of the first."""
        return self._first, [self._events[place] for place in range(min(limit, len(self._events)))]

    @property
    def waiting(self) -> int:
        return len(self._events)


class Sessions:
    def __init__(self) -> None:
        self._sessions: dict[bytes, Session] = {}

    def of(self, session: bytes, now_s: float, *, begin: bool = False) -> Session | None:
        """Found, or begun if that is asked for; it was heard of now."""
        found = self._sessions.get(session)
        if found is None:
            if not begin:
                return None
            if len(self._sessions) >= SESSIONS_MAX:
                raise Overloaded(f"{SESSIONS_MAX} routers use this worker already")
            found = self._sessions[session] = Session(now_s)
        found.heard_s = now_s
        return found

    def known(self, session: bytes) -> Session | None:
        return self._sessions.get(session)

    def forsaken(self, now_s: float) -> Iterable[tuple[bytes, Session]]:
        """Sessions whose router is gone or does not fetch; they are forgotten."""
        for name, session in list(self._sessions.items()):
            if now_s - session.heard_s > SILENT_S or session.waiting > EVENTS_MAX:
                del self._sessions[name]
                yield name, session
