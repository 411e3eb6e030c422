"""The Meta service: requests that are applied once, truncations on the chains, sessions, appends side by side."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import trio
from tests.unit.meta.namespace.service_world import CHAINS, SIZE, A, B, Service, run

from kvfs.common.errors import AlreadyExists, InvalidArgument, KvfsError, NoServingTarget, NotFound
from kvfs.common.routing import Routing
from kvfs.common.wire import base_pb2
from kvfs.common.wire import meta_pb2 as pb
from kvfs.common.wire.service import SERVICES, Method
from kvfs.meta.gc import housekeeping
from kvfs.meta.kv.memory import MemoryEngine
from kvfs.meta.namespace import idempotency, keys, store

S1, S2 = b"1" * 16, b"2" * 16


# --- applied once


def retried() -> list[tuple[str, Any]]:
    return [
        ("create", pb.CreateRequest(parent=1, name=b"new", exclusive=True)),
        ("make", pb.MakeRequest(parent=1, name=b"new", type=pb.DIRECTORY)),
        ("link", pb.LinkRequest(inode=0, parent=1, name=b"new")),
        ("remove", pb.RemoveRequest(parent=1, name=b"old")),
        ("rename", pb.RenameRequest(parent=1, name=b"old", new_parent=1, new_name=b"new")),
        ("rename", pb.RenameRequest(parent=1, name=b"old", new_parent=1, new_name=b"other", exchange=True)),
        ("append", pb.AppendRequest(inode=0, length=100)),
        ("set_xattr", pb.XattrRequest(inode=0, name=b"user.a", value=b"1", create=True)),
        ("set_attr", pb.SetAttrRequest(inode=0, length=5)),
        ("set_attr", pb.SetAttrRequest(inode=0, mode=0o600)),
        ("open", pb.OpenRequest(inode=0, write=True, truncate=True, session=S1)),
        ("set_layout", pb.SetLayoutRequest(inode=1, layout=pb.Layout(stripe=2))),
    ]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("case", range(len(retried())))
def test_a_retry_gets_the_first_reply_and_changes_nothing(case: int, restart: bool) -> None:
    async def main() -> None:
        service = await Service().start()
        old = await service.create(b"old")
        await service.create(b"other")
        method, request = retried()[case]
        if "inode" in request.DESCRIPTOR.fields_by_name and not request.inode:
            request.inode = old.inode
        request_id = b"r" * 16
        first = await service.call(method, request, request_id=request_id)
        before = await service.call("read_dir", pb.ReadDirRequest(inode=1, attributes=True))
        if restart:
            service = await Service(service.engine, service.chunks).start()
        again = await service.call(method, request, request_id=request_id)
        assert again == first
        after = await service.call("read_dir", pb.ReadDirRequest(inode=1, attributes=True))
        assert after == before
        await service.check()

    run(main)


def test_two_tries_at_once_are_applied_once() -> None:
    async def main() -> None:
        service = await Service().start()
        number = (await service.create(b"f")).inode
        offsets: list[int] = []

        async def one() -> None:
            reply = await service.call("append", pb.AppendRequest(inode=number, length=10), request_id=b"r" * 16)
            offsets.append(reply.offset)

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(one)
        assert offsets == [0] * 5
        assert (await service.stat(number)).length == 10

    run(main)


def test_a_failed_change_leaves_no_record() -> None:
    async def main() -> None:
        service = await Service().start()
        await service.create(b"f")
        with pytest.raises(AlreadyExists):
            await service.call("create", pb.CreateRequest(parent=1, name=b"f", exclusive=True), request_id=b"r" * 16)
        await service.remove(b"f")
        await service.call("create", pb.CreateRequest(parent=1, name=b"f", exclusive=True), request_id=b"r" * 16)

    run(main)


def test_request_ids_are_checked() -> None:
    async def main() -> None:
        service = await Service().start()
        with pytest.raises(InvalidArgument):
            await service.call("create", pb.CreateRequest(parent=1, name=b"f"), request_id=b"short")
        await service.call("create", pb.CreateRequest(parent=1, name=b"f"), request_id=b"r" * 16)
        with pytest.raises(InvalidArgument):
            await service.call("remove", pb.RemoveRequest(parent=1, name=b"f"), request_id=b"r" * 16)

    run(main)


def test_request_records_last_long_enough_and_are_swept() -> None:
    async def main() -> None:
        service = await Service().start()

        async def records() -> int:
            rows, _ = await service.engine.transact(lambda txn: txn.get_range(*keys.span(keys.REQUEST)))
            return len(rows)

        async def sweep() -> None:
            while await service.engine.transact(lambda txn: idempotency.sweep(txn, service.clock.wall_ns())):
                pass

        period_s = idempotency.PERIOD_NS // 10**9
        await trio.sleep(period_s - service.clock.wall_ns() // 10**9 % period_s - 5)  # 5 s before a period ends
        request = pb.CreateRequest(parent=1, name=b"f", exclusive=True)
        await service.call("create", request, request_id=b"r" * 16)
        for pause_s in (1, 14, 100):
            await trio.sleep(pause_s)
            await sweep()
            assert (await service.call("create", request, request_id=b"r" * 16)).created
        assert await records() == 1
        await trio.sleep(2 * period_s)
        await sweep()
        assert await records() == 0

    run(main)


# --- truncation


@pytest.mark.parametrize(
    ("length", "left"),
    [
        (0, {}),
        (1, {0: 1}),
        (SIZE, {0: SIZE}),
        (SIZE + 5, {0: SIZE, 1: 5}),
        (5 * SIZE + 100, {0: SIZE, 1: SIZE, 2: SIZE, 3: SIZE, 4: SIZE, 5: 100}),
    ],
)
def test_truncate_cuts_the_chunks(length: int, left: dict[int, int]) -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        await service.write(made, 6 * SIZE + 7)
        reply = await service.call("set_attr", pb.SetAttrRequest(inode=made.inode, length=length))
        assert reply.inode.length == length
        assert service.chunks.of(made.inode) == left
        await service.call("set_attr", pb.SetAttrRequest(inode=made.inode, length=10 * SIZE))
        assert service.chunks.of(made.inode) == left
        await service.check()

    run(main)


def test_opening_with_truncate_cuts_the_chunks() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        await service.write(made, 3 * SIZE)
        await service.call("open", pb.OpenRequest(inode=made.inode, write=True, truncate=True, session=S1))
        assert service.chunks.of(made.inode) == {}
        service.chunks.write(made, SIZE)
        reply = await service.call("create", pb.CreateRequest(parent=1, name=b"f", write=True, truncate=True, session=S2))
        assert reply.inode.length == 0 and not reply.created
        assert service.chunks.of(made.inode) == {}

    run(main)


def test_a_truncation_whose_service_died_is_carried_out_by_the_next() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        await service.write(made, 3 * SIZE)
        service.chunks.failing = set(CHAINS)
        with pytest.raises(NoServingTarget):
            await service.call("set_attr", pb.SetAttrRequest(inode=made.inode, length=10))
        assert (await service.stat(made.inode)).length == 10
        service.chunks.failing = set()
        after = await Service(service.engine, service.chunks).start()
        assert await after.meta.cuts.redo_all() == 1
        assert service.chunks.of(made.inode) == {0: 10}
        assert await after.meta.cuts.redo_all() == 0

    run(main)


def test_the_retry_of_a_truncation_that_failed_half_way_finishes_it() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        await service.write(made, 3 * SIZE)
        service.chunks.failing = {CHAINS[0]}
        request = pb.SetAttrRequest(inode=made.inode, length=10)
        with pytest.raises(NoServingTarget):
            await service.call("set_attr", request, request_id=b"r" * 16)
        service.chunks.failing = set()
        await service.call("set_attr", request, request_id=b"r" * 16)
        assert service.chunks.of(made.inode) == {0: 10}

    run(main)


@pytest.mark.parametrize("how", ["open", "create", "create by path"])
def test_the_retry_of_an_open_whose_truncation_failed_finishes_it(how: str) -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        await service.write(made, 3 * SIZE)
        service.chunks.failing = {CHAINS[0]}
        if how == "open":
            request: Any = pb.OpenRequest(inode=made.inode, write=True, truncate=True, session=S1)
        else:
            request = pb.CreateRequest(parent=1, write=True, truncate=True, session=S1)
            if how == "create":
                request.name = b"f"
            else:
                request.path.append(b"f")
        method = how.split()[0]
        with pytest.raises(NoServingTarget):
            await service.call(method, request, request_id=b"r" * 16)
        service.chunks.failing = set()
        await service.call(method, request, request_id=b"r" * 16)
        assert service.chunks.of(made.inode) == {}
        assert not service.meta.cuts._locks

    run(main)


def test_the_root_of_a_new_file_system_belongs_to_whom_the_configuration_names() -> None:
    async def main() -> None:
        engine = MemoryEngine()
        assert await engine.transact(lambda txn: store.prepare(txn, 1, uid=1000, gid=100))
        assert not await engine.transact(lambda txn: store.prepare(txn, 1, uid=5, gid=5))
        root = await Service(engine).stat(1)
        assert (root.uid, root.gid, root.mode) == (1000, 100, 0o755)

    run(main)


async def _left_undone(service: Service) -> pb.Inode:
    """A file of three chunks whose truncation to 10 bytes could not reach its chains; they serve again."""
    made = await service.create(b"f", write=True, session=S1)
    await service.write(made, 3 * SIZE, session=S1, still_open=True)
    service.chunks.failing = set(CHAINS)
    with pytest.raises(NoServingTarget):
        await service.call("set_attr", pb.SetAttrRequest(inode=made.inode, length=10))
    service.chunks.failing = set()
    assert service.chunks.of(made.inode) == {0: SIZE, 1: SIZE, 2: SIZE}
    return made


@pytest.mark.parametrize("how", ["open", "create", "append", "ask"])
def test_nobody_writes_before_a_truncation_that_failed_has_reached_the_chains(how: str) -> None:
    """Or the file, grown again by the write, would show what had been cut off; and the cut, when it came, would take what was written since."""

    async def main() -> None:
        service = await Service().start()
        made = await _left_undone(service)
        if how == "open":
            await service.call("open", pb.OpenRequest(inode=made.inode, write=True, session=S2))
        elif how == "create":
            await service.call("create", pb.CreateRequest(parent=1, name=b"f", write=True, session=S2))
        elif how == "append":
            reply = await service.call("append", pb.AppendRequest(inode=made.inode, session=S1, length=5))
            assert reply.offset == 10
        else:
            reply = await service.call("append", pb.AppendRequest(inode=made.inode, session=S1))
            assert (reply.offset, reply.inode.length) == (10, 10)
        assert service.chunks.of(made.inode) == {0: 10}
        assert not service.meta.cuts._locks
        await service.check()

    run(main)


def test_a_writer_that_has_not_heard_of_a_failed_truncation_does_not_undo_it() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await _left_undone(service)
        reply = await service.call(
            "close", pb.CloseRequest(inode=made.inode, session=S1, wrote=True, length=3 * SIZE, truncate_version=made.truncate_version)
        )
        assert reply.inode.length == 10 and service.chunks.of(made.inode) == {0: 10}

    run(main)


def test_a_truncation_that_failed_is_tried_again_in_the_background() -> None:
    async def main() -> None:
        service = await Service().start()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(housekeeping.run, service.meta, None)
            await trio.sleep(1)
            made = await _left_undone(service)
            service.chunks.failing = {CHAINS[0]}
            await trio.sleep(5)
            service.chunks.failing = set()
            await trio.sleep(5)
            assert service.chunks.of(made.inode) == {0: 10}
            nursery.cancel_scope.cancel()

    run(main)


def test_truncations_of_one_file_follow_each_other() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        await service.write(made, 8 * SIZE)
        service.chunks.delay_s = 1.0

        async def cut(length: int) -> None:
            await service.call("set_attr", pb.SetAttrRequest(inode=made.inode, length=length))

        async with trio.open_nursery() as nursery:
            for length in (7 * SIZE, 3 * SIZE + 1, 5 * SIZE, 2 * SIZE, 6 * SIZE):
                nursery.start_soon(cut, length)
        assert max(service.chunks.of(made.inode)) <= 2
        assert not service.meta.cuts._locks
        await service.check()

    run(main)


# --- lengths that only the chains know


def test_a_report_from_before_a_truncate() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f", write=True, session=S1)
        await service.write(made, 4 * SIZE)
        await service.call("set_attr", pb.SetAttrRequest(inode=made.inode, length=100), B)
        service.chunks.write(made, SIZE + 9)  # written after the cut by a client that has not heard of it
        reply = await service.call("close", pb.CloseRequest(inode=made.inode, session=S1, wrote=True, length=4 * SIZE, truncate_version=0))
        assert reply.inode.length == SIZE + 9

    run(main)


def test_an_uncertain_write() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f", write=True, session=S1)
        service.chunks.write(made, 2 * SIZE)
        reply = await service.call("close", pb.CloseRequest(inode=made.inode, session=S1, uncertain=True))
        assert (reply.inode.length, reply.inode.writers) == (2 * SIZE, 0)

    run(main)


# --- sessions


def test_a_close_without_a_report_costs_no_commit() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f", write=True, session=S1)
        commits = service.meta.changes.commits
        reply = await service.call("close", pb.CloseRequest(inode=made.inode, session=S1))
        assert service.meta.changes.commits == commits
        assert reply.inode.writers == 0
        assert (await service.call("status", base_pb2.Empty())).sessions == 1
        await service.meta.clear_closed()
        assert (await service.call("status", base_pb2.Empty())).sessions == 0
        assert await service.meta.clear_closed() == 0

    run(main)


def test_a_reader_keeps_a_removed_file() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        await service.write(made, 10)
        await service.call("open", pb.OpenRequest(inode=made.inode, read=True, session=S1))
        await service.remove(b"f", B)
        await service.call("collect_garbage", base_pb2.Empty())
        assert service.chunks.of(made.inode) == {0: 10}
        # also across a restart of the service, which knows readers only from their records then
        after = await Service(service.engine, service.chunks).start()
        await after.call("collect_garbage", base_pb2.Empty())
        assert service.chunks.of(made.inode) == {0: 10}
        await after.call("close", pb.CloseRequest(inode=made.inode, session=S1))
        await after.call("collect_garbage", base_pb2.Empty())
        assert service.chunks.of(made.inode) == {}
        assert (await after.stat(made.inode)).type == pb.TYPE_INVALID
        await after.check()

    run(main)


def test_a_file_open_for_reading_long_enough_is_recorded() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        await service.write(made, 10)
        await service.call("open", pb.OpenRequest(inode=made.inode, read=True, session=S1))
        await service.meta.store_readers()
        assert (await service.stat(made.inode)).writers == 0
        rows = await service.engine.transact(lambda txn: txn.get_range(*keys.sessions(made.inode)))
        assert rows[0] == []
        await trio.sleep(1.1)
        await service.meta.store_readers()
        rows = await service.engine.transact(lambda txn: txn.get_range(*keys.sessions(made.inode)))
        assert len(rows[0]) == 1
        after = await Service(service.engine, service.chunks).start()
        await after.remove(b"f", B)
        await after.call("collect_garbage", base_pb2.Empty())
        assert service.chunks.of(made.inode) == {0: 10}

    run(main)


def test_opening_and_closing_to_read_leaves_nothing() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        for _ in range(3):
            await service.call("open", pb.OpenRequest(inode=made.inode, read=True, session=S1))
            await service.call("close", pb.CloseRequest(inode=made.inode, session=S1))
        assert service.meta.open_files.count() == 0
        assert await service.meta.clear_closed() == 0

    run(main)


def ended(*pairs: tuple[pb.Inode, bytes]) -> pb.Context:
    return pb.Context(ended=[pb.Ended(inode=inode.inode, session=session) for inode, session in pairs])


def test_requests_carry_the_ends_of_sessions() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f", write=True, session=S1)
        other = await service.create(b"g", write=True, session=S2)
        await service.write(made, 10)
        await service.call("open", pb.OpenRequest(inode=other.inode, read=True, session=S1))
        commits = service.engine.latest_version  # type: ignore[attr-defined]
        reply = await service.call("get_attr", pb.GetAttrRequest(context=ended((made, S1), (other, S1)), inodes=[made.inode, other.inode]))
        assert [inode.writers for inode in reply.inodes] == [0, 1]
        assert service.meta.open_files.count() == 0
        assert service.engine.latest_version == commits  # type: ignore[attr-defined]
        await service.call("remove", pb.RemoveRequest(context=ended((other, S2), (made, S1)), parent=1, name=b"g"))  # told twice: no harm
        assert (await service.stat(other.inode)).type == pb.TYPE_INVALID  # at once: its last session had ended before
        assert await service.meta.clear_closed() == 2
        rows = await service.engine.transact(lambda txn: txn.get_range(*keys.span(keys.SESSION)))
        assert rows[0] == []
        await service.check()

    run(main)


CARRIERS = [method for method in SERVICES["Meta"].values() if "context" in method.request.DESCRIPTOR.fields_by_name and method.name != "Watch"]


@pytest.mark.parametrize("method", CARRIERS, ids=lambda method: method.name)
def test_whatever_request_carries_an_end_is_heard(method: Method) -> None:
    """Also one that fails. Watch alone carries none: the client does not hear in time whether it arrived."""

    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f", write=True, session=S1)
        with contextlib.suppress(KvfsError):
            await service.call(method.attribute, method.request(context=ended((made, S1))))
        assert (await service.stat(made.inode)).writers == 0

    run(main)


def test_the_last_end_of_a_removed_file_frees_it() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f", write=True, session=S1)
        await service.write(made, 10)
        await service.remove(b"f", B)
        await service.call("open", pb.OpenRequest(inode=made.inode, read=True, session=S2))
        for session in (S1, S2):
            await service.call("collect_garbage", base_pb2.Empty())
            assert service.chunks.of(made.inode) == {0: 10}
            await service.call("end_sessions", pb.EndSessionsRequest(context=ended((made, session))))
        await service.call("collect_garbage", base_pb2.Empty())
        assert service.chunks.of(made.inode) == {}
        assert (await service.stat(made.inode)).type == pb.TYPE_INVALID
        await service.check()

    run(main)


# --- the whole


def test_create_waits_for_chains() -> None:
    async def main() -> None:
        service = await Service().start()
        service.routing = Routing()
        with pytest.raises(NoServingTarget) as caught:
            await service.create(b"f")
        assert caught.value.retryable
        await service.call("make", pb.MakeRequest(parent=1, name=b"d", type=pb.DIRECTORY))

    run(main)


def test_files_are_spread_over_all_chains() -> None:
    async def main() -> None:
        service = await Service().start()
        first = [(await service.create(b"%d" % index)).layout.chain_ids[0] for index in range(8)]
        assert sorted(first) == sorted(CHAINS * 2)
        for index in range(4):
            assert sorted((await service.create(b"x%d" % index)).layout.chain_ids) == list(CHAINS)
        narrow = await service.create(b"narrow", layout=pb.Layout(stripe=2))
        assert len(set(narrow.layout.chain_ids)) == 2

    run(main)


def test_side_by_side_creations_in_one_directory_do_not_conflict() -> None:
    async def main() -> None:
        service = await Service().start()

        async def worker(number: int) -> None:
            for index in range(10):
                await service.create(b"%d-%d" % (number, index))
                await service.call("make", pb.MakeRequest(parent=1, name=b"d%d-%d" % (number, index), type=pb.DIRECTORY))

        async with trio.open_nursery() as nursery:
            for number in range(64):
                nursery.start_soon(worker, number)
        assert service.meta.changes.conflicts == 0
        assert (await service.stat(1)).nlink == 642
        await service.check()

    run(main)


def test_appends_side_by_side_do_not_overlap() -> None:
    async def main() -> None:
        service = await Service().start()
        number = (await service.create(b"f")).inode
        taken: list[int] = []

        async def worker() -> None:
            for _ in range(10):
                taken.append((await service.call("append", pb.AppendRequest(inode=number, length=7))).offset)

        async with trio.open_nursery() as nursery:
            for _ in range(16):
                nursery.start_soon(worker)
        assert sorted(taken) == list(range(0, 160 * 7, 7))

    run(main)


def test_stat_fs_counts_a_disk_once_and_divides_by_the_replicas() -> None:
    async def main() -> None:
        service = await Service().start()
        await service.create(b"f")
        reply = await service.call("stat_fs", pb.StatFsRequest())
        assert (reply.capacity_bytes, reply.free_bytes) == (2000, 1200)
        assert reply.files == 1
        await service.meta.count_files()

    run(main)


def test_files_are_counted() -> None:
    async def main() -> None:
        service = await Service().start()
        await service.meta.count_files()
        for index in range(5):
            await service.create(b"%d" % index)
        await service.remove(b"1")
        made = await service.create(b"f")
        await service.write(made, 5)
        await service.remove(b"f")
        await service.call("collect_garbage", base_pb2.Empty())
        again = await Service(service.engine).start()
        await again.meta.count_files()
        assert service.meta.changes.files == again.meta.changes.files == 5

    run(main)


def test_the_fsck_pages_list_every_inode() -> None:
    async def main() -> None:
        service = await Service().start()
        made = {(await service.create(b"%d" % index)).inode for index in range(10)} | {1}
        seen: set[int] = set()
        cursor, more = b"", True
        while more:
            reply = await service.call("fsck", pb.FsckRequest(cursor=cursor, limit=3), A)
            assert not reply.problems
            seen |= {inode.inode for inode in reply.inodes}
            cursor, more = reply.cursor, reply.more
        assert seen == made

    run(main)


def test_an_unknown_name_is_not_found_inline() -> None:
    async def main() -> None:
        service = await Service().start()
        with pytest.raises(NotFound):
            await service.remove(b"missing", B)

    run(main)


def test_a_reader_that_closes_while_its_file_is_removed_leaves_nothing() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        await service.write(made, 10)
        await service.call("open", pb.OpenRequest(inode=made.inode, read=True, session=S1))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.remove, b"f", B)
            nursery.start_soon(service.call, "close", pb.CloseRequest(inode=made.inode, session=S1))
        await service.call("collect_garbage", base_pb2.Empty())
        assert service.chunks.lengths == {}
        await service.check()

    run(main)


def test_a_removed_file_that_is_opened_by_number_again_is_freed_after_its_close() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f", write=True, session=S1)
        await service.write(made, 10)
        await service.remove(b"f")
        await service.call("open", pb.OpenRequest(inode=made.inode, read=True, session=S2))
        await service.call("close", pb.CloseRequest(inode=made.inode, session=S1))
        await service.call("collect_garbage", base_pb2.Empty())
        assert service.chunks.of(made.inode) == {0: 10}
        await service.call("close", pb.CloseRequest(inode=made.inode, session=S2))
        await service.call("collect_garbage", base_pb2.Empty())
        assert service.chunks.lengths == {}
        await service.check()

    run(main)


def test_a_file_in_the_queue_that_is_opened_by_number_waits() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        await service.write(made, 10)
        await service.remove(b"f")
        await service.call("open", pb.OpenRequest(inode=made.inode, read=True, session=S2))
        await service.call("collect_garbage", base_pb2.Empty())
        assert service.chunks.of(made.inode) == {0: 10}
        await service.call("close", pb.CloseRequest(inode=made.inode, session=S2))
        await service.call("collect_garbage", base_pb2.Empty())
        assert service.chunks.lengths == {}
        await service.check()

    run(main)
