"""The Meta service: who has a file open, what a close reports, and what that keeps alive."""

from __future__ import annotations

import contextlib

import pytest
import trio
from tests.unit.meta.namespace.service_world import SIZE, B, Service, run

from kvfs.common.errors import InvalidArgument, KvfsError
from kvfs.common.wire import base_pb2
from kvfs.common.wire import meta_pb2 as pb
from kvfs.common.wire.service import SERVICES, Method
from kvfs.meta.namespace import keys

S1, S2 = b"1" * 16, b"2" * 16


def test_an_uncertain_write() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f", write=True, session=S1)
        service.chunks.write(made, 2 * SIZE)
        reply = await service.call("close", pb.CloseRequest(inode=made.inode, session=S1, uncertain=True))
        assert (reply.inode.length, reply.inode.writers) == (2 * SIZE, 0)

    run(main)


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


@pytest.mark.parametrize("set_back_s", [0, 3600])
def test_a_file_open_for_reading_long_enough_is_recorded(set_back_s: int) -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        await service.write(made, 10)
        await service.call("open", pb.OpenRequest(inode=made.inode, read=True, session=S1))
        await service.meta.store_readers()
        assert (await service.stat(made.inode)).writers == 0
        rows = await service.engine.transact(lambda txn: txn.get_range(*keys.sessions(made.inode)))
        assert rows[0] == []
        service.clock.wrong_s = -set_back_s
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


@pytest.mark.parametrize("name", [b"short", b"k" * 70_000])
def test_a_session_that_cannot_be_stored_is_refused_and_in_nobodys_way(name: bytes) -> None:
    """One of 70,000 bytes was kept, and from then on no closed session was cleared: the transaction that clears them was too large, each second."""

    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f", write=True, session=S1)
        requests = (
            ("open", pb.OpenRequest(inode=made.inode, read=True, session=name)),
            ("close", pb.CloseRequest(inode=made.inode, session=name)),
            ("close", pb.CloseRequest(inode=made.inode, session=name, wrote=True, length=5)),
            ("append", pb.AppendRequest(inode=made.inode, session=name, length=5)),
            ("create", pb.CreateRequest(parent=1, name=b"g", mode=0o600, read=True, session=name)),
            ("end_sessions", pb.EndSessionsRequest(context=pb.Context(ended=[pb.Ended(inode=made.inode, session=name)]))),
        )
        for operation, request in requests:
            with pytest.raises(InvalidArgument):
                await service.call(operation, request)
        await service.call("close", pb.CloseRequest(inode=made.inode, session=S1))
        assert await service.meta.clear_closed() == 1
        await service.meta.store_readers()
        assert (await service.call("status", base_pb2.Empty())).sessions == 0

    run(main)
