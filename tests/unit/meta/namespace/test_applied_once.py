"""The Meta service: however often a request comes, it is applied once."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from tests.unit.meta.namespace.service_world import Service, run

from kvfs.common.errors import AlreadyExists, InvalidArgument, TxnMaybeCommitted
from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.kv import Engine
from kvfs.meta.kv.conflicts import ReadSet
from kvfs.meta.kv.memory import MemoryEngine
from kvfs.meta.kv.transaction import Snapshot
from kvfs.meta.kv.writes import WriteSet
from kvfs.meta.namespace import idempotency, keys

S1 = b"1" * 16


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


class Forgetful(MemoryEngine):
    """Commits, and does not say so as often as told."""

    silent = 0
    transact_at_once = Engine.transact_at_once

    async def commit(self, snapshot: Snapshot | None, reads: ReadSet, writes: WriteSet) -> int:
        version = await super().commit(snapshot, reads, writes)
        if writes and self.silent:
            self.silent -= 1
            raise TxnMaybeCommitted("the store did not say what became of the commit")
        return version


@pytest.mark.parametrize("method", ["set_attr", "open", "create"])
def test_a_truncation_whose_commit_was_not_answered_is_carried_out_before_its_answer(method: str) -> None:
    async def main() -> None:
        engine = Forgetful()
        service = await Service(engine).start()
        made = await service.create(b"f")
        await service.write(made, 100)
        requests = {
            "set_attr": pb.SetAttrRequest(inode=made.inode, length=7),
            "open": pb.OpenRequest(inode=made.inode, write=True, truncate=True, session=S1),
            "create": pb.CreateRequest(parent=1, name=b"f", write=True, truncate=True, session=S1),
        }
        engine.silent = 1
        await service.call(method, requests[method], request_id=b"r" * 16)
        assert engine.silent == 0
        assert service.chunks.of(made.inode) == ({0: 7} if method == "set_attr" else {})

    run(main)


def test_a_removal_whose_commit_was_not_answered_is_counted() -> None:
    async def main() -> None:
        engine = Forgetful()
        service = await Service(engine).start()
        await service.create(b"f")
        files = service.meta.changes.files
        engine.silent = 1
        await service.remove(b"f")
        assert engine.silent == 0
        assert service.meta.changes.files == files - 1

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


@pytest.mark.parametrize("step_s", [-1575, 1575])
def test_a_retry_is_known_to_another_service_whose_clock_is_wrong(step_s: int) -> None:
    async def main() -> None:
        first = await Service().start()
        await first.create(b"f")
        request = pb.RemoveRequest(parent=1, name=b"f")
        await first.call("remove", request, request_id=b"r" * 16)
        second = Service(first.engine, first.chunks)
        second.clock.wrong_s = step_s
        await second.start()
        await second.call("remove", request, request_id=b"r" * 16)
        first.clock.wrong_s = step_s
        await first.call("remove", request, request_id=b"r" * 16)

    run(main)


def test_an_append_tried_again_at_another_service_takes_no_more_room() -> None:
    """Simulation, seed 373: the clocks of two services were 646 s apart, and the client's connection to the first one broke."""

    async def main() -> None:
        first = await Service().start()
        number = (await first.create(b"log")).inode
        request = pb.AppendRequest(inode=number, length=100)
        second = Service(first.engine, first.chunks)
        second.clock.wrong_s = -646
        await second.start()
        replies = [await service.call("append", request, request_id=b"r" * 16) for service in (first, second, first)]
        assert [reply.offset for reply in replies] == [0, 0, 0]
        assert (await second.stat(number)).length == 100

    run(main)


def test_request_records_last_long_enough_and_are_swept() -> None:
    async def main() -> None:
        service = await Service().start()
        periods = [idempotency.Periods(service.engine, service.clock) for _ in range(2)]  # two services share the store

        async def records() -> int:
            rows, _ = await service.engine.transact(lambda txn: txn.get_range(*keys.span(keys.REQUEST)))
            return len(rows)

        async def time_passes(seconds: int) -> None:
            for _ in range(seconds // 15):
                await trio.sleep(15)
                for each in periods:
                    await each.round()

        await time_passes(idempotency.PERIOD_S)  # the next turn is near
        request = pb.CreateRequest(parent=1, name=b"f", exclusive=True)
        await service.call("create", request, request_id=b"r" * 16)
        for wrong_s in (10_000, -10_000, 0):
            service.clock.wrong_s = wrong_s
            await time_passes(90)
            assert (await service.call("create", request, request_id=b"r" * 16)).created
        assert await records() == 1
        await time_passes(2 * idempotency.PERIOD_S)
        assert await records() == 0

    run(main)


def test_a_store_without_periods_gets_one_under_which_its_records_are_found() -> None:
    async def main() -> None:
        service = await Service().start()
        request = pb.CreateRequest(parent=1, name=b"f", exclusive=True)
        await service.call("create", request, request_id=b"r" * 16)
        await service.engine.transact(lambda txn: txn.clear(keys.PERIOD))
        again = await Service(service.engine, service.chunks).start()
        assert (await again.call("create", request, request_id=b"r" * 16)).created

    run(main)
