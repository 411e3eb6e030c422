"""Pages against a plain model of them: counts, keys, and the order in which free pages are given away."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvfs.common.errors import InvalidArgument
from kvfs.inference.cache.pages import Pages


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def test_a_pool_has_pages() -> None:
    with pytest.raises(InvalidArgument, match="at least 1"):
        Pages(0)


def test_taking_is_all_or_nothing() -> None:
    pages = Pages(3)
    assert pages.take(4) is None and pages.free == 3
    taken = pages.take(3)
    assert taken is not None and sorted(taken) == [0, 1, 2]
    assert pages.take(1) is None and pages.take(0) == []


def test_a_named_page_is_found_until_its_place_is_needed_tails_first() -> None:
    pages = Pages(4)
    taken = pages.take(4)
    assert taken is not None
    for place, page in enumerate(taken):
        pages.name(page, key(place))
    pages.release(taken)
    assert pages.prefix([key(place) for place in range(5)]) == taken, "all are found although nobody holds them"
    assert pages.take(2) == [taken[3], taken[2]], "the end of the prefix goes first"
    assert pages.prefix([key(place) for place in range(4)]) == taken[:2]


def test_what_is_given_away_or_forgotten_is_not_known_to_be_stored() -> None:
    for end in (lambda pages: pages.take(1), Pages.forget):
        pages = Pages(1)
        taken = pages.take(1)
        assert taken == [0]
        pages.mark_stored([key(1)], True)
        assert not pages.stored(key(1)), "only what is here"
        pages.name(0, key(1))
        pages.mark_stored([key(1)], True)
        pages.release(taken)
        assert pages.stored(key(1))
        end(pages)
        assert not pages.stored(key(1))


def test_use_makes_a_page_recent() -> None:
    pages = Pages(2)
    taken = pages.take(2)
    assert taken is not None
    first, second = taken
    pages.name(first, key(1))
    pages.name(second, key(2))
    pages.release([first])
    pages.release([second])
    pages.hold([first])
    pages.release([first])
    assert pages.take(1) == [second]
    assert pages.find(key(1)) == first and pages.find(key(2)) is None


def test_pages_without_a_key_go_before_those_that_may_be_found() -> None:
    pages = Pages(2)
    taken = pages.take(2)
    assert taken is not None
    pages.name(taken[0], key(1))
    pages.release(taken[:1])
    pages.release(taken[1:])
    assert pages.take(1) == taken[1:]


def test_the_first_page_of_a_key_keeps_it() -> None:
    pages = Pages(2)
    taken = pages.take(2)
    assert taken is not None
    assert pages.name(taken[0], key(1)) is True
    assert pages.name(taken[1], key(1)) is False
    assert pages.find(key(1)) == taken[0]
    pages.release(taken[1:])
    assert pages.take(1) == taken[1:], "the other one is blank once it is free"


def test_mistakes_of_holders_are_noticed() -> None:
    pages = Pages(2)
    taken = pages.take(1)
    assert taken is not None
    pages.release(taken)
    with pytest.raises(AssertionError, match="more often"):
        pages.release(taken)
    with pytest.raises(KeyError):
        pages.hold(taken)
    with pytest.raises(AssertionError, match="not its writer's"):
        pages.name(taken[0], key(1))


def test_what_is_forgotten_is_not_found_and_still_held() -> None:
    pages = Pages(3)
    taken = pages.take(3)
    assert taken is not None
    for place, page in enumerate(taken):
        pages.name(page, key(place))
    pages.release(taken[1:])
    pages.forget()
    assert pages.named == 0 and pages.prefix([key(0)]) == [] and pages.holders(taken[0]) == 1
    again = pages.take(2)
    assert again is not None and sorted(again) == sorted(taken[1:])


def test_freed_pages_are_announced() -> None:
    pages = Pages(2)
    calls: list[int] = []
    pages.on_freed = lambda: calls.append(pages.free)
    taken = pages.take(2)
    assert taken is not None
    pages.hold(taken[:1])
    pages.release(taken[:1])
    assert calls == [], "one holder is left"
    pages.release(taken)
    assert calls == [2]


class PagesMachine(RuleBasedStateMachine):
    """Owners take, share, name and release pages. Each page's content is who wrote it last: a page found by a key must have that key's content."""

    @initialize(count=st.integers(1, 8))
    def start(self, count: int) -> None:
        self.pages = Pages(count)
        self.content: dict[int, bytes] = {}
        self.owned: list[tuple[list[int], list[bytes]]] = []
        """Pages of an owner, and the key of each."""
        self.order: list[int] = []
        """Free pages in the order in which they must go: a plain list."""

    def found(self) -> dict[bytes, int]:
        return {name: page for name in map(key, range(13)) if (page := self.pages.find(name)) is not None}

    @rule(first=st.integers(0, 9), count=st.integers(0, 4))
    def take(self, first: int, count: int) -> None:
        found = self.found()
        free, kept = self.pages.free, [page for page in self.order if page in found.values()]
        taken = self.pages.take(count)
        if taken is None:
            assert count > free
            return
        assert len(set(taken)) == count <= free
        assert not {page for pages, _ in self.owned for page in pages} & set(taken), "someone holds it"
        gone = [page for page in taken if page in kept]
        assert gone == kept[: len(gone)], "the least recently released go first"
        if gone:
            assert not [page for page in self.pages._blank if page not in taken], "a blank page was left"
        names = [key(first + place) for place in range(count)]
        for page, name in zip(taken, names, strict=True):
            self.content[page] = name
            if page in self.order:
                self.order.remove(page)
        self.owned.append((taken, names))

    @rule(data=st.data())
    def name(self, data: st.DataObject) -> None:
        written = [(page, name) for pages, names in self.owned for page, name in zip(pages, names, strict=True) if self.pages._keys[page] is None]
        if written:
            page, name = data.draw(st.sampled_from(written))
            before = self.pages.find(name)
            self.pages.name(page, name)
            assert self.pages.find(name) == (page if before is None else before)

    @rule(first=st.integers(0, 9), count=st.integers(0, 4), stored=st.booleans())
    def store(self, first: int, count: int, stored: bool) -> None:
        names = [key(first + place) for place in range(count)]
        before = {name for name in map(key, range(13)) if self.pages.stored(name)}
        self.pages.mark_stored(names, stored)
        after = before | {name for name in names if self.pages.find(name) is not None} if stored else before - set(names)
        assert {name for name in map(key, range(13)) if self.pages.stored(name)} == after

    @rule(first=st.integers(0, 9), count=st.integers(1, 4))
    def share(self, first: int, count: int) -> None:
        names = [key(first + place) for place in range(count)]
        found = self.pages.prefix(names)
        assert [self.content[page] for page in found] == names[: len(found)], "another key's content"
        self.pages.hold(found)
        for page in found:
            if page in self.order:
                self.order.remove(page)
        self.owned.append((found, names[: len(found)]))

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.owned:
            pages, _ = self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1)))
            self.pages.release(pages)
            held = {page for owned, _ in self.owned for page in owned}
            self.order += [page for page in reversed(pages) if page not in held]

    @rule()
    def forget(self) -> None:
        self.pages.forget()
        assert self.pages.named == 0

    @invariant()
    def counts_are_right(self) -> None:
        held = [page for pages, _ in self.owned for page in pages]
        assert [self.pages.holders(page) for page in range(self.pages.count)] == [held.count(page) for page in range(self.pages.count)]
        assert self.pages.used == len(set(held))
        assert len(self.found()) == self.pages.named <= self.pages.count
        for name, page in self.found().items():
            assert self.content[page] == name
        assert all(self.pages.find(name) is not None for name in map(key, range(13)) if self.pages.stored(name)), "given away, and said to be stored"


PagesMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPagesMachine = PagesMachine.TestCase
