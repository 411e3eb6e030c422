"""The scheduler alone: its model is a function of the tokens that really lie in the pages, its store a dictionary that is slow, forgetful and fails.

`World` checks at every step that each piece finds its own tokens in its pages and writes to no page that others may read; random lives by seed check
that every request ends with exactly its tokens, whatever happens around it.
"""

from __future__ import annotations

import os
from collections import defaultdict
from random import Random
from zlib import crc32

import pytest

from kvfs.common.errors import InvalidArgument, Overloaded
from kvfs.inference.cache.format import PAGE_TOKENS
from kvfs.inference.cache.pages import Pages
from kvfs.inference.engine.scheduler import Limits, Scheduler
from kvfs.inference.engine.sequence import Fetch, Save, Sequence, State, Work, Write
from kvfs.inference.request import Finish, Request, Sampling, TokenEvent

VOCABULARY = 50
EOS = 1
SEEDS = int(os.environ.get("KVFS_ENGINE_SEEDS", "120"))


def following(tokens: list[int]) -> int:
    """The fake model: a token that depends on all before it."""
    return crc32(bytes(tokens)) % VOCABULARY


def answer(request: Request, context: int) -> tuple[list[int], Finish]:
    tokens, prompt = [*request.prompt, *request.answered], len(request.prompt)
    while True:
        tokens.append(following(tokens))
        if tokens[-1] in request.sampling.stop_tokens or (tokens[-1] == EOS and not request.sampling.ignore_eos):
            return tokens[prompt:], Finish.STOP
        if len(tokens) - prompt == request.sampling.max_tokens or len(tokens) == context:
            return tokens[prompt:], Finish.LENGTH


def ask(name: str, prompt: list[int], max_tokens: int = 4, **fields: object) -> Request:
    sampling = Sampling(max_tokens=max_tokens, ignore_eos=bool(fields.pop("ignore_eos", False)))
    return Request(id=name, prompt=tuple(prompt), sampling=sampling, **fields)  # type: ignore[arg-type]


