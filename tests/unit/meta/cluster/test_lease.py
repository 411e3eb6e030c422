"""Who is the primary, in pure steps; and who is alive."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvfs.meta.cluster.lease import Holding, Lease, Watch, claim, may_take, observe, renew, same_reign
from kvfs.meta.cluster.liveness import Leases

DURATION_MS = 6000


def test_the_first_manager_claims_at_once() -> None:
    watch = observe(None, None, 10.0)
    assert may_take(watch, "a", 10.0)
    lease = claim(None, "a", "tcp://a:1", DURATION_MS)
    assert (lease.epoch, lease.renewal, lease.manager_uuid) == (1, 1, "a")
    assert Lease.decode(lease.encode()) == lease


def test_a_standby_waits_a_full_duration_without_a_renewal() -> None:
    lease = claim(None, "a", "tcp://a:1", DURATION_MS)
    watch = observe(None, lease, 100.0)
    assert not may_take(watch, "b", 105.999)
    watch = observe(watch, lease, 105.0)
    assert watch.since_s == 100.0
    assert may_take(watch, "b", 106.0)
    watch = observe(watch, renew(lease), 105.0)
    assert not may_take(watch, "b", 110.999) and may_take(watch, "b", 111.0)


def test_an_own_earlier_run_is_succeeded_at_once_with_a_new_epoch() -> None:
    old = renew(claim(None, "a", "tcp://a:1", DURATION_MS))
    assert may_take(observe(None, old, 1.0), "a", 1.0)
    new = claim(old, "a", "tcp://a:2", DURATION_MS)
    assert new.epoch == 2 and not same_reign(new, old) and same_reign(renew(new), new)


def test_the_fence() -> None:
    mine = claim(None, "a", "", DURATION_MS)
    assert same_reign(mine, mine) and same_reign(renew(mine), mine)
    assert not same_reign(None, mine)
    assert not same_reign(claim(mine, "b", "", DURATION_MS), mine)
    assert not same_reign(Lease("b", "", mine.epoch, 1, DURATION_MS), mine)


def test_belief_ends_at_two_thirds_and_renewal_is_due_long_before() -> None:
    holding = Holding(claim(None, "a", "", DURATION_MS), 50.0)
    assert holding.renew_at_s() == 51.0
    assert holding.believed(53.999) and not holding.believed(54.0)


# A reign from beginning to end, two managers and one record; lease 6 s. When, who, does what; epoch and renewal in the store after it; who believes.
STORY = [
    (0.0, "a", "looks", (1, 1), "a"),  # nobody was there: a claims
    (0.5, "b", "looks", (1, 1), "a"),
    (1.0, "a", "renews", (1, 2), "a"),
    (1.5, "b", "looks", (1, 2), "a"),  # a new renewal: b counts from here
    (5.0, "b", "looks", (1, 2), ""),  # a stopped renewing at 1.0: it believes until 5.0
    (7.4, "b", "looks", (1, 2), ""),  # not yet a whole duration since b saw the last renewal
    (7.5, "b", "looks", (2, 1), "b"),
    (8.0, "a", "renews", (2, 1), "b"),  # a wakes up: the fence refuses it, and it knows
    (8.5, "a", "looks", (2, 1), "b"),
    (9.0, "b", "renews", (2, 2), "b"),
    (9.1, "b", "restarts", (2, 2), ""),
    (9.2, "b", "looks", (3, 1), "b"),  # its own earlier run is dead: no wait, and another reign
]


def test_the_story_of_a_lease() -> None:
    stored: Lease | None = None
    watches: dict[str, Watch] = {}
    holdings: dict[str, Holding] = {}
    for now_s, who, does, expected, believers in STORY:
        if does == "restarts":
            watches.pop(who, None)
            holdings.pop(who, None)
        elif does == "looks":
            watches[who] = observe(watches.get(who), stored, now_s)
            if may_take(watches[who], who, now_s):
                stored = claim(stored, who, "", DURATION_MS)
                holdings[who] = Holding(stored, now_s)
        elif same_reign(stored, holdings[who].lease):
            assert stored is not None
            stored = renew(stored)
            holdings[who] = Holding(stored, now_s)
        else:
            del holdings[who]
        assert stored is not None
        assert (stored.epoch, stored.renewal) == expected, f"at {now_s} s, {who} {does}"
        assert "".join(name for name, holding in sorted(holdings.items()) if holding.believed(now_s)) == believers, f"at {now_s} s, {who} {does}"


@settings(max_examples=200, deadline=None)
@given(steps=st.lists(st.tuples(st.sampled_from("ab"), st.floats(0.0, 3.0), st.floats(0.0, 2.0)), max_size=60))
def test_no_two_believe_at_once(steps: list[tuple[str, float, float]]) -> None:
    """Two managers act in any order, each act taking some time between its beginning and its commit; there is one store."""
    now = 0.0
    stored: Lease | None = None
    watches: dict[str, Watch | None] = {"a": None, "b": None}
    holdings: dict[str, Holding | None] = {"a": None, "b": None}
    for who, pause_s, commit_s in steps:
        now += pause_s
        begun = now
        holding = holdings[who]
        if holding is not None:
            now += commit_s
            if same_reign(stored, holding.lease):
                stored = renew(holding.lease)
                holdings[who] = Holding(stored, begun)
            else:
                holdings[who] = None
                watches[who] = None
        else:
            watches[who] = watch = observe(watches[who], stored, begun)
            if may_take(watch, who, begun):
                seen = stored
                now += commit_s
                if stored == seen:
                    stored = claim(seen, who, "", DURATION_MS)
                    holdings[who] = Holding(stored, begun)
        assert sum(h is not None and h.believed(now) for h in holdings.values()) <= 1


# --- liveness


def test_a_silent_member_is_dead_after_a_lease_and_not_before() -> None:
    leases: Leases[int] = Leases(2.0, stall_s=0.5)
    leases.grant(1, 0.0)
    leases.grant(2, 0.0)
    for tick in range(1, 40):
        now = tick * 0.1
        if tick == 10:
            assert leases.renew(2, now, sequence=1)
        dead = leases.expired(now)
        assert (1 in dead) == (now >= 2.0) and (2 in dead) == (now >= 3.0)


def test_an_older_heartbeat_changes_nothing() -> None:
    leases: Leases[int] = Leases(2.0, stall_s=9.0)
    leases.grant(1, 0.0)
    assert leases.renew(1, 1.0, sequence=5)
    assert not leases.renew(1, 1.5, sequence=5) and not leases.renew(1, 1.5, sequence=4)
    assert leases.left_s(1, 1.0) == 2.0
    assert not leases.renew(7, 1.0, sequence=1)
    leases.grant(1, 2.0)
    assert leases.renew(1, 2.0, sequence=1)


def test_the_managers_own_standstill_counts_against_nobody() -> None:
    leases: Leases[int] = Leases(2.0, stall_s=0.5)
    leases.grant(1, 0.0)
    assert leases.expired(0.2) == []
    # The process stood still for ten seconds: the member's heartbeats may be waiting in the socket.
    assert leases.expired(10.2) == []
    assert leases.expired(10.4) == []
    assert leases.expired(10.6) == []
    assert [tick for tick in range(107, 130) if leases.expired(tick / 10)][:1] == [115]


def test_dropped_members_are_forgotten() -> None:
    leases: Leases[str] = Leases(1.0, stall_s=0.5)
    leases.grant("x", 0.0)
    assert "x" in leases
    leases.drop("x")
    assert "x" not in leases and leases.expired(0.4) == []
