"""rename: every pair of kinds, NOREPLACE, EXCHANGE, loops, sticky directories, link counts and times."""

from __future__ import annotations

import errno

import pytest
from tests.unit.meta.namespace.test_remove import build, garbage
from tests.unit.meta.namespace.tree import OTHER, OWNER, ROOT, STRANGER, Tree, fails, updates

from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.namespace import rename

KINDS = ("file", "directory", "symlink", "fifo")
every_kind = pytest.mark.parametrize("kind", KINDS)
plain_kind = pytest.mark.parametrize("kind", ["file", "symlink", "fifo"])


@every_kind
def test_to_a_free_name(tree: Tree, kind: str) -> None:
    tree.mkdir("/a")
    tree.mkdir("/b")
    made = build(tree, kind, "/a/x")
    with updates(tree, "/a", ctime=True, mtime=True), updates(tree, "/a/x", ctime=True):
        tree.rename("/a/x", "/a/y")
    with updates(tree, "/a", ctime=True, mtime=True), updates(tree, "/b", ctime=True, mtime=True), updates(tree, "/a/y", ctime=True):
        tree.rename("/a/y", "/b/z")
    assert tree.names("/a") == []
    seen = tree.stat("/b/z")
    assert (seen.inode, seen.nlink) == (made.inode, made.nlink)
    if kind == "directory":
        assert seen.parent == tree.stat("/b").inode
        assert (tree.stat("/a").nlink, tree.stat("/b").nlink) == (2, 3)


@pytest.mark.parametrize("target", ["file", "symlink", "fifo"])
@plain_kind
def test_replaces(tree: Tree, kind: str, target: str) -> None:
    made = build(tree, kind, "/x")
    old = build(tree, target, "/y")
    reply = tree.rename("/x", "/y")
    assert (reply.moved.inode, reply.replaced.inode, reply.replaced.nlink) == (made.inode, old.inode, 0)
    assert tree.stat("/y").inode == made.inode
    assert not tree.exists("/x")
    assert tree.getattr(old.inode).type == pb.TYPE_INVALID


def test_replacing_one_of_two_names(tree: Tree) -> None:
    tree.create("/x")
    tree.create("/y")
    tree.link("/y", "/z")
    with updates(tree, "/z", ctime=True):
        tree.rename("/x", "/y")
    assert tree.stat("/z").nlink == 1


def test_replacing_a_file_with_chunks_or_sessions(tree: Tree) -> None:
    tree.create("/x")
    written = tree.create("/y").inode
    tree.write("/y", 100)
    tree.rename("/x", "/y")
    assert garbage(tree) == [written]
    held = tree.create("/z", write=True, session=b"s" * 16).inode
    tree.rename("/y", "/z")
    assert tree.getattr(held).nlink == 0
    tree.close(held, b"s" * 16)
    assert tree.getattr(held).type == pb.TYPE_INVALID


def test_replaces_an_empty_directory(tree: Tree) -> None:
    for path in ("/p", "/q", "/p/x", "/q/y"):
        tree.mkdir(path)
    old = tree.stat("/q/y").inode
    tree.rename("/p/x", "/q/y")
    assert (tree.stat("/p").nlink, tree.stat("/q").nlink) == (2, 3)
    assert tree.getattr(old).type == pb.TYPE_INVALID
    tree.mkdir("/q/z")
    tree.rename("/q/y", "/q/z")
    assert tree.stat("/q").nlink == 3
    tree.mkdir("/q/full")
    tree.create("/q/full/x")
    with updates(tree, "/q"), updates(tree, "/q/full"), fails(errno.ENOTEMPTY):
        tree.rename("/q/z", "/q/full")


@plain_kind
def test_directories_and_others_do_not_replace_each_other(tree: Tree, kind: str) -> None:
    tree.mkdir("/d")
    build(tree, kind, "/x")
    with updates(tree, "/"), updates(tree, "/d"), updates(tree, "/x"), fails(errno.ENOTDIR):
        tree.rename("/d", "/x")
    with updates(tree, "/"), updates(tree, "/d"), updates(tree, "/x"), fails(errno.EISDIR):
        tree.rename("/x", "/d")


