"""The lookup cache: what it may answer, and above all what it may not: after a lease, a revocation, a change of our own or an overtaken answer."""

from __future__ import annotations

import pytest
from tests.unit.fuse.conftest import Clock

from kvfs.common.wire import meta_pb2 as pb
from kvfs.fuse.entry_cache import ATTRIBUTES_MAX, CHANGED_MAX, DIRECTORIES_MAX, ENTRIES_MAX, EntryCache

LEASE_MS = 1000


@pytest.fixture
def cache(clock: Clock) -> EntryCache:
    return EntryCache(clock)


def directory(number: int = 1, *, changed_ns: int = 10, lease_ms: int = LEASE_MS) -> pb.Inode:
    return pb.Inode(inode=number, type=pb.DIRECTORY, mtime_ns=changed_ns, ctime_ns=changed_ns, attr_lease_ms=lease_ms, nlink=2)


def file(number: int = 7, *, lease_ms: int = LEASE_MS, mode: int = 0o644) -> pb.Inode:
    return pb.Inode(inode=number, type=pb.FILE, attr_lease_ms=lease_ms, mode=mode, ctime_ns=55)


def know(cache: EntryCache, child: pb.Inode | None = None, name: bytes = b"a", parent: int = 1) -> None:
    """The directory is leased, and the entry has been looked up in it."""
    cache.heard(directory(parent), cache.tick())
    since = cache.tick()
    child = child or file()
    cache.heard(child, since)
    cache.entered(parent, name, child.inode, since)


def test_known_entry_needs_no_call(cache: EntryCache) -> None:
    know(cache)
    found = cache.lookup(1, b"a")
    assert found is not None and found[0].inode == 7 and found[1] == pytest.approx(0.9)


def test_nothing_is_known_without_the_directorys_lease(cache: EntryCache) -> None:
    since = cache.tick()
    cache.heard(file(), since)
    cache.entered(1, b"a", 7, since)
    assert cache.lookup(1, b"a") is None and cache.attributes(7) is not None


@pytest.mark.parametrize("passed_s,known", [(0.5, True), (0.89, True), (0.9, False), (1.0, False), (50.0, False)])
def test_lease_ends(cache: EntryCache, clock: Clock, passed_s: float, known: bool) -> None:
    know(cache)
    clock.now_s += passed_s
    assert (cache.lookup(1, b"a") is not None) == known
    assert (cache.attributes(7) is not None) == known


def test_lease_counts_from_the_question_not_from_the_answer(cache: EntryCache, clock: Clock) -> None:
    since = cache.tick()
    clock.now_s += 0.6
    assert cache.heard(file(), since) == pytest.approx(0.3)
    clock.now_s += 0.31
    assert cache.attributes(7) is None


def test_answer_without_a_lease_is_not_kept(cache: EntryCache) -> None:
    assert cache.heard(file(lease_ms=0), cache.tick()) == 0.0
    assert cache.attributes(7) is None


def test_revoked_child_is_asked_for_again(cache: EntryCache) -> None:
    know(cache)
    cache.revoked(7)
    assert cache.lookup(1, b"a") is None and cache.attributes(7) is None
    cache.heard(file(), cache.tick())
    assert cache.lookup(1, b"a") is not None, "the name itself is still true: the directory's lease was not revoked"


def test_revoked_directory_forgets_its_entries(cache: EntryCache) -> None:
    know(cache)
    cache.revoked(1)
    cache.heard(directory(), cache.tick())
    assert cache.lookup(1, b"a") is None


def test_answer_overtaken_by_a_revocation_is_not_kept(cache: EntryCache) -> None:
    know(cache)
    since = cache.tick()
    cache.revoked(7)
    assert cache.heard(file(), since) == 0.0 and cache.attributes(7) is None
    cache.revoked(1)
    cache.heard(directory(), cache.tick())
    cache.entered(1, b"a", 7, since)
    cache.heard(file(), cache.tick())
    assert cache.lookup(1, b"a") is None


def test_entries_outlive_a_lapse_only_when_the_directory_is_unchanged(cache: EntryCache, clock: Clock) -> None:
    know(cache)
    clock.now_s += 2
    cache.heard(directory(), cache.tick())
    cache.heard(file(), cache.tick())
    assert cache.lookup(1, b"a") is not None
    clock.now_s += 2
    cache.heard(directory(changed_ns=11), cache.tick())
    cache.heard(file(), cache.tick())
    assert cache.lookup(1, b"a") is None


def test_lease_that_is_renewed_in_time_keeps_the_entries(cache: EntryCache, clock: Clock) -> None:
    know(cache)
    for _ in range(5):
        clock.now_s += 0.5
        cache.heard(directory(), cache.tick())
        cache.heard(file(), cache.tick())
        assert cache.lookup(1, b"a") is not None


