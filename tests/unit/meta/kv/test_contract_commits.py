"""When a transaction conflicts, what limits it has, and how it is retried."""

from __future__ import annotations

from collections.abc import Awaitable, Coroutine
from itertools import pairwise

import pytest
import trio

from kvfs.common.errors import InvalidArgument, NotFound, TxnConflict, TxnMaybeCommitted, TxnTooBig
from kvfs.meta.kv import Engine, Transaction
from kvfs.meta.kv.limits import MAX_KEY_BYTES, MAX_TRANSACTION_BYTES, MAX_VALUE_BYTES


async def conflicts(engine: Engine, mine, others) -> bool:
    """Whether a transaction that does `mine` and writes fails when `others` commits in between."""

    def base(txn: Transaction) -> None:
        for key in (b"b", b"d", b"f"):
            txn.set(key, b"old")

    await engine.transact(base)
    with await engine.begin() as txn:
        mine(txn)
        txn.set(b"result", b"")
        await engine.transact(others)
        try:
            await txn.commit()
        except TxnConflict:
            assert await engine.transact(lambda txn: txn.get(b"result")) is None
            return True
        assert await engine.transact(lambda txn: txn.get(b"result")) == b""
        return False


CONFLICTS = {
    "point read, changed": (lambda t: t.get(b"b"), lambda o: o.set(b"b", b"new")),
    "point read, set to the same": (lambda t: t.get(b"b"), lambda o: o.set(b"b", b"old")),
    "point read, cleared": (lambda t: t.get(b"b"), lambda o: o.clear(b"b")),
    "point read, cleared by range": (lambda t: t.get(b"b"), lambda o: o.clear_range(b"a", b"c")),
    "absent key, created": (lambda t: t.get(b"x"), lambda o: o.set(b"x", b"")),
    "range, row changed": (lambda t: t.get_range(b"a", b"e"), lambda o: o.set(b"d", b"new")),
    "range, phantom inserted": (lambda t: t.get_range(b"a", b"e"), lambda o: o.set(b"c", b"")),
    "range, phantom at its begin": (lambda t: t.get_range(b"a", b"e"), lambda o: o.set(b"a", b"")),
    "range, phantom just before its end": (lambda t: t.get_range(b"a", b"e"), lambda o: o.set(b"d\xff", b"")),
    "range, row deleted": (lambda t: t.get_range(b"a", b"e"), lambda o: o.clear(b"b")),
    "range, rows deleted by range": (lambda t: t.get_range(b"a", b"e"), lambda o: o.clear_range(b"", b"\xff")),
    "empty range, phantom": (lambda t: t.get_range(b"x", b"z"), lambda o: o.set(b"y", b"")),
    "inclusive end, changed": (lambda t: t.get_range(b"b", b"d", end_inclusive=True), lambda o: o.set(b"d", b"new")),
    "limited range, phantom in the part read": (lambda t: t.get_range(b"a", b"z", limit=2), lambda o: o.set(b"c", b"")),
    "limited range, its last row": (lambda t: t.get_range(b"a", b"z", limit=2), lambda o: o.set(b"d", b"")),
    "limited range, all rows, phantom behind": (lambda t: t.get_range(b"a", b"g", limit=3), lambda o: o.set(b"f5", b"")),
    "reverse limited range, phantom": (lambda t: t.get_range(b"a", b"g", limit=2, reverse=True), lambda o: o.set(b"e", b"")),
    "reverse limited range, its last row": (lambda t: t.get_range(b"a", b"g", limit=2, reverse=True), lambda o: o.clear(b"d")),
    "explicit key": (lambda t: t.add_read_conflict(b"x"), lambda o: o.set(b"x", b"")),
    "explicit range": (lambda t: t.add_read_conflict_range(b"x", b"z"), lambda o: o.set(b"y", b"")),
    "snapshot read with explicit key": (lambda t: (t.snapshot_get(b"b"), t.add_read_conflict(b"b")), lambda o: o.clear(b"b")),
    "versionstamped key in range": (lambda t: t.get_range(b"s", b"t"), lambda o: o.set_versionstamped_key(b"s", b"")),
    "versionstamped value": (lambda t: t.get(b"b"), lambda o: o.set_versionstamped_value(b"b")),
}