def test_two_names_of_one_inode_stay(tree: Tree) -> None:
    tree.create("/a")
    tree.link("/a", "/b")
    with updates(tree, "/"), updates(tree, "/a"):
        tree.rename("/a", "/b")
        tree.rename("/a", "/a")
    assert tree.names("/") == ["a", "b"]
    assert tree.stat("/a").nlink == 2


def test_a_directory_cannot_go_below_itself(tree: Tree) -> None:
    for path in ("/a", "/a/b", "/a/b/c"):
        tree.mkdir(path)
    for target in ("/a/x", "/a/b/x", "/a/b/c/x", "/a/b"):
        with updates(tree, "/a"), fails(errno.EINVAL):
            tree.rename("/a", target)
    with fails(errno.ENOTEMPTY):
        tree.rename("/a/b/c", "/a")
    tree.create("/a/b/f")
    with fails(errno.ENOTEMPTY):
        tree.rename("/a/b/f", "/a")
    tree.rename("/a/b", "/b")
    tree.rename("/a", "/b/c/a")
    assert tree.names("/b/c") == ["a"]


def test_names(tree: Tree) -> None:
    tree.create("/f")
    tree.mkdir("/d")
    with fails(errno.ENOENT):
        tree.rename("/missing", "/x")
    with fails(errno.ENAMETOOLONG):
        tree.rename("/f", "/" + "n" * 256)
    with fails(errno.ENAMETOOLONG):
        tree.rename("/" + "n" * 256, "/x")
    with fails(errno.ENOTDIR):
        tree.rename("/f", "/f/x")
    with fails(errno.ENOTDIR):
        tree.rename("/f/x", "/g")
    for name in (b".", b".."):
        with fails(errno.EBUSY):
            tree.run(rename.rename, pb.RenameRequest(parent=1, name=name, new_parent=1, new_name=b"x"))
        with fails(errno.EBUSY):
            tree.run(rename.rename, pb.RenameRequest(parent=1, name=b"f", new_parent=1, new_name=name))


@every_kind
def test_needs_search_and_write_on_both_directories(tree: Tree, kind: str) -> None:
    for path in ("/a", "/b"):
        tree.mkdir(path, 0o755, OWNER)
    build(tree, kind, "/a/x", OWNER)
    for path in ("/a", "/b"):
        for mode in (0o600, 0o500, 0o000):
            tree.chmod(path, mode)
            with updates(tree, "/a"), updates(tree, "/b"), fails(errno.EACCES):
                tree.rename("/a/x", "/b/y", OWNER)
        tree.chmod(path, 0o755)
    with fails(errno.EACCES):
        tree.rename("/a/x", "/b/y", OTHER)
    tree.chmod("/a", 0o300)
    tree.chmod("/b", 0o300)
    tree.rename("/a/x", "/b/y", OWNER)


@every_kind
def test_sticky_source_and_target(tree: Tree, kind: str) -> None:
    for path in ("/a", "/b"):
        tree.mkdir(path, 0o777, OWNER)
        tree.chmod(path, 0o1777)
    build(tree, kind, "/a/x", OTHER)
    build(tree, kind, "/b/y", OTHER)
    if kind == "directory":  # so that moving it is not refused for its ".."
        tree.chmod("/a/x", 0o777)
    with updates(tree, "/a"), fails(errno.EPERM):
        tree.rename("/a/x", "/a/z", STRANGER)
    build(tree, kind, "/a/mine", STRANGER)
    with updates(tree, "/b"), fails(errno.EPERM):
        tree.rename("/a/mine", "/b/y", STRANGER)
    tree.rename("/a/x", "/b/y", OTHER)
    tree.rename("/b/y", "/b/z", OWNER)
    tree.rename("/b/z", "/b/y", ROOT)


