"""Attribute leases: granted to who watches, revoked before a change by another is answered, waited out when nobody answers."""

from __future__ import annotations

import trio
from tests.unit.meta.namespace.service_world import A, B, C, Service, routing, run

from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.gc.housekeeping import _sweep_leases
from kvfs.meta.namespace.leases import UNACKNOWLEDGED_MAX, LeaseTable


class Client:
    """A client that watches: drops what it is told to drop."""

    def __init__(self, service: Service, name: bytes) -> None:
        self.service = service
        self.name = name
        self.epoch = 0
        self.sequence = 0
        self.dropped: list[int] = []
        self.resets = 0
        self.slow_s = 0.0

    async def poll(self, wait_ms: int = 1000) -> None:
        reply = await self.service.call("watch", pb.WatchRequest(acknowledged=self.sequence, epoch=self.epoch, wait_ms=wait_ms), self.name)
        if reply.epoch != self.epoch:
            self.epoch = reply.epoch
            self.resets += 1
        self.dropped.extend(reply.inodes)
        await trio.sleep(self.slow_s)
        self.sequence = reply.sequence

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await self.poll()
        task_status.started()
        while True:
            await self.poll()

    async def stat(self, inode: int) -> pb.Inode:
        return await self.service.stat(inode, self.name)


async def chmod(service: Service, inode: int, client: bytes) -> float:
    """How long it took."""
    began = trio.current_time()
    await service.call("set_attr", pb.SetAttrRequest(inode=inode, mode=0o600), client)
    return trio.current_time() - began


def test_only_a_client_that_watches_gets_a_lease() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        assert made.attr_lease_ms == 0
        client = Client(service, A)
        assert (await client.stat(made.inode)).attr_lease_ms == 0
        await client.poll()
        assert (await client.stat(made.inode)).attr_lease_ms == 1000
        reply = await service.call("lookup", pb.LookupRequest(parent=1, names=[b"f"]))
        assert reply.inodes[0].attr_lease_ms == 1000
        await trio.sleep(6)
        assert (await client.stat(made.inode)).attr_lease_ms == 0  # it has not watched for a while

    run(main)


def test_a_change_by_another_waits_until_the_holder_has_dropped_it() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        holder = Client(service, A)
        holder.slow_s = 0.3
        async with trio.open_nursery() as nursery:
            await nursery.start(holder.run)
            await holder.stat(made.inode)
            took = await chmod(service, made.inode, B)
            assert made.inode in holder.dropped
            assert 0.3 <= took < 0.4
            assert await chmod(service, made.inode, B) == 0  # nobody holds it any more
            nursery.cancel_scope.cancel()

    run(main)


def test_a_change_by_the_holder_does_not_wait() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        holder = Client(service, A)
        await holder.poll()
        await holder.stat(made.inode)
        assert await chmod(service, made.inode, A) == 0

    run(main)


def test_a_holder_that_does_not_answer_is_waited_out() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        holder = Client(service, A)
        await holder.poll()
        await holder.stat(made.inode)
        await trio.sleep(0.4)
        took = await chmod(service, made.inode, B)
        assert 0.59 < took < 0.61
        assert await chmod(service, made.inode, B) == 0

    run(main)


def test_a_second_change_waits_for_the_same_acknowledgement() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        holder = Client(service, A)
        await holder.poll()
        await holder.stat(made.inode)
        times: list[float] = []

        async def change(name: bytes) -> None:
            times.append(await chmod(service, made.inode, name))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(change, B)
            nursery.start_soon(change, C)
        assert all(0.99 < took < 1.01 for took in times)

    run(main)


def test_directories_and_both_ends_of_a_rename() -> None:
    async def main() -> None:
        service = await Service().start()
        one = (await service.call("make", pb.MakeRequest(parent=1, name=b"a", type=pb.DIRECTORY))).inode.inode
        two = (await service.call("make", pb.MakeRequest(parent=1, name=b"b", type=pb.DIRECTORY))).inode.inode
        file = (await service.create(b"f", parent=one)).inode
        old = (await service.create(b"g", parent=two)).inode
        holder = Client(service, A)
        async with trio.open_nursery() as nursery:
            await nursery.start(holder.run)
            await service.call("get_attr", pb.GetAttrRequest(inodes=[1, one, two, file, old]))
            await service.call("rename", pb.RenameRequest(parent=one, name=b"f", new_parent=two, new_name=b"g"), B)
            assert set(holder.dropped) == {one, two, file, old}
            nursery.cancel_scope.cancel()

    run(main)


