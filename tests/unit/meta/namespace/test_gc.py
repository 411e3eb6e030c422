"""The garbage queue and the pruning of sessions: chunks are really freed, and only then."""

from __future__ import annotations

import pytest
import trio
from tests.unit.meta.namespace.service_world import CHAINS, SIZE, A, B, C, Service, run

from kvfs.common.errors import StaleHandle
from kvfs.common.wire import base_pb2
from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.gc import housekeeping
from kvfs.meta.gc.collector import chains_with_chunks
from kvfs.meta.gc.prune import Pruner
from kvfs.meta.namespace import keys
from kvfs.meta.namespace.spaces import SPACE_GRACE_NS
from kvfs.meta.server import make_pruner

S1, S2 = b"1" * 16, b"2" * 16


async def garbage(service: Service) -> int:
    reply = await service.call("status", base_pb2.Empty())
    return int(reply.gc_pending)


@pytest.mark.parametrize("end", [1, SIZE, 3 * SIZE + 1, 9 * SIZE])
def test_a_removed_file_gives_its_chunks_back(end: int) -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        kept = await service.create(b"kept")
        await service.write(made, end)
        await service.write(kept, end)
        before = service.chunks.of(kept.inode)
        await service.remove(b"f")
        assert await garbage(service) == 1
        reply = await service.call("collect_garbage", base_pb2.Empty())
        assert reply.gc_pending == 0
        assert service.chunks.of(made.inode) == {}
        assert service.chunks.of(kept.inode) == before
        assert (await service.stat(made.inode)).type == pb.TYPE_INVALID
        await service.check()

    run(main)


def test_a_small_file_costs_one_call() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        await service.write(made, 100)
        await service.remove(b"f")
        await service.call("collect_garbage", base_pb2.Empty())
        assert service.chunks.calls == [("remove", made.layout.chain_ids[0], made.inode)]

    run(main)


def test_chains_that_may_hold_chunks() -> None:
    layout = pb.Layout(chunk_size=SIZE, chain_ids=[4, 2, 3, 2])
    for length, expected in ((0, [4]), (1, [4]), (SIZE + 1, [4, 2]), (3 * SIZE, [4, 2, 3]), ((1 << 63) - 1, [4, 2, 3])):
        assert chains_with_chunks(pb.Inode(layout=layout, length=length, chunks_possible=True)) == expected
        assert chains_with_chunks(pb.Inode(layout=layout, length=length, chunks_possible=True, more_possible=True)) == [4, 2, 3]
    assert chains_with_chunks(pb.Inode(layout=layout, length=SIZE)) == []


def test_a_chain_that_fails_keeps_the_file_in_the_queue() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        await service.write(made, 4 * SIZE)
        await service.remove(b"f")
        service.chunks.failing = {made.layout.chain_ids[2]}
        await service.call("collect_garbage", base_pb2.Empty())
        assert await garbage(service) == 1
        assert (await service.stat(made.inode)).type == pb.FILE
        service.chunks.failing = set()
        await service.call("collect_garbage", base_pb2.Empty())
        assert await garbage(service) == 0
        assert service.chunks.of(made.inode) == {}

    run(main)


def test_a_recursive_removal_takes_everything_below() -> None:
    async def main() -> None:
        service = await Service().start()
        top = (await service.call("make", pb.MakeRequest(parent=1, name=b"t", type=pb.DIRECTORY))).inode.inode
        directories = [top]
        for level in range(3):
            made = await service.call("make", pb.MakeRequest(parent=directories[-1], name=b"sub", type=pb.DIRECTORY))
            directories.append(made.inode.inode)
            for index in range(100):
                file = await service.create(b"%d" % index, parent=directories[-2])
                if index % 10 == 0:
                    await service.write(file, SIZE * (level + 1))
        outside = await service.create(b"outside")
        await service.call("link", pb.LinkRequest(inode=outside.inode, parent=directories[1], name=b"link"))
        await service.call("set_xattr", pb.XattrRequest(inode=directories[2], name=b"user.a", value=b"1"))
        reply = await service.call("remove", pb.RemoveRequest(parent=1, name=b"t", recursive=True))
        assert reply.inode.nlink == 0
        await service.check()
        await service.call("collect_garbage", base_pb2.Empty())
        assert service.chunks.lengths == {}
        rows, _ = await service.engine.transact(lambda txn: txn.get_range(*keys.span(keys.INODE)))
        assert [keys.owner(key) for key, _ in rows] == [1, outside.inode]
        assert (await service.stat(outside.inode)).nlink == 1
        await service.check()

    run(main)


def test_an_open_file_in_a_removed_tree_stays_until_it_is_closed() -> None:
    async def main() -> None:
        service = await Service().start()
        top = (await service.call("make", pb.MakeRequest(parent=1, name=b"t", type=pb.DIRECTORY))).inode.inode
        made = await service.create(b"f", parent=top, write=True, session=S1)
        await service.call("remove", pb.RemoveRequest(parent=1, name=b"t", recursive=True))
        await service.call("collect_garbage", base_pb2.Empty())
        assert (await service.stat(top)).type == pb.TYPE_INVALID
        assert (await service.stat(made.inode)).nlink == 0
        await service.write(made, 10, session=S1)
        await service.call("collect_garbage", base_pb2.Empty())
        assert service.chunks.lengths == {}
        await service.check()

    run(main)


