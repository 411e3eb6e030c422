"""unlink, rmdir, recursive removal: errors in Linux's order, sticky directories, link counts, times, what happens to open files."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from tests.unit.meta.namespace.tree import OTHER, OWNER, ROOT, STRANGER, Tree, fails, updates

from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.namespace import keys, records, remove
from kvfs.meta.namespace.step import Reader

S1 = b"1" * 16


def garbage(tree: Tree) -> list[int]:
    rows, _ = tree.put(lambda txn: txn.get_range(*keys.span(keys.GARBAGE)))
    return [keys.garbage_parts(key)[1] for key, _ in rows]


def build(tree: Tree, kind: str, path: str, who: pb.User = ROOT) -> pb.Inode:
    if kind == "directory":
        return tree.mkdir(path, 0o755, who)
    if kind == "symlink":
        return tree.symlink("x", path, who)
    if kind == "fifo":
        return tree.make(path, pb.FIFO, 0o644, who)
    return tree.create(path, 0o644, who)


every_kind = pytest.mark.parametrize("kind", ["file", "directory", "symlink", "fifo"])


def take(tree: Tree, kind: str, path: str, who: pb.User = ROOT) -> pb.Inode:
    return tree.rmdir(path, who) if kind == "directory" else tree.unlink(path, who)


@every_kind
def test_removal(tree: Tree, kind: str) -> None:
    tree.mkdir("/d")
    made = build(tree, kind, "/d/x")
    with updates(tree, "/d", ctime=True, mtime=True):
        gone = take(tree, kind, "/d/x")
    assert (gone.inode, gone.nlink) == (made.inode, 0)
    assert not tree.exists("/d/x")
    assert tree.getattr(made.inode).type == pb.TYPE_INVALID
    with updates(tree, "/d"), fails(errno.ENOENT):
        take(tree, kind, "/d/x")


@every_kind
def test_needs_search_and_write_on_the_directory(tree: Tree, kind: str) -> None:
    tree.mkdir("/d", 0o755, OWNER)
    build(tree, kind, "/d/x", OWNER)
    with updates(tree, "/d"), fails(errno.EACCES):
        take(tree, kind, "/d/x", OTHER)
    for mode in (0o600, 0o500, 0o000):
        tree.chmod("/d", mode)
        with updates(tree, "/d"), fails(errno.EACCES):
            take(tree, kind, "/d/x", OWNER)
    tree.chmod("/d", 0o300)
    take(tree, kind, "/d/x", OWNER)


@every_kind
def test_sticky_directories(tree: Tree, kind: str) -> None:
    tree.mkdir("/d", 0o1777, OWNER)
    tree.chmod("/d", 0o1777)
    build(tree, kind, "/d/a", OTHER)
    build(tree, kind, "/d/b", OTHER)
    build(tree, kind, "/d/c", OTHER)
    with updates(tree, "/d"), fails(errno.EPERM):
        take(tree, kind, "/d/a", STRANGER)
    take(tree, kind, "/d/a", OTHER)
    take(tree, kind, "/d/b", OWNER)
    take(tree, kind, "/d/c", ROOT)
    tree.chmod("/d", 0o777)
    build(tree, kind, "/d/e", OTHER)
    take(tree, kind, "/d/e", STRANGER)


def test_missing_comes_before_permission_and_permission_before_kind(tree: Tree) -> None:
    tree.mkdir("/d", 0o755, OWNER)
    tree.mkdir("/d/sub")
    tree.create("/d/file")
    with fails(errno.ENOENT):
        tree.unlink("/d/missing", OTHER)
    with fails(errno.EACCES):
        tree.unlink("/d/sub", OTHER)
    with fails(errno.EACCES):
        tree.rmdir("/d/file", OTHER)
    with fails(errno.EISDIR):
        tree.unlink("/d/sub", OWNER)
    with fails(errno.ENOTDIR):
        tree.rmdir("/d/file", OWNER)


def test_names(tree: Tree) -> None:
    for directory in (False, True):
        with fails(errno.ENAMETOOLONG):
            tree.unlink("/" + "n" * 256, directory=directory)
        with fails(errno.ENOENT):
            tree.unlink("/" + "n" * 255, directory=directory)
    tree.create("/f")
    with fails(errno.ENOTDIR):
        tree.unlink("/f/x")
    for name, directory, expected in (
        (b".", True, errno.EINVAL),
        (b"..", True, errno.ENOTEMPTY),
        (b".", False, errno.EISDIR),
        (b"..", False, errno.EISDIR),
    ):
        with fails(expected):
            tree.run(remove.remove, pb.RemoveRequest(parent=1, name=name, directory=directory))


def test_rmdir_wants_an_empty_directory(tree: Tree) -> None:
    tree.mkdir("/d")
    for kind in ("file", "directory", "symlink", "fifo"):
        build(tree, kind, "/d/x")
        with updates(tree, "/d"), fails(errno.ENOTEMPTY):
            tree.rmdir("/d")
        take(tree, kind, "/d/x")
    tree.rmdir("/d")
    assert tree.stat("/").nlink == 2


def test_nothing_can_be_made_in_a_removed_directory(tree: Tree) -> None:
    number = tree.mkdir("/d").inode
    tree.rmdir("/d")
    from kvfs.meta.namespace import entries

    with fails(errno.ENOENT):
        tree.run(entries.make, pb.MakeRequest(parent=number, name=b"x", type=pb.FIFO))


def test_one_name_of_several(tree: Tree) -> None:
    tree.create("/a")
    tree.link("/a", "/b")
    with updates(tree, "/a", ctime=True):
        assert tree.unlink("/b").nlink == 1
    assert tree.stat("/a").nlink == 1


def test_a_file_with_chunks_goes_to_the_garbage_queue(tree: Tree) -> None:
    number = tree.create("/f").inode
    tree.write("/f", 100)
    tree.unlink("/f")
    assert tree.getattr(number).nlink == 0
    assert garbage(tree) == [number]


def test_a_file_that_never_had_a_chunk_goes_at_once(tree: Tree) -> None:
    number = tree.create("/f", write=True, session=S1).inode
    tree.close(number, S1)
    tree.setattr("/f", length=1 << 30)
    tree.setxattr("/f", "user.a", b"1")
    tree.unlink("/f")
    assert tree.getattr(number).type == pb.TYPE_INVALID
    assert garbage(tree) == []


def test_an_open_file_outlives_its_name(tree: Tree) -> None:
    number = tree.create("/f", write=True, session=S1).inode
    assert tree.unlink("/f").nlink == 0
    assert garbage(tree) == []
    seen = tree.getattr(number)
    assert (seen.nlink, seen.writers) == (0, 1)
    assert tree.close(number, wrote=True, length=10, truncate_version=0, still_open=True).length == 10
    tree.close(number, S1)
    assert garbage(tree) == [number]


def test_an_open_file_that_was_not_written_goes_with_its_last_session(tree: Tree) -> None:
    number = tree.create("/f", write=True, session=S1).inode
    tree.unlink("/f")
    tree.close(number, S1)
    assert tree.getattr(number).type == pb.TYPE_INVALID


def test_readers_that_only_the_service_knows_keep_a_file(tree: Tree) -> None:
    readers: dict[int, list[Reader]] = {}
    tree.around = replace(
        tree.around,
        readers=lambda inode: readers.get(inode, ()),
        keep=lambda inode: readers.get(inode, ()),
    )
    number = tree.create("/f").inode
    tree.write("/f", 10)
    readers[number] = [Reader(S1, b"c" * 16, 5)]
    tree.unlink("/f")
    assert garbage(tree) == []
    stored = tree.put(lambda txn: txn.get(keys.session(number, S1)))
    assert stored is not None and records.decode_session(stored) == records.Session(b"c" * 16, False, 5)
    readers.clear()
    tree.close(number, S1)
    assert garbage(tree) == [number]


def test_a_session_that_is_closing_does_not_keep_a_file(tree: Tree) -> None:
    tree.around = replace(tree.around, closing=lambda inode: {S1})
    number = tree.create("/f", write=True, session=S1).inode
    tree.unlink("/f")
    assert tree.getattr(number).type == pb.TYPE_INVALID
    assert tree.put(lambda txn: txn.get(keys.session(number, S1))) is None


# --- recursive


def grow(tree: Tree) -> None:
    tree.mkdir("/t", 0o755, OWNER)
    tree.mkdir("/t/a", 0o755, OWNER)
    tree.mkdir("/t/a/b", 0o755, OWNER)
    for name in ("/t/1", "/t/a/2", "/t/a/b/3"):
        tree.create(name, 0o644, OWNER)


def test_recursive_removal_cuts_the_tree_off(tree: Tree) -> None:
    grow(tree)
    number = tree.stat("/t").inode
    links = tree.stat("/").nlink
    tree.unlink("/t", recursive=True)
    assert not tree.exists("/t")
    assert tree.stat("/").nlink == links - 1
    assert garbage(tree) == [number]
    from kvfs.meta.namespace import files

    with fails(errno.ENOENT):
        tree.run(files.create, pb.CreateRequest(parent=number, name=b"late"))


def test_recursive_removal_needs_every_directory_below(tree: Tree) -> None:
    grow(tree)
    tree.chmod("/t/a/b", 0o555)
    with fails(errno.EACCES):
        tree.unlink("/t", OWNER, recursive=True)
    assert tree.exists("/t/a/b/3")
    tree.chown("/t/a", 1002, 1002)
    tree.chmod("/t/a", 0o1777)
    tree.chmod("/t/a/b", 0o777)
    tree.chown("/t/a/2", 1002, 1002)
    with fails(errno.EPERM):
        tree.unlink("/t", OWNER, recursive=True)
    tree.unlink("/t", recursive=True)


def test_recursive_removal_of_a_file_is_unlink(tree: Tree) -> None:
    tree.create("/f")
    tree.unlink("/f", recursive=True)
    assert not tree.exists("/f")