def test_a_failed_change_revokes_nothing() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        holder = Client(service, A)
        await holder.poll()
        await holder.stat(made.inode)
        began = trio.current_time()
        try:
            await service.call("create", pb.CreateRequest(parent=1, name=b"f", exclusive=True), B)
        except Exception:
            pass
        assert trio.current_time() == began

    run(main)


def test_a_lost_reply_is_sent_again() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        holder = Client(service, A)
        await holder.poll()
        await holder.stat(made.inode)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(chmod, service, made.inode, B)
            await trio.sleep(0.1)
            request = pb.WatchRequest(acknowledged=holder.sequence, epoch=holder.epoch, wait_ms=1000)
            first = await service.call("watch", request, A)
            again = await service.call("watch", request, A)
            assert first == again
            assert list(first.inodes) == [made.inode]
            holder.sequence = first.sequence
            nursery.start_soon(holder.poll)

    run(main)


def test_a_restart_is_a_new_epoch_and_changes_wait_out_old_leases() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        holder = Client(service, A)
        await holder.poll()
        await holder.stat(made.inode)
        await trio.sleep(0.001)
        after = await Service(service.engine).start()
        holder.service = after
        began = trio.current_time()
        await holder.poll(wait_ms=60_000)
        assert trio.current_time() == began and holder.resets == 2
        assert 0.99 < await chmod(after, made.inode, B) < 1.01
        assert await chmod(after, made.inode, B) == 0

    run(main)


def test_a_watch_without_news_ends_empty() -> None:
    async def main() -> None:
        service = await Service().start()
        holder = Client(service, A)
        await holder.poll()
        began = trio.current_time()
        await holder.poll(wait_ms=2500)
        assert 2.49 < trio.current_time() - began < 2.51
        assert holder.dropped == [] and holder.resets == 1

    run(main)


def test_with_two_meta_services_nobody_gets_a_lease() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        holder = Client(service, A)
        await holder.poll()
        service.routing = routing(metas=2)
        await _sweep_leases(service.meta)
        assert (await holder.stat(made.inode)).attr_lease_ms == 0
        service.routing = routing(metas=1)
        await _sweep_leases(service.meta)
        assert (await holder.stat(made.inode)).attr_lease_ms == 1000

    run(main)


def test_what_the_garbage_queue_changes_is_told_too() -> None:
    async def main() -> None:
        service = await Service().start()
        top = (await service.call("make", pb.MakeRequest(parent=1, name=b"t", type=pb.DIRECTORY))).inode.inode
        outside = (await service.create(b"outside")).inode
        await service.call("link", pb.LinkRequest(inode=outside, parent=top, name=b"inside"))
        await service.call("remove", pb.RemoveRequest(parent=1, name=b"t", recursive=True))
        holder = Client(service, A)
        async with trio.open_nursery() as nursery:
            await nursery.start(holder.run)
            assert (await holder.stat(outside)).nlink == 2
            await service.meta.collector.collect_all()
            await trio.sleep(0.01)
            assert outside in holder.dropped
            assert (await holder.stat(outside)).nlink == 1
            nursery.cancel_scope.cancel()

    run(main)


def test_stamps_only_grow() -> None:
    async def main() -> None:
        service = await Service().start()
        stamps = [service.meta.changes.now_ns() for _ in range(100)]
        assert len(set(stamps)) == 100 and sorted(stamps) == stamps

    run(main)


def test_tables_are_swept_and_queues_are_bounded() -> None:
    async def main() -> None:
        table = LeaseTable(5, 1000)
        watcher = table.watcher(A, 0.0)
        for number in range(2, 100):
            table.grant(pb.Inode(inode=number, type=pb.FILE), A, 0.0)
        assert table.held() == 98
        table.sweep(0.9)
        assert table.held() == 98
        table.sweep(1.1)
        assert table.held() == 0
        assert table.revoke([5], B, 2.0) == []
        epoch = watcher.epoch
        for number in range(UNACKNOWLEDGED_MAX + 5):
            watcher.tell(number)
        assert watcher.epoch == epoch + 1
        assert len(watcher.notices) <= UNACKNOWLEDGED_MAX
        table.sweep(1000.0)
        assert not table.watches(A, 1000.0)

    run(main)
