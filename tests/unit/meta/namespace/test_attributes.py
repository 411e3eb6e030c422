"""chmod, chown, utimens, truncate: who may, what changes, which times."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from tests.unit.meta.namespace.tree import OTHER, OWNER, ROOT, SECOND, Tree, fails, updates, user

from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.namespace import attributes

S1, S2 = b"1" * 16, b"2" * 16


@pytest.fixture(params=["file", "directory", "fifo"])
def thing(tree: Tree, request: pytest.FixtureRequest) -> str:
    """Something of OWNER's at /x."""
    if request.param == "file":
        tree.create("/x", 0o644, OWNER)
    elif request.param == "directory":
        tree.mkdir("/x", 0o755, OWNER)
    else:
        tree.make("/x", pb.FIFO, 0o644, OWNER)
    return str(request.param)


# --- chmod


def test_chmod(tree: Tree, thing: str) -> None:
    for mode in (0o111, 0o000, 0o777, 0o1755):
        with updates(tree, "/x", ctime=True):
            assert tree.chmod("/x", mode, OWNER).mode == mode
        assert tree.stat("/x").mode == mode
    tree.chmod("/x", 0o600, ROOT)
    for who in (OTHER, user(1003, 1001), user(1003, 1003, 1001)):
        with updates(tree, "/x"), fails(errno.EPERM):
            tree.chmod("/x", 0o777, who)


def test_chmod_ignores_other_bits(tree: Tree, thing: str) -> None:
    assert tree.chmod("/x", 0o100644, OWNER).mode == 0o644


def test_chmod_drops_set_gid_of_a_foreign_group(tree: Tree, thing: str) -> None:
    tree.chown("/x", None, 500)
    assert tree.chmod("/x", 0o2755, OWNER).mode == 0o755
    assert tree.chmod("/x", 0o2755, user(1001, 500)).mode == 0o2755
    assert tree.chmod("/x", 0o755, OWNER).mode == 0o755
    assert tree.chmod("/x", 0o2755, user(1001, 1001, 7, 500)).mode == 0o2755
    assert tree.chmod("/x", 0o6755, ROOT).mode == 0o6755


def test_a_writer_may_only_drop_privileges(tree: Tree) -> None:
    tree.create("/x", 0o6777, OWNER)
    assert tree.chmod("/x", 0o777, OTHER).mode == 0o777  # what the kernel sends for a write by OTHER
    tree.chmod("/x", 0o6777)
    for mode in (0o666, 0o7777, 0o0776, 0o6777):
        with fails(errno.EPERM):
            tree.chmod("/x", mode, OTHER)
    tree.chmod("/x", 0o6755)
    with fails(errno.EPERM):
        tree.chmod("/x", 0o755, OTHER)


# --- chown


def test_root_chowns(tree: Tree, thing: str) -> None:
    with updates(tree, "/x", ctime=True):
        tree.chown("/x", 5, 6)
    seen = tree.stat("/x")
    assert (seen.uid, seen.gid) == (5, 6)
    tree.chown("/x", None, 7)
    tree.chown("/x", 8, None)
    seen = tree.stat("/x")
    assert (seen.uid, seen.gid) == (8, 7)


def test_an_owner_chooses_among_his_groups(tree: Tree, thing: str) -> None:
    member = user(1001, 1001, 500, 501)
    with updates(tree, "/x", ctime=True):
        tree.chown("/x", None, 500, member)
    tree.chown("/x", 1001, 501, member)  # his own uid, said again
    tree.chown("/x", None, 501, user(1001, 1001))  # the group that it has already
    with updates(tree, "/x"), fails(errno.EPERM):
        tree.chown("/x", None, 502, member)
    with updates(tree, "/x"), fails(errno.EPERM):
        tree.chown("/x", 1002, None, member)
    with updates(tree, "/x"), fails(errno.EPERM):
        tree.chown("/x", 1002, 500, member)
    for stranger in (OTHER, user(1002, 1001, 501)):
        for uid, gid in ((1002, None), (None, 1002), (1001, None), (None, 501), (1001, 501)):
            with updates(tree, "/x"), fails(errno.EPERM):
                tree.chown("/x", uid, gid, stranger)