def test_own_change_of_an_inode(cache: EntryCache) -> None:
    know(cache)
    overtaken = cache.tick()
    begun = cache.changing(7), cache.tick()[1]
    during = cache.tick()
    assert cache.attributes(7) is None
    since = cache.changed(7, begun)
    assert since is not None
    assert cache.heard(file(), overtaken) == 0.0, "asked before the change"
    assert cache.heard(file(), during) == 0.0, "asked while it was under way"
    assert cache.heard(file(mode=0o600), since) > 0.0
    found = cache.lookup(1, b"a")
    assert found is not None and found[0].mode == 0o600


@pytest.mark.parametrize("how", ["another change of ours", "a revocation"])
def test_two_changes_at_once_leave_nothing_known(cache: EntryCache, how: str) -> None:
    know(cache)
    begun = cache.changing(7), cache.tick()[1]
    if how == "a revocation":
        cache.revoked(7)
    else:
        other = cache.changing(7), cache.tick()[1]
        cache.changed(7, other)
    assert cache.changed(7, begun) is None
    assert cache.attributes(7) is None


def test_own_creation_is_known_and_moves_the_directorys_times(cache: EntryCache) -> None:
    know(cache)
    since = cache.tick()
    change = cache.begin_entry(1, b"new")
    assert cache.attributes(1) is None, "while it is under way nobody knows the directory's times"
    cache.end_entry(change, entry=8, at_ns=55, links=1)
    cache.heard(file(8), since)
    found = cache.lookup(1, b"new")
    assert found is not None and found[0].inode == 8
    parent = cache.attributes(1)
    assert parent is not None and (parent[0].mtime_ns, parent[0].ctime_ns, parent[0].nlink) == (55, 55, 3)
    assert cache.lookup(1, b"a") is not None, "its other entries are as true as before"


def test_own_removal_forgets_the_entry_and_the_child(cache: EntryCache) -> None:
    know(cache)
    asked_before = cache.tick()
    change = cache.begin_entry(1, b"a")
    cache.end_entry(change, entry=0, at_ns=60)
    cache.revoked(7)
    assert cache.lookup(1, b"a") is None and cache.attributes(7) is None
    cache.entered(1, b"a", 7, asked_before)
    cache.heard(file(), asked_before)
    assert cache.lookup(1, b"a") is None, "a lookup that was on its way during the removal"


def test_failed_change_restores_nothing(cache: EntryCache) -> None:
    know(cache)
    change = cache.begin_entry(1, b"a")
    cache.end_entry(change)
    assert cache.lookup(1, b"a") is None and cache.attributes(1) is None


def test_creation_whose_directory_was_revoked_meanwhile_is_not_known(cache: EntryCache, clock: Clock) -> None:
    know(cache)
    since = cache.tick()
    change = cache.begin_entry(1, b"new")
    cache.revoked(1)
    clock.now_s += 0.1
    cache.heard(directory(changed_ns=70), cache.tick())
    cache.end_entry(change, entry=8, at_ns=55)
    cache.heard(file(8), since)
    assert cache.lookup(1, b"new") is None
    parent = cache.attributes(1)
    assert parent is None or parent[0].mtime_ns != 55


def make_directory(cache: EntryCache, number: int = 5) -> None:
    """As mkdir through this mount does."""
    cache.heard(directory(1), cache.tick())
    since = cache.tick()
    cache.end_entry(cache.begin_entry(1, b"d"), entry=number, at_ns=55, links=1)
    cache.heard(directory(number), since)
    cache.made(directory(number), since)


def make_file(cache: EntryCache, name: bytes, *, parent: int = 5, number: int = 9) -> None:
    since = cache.tick()
    cache.end_entry(cache.begin_entry(parent, name), entry=number, at_ns=56)
    cache.heard(file(number), since)


def test_directory_made_here_is_known_whole(cache: EntryCache, clock: Clock) -> None:
    make_directory(cache)
    assert cache.absent(5, b"x") and not cache.absent(1, b"x"), "of the root nobody knows what else there is"
    assert not cache.absent(5, b".") and not cache.absent(5, b".."), "these are no entries, but there"
    make_file(cache, b"x")
    assert not cache.absent(5, b"x") and cache.absent(5, b"y")
    cache.end_entry(cache.begin_entry(5, b"x"), entry=0, at_ns=57)
    assert cache.absent(5, b"x")
    clock.now_s += 1
    assert not cache.absent(5, b"y"), "the lease is over"
    cache.heard(directory(5, changed_ns=57), cache.tick())
    assert cache.absent(5, b"y"), "and comes back with the directory unchanged"
    clock.now_s += 1
    cache.heard(directory(5, changed_ns=58), cache.tick())
    assert not cache.absent(5, b"y")