def test_the_queue_waits_its_delay_and_runs_in_the_background() -> None:
    async def main() -> None:
        service = await Service(gc_delay_s=5.0).start()
        made = await service.create(b"f")
        await service.write(made, SIZE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(housekeeping.run, service.meta, None)
            await service.remove(b"f")
            await trio.sleep(4)
            assert service.chunks.of(made.inode)
            await trio.sleep(3)
            assert not service.chunks.of(made.inode)
            nursery.cancel_scope.cancel()

    run(main)


# --- pruning


def pruner(service: Service, listed: set[bytes], *, grace_s: float = 10.0) -> Pruner:
    async def list_clients() -> set[bytes]:
        return listed

    return make_pruner(service.meta, list_clients, grace_s=grace_s)


def test_a_dead_writer_is_closed_with_the_length_of_its_chunks() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f", write=True, session=S1)
        other = await service.create(b"g", B, write=True, session=S2)
        service.chunks.write(made, 2 * SIZE + 5)
        job = pruner(service, {B})
        assert await job.round() == 0
        await trio.sleep(9)
        assert await job.round() == 0
        await trio.sleep(2)
        assert await job.round() == 1
        seen = await service.stat(made.inode)
        assert (seen.length, seen.writers) == (2 * SIZE + 5, 0)
        assert (await service.stat(other.inode)).writers == 1
        assert await job.round() == 0

    run(main)


def test_a_client_that_comes_back_keeps_its_files() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f", write=True, session=S1)
        listed: set[bytes] = set()
        job = pruner(service, listed)
        await job.round()
        await trio.sleep(6)
        listed.add(A)
        await job.round()
        listed.clear()
        await trio.sleep(6)
        await job.round()
        assert (await service.stat(made.inode)).writers == 1

    run(main)


def test_a_removed_file_of_a_dead_client_is_freed_completely() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f", write=True, session=S1)
        service.chunks.write(made, 7 * SIZE)
        await service.remove(b"f", B)
        job = pruner(service, {B}, grace_s=0.0)
        assert await job.round() == 1
        await service.call("collect_garbage", base_pb2.Empty())
        assert service.chunks.lengths == {}
        assert {chain for what, chain, _ in service.chunks.calls if what == "remove"} == set(CHAINS)
        service.chunks.write(made, SIZE)  # it lives, and a write of its was under way
        await service.call("collect_garbage", base_pb2.Empty())
        await service.check()
        await trio.sleep(SPACE_GRACE_NS / 1e9 + 1)
        await service.call("collect_garbage", base_pb2.Empty())
        assert service.chunks.lengths == {} and await garbage(service) == 0
        assert (await service.stat(made.inode)).type == pb.TYPE_INVALID
        await service.check()

    run(main)


def test_an_fsync_of_a_removed_file_whose_writer_was_thought_dead_is_refused() -> None:
    """It was answered, and then the bytes went."""

    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f", write=True, session=S1)
        await service.remove(b"f", B)
        service.chunks.write(made, SIZE)
        fsync = pb.CloseRequest(inode=made.inode, session=S1, wrote=True, length=SIZE, still_open=True)
        assert (await service.call("close", fsync)).inode.length == SIZE
        await pruner(service, {B}, grace_s=0.0).round()
        with pytest.raises(StaleHandle):
            await service.call("close", fsync)
        fsync.still_open = False
        await service.call("close", fsync)  # nobody has the file any more, nor needs it
        await service.call("collect_garbage", base_pb2.Empty())
        assert service.chunks.lengths == {}
        await service.check()

    run(main)


def test_an_fsync_of_a_removed_file_that_another_handle_holds_is_answered() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f", write=True, session=S1)
        await service.call("open", pb.OpenRequest(inode=made.inode, write=True, session=S2))
        await service.remove(b"f", B)
        await service.call("close", pb.CloseRequest(inode=made.inode, session=S1, wrote=True, length=1))
        await service.call("close", pb.CloseRequest(inode=made.inode, session=S1, wrote=True, length=2, still_open=True))
        assert (await service.stat(made.inode)).length == 2

    run(main)


def test_readers_of_a_dead_client_are_dropped() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await service.create(b"f")
        await service.write(made, SIZE)
        await service.call("open", pb.OpenRequest(inode=made.inode, read=True, session=S1), C)
        await service.remove(b"f")
        job = pruner(service, {A}, grace_s=0.0)
        await job.round()
        await service.meta.clear_closed()
        await service.call("collect_garbage", base_pb2.Empty())
        assert service.chunks.lengths == {}
        assert service.meta.open_files.count() == 0

    run(main)