def test_moving_a_directory_to_another_needs_write_on_it(tree: Tree) -> None:
    tree.mkdir("/a", 0o777)
    tree.chmod("/a", 0o777)
    tree.mkdir("/b", 0o777)
    tree.chmod("/b", 0o777)
    tree.mkdir("/a/x", 0o755, OWNER)
    with updates(tree, "/a"), fails(errno.EACCES):
        tree.rename("/a/x", "/b/x", OTHER)
    tree.rename("/a/x", "/a/y", OTHER)  # its ".." stays
    tree.chmod("/a/y", 0o555)
    with fails(errno.EACCES):
        tree.rename("/a/y", "/b/y", OWNER)
    tree.rename("/a/y", "/b/y", ROOT)
    tree.create("/b/f", 0o000, OWNER)
    tree.rename("/b/f", "/a/f", OTHER)  # a file has none


def test_kind_comes_after_permission_and_before_emptiness(tree: Tree) -> None:
    tree.mkdir("/d", 0o755, OWNER)
    tree.mkdir("/d/full", 0o755, OWNER)
    tree.create("/d/full/x", 0o644, OWNER)
    tree.create("/d/f", 0o644, OWNER)
    with fails(errno.EACCES):
        tree.rename("/d/f", "/d/full", OTHER)
    with fails(errno.EISDIR):
        tree.rename("/d/f", "/d/full", OWNER)


# --- flags


def test_noreplace(tree: Tree) -> None:
    tree.create("/a")
    tree.create("/b")
    tree.link("/a", "/c")
    for target in ("/b", "/c", "/a"):
        with updates(tree, "/"), fails(errno.EEXIST):
            tree.rename("/a", target, no_replace=True)
    tree.rename("/a", "/d", no_replace=True)
    assert tree.names("/") == ["b", "c", "d"]
    with fails(errno.EINVAL):
        tree.rename("/b", "/c", no_replace=True, exchange=True)


@pytest.mark.parametrize("one", KINDS)
@pytest.mark.parametrize("two", KINDS)
def test_exchange(tree: Tree, one: str, two: str) -> None:
    tree.mkdir("/p")
    tree.mkdir("/q")
    first, second = build(tree, one, "/p/x"), build(tree, two, "/q/y")
    with updates(tree, "/p", ctime=True, mtime=True), updates(tree, "/q", ctime=True, mtime=True):
        tree.rename("/p/x", "/q/y", exchange=True)
    assert (tree.stat("/p/x").inode, tree.stat("/q/y").inode) == (second.inode, first.inode)
    assert tree.stat("/p").nlink == (3 if two == "directory" else 2)
    assert tree.stat("/q").nlink == (3 if one == "directory" else 2)
    build(tree, "file", "/p/z")
    tree.rename("/p/x", "/p/z", exchange=True)
    assert tree.stat("/p/z").inode == second.inode


def test_exchange_of_full_directories(tree: Tree) -> None:
    for path in ("/a", "/b", "/a/sub", "/b/sub"):
        tree.mkdir(path)
    tree.create("/a/sub/1")
    tree.create("/b/sub/2")
    tree.rename("/a/sub", "/b/sub", exchange=True)
    assert (tree.names("/a/sub"), tree.names("/b/sub")) == (["2"], ["1"])
    for old, new in (("/a", "/a/sub"), ("/a/sub", "/a")):
        with fails(errno.EINVAL):
            tree.rename(old, new, exchange=True)
    with fails(errno.ENOENT):
        tree.rename("/a", "/missing", exchange=True)


def test_exchange_checks_both_sides(tree: Tree) -> None:
    for path in ("/a", "/b"):
        tree.mkdir(path, 0o777)
        tree.chmod(path, 0o777)
    tree.create("/a/f", 0o644, OWNER)
    tree.mkdir("/b/d", 0o755, OWNER)
    with fails(errno.EACCES):  # the directory's ".." would change
        tree.rename("/a/f", "/b/d", OTHER, exchange=True)
    tree.chmod("/b", 0o1777)
    with fails(errno.EPERM):
        tree.rename("/a/f", "/b/d", OTHER, exchange=True)
    tree.rename("/a/f", "/b/d", OWNER, exchange=True)