NO_CONFLICTS = {
    "other key": (lambda t: t.get(b"b"), lambda o: o.set(b"d", b"new")),
    "snapshot get": (lambda t: t.snapshot_get(b"b"), lambda o: o.set(b"b", b"new")),
    "snapshot range": (lambda t: t.snapshot_get_range(b"a", b"z"), lambda o: o.set(b"c", b"new")),
    "write only": (lambda t: t.set(b"b", b"mine"), lambda o: o.set(b"b", b"other")),
    "clear only": (lambda t: t.clear_range(b"a", b"z"), lambda o: o.set(b"b", b"other")),
    "own write read back": (lambda t: (t.set(b"b", b"mine"), t.get(b"b")), lambda o: o.set(b"b", b"other")),
    "own clear read back": (lambda t: (t.clear_range(b"a", b"c"), t.get(b"b")), lambda o: o.set(b"b", b"other")),
    "range end is not in it": (lambda t: t.get_range(b"a", b"d"), lambda o: o.set(b"d", b"new")),
    "exclusive begin": (lambda t: t.get_range(b"b", b"d", begin_inclusive=False), lambda o: o.set(b"b", b"new")),
    "limited range, behind the part read": (lambda t: t.get_range(b"a", b"z", limit=2), lambda o: o.set(b"e", b"")),
    "reverse limited range, before the part read": (lambda t: t.get_range(b"a", b"z", limit=1, reverse=True), lambda o: o.set(b"b", b"new")),
}


@pytest.mark.parametrize("case", CONFLICTS)
def test_conflict(store, case):
    assert store(lambda engine: conflicts(engine, *CONFLICTS[case]))


@pytest.mark.parametrize("case", NO_CONFLICTS)
def test_no_conflict(store, case):
    assert not store(lambda engine: conflicts(engine, *NO_CONFLICTS[case]))


def test_a_read_only_transaction_never_conflicts(store):
    async def body(engine):
        with await engine.begin() as txn:
            txn.get(b"k")
            await engine.transact(lambda other: other.set(b"k", b""))
            await txn.commit()

    store(body)


def test_only_commits_after_the_snapshot_conflict(store):
    async def body(engine):
        with await engine.begin() as early:
            early.get(b"x")  # keeps the log of commits alive
            await engine.transact(lambda txn: txn.set(b"k", b"1"))
            with await engine.begin() as txn:
                assert txn.get(b"k") == b"1"
                txn.set(b"k", b"2")
                await txn.commit()

    store(body)


def test_write_skew_is_refused(store):
    """Two doctors on call: each reads both and leaves. Serializable: one of them must stay."""

    async def body(engine):
        await engine.transact(lambda txn: (txn.set(b"on/a", b""), txn.set(b"on/b", b"")))
        first, second = await engine.begin(), await engine.begin()
        for txn, key in ((first, b"on/a"), (second, b"on/b")):
            assert len(txn.get_range(b"on/", b"on0")[0]) == 2
            txn.clear(key)
        await first.commit()
        with pytest.raises(TxnConflict):
            await second.commit()

    store(body)


# --- limits


def test_limits_of_keys_and_values(store):
    async def body(engine):
        long_key, long_value = b"\xff" * MAX_KEY_BYTES, bytes(MAX_VALUE_BYTES)
        await engine.transact(lambda txn: txn.set(long_key, long_value))
        assert await engine.transact(lambda txn: txn.get(long_key)) == long_value
        rows, more = await engine.transact(lambda txn: txn.get_range(b"", long_key, end_inclusive=True))
        assert rows == [(long_key, long_value)], "the engine's own keys are never seen"
        assert not more
        for step in (
            lambda txn: txn.set(long_key + b"x", b""),
            lambda txn: txn.get(long_key + b"x"),
            lambda txn: txn.clear(long_key + b"x"),
            lambda txn: txn.set(b"k", long_value + b"x"),
            lambda txn: txn.set(b"", b"v"),
            lambda txn: txn.get_range(b"a", long_key + b"xy"),
            lambda txn: txn.clear_range(b"a", long_key + b"xy"),
            lambda txn: txn.set_versionstamped_key(bytes(MAX_KEY_BYTES - 9), b""),
            lambda txn: txn.set_versionstamped_value(b"k", bytes(MAX_VALUE_BYTES - 9)),
        ):
            with pytest.raises(TxnTooBig):
                await engine.transact(step)
        await engine.transact(lambda txn: txn.clear(long_key))
        assert await engine.transact(lambda txn: txn.get(long_key)) is None

    store(body)