class World:
    """A scheduler, the memory of its pages, and a store."""

    def __init__(self, *, pages: int = 16, store: bool = False, **limits: int) -> None:
        given = {"context": 4096, "step_tokens": 64, "running": 8, "waiting": 16, **limits}
        self.limits = Limits(vocabulary=VOCABULARY, stop_tokens=frozenset({EOS}), store=store, **given)
        self.pages = Pages(pages)
        self.scheduler = Scheduler(self.limits, self.pages)
        self.memory: list[list[int]] = [[-1] * PAGE_TOKENS for _ in range(pages)]
        self.stored: dict[bytes, list[int]] = {}
        self.tails: dict[tuple[bytes, tuple[int, ...]], list[int]] = {}
        self.events: dict[str, list[TokenEvent]] = defaultdict(list)
        self.lookups: list[Sequence] = []
        self.fetches: list[Fetch] = []
        self.writes: list[Write] = []
        self.saves: list[Save] = []
        self.steps = 0
        self.unreadable: frozenset[Fetch] = frozenset()
        """Of the step under way: whoever waited for their layers was told that they will not come."""
        self.whole: set[Fetch] = set()
        """Whoever waited was told that all is there."""

    def drain(self) -> None:
        effects = self.scheduler.drain()
        for event in effects.events:
            self.events[event.request].append(event)
        self.lookups += effects.lookups
        self.fetches += effects.fetches
        self.writes += effects.writes
        self.saves += effects.saves

    def submit(self, request: Request) -> None:
        self.scheduler.submit(request)
        self.drain()

    def answer_lookup(self, place: int = 0) -> None:
        sequence = self.lookups.pop(place)
        pages = 0
        while pages < len(sequence.keys) and sequence.keys[pages] in self.stored:
            pages += 1
        self.scheduler.looked_up(sequence, pages, (sequence.parent(sequence.reusable), tuple(sequence.tail)) in self.tails)

    def read(self, fetch: Fetch) -> bool:
        """Into the pages; False: something isn't there any more."""
        content = [self.stored.get(key) for key in fetch.keys]
        if fetch.tail:
            content.append(self.tails.get((fetch.parent, tuple(fetch.tail))))
        for page, cells in zip(fetch.pages, content, strict=True):
            self.memory[page] = list(cells) if cells else [-2] * PAGE_TOKENS
        return all(content)

    def end_fetch(self, place: int = 0, *, ok: bool = True) -> None:
        fetch = self.fetches.pop(place)
        ok = ok and fetch not in self.unreadable and (fetch in self.whole or self.read(fetch))
        self.scheduler.fetched(fetch, ok)
        self.drain()

    def end_write(self, place: int = 0, *, keep: int = 1 << 30) -> None:
        """`keep`: so many of its pages."""
        write = self.writes.pop(place)
        self.stored.update({key: list(self.memory[page]) for key, page in list(zip(write.keys, write.pages, strict=True))[:keep]})
        self.scheduler.written(write, min(keep, len(write.keys)))

    def end_save(self, place: int = 0, *, keep: bool = True) -> None:
        save = self.saves.pop(place)
        if keep:
            self.stored.update({key: list(self.memory[page]) for key, page in zip(save.keys, save.pages, strict=False)})
            if save.tail:
                self.tails[save.parent, tuple(save.tail)] = list(self.memory[save.pages[-1]])
        self.scheduler.saved(save)
        self.drain()

    def begin(self) -> list[Work]:
        works = self.scheduler.step()
        self.drain()
        assert sum(len(work.tokens) for work in works) <= self.limits.step_tokens
        assert len(self.scheduler._running) + len(self.scheduler._apart) <= self.limits.running
        oldest = [sequence for sequence in self.scheduler._running if sequence.fetch is None][:1]
        assert len({work.sequence.fetch is None for work in works}) < 2, "nobody waits for another one's layers"
        assert not oldest or oldest[0] in [work.sequence for work in works], "the oldest goes on in every step"
        self.steps += bool(works)
        return works

    def compute(self, works: list[Work], unreadable: frozenset[Fetch] = frozenset()) -> tuple[list[int | None], list[Sequence]]:
        """As the model does, while the scheduler knows nothing of it."""
        self.unreadable = unreadable
        tokens: list[int | None] = []
        broken = []
        for work in works:
            sequence = work.sequence
            if sequence.fetch is not None and (sequence.fetch in unreadable or not self.read(sequence.fetch)):
                broken.append(sequence)
            elif sequence.fetch is not None:
                self.whole.add(sequence.fetch)
            end = work.start + len(work.tokens)
            assert len(sequence.pages) * PAGE_TOKENS >= end
            for position, token in enumerate(work.tokens, work.start):
                page = sequence.pages[position // PAGE_TOKENS]
                assert self.pages._keys[page] is None, "others may find this page"
                self.memory[page][position % PAGE_TOKENS] = token
            found = [self.memory[sequence.pages[position // PAGE_TOKENS]][position % PAGE_TOKENS] for position in range(end)]
            assert found == sequence.tokens[:end] or sequence in broken, "another request's latents"
            tokens.append(following(found) if work.sample and min(found) >= 0 else 0 if work.sample else None)
        return tokens, broken

    def step(self) -> list[Work]:
        works = self.begin()
        tokens, broken = self.compute(works)
        self.scheduler.done(works, tokens, broken)
        self.drain()
        return works

    def run(self) -> None:
        """Until all that can be done without the store is done."""
        while self.step():
            pass

    def tokens(self, name: str) -> list[int]:
        return [event.token for event in self.events[name] if event.token is not None]

    def check(self, request: Request) -> None:
        """It ended as it must."""
        events = self.events[request.id]
        tokens, finish = answer(request, self.scheduler.context)
        assert self.tokens(request.id) == tokens[len(request.answered) :]
        assert [event.finish for event in events] == [None] * (len(events) - 1) + [finish]
        assert [event.index for event in events] == list(range(len(request.answered), len(tokens)))
        assert all(event.disk_tokens <= event.cached_tokens <= len(request.prompt) for event in events)

    def check_idle(self) -> None:
        load = self.scheduler.load()
        assert (load.waiting, load.running, load.waiting_tokens, load.pages_used) == (0, 0, 0, 0)
        assert not self.scheduler._by_id and not self.scheduler._apart


def prompt(length: int, seed: int = 0) -> list[int]:
    return [Random(seed * 1000 + place).randrange(2, VOCABULARY) for place in range(length)]


def test_a_prompt_is_computed_in_chunks_and_then_decoded() -> None:
    world, request = World(step_tokens=50), ask("a", prompt(120))
    world.submit(request)
    chunks = [[len(work.tokens) for work in world.step()] for _ in range(3)]
    assert chunks == [[50], [50], [20]]
    world.run()
    world.check(request)
    world.check_idle()


def test_answers_go_on_while_a_long_prompt_is_computed() -> None:
    world, short, long = World(step_tokens=20), ask("s", prompt(5), 12, ignore_eos=True), ask("l", prompt(150, 1))
    world.submit(short)
    world.step()
    world.submit(long)
    for _ in range(5):
        assert [(work.sequence.request.id, len(work.tokens)) for work in world.step()] == [("s", 1), ("l", 19)]
    world.run()
    world.check(short)
    world.check(long)


def test_a_prefix_in_memory_is_not_computed_again_and_the_last_token_always_is() -> None:
    world = World()
    for name, length, reused in (("a", 128, 0), ("b", 128, 64), ("c", 129, 128), ("d", 200, 128)):
        request = ask(name, prompt(length))
        world.submit(request)
        world.run()
        world.check(request)
        assert world.events[name][0].cached_tokens == reused
    assert world.scheduler.stats.memory_hits == 64 + 128 + 128
    other = ask("e", prompt(128), salt=b"tenant")
    world.submit(other)
    world.run()
    assert world.events["e"][0].cached_tokens == 0, "another salt, other pages"
    world.check_idle()


def test_requests_that_come_together_share_what_the_first_computes() -> None:
    world = World(step_tokens=1000)
    requests = [ask(f"r{number}", prompt(200) + prompt(5, number + 1)) for number in range(4)]
    for request in requests:
        world.submit(request)
    assert [len(work.tokens) for work in world.step()] == [205], "the others wait for the pages of the first"
    assert [len(work.tokens) for work in world.step()][-3:] == [13, 13, 13]
    world.run()
    for request in requests:
        world.check(request)
    assert [world.events[request.id][0].cached_tokens for request in requests] == [0, 192, 192, 192]


def test_the_same_prompt_twice_at_once_computes_its_last_page_twice() -> None:
    world = World(step_tokens=1000)
    for name in "ab":
        world.submit(ask(name, prompt(128)))
    assert [len(work.tokens) for work in world.step()] == [128]
    assert [len(work.tokens) for work in world.step()] == [1, 64], "the last token is always computed"
    world.run()
    for name in "ab":
        world.check(ask(name, prompt(128)))


def test_the_youngest_makes_room_and_is_computed_anew() -> None:
    world = World(pages=4, step_tokens=200)
    requests = [ask("old", prompt(60), 100, ignore_eos=True), ask("young", prompt(60, 1), 100, ignore_eos=True)]
    for request in requests:
        world.submit(request)
    world.run()
    for request in requests:
        world.check(request)
    assert world.scheduler.stats.preemptions >= 1
    finished = list(world.events)
    assert finished[0] == "old"
    world.check_idle()


def test_a_large_request_is_not_overtaken_by_small_ones() -> None:
    world = World(pages=6, step_tokens=400)
    for name, length in (("first", 200), ("large", 300), ("small", 10)):
        world.submit(ask(name, prompt(length, ord(name[0])), 30, ignore_eos=True))
    started = []
    while works := world.step():
        started += [work.sequence.request.id for work in works if not work.start]
    assert started == ["first", "large", "small"]


def test_a_context_ends_where_the_model_or_the_pool_does() -> None:
    for world in (World(pages=2), World(context=128)):
        request = ask("a", prompt(120), 100, ignore_eos=True)
        world.submit(request)
        world.run()
        world.check(request)
        assert len(world.tokens("a")) == 8 and world.events["a"][-1].finish is Finish.LENGTH
        with pytest.raises(InvalidArgument, match="at most 127"):
            world.submit(ask("b", prompt(128)))


def test_tokens_that_do_not_exist_are_refused() -> None:
    world = World()
    for token in (-1, VOCABULARY):
        with pytest.raises(InvalidArgument, match=f"token {token}: 0 to 49"):
            world.submit(ask("a", [3, token]))
    world.check_idle()


def test_more_than_may_wait_are_refused_and_the_same_id_joins() -> None:
    world = World(waiting=2)
    for name in "ab":
        world.submit(ask(name, prompt(5)))
    with pytest.raises(Overloaded, match="2 requests wait already"):
        world.submit(ask("c", prompt(5)))
    world.submit(ask("a", prompt(9)))
    world.run()
    world.check(ask("a", prompt(5)))


def test_stop_tokens_and_the_end_of_sequence() -> None:
    tokens = answer(ask("x", prompt(10), 30, ignore_eos=True), 4096)[0]
    stop = tokens[5]
    request = Request(id="a", prompt=tuple(prompt(10)), sampling=Sampling(max_tokens=30, ignore_eos=True, stop_tokens=(stop,)))
    world = World()
    world.submit(request)
    world.run()
    assert world.tokens("a") == tokens[: tokens.index(stop) + 1] and world.events["a"][-1].finish is Finish.STOP


def test_an_answer_goes_on_after_what_is_known_of_it() -> None:
    whole = answer(ask("x", prompt(70), 20, ignore_eos=True), 4096)[0]
    request = ask("a", prompt(70), 20, ignore_eos=True, answered=tuple(whole[:9]))
    world = World()
    world.submit(request)
    world.run()
    world.check(request)
    assert world.tokens("a") == whole[9:] and world.events["a"][0].index == 9


def test_cancelled_waiting_running_and_in_the_middle_of_a_step() -> None:
    world = World(running=2, step_tokens=64)
    for name in "abc":
        world.submit(ask(name, prompt(10, ord(name)), 50, ignore_eos=True))
    world.step()
    world.scheduler.cancel("c")
    works = world.begin()
    world.scheduler.cancel("a")
    world.scheduler.cancel("nobody")
    world.drain()
    assert not [event for event in world.events["a"] if event.finish], "its pages are in use"
    world.scheduler.done(works, world.compute(works)[0])
    world.scheduler.cancel("b")
    world.drain()
    for name, tokens in (("a", 1), ("b", 2), ("c", 0)):
        last = world.events[name][-1]
        assert (last.finish, last.token, last.index, len(world.tokens(name))) == (Finish.CANCELLED, None, tokens, tokens)
    world.check_idle()
    assert world.scheduler.stats.finished[Finish.CANCELLED] == 3


def test_an_error_of_the_model_ends_the_requests_of_its_step_only() -> None:
    world = World(running=2)
    for name in "abc":
        world.submit(ask(name, prompt(10, ord(name)), 5))
    world.scheduler.failed(world.begin(), "out of memory")
    world.run()
    for name in "ab":
        assert [(event.finish, event.message) for event in world.events[name]] == [(Finish.ERROR, "out of memory")]
    world.check(ask("c", prompt(10, ord("c")), 5))
    world.check_idle()


def test_logits_that_are_no_numbers_end_one_request() -> None:
    world = World()
    for name in "ab":
        world.submit(ask(name, prompt(10, ord(name)), 5))
    works = world.begin()
    tokens, _ = world.compute(works)
    world.scheduler.done(works, [-1, tokens[1]])
    world.drain()
    world.run()
    assert world.events["a"][0].finish is Finish.ERROR and "not numbers" in world.events["a"][0].message
    world.check(ask("b", prompt(10, ord("b")), 5))


# --- the store --------------------------------------------------------------------------------------------------------------------------


def filled(request: Request) -> World:
    """A store that has the prefix of the request, from another life."""
    world = World(store=True)
    world.submit(request)
    world.answer_lookup()
    world.run()
    while world.writes:
        world.end_write()
    fresh = World(store=True)
    fresh.stored, fresh.tails = world.stored, world.tails
    return fresh


def test_pages_in_the_store_are_read_while_others_are_computed() -> None:
    request, other = ask("a", prompt(200)), ask("o", prompt(30, 1))
    world = filled(request)
    world.submit(request)
    world.submit(other)
    assert [sequence.request.id for sequence in world.lookups] == ["a"], "nothing of the other could be there"
    world.step()
    assert world.tokens("o") and not world.fetches, "one that the store is asked about holds nobody up"
    world.answer_lookup()
    world.run()
    world.check(other)
    assert len(world.fetches[0].pages) == 3
    world.end_fetch()
    assert [work.start for work in world.step()] == [192]
    world.run()
    world.check(request)
    assert (world.events["a"][0].cached_tokens, world.events["a"][0].disk_tokens) == (192, 192)
    world.check_idle()


def test_what_cannot_be_read_is_computed() -> None:
    request = ask("a", prompt(200))
    world = filled(request)
    world.submit(request)
    world.answer_lookup()
    world.step()
    world.end_fetch(ok=False)
    world.run()
    world.check(request)
    assert world.events["a"][0].cached_tokens == 0 and world.scheduler.stats.failed_fetches == 1


@pytest.mark.parametrize("ok", [True, False])
def test_a_prompt_whose_first_layers_are_there_is_computed_on_and_thrown_away_if_the_rest_fails(ok: bool) -> None:
    request = ask("a", prompt(200))
    world = filled(request)
    world.submit(request)
    world.answer_lookup()
    assert not world.step()
    world.scheduler.arriving(world.fetches[0])
    works = world.begin()
    assert [work.start for work in works] == [192]
    tokens, broken = world.compute(works, frozenset() if ok else frozenset(world.fetches))
    world.scheduler.done(works, tokens, broken)
    world.end_fetch(ok=ok)
    assert len(world.tokens("a")) == ok
    world.run()
    world.check(request)
    assert world.events["a"][0].disk_tokens == (192 if ok else 0)
    while world.writes:
        world.end_write()
    world.check_idle()


@pytest.mark.parametrize("ok", [True, False])
def test_a_prefix_that_many_need_is_read_once(ok: bool) -> None:
    requests = [ask(f"r{number}", prompt(200) + prompt(9, number + 1)) for number in range(4)]
    world = filled(requests[0])
    for request in requests:
        world.submit(request)
    while world.lookups:
        world.answer_lookup()
    assert not world.step()
    assert len(world.fetches) == 1, "the others wait for what the first reads"
    world.end_fetch(ok=ok)
    assert sum(len(work.tokens) for _ in range(4) for work in world.step()) < 64 + 3 * 64 + 4 * 20
    world.run()
    assert not world.fetches, "and don't try again one after another"
    for request in requests:
        world.check(request)
    while world.writes:
        world.end_write()
    world.check_idle()


def test_a_fetch_that_fails_during_the_step_that_used_it_spoils_the_step() -> None:
    request = ask("a", prompt(200))
    world = filled(request)
    world.submit(request)
    world.answer_lookup()
    world.step()
    world.scheduler.arriving(world.fetches[0])
    works = world.begin()
    tokens, broken = world.compute(works)
    world.end_fetch(ok=False)
    world.scheduler.done(works, tokens, broken)
    world.drain()
    assert not broken and not world.tokens("a")
    world.run()
    world.check(request)


def test_a_step_that_waits_too_long_for_layers_is_done_again_when_all_is_there() -> None:
    request, other = ask("a", prompt(200)), ask("o", prompt(30, 1))
    world = filled(request)
    world.submit(request)
    world.answer_lookup()
    world.step()
    world.scheduler.arriving(world.fetches[0])
    works = world.begin()
    world.submit(other)
    world.scheduler.postponed(works)
    assert [work.sequence.request.id for work in world.step()] == ["o"]
    world.run()
    world.check(other)
    assert not world.tokens("a")
    world.end_fetch()
    world.run()
    world.check(request)
    assert world.events["a"][0].disk_tokens == 192


def test_only_as_many_pages_are_read_as_it_is_worth() -> None:
    request = ask("a", prompt(300))
    world = filled(request)
    world.scheduler._worth = lambda pages: pages // 2
    world.submit(request)
    world.answer_lookup()
    world.step()
    assert [len(fetch.pages) for fetch in world.fetches] == [2]
    world.end_fetch()
    world.run()
    world.check(request)


def test_pages_of_a_cancelled_fetch_are_nobodys_until_it_has_ended() -> None:
    request = ask("a", prompt(200))
    world = filled(request)
    world.submit(request)
    world.answer_lookup()
    world.step()
    world.scheduler.cancel("a")
    assert world.pages.used == 3
    world.end_fetch()
    world.check_idle()


@pytest.mark.parametrize("length", [40, 64, 200])
def test_an_answer_is_handed_over_through_the_store_with_its_unfinished_page(length: int) -> None:
    first = ask("a", prompt(length), 10, ignore_eos=True, hand_over=True)
    world = World(store=True)
    world.submit(first)
    if world.lookups:
        world.answer_lookup()
    world.run()
    assert not world.events["a"], "not before its pages are stored"
    world.end_save()
    token = world.tokens("a")
    assert len(token) == 1 and world.events["a"][0].finish is None
    assert sum(len(write.keys) for write in world.writes) == (length - 1) // 64, "what becomes full with the last chunk is saved, not offered too"
    while world.writes:
        world.end_write(keep=0)
    world.check_idle()

    other = World(store=True)
    other.stored, other.tails = world.stored, world.tails
    second = ask("a", prompt(length), 10, ignore_eos=True, answered=tuple(token))
    other.submit(second)
    other.answer_lookup()
    other.step()
    other.end_fetch()
    assert [work.start for work in other.step()] == [length], "one token is left to compute"
    other.run()
    other.check(second)
    assert other.events["a"][0].disk_tokens == length


def test_what_of_a_prefix_was_dropped_is_offered_again_by_the_next_request_that_has_it() -> None:
    first, second = ask("a", prompt(200), 80, ignore_eos=True), ask("b", prompt(200) + prompt(70, 1), 80, ignore_eos=True)
    world = World(store=True, pages=32)
    world.submit(first)
    world.answer_lookup()
    while not world.writes:
        world.step()
    keys = world.writes[0].keys
    world.end_write(keep=0)
    world.run()
    assert not world.writes, "nobody could get to what is behind a gap"
    world.submit(second)
    world.answer_lookup()
    world.run()
    offered = [key for write in world.writes for key in write.keys]
    assert offered[:1] == keys and len(offered) == len(set(offered)) == 5, "the prefix first, then what is new"
    world.end_write(keep=2)
    while world.writes:
        world.end_write()
    third = ask("c", [*second.prompt, *prompt(60, 2)], 2)
    world.submit(third)
    world.answer_lookup()
    world.run()
    (write,) = world.writes
    assert len(write.keys) == 3 and write.keys[:2] == offered[2:4] and write.before == offered[:2]
    world.end_write()
    world.check_idle()


def test_pages_that_the_store_has_are_not_offered_though_they_were_computed() -> None:
    request = ask("a", prompt(200))
    world = filled(request)
    world.scheduler = Scheduler(world.limits, world.pages, lambda pages: 0)
    world.submit(request)
    world.answer_lookup()
    world.run()
    world.check(request)
    assert not world.writes


def test_what_gave_no_numbers_is_not_kept() -> None:
    world = World(store=True, step_tokens=300)
    world.submit(ask("a", prompt(200)))
    world.answer_lookup()
    works = world.begin()
    world.scheduler.done(works, [-1])
    world.drain()
    assert not world.writes and world.events["a"][-1].finish is Finish.ERROR


DEEDS = ("submit", "cancel", "lookup", "arriving", "fetch", "write", "save", "evict", "step")
WEIGHTS = (8, 0.5, 10, 10, 3, 6, 3, 0.3, 60)


def life(seed: int) -> None:
    """Random requests, cancels and failures, a tiny pool, a store that is slow and forgetful."""
    random = Random(seed)
    store = random.random() < 0.7
    world = World(
        pages=random.choice([3, 5, 8, 20]),
        store=store,
        step_tokens=random.choice([1, 7, 40, 64, 130, 500]),
        running=random.choice([1, 2, 5, 16]),
        waiting=random.choice([2, 6, 50]),
    )
    longest = min(260, world.scheduler.context - 1)
    requests: dict[str, Request] = {}
    cancelled: set[str] = set()
    works: list[Work] | None = None
    computed: tuple[list[int | None], list[Sequence]] = ([], [])
    failed: set[str] = set()
    to_come = random.randint(5, 20)
    for _turn in range(20_000):
        deed = random.choices(DEEDS, WEIGHTS)[0]
        if deed == "submit" and to_come:
            to_come -= 1
            name = f"r{to_come}"
            tokens = prompt(random.randint(1, longest), random.randint(0, 1))
            if random.random() < 0.5:
                tokens = tokens[: random.randint(1, len(tokens))] + prompt(random.randint(0, longest - len(tokens)), 7)
            if random.random() < 0.3:  # exactly full pages
                tokens = tokens[: max(1, len(tokens) // PAGE_TOKENS * PAGE_TOKENS)]
            request = ask(name, tokens, random.randint(1, 150), ignore_eos=random.random() < 0.9, hand_over=random.random() < 0.2)
            if random.random() < 0.2:
                known = answer(request, world.scheduler.context)[0]
                cut = random.randint(0, len(known) - 1)
                request = ask(name, tokens, request.sampling.max_tokens, ignore_eos=request.sampling.ignore_eos, answered=tuple(known[:cut]))
            try:
                world.submit(request)
                requests[name] = request
            except Overloaded:
                assert len(world.scheduler._waiting) >= world.limits.waiting
        elif deed == "cancel" and requests:
            name = random.choice(sorted(requests))
            if not any(event.finish for event in world.events[name]):
                cancelled.add(name)
            world.scheduler.cancel(name)
            world.drain()
        elif deed == "lookup" and world.lookups:
            world.answer_lookup(random.randrange(len(world.lookups)))
        elif deed == "arriving" and world.fetches:
            world.scheduler.arriving(random.choice(world.fetches))
        elif deed == "fetch" and world.fetches:
            world.end_fetch(random.randrange(len(world.fetches)), ok=random.random() < 0.8)
        elif deed == "write" and world.writes:
            world.end_write(random.randrange(len(world.writes)), keep=random.choice((0, 1, 100, 100)))
        elif deed == "save" and world.saves:
            world.end_save(random.randrange(len(world.saves)), keep=random.random() < 0.8)
        elif deed == "evict" and world.stored:
            del world.stored[random.choice(sorted(world.stored))]
        elif works is None:
            works = world.begin()
            computed = world.compute(works, frozenset(fetch for fetch in world.fetches if random.random() < 0.3))
        elif random.random() < 0.3 and all(work.sequence.fetch is not None for work in works):
            world.scheduler.postponed(works)
            works = None
            world.drain()
        elif random.random() < 0.002:
            failed |= {work.sequence.request.id for work in works if work.sequence.ending is None}
            world.scheduler.failed(works, "planted")
            works = None
            world.drain()
        else:
            world.scheduler.done(works, *computed)
            works = None
            world.drain()
        if not to_come and works is None and not (world.scheduler._by_id or world.fetches or world.writes or world.saves):
            break
    else:
        raise AssertionError(f"seed {seed}: {[(s.request.id, s.state) for s in world.scheduler._by_id.values()]} did not end")
    world.check_idle()
    for name, request in requests.items():
        check_life(world, request, name in cancelled, name in failed)


def check_life(world: World, request: Request, cancelled: bool, failed: bool) -> None:
    events, (tokens, _) = world.events[request.id], answer(request, world.scheduler.context)
    assert [event.finish for event in events[:-1]] == [None] * (len(events) - 1), "one end"
    got = world.tokens(request.id)
    assert got == tokens[len(request.answered) :][: len(got)], "a wrong token"
    if cancelled and events[-1].finish is Finish.CANCELLED:
        return
    if failed:
        assert events[-1].finish is Finish.ERROR
    elif request.hand_over and len(tokens) > 1:
        assert len(events) == 1 and events[0].finish is None and len(got) == 1
    else:
        world.check(request)


@pytest.mark.parametrize("first", range(0, SEEDS, 30))
def test_random_lives(first: int) -> None:
    for seed in range(first, min(first + 30, SEEDS)):
        try:
            life(seed)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise


def test_an_unfinished_first_page_belongs_to_its_salt() -> None:
    world = World(store=True)
    world.submit(ask("a", prompt(40), 10, ignore_eos=True, hand_over=True, salt=b"one"))
    world.run()
    world.end_save()
    for salt, found in ((b"two", False), (b"one", True)):
        world.submit(ask("b", prompt(40), 10, ignore_eos=True, answered=tuple(world.tokens("a")), salt=salt))
        sequence = world.lookups[0]
        world.answer_lookup()
        assert sequence.tail_stored is found
        world.scheduler.cancel("b")


def test_states_are_told_apart() -> None:
    """A request that is being handed over can be cancelled: its pages are stored all the same."""
    world = World(store=True)
    world.submit(ask("a", prompt(70), 10, ignore_eos=True, hand_over=True))
    world.answer_lookup()
    world.run()
    assert world.saves[0].sequence.state is State.SAVING
    world.scheduler.cancel("a")
    world.end_save()
    assert [event.finish for event in world.events["a"]] == [Finish.CANCELLED]
    while world.writes:
        world.end_write()
    world.check_idle()
