"""The target-state table, row by row, and what must hold for any chain through any history."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfs.common.wire import cluster_pb2 as pb
from kvfs.meta.cluster.states import Chain, Local, Member, Public, advance, heard, next_public, problems

S, Y, W, L, O = Public.SERVING, Public.SYNCING, Public.WAITING, Public.LASTSRV, Public.OFFLINE  # noqa: E741
UP, ON, OFF, UNKNOWN = Local.UPTODATE, Local.ONLINE, Local.OFFLINE, Local.UNKNOWN

# craq.md, in its order: local, public now, does the predecessor serve, does another serve, public next. None: any.
TABLE = [
    (UP, S, None, None, S),
    (UP, Y, None, None, S),
    (UP, W, None, None, W),
    (UP, L, None, None, S),
    (UP, O, None, None, W),
    (ON, S, None, None, S),
    (ON, Y, True, None, Y),
    (ON, Y, False, None, W),
    (ON, W, True, None, Y),
    (ON, W, False, None, W),
    (ON, L, None, None, S),
    (ON, O, None, None, W),
    (OFF, S, None, False, L),
    (OFF, S, None, True, O),
    (OFF, Y, None, None, O),
    (OFF, W, None, None, O),
    (OFF, L, None, None, L),
    (OFF, O, None, None, O),
    # Not in craq.md: nothing heard yet changes nothing, but nobody syncs without a feeder.
    (UNKNOWN, S, None, None, S),
    (UNKNOWN, Y, True, None, Y),
    (UNKNOWN, Y, False, None, W),
    (UNKNOWN, W, None, None, W),
    (UNKNOWN, L, None, None, L),
    (UNKNOWN, O, None, None, O),
]


@pytest.mark.parametrize(("local", "public", "predecessor", "another", "expected"), TABLE)
def test_row_of_the_table(local: Local, public: Public, predecessor: bool | None, another: bool | None, expected: Public) -> None:
    for predecessor_serves in (True, False) if predecessor is None else (predecessor,):
        for another_serves in (True, False) if another is None else (another,):
            assert next_public(local, public, predecessor_serves=predecessor_serves, another_serves=another_serves) is expected


def test_the_table_is_whole() -> None:
    assert {(local, public) for local, public, *_ in TABLE} == {(local, public) for local in Local for public in Public}


# What a target says, its public state, whether it came back blank, the chain version that it knew of the current 5; what counts.
HEARD = [
    (UP, Y, False, 5, UP),
    (UP, Y, False, 4, ON),  # before the chain changed: its feeder may be another one now, and its copy of less
    (UP, Y, False, 0, UP),  # it does not say
    (UP, S, False, 4, UP),  # one that serves has to do nothing for a new version
    (ON, Y, False, 4, ON),
    (OFF, Y, False, 4, OFF),
    (ON, L, False, 4, ON),
    (ON, L, True, 4, OFF),  # an empty disk is not the last replica
    (UP, L, True, 5, OFF),
    (ON, W, True, 5, ON),  # it may be filled
]


@pytest.mark.parametrize(("says", "public", "blank", "told_version", "expected"), HEARD)
def test_what_counts_of_a_report(says: Local, public: Public, blank: bool, told_version: int, expected: Local) -> None:
    assert heard(says, public, blank=blank, told_version=told_version, chain_version=5) is expected


def test_numbers_are_those_of_the_wire() -> None:
    assert {s.name: s.value for s in Public} == {"SERVING": 1, "SYNCING": 2, "WAITING": 3, "LASTSRV": 4, "OFFLINE": pb.PUBLIC_OFFLINE}
    assert (pb.SERVING, pb.SYNCING, pb.WAITING, pb.LASTSRV) == (1, 2, 3, 4)
    assert (Local.UNKNOWN, Local.UPTODATE, Local.ONLINE, Local.OFFLINE) == (pb.LOCAL_INVALID, pb.UPTODATE, pb.ONLINE, pb.LOCAL_OFFLINE)


def chain(*states: Public, version: int = 1) -> Chain:
    return Chain(7, version, tuple(Member(index + 1, state) for index, state in enumerate(states)))


def shape(of: Chain) -> list[tuple[int, Public]]:
    return [(member.target_id, member.state) for member in of.members]


def test_nothing_changes_nothing() -> None:
    before = chain(S, S, O)
    assert advance(before, {1: UP, 2: UP, 3: OFF}) is before
    assert advance(before, {}) is before


def test_a_target_that_dies_goes_to_the_end_and_the_version_grows() -> None:
    after = advance(chain(S, S, S, version=4), {1: OFF, 2: UP, 3: UP})
    assert shape(after) == [(2, S), (3, S), (1, O)] and after.version == 5


def test_when_all_die_at_once_the_tail_is_the_last_serving() -> None:
    # The tail has committed whatever anyone has read; the others may hold it as pending.
    after = advance(chain(S, S, S), {1: OFF, 2: OFF, 3: OFF})
    assert shape(after) == [(3, L), (1, O), (2, O)]


def test_only_the_last_serving_revives_the_chain() -> None:
    lost = advance(advance(chain(S, S), {1: OFF, 2: UP}), {1: OFF, 2: OFF})
    assert shape(lost) == [(2, L), (1, O)]
    waiting = advance(lost, {1: ON, 2: OFF})
    assert shape(waiting) == [(1, W), (2, L)]
    assert advance(waiting, {1: ON, 2: OFF}) is waiting
    revived = advance(waiting, {1: ON, 2: ON})
    assert shape(revived) == [(2, S), (1, Y)]


def test_return_of_a_target_step_by_step() -> None:
    now = advance(chain(S, S, S), {1: UP, 2: OFF, 3: UP})
    steps = [shape(now)]
    for local in (ON, ON, ON, UP):
        now = advance(now, {1: UP, 2: local, 3: UP})
        steps.append(shape(now))
    assert steps == [
        [(1, S), (3, S), (2, O)],
        [(1, S), (3, S), (2, W)],
        [(1, S), (3, S), (2, Y)],
        [(1, S), (3, S), (2, Y)],
        [(1, S), (3, S), (2, S)],
    ]


def test_one_syncs_at_a_time_and_the_next_follows() -> None:
    now = chain(S, W, W)
    now = advance(now, {1: UP, 2: ON, 3: ON})
    assert shape(now) == [(1, S), (2, Y), (3, W)]
    assert advance(now, {1: UP, 2: ON, 3: ON}) is now
    now = advance(now, {1: UP, 2: UP, 3: ON})
    assert shape(now) == [(1, S), (2, S), (3, Y)]


def test_one_that_returns_passes_those_that_stay_away() -> None:
    now = advance(chain(S, O, O), {1: UP, 2: OFF, 3: ON})
    assert shape(now) == [(1, S), (3, W), (2, O)]
    assert shape(advance(now, {1: UP, 2: OFF, 3: ON})) == [(1, S), (3, Y), (2, O)]


def test_the_feeder_dies_another_takes_over() -> None:
    assert shape(advance(chain(S, S, Y), {1: UP, 2: OFF, 3: ON})) == [(1, S), (3, Y), (2, O)]


def test_the_only_feeder_dies_the_syncing_one_waits() -> None:
    assert shape(advance(chain(S, Y, W), {1: OFF, 2: ON, 3: ON})) == [(2, W), (3, W), (1, L)]


def test_the_feeder_dies_in_the_scan_in_which_the_other_is_complete() -> None:
    # Every write since was forwarded to it, so it has all, and the chain goes on.
    assert shape(advance(chain(S, Y), {1: OFF, 2: UP})) == [(2, S), (1, O)]


def test_one_replica() -> None:
    lost = advance(chain(S), {1: OFF})
    assert shape(lost) == [(1, L)]
    assert shape(advance(lost, {1: ON})) == [(1, S)]


# What the replicas of a chain of two say, scan by scan, each with the boot of its machine; how often what was not synced may be lost.
HISTORIES = {
    "one loses power, the other serves on": (["up a, off b", "up a, on b2", "up a, up b2"], 0),
    "both are killed": (["off a, off b", "on a, on b"], 0),
    "both lose power": (["off a, off b", "on a2, on b2"], 1),
    "one loses power, the last one serving is killed": (["off a, up b", "on a2, off b", "on a2, on b"], 0),
    "one is cut off, the last one serving loses power": (["off a, up b", "on a, off b", "on a, on b2"], 1),
    "the last one serving registers, loses power, registers again": (["off a, off b", "off a, off b2", "off a, unknown b3", "off a, on b3"], 1),
    "one, then the other": (
        ["off a, up b", "on a2, up b", "on a2, up b", "up a2, up b", "up a2, off b", "up a2, on b2"],
        0,
    ),
    "one twice, then the other is killed": (
        ["off a, up b", "on a2, up b", "on a2, up b", "off a3, up b", "on a3, off b", "on a3, on b"],
        0,
    ),
    "both lose power twice": (["off a, off b", "on a2, on b2", "on a2, off b2", "on a2, on b3"], 2),
    "nobody knows in which boot": (["off -, off -", "on -, on -"], 1),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_a_chain_tells_when_nobody_kept_what_was_not_synced(name: str) -> None:
    scans, losses = HISTORIES[name]
    now = chain(S, S)
    for scan in scans:
        said = {target: words.split() for target, words in enumerate(scan.split(", "), start=1)}
        locals_ = {target: {"up": UP, "on": ON, "off": OFF, "unknown": UNKNOWN}[local] for target, (local, _) in said.items()}
        before, now = now, advance(now, locals_, {target: boot.strip("-") for target, (_, boot) in said.items()})
        assert problems(now) == []
        assert now.loss == before.loss or now.version > before.version
    assert now.loss == losses and now.serving and not now.last_boot


def test_a_record_from_before_boots_were_kept_counts_as_lost() -> None:
    old = chain(L, O)
    assert advance(old, {1: ON}, {1: "a"}).loss == 1


@settings(max_examples=300, deadline=None)
@given(size=st.integers(1, 5), history=st.lists(st.lists(st.sampled_from(list(Local)), min_size=5, max_size=5), max_size=40))
def test_any_history_keeps_the_chain_sound(size: int, history: list[list[Local]]) -> None:
    now = chain(*[S] * size)
    complete = set(range(1, size + 1))  # who has every acknowledged write: those who serve now, and whom the last ones to serve left behind
    for scan in history:
        locals_ = dict(enumerate(scan, start=1))
        # A target says it is up to date only after its feeder made it so.
        for member in now.members:
            if member.state not in (S, Y) and locals_[member.target_id] is UP:
                locals_[member.target_id] = ON
        after = advance(now, locals_)
        assert problems(after) == []
        assert sorted(member.target_id for member in after.members) == list(range(1, size + 1))
        assert after.version == now.version + (after.members != now.members)
        before = {member.target_id: member.state for member in now.members}
        for member in after.members:
            if member.state is S and before[member.target_id] is not S:
                assert before[member.target_id] is L or (before[member.target_id] is Y and locals_[member.target_id] is UP)
            if member.state is Y and before[member.target_id] is not Y:
                assert before[member.target_id] is W
        serving = {member.target_id for member in after.members if member.state is S}
        stayed = [[m.target_id for m in of.members if m.state is S and m.target_id in serving and before[m.target_id] is S] for of in (now, after)]
        assert stayed[0] == stayed[1], "targets that go on serving changed places"
        last = {member.target_id for member in after.members if member.state is L}
        # Whoever stands for the chain's data now was among those who had all of it, or has just been made complete by one that had.
        for target in serving | last:
            assert target in complete or before[target] is Y
        complete = serving | last
        now = after


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 5), history=st.lists(st.lists(st.sampled_from([UP, ON, OFF]), min_size=5, max_size=5), max_size=20))
def test_when_all_are_well_again_all_serve_again(size: int, history: list[list[Local]]) -> None:
    now = chain(*[S] * size)
    for scan in history:
        now = advance(now, dict(enumerate(scan, start=1)))
    for _ in range(3 * size + 2):
        now = advance(now, {m.target_id: UP if m.state in (S, Y) else ON for m in now.members})
    assert all(member.state is S for member in now.members)


def test_problems_finds_each_fault() -> None:
    assert problems(chain(S, O, W)) and problems(chain(O, O)) and problems(chain(S, L)) and problems(chain(S, Y, Y)) and problems(chain(Y, L))
    assert problems(chain(S, S, Y, W, O)) == []
