"""What a transaction reads: its own writes over one snapshot."""

from __future__ import annotations

import pytest
import trio

from kvfs.common.errors import InvalidArgument, TxnConflict, TxnTooOld
from kvfs.meta.kv import Engine, Transaction


async def fill(engine: Engine, *keys: bytes) -> None:
    def body(txn: Transaction) -> None:
        for key in keys:
            txn.set(key, b"v" + key)

    await engine.transact(body)


def keys(found: tuple[list[tuple[bytes, bytes]], bool]) -> list[bytes]:
    return [key for key, _ in found[0]]


def test_a_committed_value_is_read_by_the_next_transaction(store):
    async def body(engine):
        await engine.transact(lambda txn: txn.set(b"k", b"one"))
        assert await engine.transact(lambda txn: txn.get(b"k")) == b"one"
        assert await engine.transact(lambda txn: txn.snapshot_get(b"k")) == b"one"
        assert await engine.transact(lambda txn: txn.get(b"other")) is None

    store(body)


def test_an_empty_value_is_not_an_absent_one(store):
    async def body(engine):
        await engine.transact(lambda txn: txn.set(b"k", b""))
        assert await engine.transact(lambda txn: txn.get(b"k")) == b""
        assert await engine.transact(lambda txn: txn.get_range(b"a", b"z")) == ([(b"k", b"")], False)

    store(body)


def test_get_sees_own_set_clear_and_clear_range(store):
    async def body(engine):
        await fill(engine, b"a", b"b", b"c")

        def own(txn: Transaction) -> None:
            txn.set(b"a", b"new")
            txn.clear(b"b")
            assert (txn.get(b"a"), txn.get(b"b"), txn.get(b"c")) == (b"new", None, b"vc")
            txn.clear_range(b"a", b"c")
            assert (txn.get(b"a"), txn.get(b"b"), txn.get(b"c")) == (None, None, b"vc")
            txn.set(b"b", b"again")
            assert txn.snapshot_get(b"b") == b"again"

        await engine.transact(own)
        assert await engine.transact(lambda txn: txn.get_range(b"a", b"z")) == ([(b"b", b"again"), (b"c", b"vc")], False)

    store(body)


@pytest.mark.parametrize("snapshot", [False, True])
def test_a_range_merges_pending_writes_in_order_both_ways(store, snapshot):
    async def body(engine):
        await fill(engine, b"a", b"c", b"e", b"g", b"i")
        with await engine.begin() as txn:
            txn.set(b"b", b"new")
            txn.set(b"c", b"changed")
            txn.clear(b"e")
            txn.clear_range(b"f", b"h")
            txn.set(b"g5", b"inside the cleared range")
            txn.set(b"z", b"outside")
            read = txn.snapshot_get_range if snapshot else txn.get_range
            expected = [(b"a", b"va"), (b"b", b"new"), (b"c", b"changed"), (b"g5", b"inside the cleared range"), (b"i", b"vi")]
            assert read(b"a", b"j") == (expected, False)
            assert read(b"a", b"j", reverse=True) == (expected[::-1], False)
            for limit in range(1, 5):
                assert read(b"a", b"j", limit=limit) == (expected[:limit], True)
                assert read(b"a", b"j", limit=limit, reverse=True) == (expected[::-1][:limit], True)
            assert read(b"a", b"j", limit=5) == (expected, False)

    store(body)


def test_range_bounds_can_be_inclusive_or_not(store):
    async def body(engine):
        await fill(engine, b"a", b"b", b"b\0", b"c")
        with await engine.begin() as txn:
            assert keys(txn.get_range(b"a", b"c")) == [b"a", b"b", b"b\0"]
            assert keys(txn.get_range(b"a", b"c", begin_inclusive=False)) == [b"b", b"b\0"]
            assert keys(txn.get_range(b"a", b"b", end_inclusive=True)) == [b"a", b"b"]
            assert keys(txn.get_range(b"b", b"c", begin_inclusive=False, end_inclusive=True)) == [b"b\0", b"c"]
            assert keys(txn.get_range(b"c", b"a")) == []
            assert keys(txn.get_range(b"b", b"b")) == []
            assert keys(txn.get_range(b"", b"\xff")) == [b"a", b"b", b"b\0", b"c"]

    store(body)


def test_a_directory_is_paged_through_by_limit_and_last_key(store):
    async def body(engine):
        names = [b"d/%05d" % number for number in range(1000)]
        await fill(engine, *names)
        seen, after, more = [], b"d/", True
        with await engine.begin() as txn:
            while more:
                rows, more = txn.get_range(after, b"d0", limit=128, begin_inclusive=False)
                assert len(rows) == (128 if more else 1000 % 128)
                seen += [key for key, _ in rows]
                after = seen[-1]
        assert seen == names

    store(body)