def test_the_size_of_a_transaction_is_bounded_and_a_full_one_commits(store):
    async def body(engine):
        value = bytes(MAX_VALUE_BYTES)
        with await engine.begin() as txn:
            for number in range(99):
                txn.set(b"k%02d" % number, value)
            txn.set(b"k00", value)  # again: replaced, not added
            with pytest.raises(TxnTooBig):
                txn.set(b"k99", value)
            txn.clear_range(b"k00", b"k10")
            txn.set(b"k99", value)
            await txn.commit()
        rows, _ = await engine.transact(lambda txn: txn.get_range(b"k", b"l"))
        assert len(rows) == 90

        with await engine.begin() as txn, pytest.raises(TxnTooBig):
            for number in range(MAX_TRANSACTION_BYTES):
                txn.add_read_conflict(b"%0500d" % number)

    store(body)


def test_a_range_read_without_a_sensible_limit_is_refused(store):
    async def body(engine):
        with await engine.begin() as txn:
            for limit in (0, -1, 1_000_000):
                with pytest.raises(InvalidArgument):
                    txn.get_range(b"a", b"b", limit=limit)

    store(body)


# --- versionstamps


def test_versionstamps_are_unique_and_grow(store):
    async def body(engine):
        stamps = []

        async def commit(number: int) -> None:
            with await engine.begin() as txn:
                txn.get(b"unrelated")
                txn.set(b"n%d" % number, b"")
                await txn.commit()
                stamps.append(txn.versionstamp)

        for number in range(20):
            await commit(number)
        assert stamps == sorted(stamps)
        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(commit, number)
        assert len(set(stamps)) == 70
        assert all(len(stamp) == 10 for stamp in stamps)
        assert min(stamps[20:]) > max(stamps[:20])

    store(body)


def test_versionstamped_keys_and_values(store):
    async def body(engine):
        with await engine.begin() as txn:
            txn.set_versionstamped_key(b"q/", b"first", b"/end")
            txn.set_versionstamped_value(b"last", b"<", b">")
            assert txn.get_range(b"q/", b"q0") == ([], False)
            with pytest.raises(InvalidArgument):
                txn.get(b"last")
            with pytest.raises(InvalidArgument):
                txn.versionstamp  # noqa: B018
            await txn.commit()
            first = txn.versionstamp
        await engine.transact(lambda txn: txn.set_versionstamped_key(b"q/", b"second"))
        rows, _ = await engine.transact(lambda txn: txn.get_range(b"q/", b"q0"))
        assert [value for _, value in rows] == [b"first", b"second"]
        assert rows[0][0] == b"q/" + first + b"/end"
        assert await engine.transact(lambda txn: txn.get(b"last")) == b"<" + first + b">"

        def replaced(txn: Transaction) -> None:
            txn.set_versionstamped_value(b"last")
            txn.set(b"last", b"plain")
            assert txn.get(b"last") == b"plain"
            txn.set_versionstamped_value(b"other")
            txn.clear_range(b"o", b"p")
            assert txn.get(b"other") is None

        await engine.transact(replaced)
        assert await engine.transact(lambda txn: (txn.get(b"last"), txn.get(b"other"))) == (b"plain", None)

    store(body)


# --- the retry loop


def test_transact_retries_conflicts_with_backoff_until_it_succeeds(store):
    async def body(engine):
        tries = []

        async def disturb() -> None:
            await engine.transact(lambda txn: txn.set(b"k", b"%d" % len(tries)))

        real = engine.commit

        async def commit(snapshot, reads, writes):
            if b"mine" in writes.values and len(tries) < 4:
                await disturb()
            return await real(snapshot, reads, writes)

        engine.commit = commit

        def work(txn: Transaction) -> bytes | None:
            tries.append(trio.current_time())
            txn.set(b"mine", b"")
            return txn.get(b"k")

        assert await engine.transact(work) == b"3"
        gaps = [later - earlier for earlier, later in pairwise(tries)]
        assert len(tries) == 4
        assert gaps == pytest.approx([0.010, 0.020, 0.040], abs=0.002)

    store(body)


def test_transact_retries_an_unknown_outcome(store):
    """With the record that it reads and writes itself, the work is done once although the loop runs it twice."""

    async def body(engine):
        real = engine.commit
        lost = []

        async def commit(snapshot, reads, writes):
            version = await real(snapshot, reads, writes)
            if writes and not lost:
                lost.append(version)
                raise TxnMaybeCommitted("the answer was lost")
            return version

        engine.commit = commit

        def add_once(txn: Transaction) -> int:
            if txn.get(b"request/7") is None:
                txn.set(b"request/7", b"done")
                txn.set(b"count", b"%d" % (int(txn.get(b"count") or b"0") + 1))
            return int(txn.get(b"count") or b"0")

        assert await engine.transact(add_once) == 1
        assert lost

    store(body)