@pytest.mark.parametrize("who", [ROOT, user(1001, 1001, 500)])
def test_chown_drops_set_uid_and_set_gid(tree: Tree, who: pb.User) -> None:
    tree.create("/x", 0o6555, OWNER)
    tree.chmod("/x", 0o6555)
    assert tree.chown("/x", None, 500, who).mode == 0o555
    tree.chmod("/x", 0o6545)
    assert tree.chown("/x", None, 1001, who).mode == 0o2545  # without group execution set-gid means locking, not privilege
    tree.mkdir("/d", 0o755, OWNER)
    tree.chmod("/d", 0o6755)
    assert tree.chown("/d", None, 500, who).mode == 0o6755


def test_chown_with_nothing_to_change(tree: Tree, thing: str) -> None:
    tree.chmod("/x", 0o6755)
    with updates(tree, "/x"):
        tree.chown("/x", None, None, OTHER)
    assert tree.stat("/x").mode == 0o6755


def test_chmod_with_chown_sets_the_mode_given(tree: Tree) -> None:
    tree.create("/x", 0o755, OWNER)
    assert tree.setattr("/x", ROOT, uid=7, mode=0o4755).mode == 0o4755


# --- utimens


def test_explicit_times(tree: Tree, thing: str) -> None:
    tree.setattr("/x", OWNER, atime_ns=1_234_567_891, mtime_ns=987_654_321_987)
    seen = tree.stat("/x")
    assert (seen.atime_ns, seen.mtime_ns) == (1_234_567_891, 987_654_321_987)
    for times in ({"atime_ns": 5}, {"mtime_ns": 6}, {"atime_ns": -7, "mtime_ns": -(1 << 40)}):
        tree.setattr("/x", OWNER, **times)
    seen = tree.stat("/x")
    assert (seen.atime_ns, seen.mtime_ns) == (-7, -(1 << 40))


def test_one_time_alone_keeps_the_other(tree: Tree, thing: str) -> None:
    before = tree.stat("/x")
    with updates(tree, "/x", ctime=True, atime=True):
        tree.setattr("/x", OWNER, atime_ns=3 * SECOND)
    with updates(tree, "/x", ctime=True, mtime=True):
        tree.setattr("/x", OWNER, mtime_now=True)
    after = tree.stat("/x")
    assert after.atime_ns == 3 * SECOND
    assert after.mtime_ns > before.mtime_ns


def test_times_of_a_directory_with_entries(tree: Tree) -> None:
    tree.mkdir("/d")
    tree.create("/d/a")
    tree.setattr("/d", mtime_ns=77)
    assert tree.stat("/d").mtime_ns == 77
    with updates(tree, "/d", ctime=True, atime=True):
        tree.setattr("/d", atime_ns=78)
    assert tree.stat("/d").mtime_ns == 77
    tree.create("/d/b")
    assert tree.stat("/d").mtime_ns == tree.now_ns - SECOND


def test_who_may_set_times(tree: Tree, thing: str) -> None:
    explicit: dict[str, Any] = {"atime_ns": 1, "mtime_ns": 2}
    now: dict[str, Any] = {"atime_now": True, "mtime_now": True}
    mixed: list[dict[str, Any]] = [{"atime_now": True}, {"mtime_now": True}, {"atime_ns": 1}, {"atime_now": True, "mtime_ns": 2}]
    tree.chmod("/x", 0o644)
    for times in (explicit, *mixed):
        with updates(tree, "/x"), fails(errno.EPERM):
            tree.setattr("/x", OTHER, **times)
    with updates(tree, "/x"), fails(errno.EACCES):
        tree.setattr("/x", OTHER, **now)
    tree.chmod("/x", 0o666)
    for times in (explicit, *mixed):
        with updates(tree, "/x"), fails(errno.EPERM):
            tree.setattr("/x", OTHER, **times)
    with updates(tree, "/x", ctime=True, mtime=True, atime=True):
        tree.setattr("/x", OTHER, **now)
    tree.chmod("/x", 0o000)
    for times in (explicit, now, *mixed):
        tree.setattr("/x", OWNER, **times)
        tree.setattr("/x", ROOT, **times)


