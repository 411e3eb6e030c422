"""What is computed next: the engine's protocol core. State and event in, work and effects out; no I/O, no torch, no clock.

Owns `Scheduler`, `Limits` and `Effects`. Invariants:
  - a request that was accepted ends with exactly one finished event, or, handed over, with its one token;
  - requests are admitted in the order of their arrival, and only with all pages reserved that their tokens so far need; only one that the store is
    still asked about, or whose prefix is being read for another one, is passed by;
  - every step decodes a token of each running answer and fills up with chunks of prompts, the oldest first;
  - when an answer needs one page more and none is free, the youngest running request gives its pages back and is computed anew later: the oldest
    always goes on, so every request ends;
  - a page that others may find is never written to; pages that the store reads or writes stay held until it has ended, whatever became of their
    request;
  - at most `waiting` new requests wait, `running` have pages, `step_tokens` tokens are computed in a step.
Belongs to the engine's trio thread. While a step is under way (`step` returned it, neither `done` nor `failed` was called) all else may be called.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import attrgetter

from kvfs.common.errors import InvalidArgument, Overloaded
from kvfs.inference.cache.format import PAGE_TOKENS
from kvfs.inference.cache.pages import Pages
from kvfs.inference.engine.offers import Offers
from kvfs.inference.engine.sequence import Fetch, Save, Sequence, State, Work, Write
from kvfs.inference.engine.stats import EngineLoad, EngineStats
from kvfs.inference.request import Finish, Request, TokenEvent
from kvfs.kvcache.keys import chain

_AGE = attrgetter("number")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    context: int
    """Tokens of a prompt and its answer at most, by the model."""
    vocabulary: int
    stop_tokens: frozenset[int]
    """The model's end-of-sequence tokens."""
    step_tokens: int
    running: int
    waiting: int
    store: bool
    """There is one to ask."""


@dataclass(slots=True)
class Effects:
    """What is to be done outside, in this order."""

    events: list[TokenEvent] = field(default_factory=list)
    lookups: list[Sequence] = field(default_factory=list)
    """Ask the store which of their pages it has: `looked_up`."""
    fetches: list[Fetch] = field(default_factory=list)
    """`arriving`, if the first layers are there, and `fetched`."""
    writes: list[Write] = field(default_factory=list)
    """`written`."""
    saves: list[Save] = field(default_factory=list)
    """`saved`."""


