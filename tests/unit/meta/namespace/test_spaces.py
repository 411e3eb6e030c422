"""KV-cache spaces at the metadata service: what is refused, what a space directory does not do, and how its blocks go."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from tests.unit.meta.namespace.service_world import CHAINS, A, B, Service, run
from tests.unit.meta.namespace.tree import OWNER, STRANGER, Tree, fails

from kvfs.common.errors import InvalidArgument, NotPermitted
from kvfs.common.ids import SPACE_BIT, is_space
from kvfs.common.wire import base_pb2
from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.namespace import attributes, xattrs
from kvfs.meta.namespace.access import require_room
from kvfs.meta.namespace.spaces import SPACE_GRACE_NS

EPERM, ENOTEMPTY, EINVAL, EACCES, EISDIR, ENOENT = 1, 39, 22, 13, 21, 2


def space(**fields: Any) -> pb.Space:
    return pb.Space(**{"block_tokens": 64, "block_bytes": 1 << 20, "digest": b"d" * 16, "format": {"model": "m"}, **fields})


def make(tree: Tree, path: str, who: pb.User = OWNER, **fields: Any) -> pb.Inode:
    return tree.make(path, pb.DIRECTORY, 0o755, who, space=space(**fields))


def test_a_space_has_its_number_its_chains_and_what_was_asked_for() -> None:
    tree = Tree()
    made = make(tree, "/s", quota_bytes=8 << 20, ttl_ms=5000)
    assert is_space(made.inode) and made.type == pb.DIRECTORY and not is_space(tree.mkdir("/d").inode)
    found = tree.stat("/s").space
    assert (found.block_tokens, found.block_bytes, found.quota_bytes, found.ttl_ms) == (64, 1 << 20, 8 << 20, 5000)
    assert (list(found.chain_ids), found.table_id, found.replication, found.version) == ([1, 2, 3, 4], 1, 2, 1)
    assert dict(found.format) == {"model": "m"} and found.digest == b"d" * 16
    assert tree.stat("/").nlink == 4
    assert tree.problems() == []


@pytest.mark.parametrize(
    "fields",
    [
        {"block_bytes": 0},
        {"block_bytes": (64 << 20) + 1},
        {"block_tokens": 0},
        {"digest": b"short"},
        {"quota_bytes": (4 << 20) - 1},
        {"format": {f"f{number}": "x" for number in range(65)}},
        {"format": {"model": "x" * 5000}},
    ],
)
def test_parameters_out_of_their_limits(fields: dict[str, Any]) -> None:
    tree = Tree()
    with fails(EINVAL):
        make(tree, "/s", **fields)
    assert not tree.exists("/s")


def test_only_a_directory_can_be_a_space() -> None:
    with fails(EINVAL):
        Tree().make("/s", pb.FIFO, 0o755, OWNER, space=space())


def test_no_file_operation_makes_anything_in_a_space() -> None:
    tree = Tree()
    make(tree, "/s")
    tree.create("/f", who=OWNER)
    tree.mkdir("/d", who=OWNER)
    for attempt in (
        lambda: tree.create("/s/f", who=OWNER),
        lambda: tree.mkdir("/s/d", who=OWNER),
        lambda: tree.symlink("x", "/s/l", OWNER),
        lambda: tree.make("/s/p", pb.FIFO, 0o644, OWNER),
        lambda: make(tree, "/s/s"),
        lambda: tree.link("/f", "/s/f", OWNER),
        lambda: tree.rename("/f", "/s/f", OWNER),
        lambda: tree.rename("/d", "/s/d", OWNER),
        lambda: tree.run(attributes.set_layout, pb.SetLayoutRequest(inode=tree.stat("/s").inode, layout=pb.Layout(stripe=1)), OWNER),
    ):
        with fails(EPERM):
            attempt()
    with fails(EACCES):  # permissions come first
        tree.create("/s/f", who=STRANGER)
    with fails(ENOENT):
        tree.unlink("/s/f", OWNER)
    assert tree.names("/s") == []
    assert tree.problems() == []


def test_its_parameters_cannot_be_set_as_attributes() -> None:
    tree = Tree()
    make(tree, "/s")
    with fails(EPERM):
        tree.setxattr("/s", "user.kvfs.quota", b"1", OWNER)
    tree.setxattr("/s", "user.note", b"mine", OWNER)
    assert tree.xattr(xattrs.get_xattr, "/s", "user.note", OWNER).value == b"mine"


def test_a_rename_keeps_the_epoch_and_replaces_no_space() -> None:
    tree = Tree()
    made = make(tree, "/s")
    tree.mkdir("/d", who=OWNER)
    tree.rename("/s", "/d/t", OWNER)
    assert tree.stat("/d/t").inode == made.inode
    other = make(tree, "/other")
    tree.mkdir("/plain", who=OWNER)
    for moved in ("/other", "/plain"):
        with fails(ENOTEMPTY):
            tree.rename(moved, "/d/t", OWNER)
    tree.rename("/other", "/d/t", OWNER, exchange=True)
    assert (tree.stat("/d/t").inode, tree.stat("/other").inode) == (other.inode, made.inode)
    assert tree.problems() == []


def test_dropping_needs_what_rmdir_needs() -> None:
    tree = Tree()
    tree.mkdir("/d", who=OWNER)
    make(tree, "/d/s")
    with fails(EACCES):
        tree.rmdir("/d/s", STRANGER)
    with fails(EISDIR):
        tree.unlink("/d/s", OWNER)
    assert tree.rmdir("/d/s", OWNER).nlink == 0
    assert not tree.exists("/d/s") and tree.stat("/d").nlink == 2
    again = make(tree, "/d/s")
    assert is_space(again.inode)
    assert tree.problems() == []


def test_tables_are_chosen_by_number_or_replication() -> None:
    async def main() -> None:
        service = await Service().start()

        async def chains(**fields: Any) -> pb.Space:
            name = repr(fields).encode()
            reply = await service.call("make", pb.MakeRequest(parent=1, name=name, type=pb.DIRECTORY, mode=0o755, space=space(**fields)))
            found: pb.Space = reply.inode.space
            return found

        for fields in ({}, {"replication": 2}, {"table_id": 1}, {"table_id": 1, "replication": 2}):
            found = await chains(**fields)
            assert (found.table_id, found.replication, tuple(found.chain_ids)) == (1, 2, CHAINS)
        for wrong in ({"replication": 3}, {"table_id": 9}, {"table_id": 1, "replication": 1}):
            with pytest.raises(InvalidArgument):
                await chains(**wrong)

    run(main)


async def _space(service: Service, name: bytes = b"s", parent: int = 1) -> pb.Inode:
    reply = await service.call("make", pb.MakeRequest(parent=parent, name=name, type=pb.DIRECTORY, mode=0o755, space=space()))
    found: pb.Inode = reply.inode
    return found


def _put(service: Service, inode: int) -> None:
    for number in range(12):
        service.chunks.lengths[CHAINS[number % 4], inode, (number << 120) + 1] = 1 << 20


async def _pending(service: Service) -> int:
    reply = await service.call("status", base_pb2.Empty())
    return int(reply.gc_pending)


def test_blocks_are_removed_at_once_and_again_after_the_grace() -> None:
    async def main() -> None:
        service = await Service(gc_delay_s=5.0).start()
        made, kept = await _space(service), await _space(service, b"kept")
        _put(service, made.inode)
        _put(service, kept.inode)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.meta.collector.run)
            await service.call("remove", pb.RemoveRequest(parent=1, name=b"s", directory=True))
            await service.check()
            await trio.sleep(1)  # at once: not after gc_delay
            assert service.chunks.of(made.inode) == {}
            assert (await service.stat(made.inode)).nlink == 0 and await _pending(service) == 1
            _put(service, made.inode)  # a client that had not heard of it
            await trio.sleep(SPACE_GRACE_NS / 1e9 - 2)
            assert len(service.chunks.of(made.inode)) == 12
            await service.check()
            await trio.sleep(3)
            assert service.chunks.of(made.inode) == {}
            assert (await service.stat(made.inode)).type == pb.TYPE_INVALID and await _pending(service) == 0
            assert {call[1] for call in service.chunks.calls if call[2] == made.inode} == set(CHAINS)
            assert len(service.chunks.of(kept.inode)) == 12
            await service.check()
            nursery.cancel_scope.cancel()

    run(main)


def test_collecting_everything_does_not_cut_the_grace_short() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await _space(service)
        await service.call("remove", pb.RemoveRequest(parent=1, name=b"s", directory=True))
        assert (await service.call("collect_garbage", base_pb2.Empty())).gc_pending == 1
        assert (await service.stat(made.inode)).type == pb.DIRECTORY
        await trio.sleep(SPACE_GRACE_NS / 1e9 + 1)
        assert (await service.call("collect_garbage", base_pb2.Empty())).gc_pending == 0
        assert (await service.stat(made.inode)).type == pb.TYPE_INVALID

    run(main)


def test_a_chain_that_fails_keeps_a_dropped_space_in_the_queue() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await _space(service)
        _put(service, made.inode)
        await service.call("remove", pb.RemoveRequest(parent=1, name=b"s", directory=True))
        service.chunks.failing = {CHAINS[2]}
        await service.call("collect_garbage", base_pb2.Empty())
        assert len(service.chunks.of(made.inode)) == 3
        service.chunks.failing = set()
        await service.call("collect_garbage", base_pb2.Empty())
        assert service.chunks.of(made.inode) == {}
        service.chunks.failing = {CHAINS[0]}  # the second removal has to succeed too
        await trio.sleep(SPACE_GRACE_NS / 1e9 + 1)
        await service.call("collect_garbage", base_pb2.Empty())
        assert (await service.stat(made.inode)).type == pb.DIRECTORY
        service.chunks.failing = set()
        await service.call("collect_garbage", base_pb2.Empty())
        assert (await service.stat(made.inode)).type == pb.TYPE_INVALID

    run(main)


def test_a_tree_with_spaces_goes_with_them() -> None:
    async def main() -> None:
        service = await Service().start()
        top = (await service.call("make", pb.MakeRequest(parent=1, name=b"t", type=pb.DIRECTORY))).inode.inode
        below = await _space(service, parent=top)
        alone = await _space(service, b"alone")
        for made in (below, alone):
            _put(service, made.inode)
        for name in (b"t", b"alone"):
            await service.call("remove", pb.RemoveRequest(parent=1, name=name, recursive=True))
        await service.check()
        await service.call("collect_garbage", base_pb2.Empty())
        assert service.chunks.lengths == {}
        await service.check()
        await trio.sleep(SPACE_GRACE_NS / 1e9 + 1)
        await service.call("collect_garbage", base_pb2.Empty())
        for made in (below, alone):
            assert (await service.stat(made.inode)).type == pb.TYPE_INVALID
        assert await _pending(service) == 0

    run(main)


def test_dropping_is_told_to_who_trusts_the_space() -> None:
    async def main() -> None:
        service = await Service().start()
        made = await _space(service)
        epoch = (await service.call("watch", pb.WatchRequest(wait_ms=1), B)).epoch
        assert (await service.stat(made.inode, B)).attr_lease_ms
        told: list[int] = []

        async def watch() -> None:
            reply = await service.call("watch", pb.WatchRequest(acknowledged=0, wait_ms=20_000, epoch=epoch), B)
            told.extend(reply.inodes)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await service.call("remove", pb.RemoveRequest(parent=1, name=b"s", directory=True), A)
        assert made.inode in told

    run(main)


def test_the_bit_is_only_in_spaces() -> None:
    assert is_space(SPACE_BIT | 7) and not is_space(7)
    with pytest.raises(NotPermitted):
        require_room(pb.Inode(space=space()))
