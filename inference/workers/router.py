"""The router: every request has a worker, until its answer is whole.

Owns `Router` and `RouterConfig`. It is what the HTTP server calls its backend (http/backend.py). Invariants:
  - the tokens of an answer come out once and in order, whichever workers computed them;
  - a request whose worker is lost goes on at another one with the tokens that were seen: what it needs of its prefix is in the store, or computed
    again; one that was with STRIKES_MAX workers when they were lost, and got no token in between, is not tried any more, as it may be what
    killed them;
  - with prefill and decode workers, a prompt is computed by one of the first, which stores all of it and hands it over with the first token; where
    none of a kind serves, one of the other does both;
  - a new request that no worker has room for is refused (Overloaded); one whose answer has begun waits.
Belongs to one trio thread.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace

import trio

from kvfs.common.boundary.clock import Clock
from kvfs.common.boundary.random import Random
from kvfs.common.errors import InternalError, InvalidArgument, Overloaded, ServiceStopping, Unreachable
from kvfs.common.wire.channel import ChannelPool
from kvfs.inference.cache.format import PAGE_TOKENS
from kvfs.inference.http.backend import WorkerStatus
from kvfs.inference.request import Request, TokenEvent
from kvfs.inference.workers.placement import Candidate, Prefixes, choose_decode, choose_prefill
from kvfs.inference.workers.remote import RemoteWorker, WorkerLost
from kvfs.kvcache.keys import chain

STRIKES_MAX = 3
SEEN_PAGES = 1 << 20
"""Keys of pages that the router remembers some worker to have computed."""
PAUSE_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    patience_s: float = 60.0
    """How long a request waits for a worker when none serves, or none has room for one whose answer has begun."""
    requests_max: int = 4096
    """At once; more are refused."""

    def __post_init__(self) -> None:
        if self.patience_s <= 0 or self.requests_max < 1:
            raise InvalidArgument("patience_s is above 0, and requests_max at least 1")


class Router:
    def __init__(
        self, workers: Mapping[str, Sequence[str]], pool: ChannelPool, clock: Clock, random: Random, config: RouterConfig | None = None
    ) -> None:
        """`workers`: name -> addresses."""
        self.workers = {name: RemoteWorker(name, addresses, pool, clock, random) for name, addresses in workers.items()}
        self._clock = clock
        self._config = config or RouterConfig()
        self._seen = Prefixes()
        self._under_way = 0

    async def run(self) -> None:
        """Until it is cancelled."""
        async with trio.open_nursery() as nursery:
            for worker in self.workers.values():
                nursery.start_soon(worker.run)

    async def ready(self) -> None:
        """Until every worker serves."""
        for worker in self.workers.values():
            while not worker.serving:
                await worker.changed.wait()

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer at most: of the worker that can do least. 0: none was heard of yet."""
        return min((worker.status.context for worker in self.workers.values() if worker.status.context), default=0)

    async def status(self) -> list[WorkerStatus]:
        await trio.lowlevel.checkpoint()
        return [
            WorkerStatus(
                name=worker.name,
                role=worker.status.role,
                serving=worker.serving,
                waiting=worker.status.waiting,
                running=worker.status.running,
                waiting_tokens=worker.status.waiting_tokens,
                pages=worker.status.pages,
                pages_used=worker.status.pages_used,
                counters=dict(worker.status.counters),
            )
            for worker in self.workers.values()
        ]

    async def drain(self, name: str, drain: bool = True) -> None:
        """No new requests for this worker, or new ones again. InvalidArgument: there is none of that name."""
        if name not in self.workers:
            raise InvalidArgument(f"there is no worker {name}; there are {', '.join(self.workers)}")
        await self.workers[name].drain(drain)

    async def flush(self) -> None:
        """Every worker that serves forgets the prefixes in its memory; those in the store stay."""
        for worker in self.workers.values():
            if worker.serving:
                await worker.flush()

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """The answer, token by token; the last event has a finish. Overloaded, Unreachable, InvalidArgument before the first. Closing it gives the
        request up."""
        if self._under_way >= self._config.requests_max:
            raise Overloaded(f"{self._under_way} requests are under way already: try again later")
        self._under_way += 1
        try:
            async for event in self._answer(request):
                yield event
        finally:
            self._under_way -= 1

    async def _answer(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        answered = list(request.answered)
        first: TokenEvent | None = None
        strikes = attempt = 0
        before = len(answered)
        while True:
            attempt += 1
            # A name of its own for each attempt: what a lost worker may still say of an earlier one is nobody's.
            asked = replace(request, id=f"{request.id}/{attempt}", answered=tuple(answered))
            worker, asked, events = await self._place(asked, began=first is not None)
            keys = chain([*request.prompt, *answered], PAGE_TOKENS, salt=request.salt)
            for prefixes, pages in ((worker.prefixes, worker.status.pages), (self._seen, SEEN_PAGES)):
                prefixes.note(keys, pages)
            whole = over = False
            try:
                async for event, over in events:
                    if event.token is not None:
                        answered.append(event.token)
                    if first is None:
                        first = event
                    whole = event.finish is not None
                    yield replace(event, request=request.id, cached_tokens=first.cached_tokens, disk_tokens=first.disk_tokens)
                    if over:
                        break
            finally:
                if not over:
                    worker.give_up(asked.id)
            if whole:
                return
            if not over:
                # With a token more since the last loss, it is not this request that kills workers.
                strikes, before = (1 if len(answered) > before else strikes + 1), len(answered)
                if strikes >= STRIKES_MAX:
                    raise InternalError(f"{strikes} workers were lost one after the other while they computed this request: it is not tried again")

    async def _place(self, request: Request, *, began: bool) -> tuple[RemoteWorker, Request, trio.MemoryReceiveChannel[tuple[TokenEvent, bool]]]:
        """A worker that has taken the request, and the request as it took it."""
        end_s = self._clock.monotonic() + self._config.patience_s
        full: Overloaded | None = None
        keys = chain(request.prompt, PAGE_TOKENS, salt=request.salt)
        while True:
            refused: set[str] = set()
            while (choice := self._choose(request, keys, refused)) is not None:
                worker, hand_over = choice
                asked = replace(request, hand_over=hand_over)
                new = max(1, len(request.prompt) - worker.prefixes.tokens(keys))
                try:
                    return worker, asked, await worker.submit(asked, new)
                except (WorkerLost, ServiceStopping):
                    refused.add(worker.name)
                except Overloaded as error:
                    full = error
                    refused.add(worker.name)
            if full is not None and not began:
                raise full
            if self._clock.monotonic() >= end_s:
                raise full or Unreachable("no worker serves: their logs say why")
            await self._clock.sleep(PAUSE_S)

    def _choose(self, request: Request, keys: Sequence[bytes], refused: set[str]) -> tuple[RemoteWorker, bool] | None:
        """The worker, and whether it hands over after the first token."""
        serving = [worker for worker in self.workers.values() if worker.serving and worker.name not in refused]
        prefilling = [worker for worker in serving if worker.status.role != "decode"]
        decoding = [worker for worker in serving if worker.status.role != "prefill"]
        split = any(worker.status.role == "prefill" for worker in prefilling) and any(worker.status.role == "decode" for worker in decoding)
        if request.answered and decoding and split:
            chosen = choose_decode(_candidate(worker) for worker in decoding)
            hand_over = False
        else:
            among = prefilling or decoding
            chosen = choose_prefill(
                (_candidate(worker, worker.prefixes.tokens(keys)) for worker in among), len(request.prompt), self._seen.tokens(keys)
            )
            hand_over = split and not request.answered and chosen is not None and self.workers[chosen.name].status.role == "prefill"
        return None if chosen is None else (self.workers[chosen.name], hand_over)


def _candidate(worker: RemoteWorker, here: int = 0) -> Candidate:
    status = worker.status
    return Candidate(
        name=worker.name,
        waiting_tokens=status.waiting_tokens + worker.sent.tokens,
        requests=max(worker.requests, status.waiting + status.running),
        pages=max(1, status.pages),
        pages_used=status.pages_used + worker.sent.pages,
        here=here,
    )