def test_directory_is_no_longer_known_whole_after_a_revocation(cache: EntryCache) -> None:
    make_directory(cache)
    cache.revoked(5)
    cache.heard(directory(5), cache.tick())
    assert not cache.absent(5, b"x")


def test_nothing_is_absent_while_a_change_is_under_way_or_has_failed(cache: EntryCache) -> None:
    make_directory(cache)
    make_file(cache, b"x")
    change = cache.begin_entry(5, b"x")
    assert not cache.absent(5, b"x") and not cache.absent(5, b"y")
    cache.end_entry(change)
    assert not cache.absent(5, b"x"), "the removal failed, or only its answer was lost"


def test_directory_revoked_while_its_making_was_under_way_is_not_known_whole(cache: EntryCache) -> None:
    cache.heard(directory(1), cache.tick())
    since = cache.tick()
    change = cache.begin_entry(1, b"d")
    cache.revoked(5)
    cache.end_entry(change, entry=5, at_ns=55, links=1)
    cache.heard(directory(5), since)
    cache.made(directory(5), since)
    assert not cache.absent(5, b"x")


def test_entry_made_after_the_lease_lapsed_ends_the_whole_knowledge(cache: EntryCache, clock: Clock) -> None:
    make_directory(cache)
    clock.now_s += 2
    make_file(cache, b"x")
    cache.heard(directory(5, changed_ns=10), cache.tick())
    assert not cache.absent(5, b"x") and not cache.absent(5, b"y")


def test_too_many_entries_are_not_known_whole(cache: EntryCache) -> None:
    make_directory(cache)
    for number in range(ENTRIES_MAX + 1):
        cache.end_entry(cache.begin_entry(5, b"%d" % number), entry=number + 100, at_ns=56)
    assert not cache.absent(5, b"none")


def test_lost_service_means_that_nothing_is_known(cache: EntryCache) -> None:
    know(cache)
    since = cache.tick()
    cache.lose_all()
    assert cache.lookup(1, b"a") is None and cache.attributes(1) is None
    assert cache.heard(file(), since) == 0.0, "asked of the service before it was lost"


def test_disabled_cache_knows_nothing(clock: Clock) -> None:
    cache = EntryCache(clock, enabled=False)
    know(cache)
    assert cache.lookup(1, b"a") is None and cache.attributes(7) is None


def test_tables_are_bounded(cache: EntryCache) -> None:
    since = cache.tick()
    for number in range(2, ATTRIBUTES_MAX + 100):
        cache.heard(file(number), since)
    for number in range(10**6, 10**6 + DIRECTORIES_MAX + 10):
        cache.heard(directory(number), since)
    know(cache)
    for number in range(ENTRIES_MAX + 10):
        cache.entered(1, b"%d" % number, number, cache.tick())
    assert len(cache._attributes) == ATTRIBUTES_MAX and len(cache._directories) == DIRECTORIES_MAX
    assert len(cache._directories[1].entries) <= ENTRIES_MAX
    for number in range(CHANGED_MAX + 10):
        cache.changing(number)
    assert len(cache._changed) == CHANGED_MAX
    assert cache.heard(file(5), since) == 0.0, "a change that is no longer remembered still counts"


def test_what_was_looked_for_in_vain_is_absent_until_something_comes(cache: EntryCache) -> None:
    since = cache.tick()
    cache.heard(directory(1), since)
    cache.entered(1, b"x", 0, cache.tick())
    assert cache.absent(1, b"x") and cache.entry(1, b"x") == 0 and cache.lookup(1, b"x") is None
    assert not cache.absent(1, b"y") and cache.entry(1, b"y") is None
    change = cache.begin_entry(1, b"x")
    cache.entered(1, b"x", 0, cache.tick())
    assert not cache.absent(1, b"x"), "it is being made here: whatever a lookup says may be out of date"
    cache.end_entry(change, entry=7, at_ns=5)
    assert not cache.absent(1, b"x") and cache.entry(1, b"x") == 7


def test_lookup_made_before_the_lease_is_not_kept(cache: EntryCache, clock: Clock) -> None:
    asked = cache.tick()
    clock.now_s += 0.01
    cache.heard(directory(1), cache.tick())
    clock.now_s += 0.01
    cache.entered(1, b"a", 7, asked)
    assert cache.entry(1, b"a") is None, "a change between the answer and the lease would not have been heard"