def test_transact_gives_up_after_ten_tries_or_the_deadline(store):
    async def body(engine):
        tries = []

        def work(txn: Transaction) -> None:
            tries.append(trio.current_time())
            raise TxnConflict("always")

        started = trio.current_time()
        with pytest.raises(TxnConflict):
            await engine.transact(work)
        assert len(tries) == 10
        assert trio.current_time() - started <= 5
        tries.clear()
        with pytest.raises(TxnConflict):
            await engine.transact(work, deadline_s=0.1)
        assert len(tries) == 4  # at 0, 10, 30 and 70 ms

    store(body)


def test_transact_passes_other_errors_on_and_writes_nothing(store):
    async def body(engine):
        tries = []

        def work(txn: Transaction) -> None:
            tries.append(1)
            txn.set(b"k", b"")
            raise NotFound("no such file")

        with pytest.raises(NotFound):
            await engine.transact(work)
        assert len(tries) == 1
        assert not engine._live
        assert await engine.transact(lambda txn: txn.get(b"k")) is None

    store(body)


# --- concurrency


def test_a_counter_under_contention_loses_nothing(store):
    """Transactions that wait between read and commit: every increment counts once, by conflicts and retries alone."""

    async def body(engine):
        conflicted = []

        async def add() -> None:
            txn = await engine.begin()
            while True:
                value = int(txn.get(b"n") or b"0")
                await trio.sleep(0.001)
                txn.set(b"n", b"%d" % (value + 1))
                try:
                    await txn.commit()
                    return
                except TxnConflict:
                    conflicted.append(1)
                    txn.reset()

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(add)
        assert await engine.transact(lambda txn: txn.get(b"n")) == b"20"
        assert conflicted

    store(body)


def test_transact_in_one_process_never_conflicts(store):
    """The body runs without awaiting, on the newest commit: a hot key costs no retries."""

    async def body(engine):
        runs = []

        def add(txn: Transaction) -> None:
            runs.append(1)
            txn.set(b"n", b"%d" % (int(txn.get(b"n") or b"0") + 1))

        async with trio.open_nursery() as nursery:
            for _ in range(200):
                nursery.start_soon(engine.transact, add)
        assert len(runs) == 200
        assert await engine.transact(lambda txn: txn.get(b"n")) == b"200"

    store(body)


def test_a_cancelled_commit_leaves_the_store_usable(store):
    async def body(engine):
        for _ in range(5):
            with trio.CancelScope() as scope:
                scope.cancel()
                await engine.transact(lambda txn: txn.set(b"k", b"v"))
        await engine.transact(lambda txn: txn.set(b"j", b"w"))
        assert await engine.transact(lambda txn: txn.get(b"j")) == b"w"

    store(body)


# --- at once


async def done(outcome):
    return await outcome if isinstance(outcome, Awaitable) else outcome


def test_at_once_commits_what_transact_does(store):
    async def body(engine):
        for number in range(300):  # long enough for checkpoints, and for syncs in either thread
            key = b"k%d" % number
            assert await done(engine.transact_at_once(lambda txn, key=key: (txn.get(key), txn.set(key, b"v"), key)[2])) == key
            assert await done(engine.transact_at_once(lambda txn, key=key: txn.get(key))) == b"v"
        rows, _ = await engine.transact(lambda txn: txn.get_range(b"k", b"l"))
        assert len(rows) == 300

    store(body)


def test_at_once_retries_what_conflicts_and_gives_errors_as_they_are(store):
    async def body(engine):
        tries = []

        def disturbed(txn: Transaction) -> bytes | None:
            tries.append(1)
            found = txn.get(b"k")
            if len(tries) < 3:
                other = engine.transact_at_once(lambda other: other.set(b"k", b"%d" % len(tries)))
                if isinstance(other, Coroutine):
                    other.close()  # committed all the same
            txn.set(b"mine", found or b"none")
            return found

        assert await done(engine.transact_at_once(disturbed)) == b"2"
        assert len(tries) == 3
        assert await engine.transact(lambda txn: txn.get(b"mine")) == b"2"

        def fails(txn: Transaction) -> None:
            txn.set(b"mine", b"lost")
            raise NotFound("no")

        with pytest.raises(NotFound):
            engine.transact_at_once(fails)
        assert await engine.transact(lambda txn: txn.get(b"mine")) == b"2"

    store(body)