# --- truncate


def test_truncate(tree: Tree) -> None:
    tree.create("/x", 0o644, OWNER)
    for length in (1234, 567, 0, 1 << 40):
        with updates(tree, "/x", ctime=True, mtime=True):
            assert tree.truncate("/x", length, OWNER).length == length
        assert tree.stat("/x").length == length


def test_truncate_needs_write_permission(tree: Tree) -> None:
    tree.create("/x", 0o644, OWNER)
    with updates(tree, "/x"), fails(errno.EACCES):
        tree.truncate("/x", 5, OTHER)
    tree.chmod("/x", 0o444)
    with fails(errno.EACCES):
        tree.truncate("/x", 5, OWNER)
    tree.truncate("/x", 5, ROOT)
    tree.chmod("/x", 0o002)
    tree.truncate("/x", 6, OTHER)
    with fails(errno.EACCES):
        tree.truncate("/x", 7, OWNER)


def test_truncate_through_an_open_file(tree: Tree) -> None:
    made = tree.create("/x", 0o000, OWNER, write=True, session=S1)
    reply = tree.run(attributes.set_attr, pb.SetAttrRequest(inode=made.inode, length=9, session=S1), OWNER)
    assert reply.inode.length == 9
    with fails(errno.EACCES):
        tree.run(attributes.set_attr, pb.SetAttrRequest(inode=made.inode, length=3, session=S2), OWNER)


def test_truncate_of_other_kinds(tree: Tree) -> None:
    tree.mkdir("/d")
    tree.make("/p", pb.FIFO)
    with fails(errno.EISDIR):
        tree.truncate("/d", 0)
    with fails(errno.EINVAL):
        tree.truncate("/p", 0)
    tree.create("/f")
    with fails(errno.EFBIG):
        tree.truncate("/f", 1 << 63)
    assert tree.truncate("/f", (1 << 63) - 1).length == (1 << 63) - 1


def test_truncate_by_others_drops_privileges(tree: Tree) -> None:
    tree.create("/x", 0o6777, OWNER)
    assert tree.truncate("/x", 5, ROOT).mode == 0o6777
    assert tree.truncate("/x", 6, OTHER).mode == 0o777


def test_only_a_cut_that_can_hit_chunks_is_carried_out(tree: Tree) -> None:
    number = tree.create("/x").inode
    assert tree.last is not None
    tree.truncate("/x", 100)
    tree.truncate("/x", 50)
    assert tree.last.cuts == []  # nobody ever wrote
    tree.write("/x", 1000)
    tree.truncate("/x", 2000)
    assert tree.last.cuts == []
    before = tree.stat("/x").truncate_version
    tree.truncate("/x", 500)
    assert tree.last.cuts == [number]
    assert tree.stat("/x").truncate_version == before + 1


def test_a_cut_under_an_open_writer_is_always_carried_out(tree: Tree) -> None:
    made = tree.create("/x", write=True, session=S1)
    tree.truncate("/x", 0)
    assert tree.last is not None
    assert tree.last.cuts == [made.inode]  # what the writer has not reported may lie anywhere


def test_an_inode_that_is_gone(tree: Tree) -> None:
    with fails(errno.ESTALE):
        tree.run(attributes.set_attr, pb.SetAttrRequest(inode=999, mode=0o644))


# --- layout


def test_set_layout(tree: Tree) -> None:
    tree.mkdir("/d", 0o755, OWNER)
    number = tree.stat("/d").inode
    with updates(tree, "/d", ctime=True):
        tree.run(attributes.set_layout, pb.SetLayoutRequest(inode=number, layout=pb.Layout(chunk_size=1 << 22, stripe=3, chain_ids=[9])), OWNER)
    made = tree.create("/d/f").layout
    assert (made.chunk_size, made.stripe, list(made.chain_ids)) == (1 << 22, 3, [1, 2, 3])
    with fails(errno.EPERM):
        tree.run(attributes.set_layout, pb.SetLayoutRequest(inode=number), OTHER)
    with fails(errno.EINVAL):
        tree.run(attributes.set_layout, pb.SetLayoutRequest(inode=tree.stat("/d/f").inode))