def test_one_transaction_sees_one_snapshot(store):
    async def body(engine):
        await fill(engine, b"a", b"b")
        with await engine.begin() as txn:
            assert txn.get(b"a") == b"va"

            def change(other: Transaction) -> None:
                other.set(b"a", b"later")
                other.clear(b"b")
                other.set(b"c", b"later")

            for _ in range(3):
                await engine.transact(change)
            assert (txn.get(b"a"), txn.get(b"b"), txn.get(b"c")) == (b"va", b"vb", None)
            assert txn.get_range(b"a", b"z") == ([(b"a", b"va"), (b"b", b"vb")], False)
            await txn.commit()  # it wrote nothing: nothing to conflict
        assert await engine.transact(lambda txn: keys(txn.get_range(b"a", b"z"))) == [b"a", b"c"]

    store(body)


def test_a_snapshot_holds_through_hundreds_of_commits(store):
    """More than a checkpoint's worth: the base must not run ahead of an open snapshot."""

    async def body(engine):
        await fill(engine, b"old", b"gone")
        with await engine.begin() as txn:
            assert txn.get(b"old") == b"vold"

            def change(other: Transaction, number: int) -> None:
                other.set(b"old", b"%d" % number)
                other.clear(b"gone")
                other.set(b"new%d" % number, b"")

            for number in range(300):
                await engine.transact(lambda other, number=number: change(other, number))
            assert txn.get(b"old") == b"vold"
            assert keys(txn.get_range(b"a", b"z")) == [b"gone", b"old"]
            txn.close()
        for number in range(10):
            await engine.transact(lambda other, number=number: other.set(b"more", b"%d" % number))
        rows, _ = await engine.transact(lambda txn: txn.get_range(b"a", b"z"))
        assert len(rows) == 302
        assert dict(rows)[b"old"] == b"299"

    store(body)


def test_an_uncommitted_transaction_leaves_nothing(store):
    async def body(engine):
        with await engine.begin() as txn:
            txn.set(b"k", b"v")
            assert txn.get(b"k") == b"v"
        assert await engine.transact(lambda txn: txn.get(b"k")) is None

    store(body)


def test_reset_forgets_reads_and_writes_and_takes_a_new_snapshot(store):
    async def body(engine):
        txn = await engine.begin()
        txn.get(b"k")
        txn.set(b"lost", b"")
        await engine.transact(lambda other: other.set(b"k", b"new"))
        txn.set(b"also lost", b"")
        with pytest.raises(TxnConflict):
            await txn.commit()
        txn.reset()
        assert txn.get(b"k") == b"new"
        txn.set(b"kept", b"")
        await txn.commit()
        txn.close()
        assert await engine.transact(lambda txn: keys(txn.get_range(b"a", b"z"))) == [b"k", b"kept"]

    store(body)


def test_an_ended_transaction_refuses_to_go_on_until_reset(store):
    async def body(engine):
        txn = await engine.begin()
        txn.set(b"k", b"v")
        await txn.commit()
        for step in (lambda: txn.set(b"k", b"w"), lambda: txn.clear(b"k"), lambda: txn.get(b"j"), lambda: txn.get_range(b"a", b"b")):
            with pytest.raises(InvalidArgument):
                step()
        with pytest.raises(InvalidArgument):
            await txn.commit()
        txn.reset()
        txn.set(b"k", b"w")
        await txn.commit()
        assert await engine.transact(lambda txn: txn.get(b"k")) == b"w"

    store(body)


def test_a_transaction_past_its_lifetime_can_neither_read_nor_commit(store):
    async def body(engine):
        txn = await engine.begin()
        await trio.sleep(60)  # before its first read it has no snapshot, so no age
        assert txn.get(b"k") is None
        await trio.sleep(4.9)
        assert txn.get(b"k") is None
        txn.set(b"k", b"v")
        await trio.sleep(0.2)
        for read in (lambda: txn.get(b"j"), lambda: txn.get_range(b"a", b"b"), lambda: txn.snapshot_get(b"j"), lambda: txn.add_read_conflict(b"j")):
            with pytest.raises(TxnTooOld):
                read()
        with pytest.raises(TxnTooOld):
            await txn.commit()
        txn.reset()
        txn.get(b"k")
        txn.set(b"k", b"v")
        await txn.commit()

    store(body)


def test_a_write_only_transaction_has_no_age(store):
    async def body(engine):
        txn = await engine.begin()
        txn.set(b"k", b"v")
        await trio.sleep(60)
        await txn.commit()
        assert await engine.transact(lambda txn: txn.get(b"k")) == b"v"

    store(body)


def test_a_forgotten_transaction_does_not_hold_the_store_back(store):
    async def body(engine):
        forgotten = await engine.begin()
        forgotten.get(b"k")
        await trio.sleep(6)
        await engine.transact(lambda txn: txn.set(b"k", b"v"))
        assert not engine._live
        with pytest.raises(TxnTooOld):
            forgotten.get(b"k")

    store(body)
