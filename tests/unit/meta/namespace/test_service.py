"""The Meta service: where files lie, appends and creations side by side, counts and pages."""

from __future__ import annotations

import pytest
import trio
from tests.unit.meta.namespace.service_world import CHAINS, A, B, Service, run

from kvfs.common.errors import NoServingTarget, NotFound
from kvfs.common.routing import Routing
from kvfs.common.wire import base_pb2
from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.kv.memory import MemoryEngine
from kvfs.meta.namespace import store


def test_the_root_of_a_new_file_system_belongs_to_whom_the_configuration_names() -> None:
    async def main() -> None:
        engine = MemoryEngine()
        assert await engine.transact(lambda txn: store.prepare(txn, 1, uid=1000, gid=100))
        assert not await engine.transact(lambda txn: store.prepare(txn, 1, uid=5, gid=5))
        root = await Service(engine).stat(1)
        assert (root.uid, root.gid, root.mode) == (1000, 100, 0o755)

    run(main)


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