class Scheduler:
    def __init__(self, limits: Limits, pages: Pages, worth: Callable[[int], int] = int) -> None:
        """`worth`: of so many pages in the store after those in memory, how many are read sooner than computed."""
        self.context = min(limits.context, pages.count * PAGE_TOKENS)
        self.stats = EngineStats()
        self._limits = limits
        self._running_max = min(limits.running, limits.step_tokens)  # so that each of them gets its token in every step
        self._pages = pages
        self._offers = Offers(pages)
        self._worth = worth
        self._by_id: dict[str, Sequence] = {}
        self._arrived = 0
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        """Both by age."""
        self._apart: set[Sequence] = set()
        """FETCHING or SAVING."""
        self._on_the_way: set[bytes] = set()
        """Keys of pages that are being fetched."""
        self._effects = Effects()

    # --- requests come and go -------------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """One that is here already is joined. InvalidArgument: it can never be answered; Overloaded: not now."""
        if request.id in self._by_id:
            return
        tokens = [*request.prompt, *request.answered]
        self._check(request, tokens)
        if len(self._waiting) >= self._limits.waiting:
            raise Overloaded(f"{len(self._waiting)} requests wait already, and no more may: try again in a moment, or ask another worker")
        sequence = Sequence(request, self._arrived, tokens, chain(tokens, PAGE_TOKENS, salt=request.salt))
        self._arrived += 1
        self._by_id[request.id] = sequence
        self._waiting.append(sequence)
        here = len(self._pages.prefix(sequence.reusable_keys()))
        if self._limits.store and (here < sequence.reusable or sequence.tail):
            sequence.stored = None
            self._effects.lookups.append(sequence)

    def _check(self, request: Request, tokens: list[int]) -> None:
        if len(tokens) >= self.context:
            raise InvalidArgument(
                f"the prompt and what is answered have {len(tokens)} tokens: at most {self.context - 1}, so that one more fits into the context"
            )
        if min(tokens) < 0 or max(tokens) >= self._limits.vocabulary:
            raise InvalidArgument(f"the prompt has token {min(tokens) if min(tokens) < 0 else max(tokens)}: 0 to {self._limits.vocabulary - 1} exist")

    def cancel(self, request_id: str) -> None:
        """Its answer ends, with an event, at once or when the step under way is done. Nothing if it ended already."""
        sequence = self._by_id.get(request_id)
        if sequence is None:
            return
        if sequence.in_step:
            sequence.ending = Finish.CANCELLED
        else:
            self._end(sequence, Finish.CANCELLED)

    def flush(self) -> None:
        """No page is found in memory any more."""
        self._pages.forget()

    # --- what the store says ----------------------------------------------------------------------------------------------------------

    def looked_up(self, sequence: Sequence, pages: int, tail: bool) -> None:
        """The store has the first so many full pages, and the unfinished one."""
        sequence.stored = min(pages, sequence.reusable)
        sequence.tail_stored = tail and sequence.stored == sequence.reusable

    def arriving(self, fetch: Fetch) -> None:
        """The first layers are there: the rest of the prompt may be computed, waiting for the others layer by layer."""
        if fetch.sequence.fetch is fetch:
            self._start(fetch.sequence)

    def fetched(self, fetch: Fetch, ok: bool) -> None:
        """Nothing writes into its pages any more. Once for each fetch."""
        sequence = fetch.sequence
        if sequence.fetch is fetch:
            if sequence.in_step:
                sequence.fetch_ended = ok
            elif ok:
                self._arrived_whole(sequence)
                self._start(sequence)
            else:
                self._compute_instead(sequence)
        self._on_the_way.difference_update(fetch.keys)
        if not ok:
            self._expect_no_more(set(fetch.keys))
        self._pages.release(fetch.pages)

    def written(self, write: Write, stored: int) -> None:
        """So many of its pages, from the first on, are in the store; the others were given up. Once for each write."""
        self._offers.written(write, stored)

    def saved(self, save: Save) -> None:
        """As far as it could be. Once for each save."""
        sequence = save.sequence
        if sequence.state is State.SAVING:
            self._leave(sequence)
            self.stats.handed_over += 1
            self._effects.events.append(save.event)
        self._pages.release(save.pages)

    # --- steps ------------------------------------------------------------------------------------------------------------------------

    def step(self) -> list[Work]:
        """The next one; empty: nothing can be computed before something else happens. Requests whose last layers are still being read are computed
        together, and only when there is nothing else: they may have to wait, and nobody waits with them."""
        self._admit()
        return self._step(arriving=False) or self._step(arriving=True)

    def _step(self, *, arriving: bool) -> list[Work]:
        works: list[Work] = []
        for sequence in list(self._running):
            if sequence.left == 1 and sequence.state is State.RUNNING and (sequence.fetch is not None) == arriving and self._room(sequence):
                works.append(self._work(sequence, 1))
        budget = self._limits.step_tokens - len(works)
        coming: set[bytes] = set()
        for sequence in self._running:
            if budget <= 0:
                break
            if sequence.in_step or (sequence.fetch is not None) != arriving or not self._ready(sequence, coming):
                continue
            count = min(budget, sequence.left)
            works.append(self._work(sequence, count))
            budget -= count
            coming.update(sequence.key(place) for place in range(sequence.computed // PAGE_TOKENS, (sequence.computed + count) // PAGE_TOKENS))
        return works

    def done(self, works: Iterable[Work], tokens: Iterable[int | None], broken: Iterable[Sequence] = ()) -> None:
        """The step is computed. `tokens`: for each work the next token, if it was to be chosen. `broken`: read from the store in vain, so that what
        was computed after it is worth nothing."""
        lost = set(broken)
        for work, token in zip(works, tokens, strict=True):
            sequence = work.sequence
            sequence.in_step = False
            if sequence.ending is not None:
                self._end(sequence, sequence.ending)
            elif sequence.fetch_ended is False or sequence in lost:
                self._compute_instead(sequence)
            else:
                if sequence.fetch is not None:  # every layer of it was waited for
                    self._arrived_whole(sequence)
                self._computed(sequence, work, token)

    def postponed(self, works: Iterable[Work]) -> None:
        """The step was given up, as layers that it waited for were long in coming: its requests go on when all is there."""
        for work in works:
            sequence = work.sequence
            sequence.in_step = False
            if sequence.ending is not None:
                self._end(sequence, sequence.ending)
            elif sequence.fetch_ended is False:
                self._compute_instead(sequence)
            elif sequence.fetch_ended:
                self._arrived_whole(sequence)
            elif sequence.fetch is not None:
                sequence.computed -= sequence.fetch.tokens
                sequence.state = State.FETCHING
                self._running.remove(sequence)
                self._apart.add(sequence)

    def failed(self, works: Iterable[Work], message: str) -> None:
        """The step ended with an error of the model's: so do its requests."""
        for work in works:
            work.sequence.in_step = False
            self._end(work.sequence, work.sequence.ending or Finish.ERROR, message)

    def drain(self) -> Effects:
        """What is to be done since the last call."""
        effects, self._effects = self._effects, Effects()
        return effects

    def load(self) -> EngineLoad:
        return EngineLoad(
            waiting=len(self._waiting),
            running=len(self._running) + len(self._apart),
            waiting_tokens=sum(sequence.to_compute for sequence in self._by_id.values() if sequence.left > 1),
            pages_used=self._pages.used,
            pages=self._pages.count,
            pages_cached=self._pages.named,
        )

    # --- admission ----------------------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        place = 0
        while place < len(self._waiting) and len(self._running) + len(self._apart) < self._running_max:
            sequence = self._waiting[place]
            found = self._pages.prefix(sequence.reusable_keys())
            if sequence.stored is None or (len(found) < sequence.reusable and sequence.key(len(found)) in self._on_the_way):
                place += 1
            elif self._reserve(sequence, found):
                del self._waiting[place]
            else:
                return

    def _reserve(self, sequence: Sequence, found: list[int]) -> bool:
        """All pages of its tokens so far: those in memory, those that the store has, and empty ones. One is left for each that runs already."""
        idle = sum(not self._pages.holders(page) for page in found)
        need = sequence.pages_needed - len(found)
        if self._pages.free - idle < need + len(self._running) + len(self._apart):
            return False
        self._pages.hold(found)
        empty = self._pages.take(need)
        assert empty is not None, f"{need} pages were free and are not"
        sequence.pages = found + empty
        sequence.known = len(found)
        sequence.computed = len(found) * PAGE_TOKENS
        self._count(sequence, sequence.computed, 0)
        if not self._fetch(sequence):
            self._start(sequence)
        return True

    def _fetch(self, sequence: Sequence) -> bool:
        """Has the store read what it has beyond memory, as far as that is worth it. False: nothing."""
        assert sequence.stored is not None
        here, stored = sequence.known, max(sequence.stored, sequence.known)
        pages = self._worth(stored - here + sequence.tail_stored)
        tail = sequence.tail if sequence.tail_stored and here + pages > stored else []
        keys = [sequence.key(place) for place in range(here, min(here + pages, stored))]
        if not keys and not tail:
            return False
        before = here + len(keys)
        own = sequence.pages[here : before + bool(tail)]
        sequence.fetch = Fetch(sequence, keys, own, tail, sequence.parent(before))
        sequence.state = State.FETCHING
        self._pages.hold(own)
        self._apart.add(sequence)
        self._on_the_way.update(keys)
        self._effects.fetches.append(sequence.fetch)
        return True

    def _start(self, sequence: Sequence) -> None:
        """It has its pages and takes part in steps from now on."""
        if sequence.state is not State.RUNNING:
            if sequence.fetch is not None:  # its own layers are waited for where they are needed
                sequence.computed += sequence.fetch.tokens
            sequence.state = State.RUNNING
            self._apart.discard(sequence)
            insort(self._running, sequence, key=_AGE)

    def _arrived_whole(self, sequence: Sequence) -> None:
        """All that it fetched is there, and may be found by others."""
        fetch, sequence.fetch, sequence.fetch_ended = sequence.fetch, None, None
        assert fetch is not None
        if sequence.state is State.FETCHING:
            sequence.computed += fetch.tokens
        for page, key in zip(fetch.pages, fetch.keys, strict=False):
            self._pages.name(page, key)
        self._offers.there(fetch.keys)
        sequence.known += len(fetch.keys)
        self._count(sequence, 0, fetch.tokens)

    def _compute_instead(self, sequence: Sequence) -> None:
        """The store failed it: as if the store had nothing."""
        self.stats.failed_fetches += 1
        sequence.stored, sequence.tail_stored = 0, False
        self._again(sequence)

    def _expect_no_more(self, keys: set[bytes]) -> None:
        """Those who waited for these pages do not try one after another: they are computed, once."""
        for sequence in self._waiting:
            for place in range(sequence.stored or 0):
                if sequence.keys[place] in keys:
                    sequence.stored, sequence.tail_stored = place, False
                    break

    # --- what is computed -----------------------------------------------------------------------------------------------------------------

    def _work(self, sequence: Sequence, count: int) -> Work:
        sequence.in_step = True
        start, end = sequence.computed, sequence.computed + count
        return Work(sequence, start, sequence.tokens[start:end], end == len(sequence.tokens))

    def _room(self, sequence: Sequence) -> bool:
        """A place for the token to decode. False: the sequence itself had to make room."""
        while sequence.computed == len(sequence.pages) * PAGE_TOKENS:
            page = self._pages.take(1)
            if page is not None:
                sequence.pages += page
                return True
            youngest = self._running[-1]
            self.stats.preemptions += 1
            self._again(youngest)
            if youngest is sequence:
                return False
        return True

    def _ready(self, sequence: Sequence, coming: set[bytes]) -> bool:
        """Whether its next chunk is to be computed now: pages that others computed since it was admitted are taken over, one that someone computes
        in this very step (`coming`) is waited for."""
        while sequence.fetch is None and sequence.computed % PAGE_TOKENS == 0 and sequence.left > PAGE_TOKENS:
            place = sequence.computed // PAGE_TOKENS
            key = sequence.key(place)
            if key in coming:
                return False
            page = self._pages.find(key)
            if page is None:
                break
            self._pages.hold([page])
            self._pages.release([sequence.pages[place]])
            sequence.pages[place] = page
            sequence.known += 1
            sequence.computed += PAGE_TOKENS
            self._count(sequence, PAGE_TOKENS, 0)
        return True

    def _computed(self, sequence: Sequence, work: Work, token: int | None) -> None:
        sequence.computed += len(work.tokens)
        self.stats.computed_tokens += len(work.tokens)
        full = self._name_full(sequence)
        if token is None:
            self._write(sequence, full)
            return
        if token < 0:
            self._end(sequence, Finish.ERROR, "the model's logits are not numbers after this prompt: its weights or its cache may be damaged")
            return
        sequence.tokens.append(token)
        self._begun(sequence)
        self.stats.generated_tokens += 1
        finish = self._finish(sequence, token)
        event = sequence.event(token, finish)
        if sequence.request.hand_over and finish is None:
            self._hand_over(sequence, event)
            return
        self._write(sequence, full)
        self._effects.events.append(event)
        if finish is not None:
            self.stats.finished[finish] += 1
            self._leave(sequence)

    def _finish(self, sequence: Sequence, token: int) -> Finish | None:
        sampling = sequence.request.sampling
        if token in sampling.stop_tokens or (token in self._limits.stop_tokens and not sampling.ignore_eos):
            return Finish.STOP
        if len(sequence.tokens) - len(sequence.request.prompt) >= sampling.max_tokens or len(sequence.tokens) >= self.context:
            return Finish.LENGTH
        return None

    def _name_full(self, sequence: Sequence) -> list[int]:
        """Pages that have become full may be found, unless another one has the same content already: their places."""
        places = [
            place for place in range(sequence.known, sequence.computed // PAGE_TOKENS) if self._pages.name(sequence.pages[place], sequence.key(place))
        ]
        found = sequence.stored or 0  # some may have been computed although the store has them
        self._offers.there([sequence.key(place) for place in places if place < found])
        sequence.known = max(sequence.known, sequence.computed // PAGE_TOKENS)
        return places

    def _write(self, sequence: Sequence, places: list[int]) -> None:
        write = self._offers.of(sequence, places) if self._limits.store else None
        if write is not None:
            self._effects.writes.append(write)

    def _hand_over(self, sequence: Sequence, event: TokenEvent) -> None:
        """The answer goes on elsewhere, once its pages are in the store."""
        if not self._limits.store:
            self._leave(sequence)
            self.stats.handed_over += 1
            self._effects.events.append(event)
            return
        full = sequence.known
        tail = sequence.tokens[full * PAGE_TOKENS : sequence.computed]
        pages = sequence.pages[: full + bool(tail)]
        self._pages.hold(pages)
        self._running.remove(sequence)
        self._apart.add(sequence)
        sequence.state = State.SAVING
        self._effects.saves.append(Save(sequence, sequence.keys[:full], pages, tail, sequence.parent(full), event))

    def _count(self, sequence: Sequence, memory: int, disk: int) -> None:
        if not sequence.counted:
            sequence.memory_tokens += memory
            sequence.disk_tokens += disk

    def _begun(self, sequence: Sequence) -> None:
        """Its answer has: what of the prompt was cached is known now."""
        if sequence.counted:
            return
        sequence.counted = True
        stats, prompt, memory = self.stats, len(sequence.request.prompt), min(sequence.memory_tokens, len(sequence.request.prompt))
        stats.prompt_tokens += prompt
        stats.memory_queries += prompt
        stats.memory_hits += memory
        if self._limits.store:
            stats.disk_queries += prompt - memory
            stats.disk_hits += min(sequence.disk_tokens, prompt - memory)

    # --- where sequences go ---------------------------------------------------------------------------------------------------------------

    def _again(self, sequence: Sequence) -> None:
        """From its first token that is not in memory, when there is room."""
        self._give_back(sequence)
        if not sequence.counted:
            sequence.memory_tokens = sequence.disk_tokens = 0
        sequence.state = State.WAITING
        insort(self._waiting, sequence, key=_AGE)

    def _end(self, sequence: Sequence, finish: Finish, message: str = "") -> None:
        self.stats.finished[finish] += 1
        self._leave(sequence)
        self._effects.events.append(sequence.event(None, finish, message))

    def _leave(self, sequence: Sequence) -> None:
        if sequence.state is State.WAITING:
            self._waiting.remove(sequence)
        self._give_back(sequence)
        sequence.state = State.ENDED
        del self._by_id[sequence.request.id]

    def _give_back(self, sequence: Sequence) -> None:
        if sequence.state is State.RUNNING:
            self._running.remove(sequence)
        self._apart.discard(sequence)
        pages, sequence.pages = sequence.pages, []
        sequence.fetch, sequence.fetch_ended, sequence.computed, sequence.known = None, None, 0, 0
        self._pages.release(pages)
