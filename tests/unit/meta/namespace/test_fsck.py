"""The check of the metadata finds every planted fault."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from tests.unit.meta.namespace.tree import Tree

from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.kv import Transaction
from kvfs.meta.namespace import fsck, keys, records

S1 = b"1" * 16


@pytest.fixture
def grown() -> Tree:
    """A tree with something of every kind: /d (directory) /d/sub, /f (two names, attributes), /open (removed, open), /gone (in the queue)."""
    tree = Tree()
    tree.mkdir("/d")
    tree.mkdir("/d/sub")
    tree.create("/f")
    tree.link("/f", "/d/g")
    tree.setxattr("/f", "user.a", b"1")
    tree.create("/open", write=True, session=S1)
    tree.unlink("/open")
    tree.create("/gone")
    tree.write("/gone", 10)
    tree.unlink("/gone")
    assert tree.problems() == []
    return tree


def inode_of(tree: Tree, path: str) -> int:
    return tree.stat(path).inode


def edit(number: int, **fields: int) -> Callable[[Transaction], None]:
    def change(txn: Transaction) -> None:
        data = txn.get(keys.inode(number))
        assert data is not None
        inode = records.decode_inode(data)
        for name, value in fields.items():
            setattr(inode, name, value)
        txn.set(keys.inode(number), records.encode_inode(inode))

    return change


Change = Callable[[Transaction], None]


def put(key: bytes, value: bytes) -> Change:
    return lambda txn: txn.set(key, value)


def drop(key: bytes) -> Change:
    return lambda txn: txn.clear(key)


FAULTS: dict[str, tuple[Callable[[Tree], Change], str]] = {
    "an entry without inode": (lambda t: put(keys.entry(1, b"x"), records.encode_entry(999, pb.FILE)), "999, which is not there"),
    "an inode without entry": (lambda t: drop(keys.entry(1, b"f")), "says 2 links, and has 1 names"),
    "a wrong type": (lambda t: put(keys.entry(1, b"f"), records.encode_entry(inode_of(t, "/f"), pb.FIFO)), "says type"),
    "a wrong link count": (lambda t: edit(inode_of(t, "/f"), nlink=3), "says 3 links"),
    "a wrong directory count": (lambda t: put(keys.directory_links(inode_of(t, "/d")), records.encode_links(2)), "2 links, and has 1 subdirectories"),
    "a wrong parent": (lambda t: edit(inode_of(t, "/d/sub"), parent=1), "says that its parent is 1"),
    "a loop": (lambda t: edit(inode_of(t, "/d"), parent=inode_of(t, "/d/sub")), "cannot be reached"),
    "a lost directory": (lambda t: drop(keys.entry(1, b"d")), "0 names"),
    "entries of nothing": (lambda t: put(keys.entry(888, b"x"), records.encode_entry(inode_of(t, "/f"), pb.FILE)), "that directory is not there"),
    "entries of a file": (lambda t: put(keys.entry(inode_of(t, "/f"), b"x"), records.encode_entry(inode_of(t, "/f"), pb.FILE)), "is not a directory"),
    "an open file without session": (lambda t: lambda txn: txn.clear_range(*keys.span(keys.SESSION)), "nothing will free it"),
    "a removed file outside the queue": (lambda t: lambda txn: txn.clear_range(*keys.span(keys.GARBAGE)), "nothing will free it"),
    "a cut-off directory outside the queue": (lambda t: edit(inode_of(t, "/d/sub"), nlink=0), "nothing will take it apart"),
    "attributes of nothing": (lambda t: put(keys.xattr(777, b"user.a"), b"1"), "extended attribute record of inode 777"),
    "times of nothing": (lambda t: put(keys.directory_times(777), records.encode_times(1, 1)), "directory times record"),
    "links of nothing": (lambda t: put(keys.directory_links(777), records.encode_links(2)), "link count record"),
    "a truncation of nothing": (lambda t: put(keys.cut(777), records.encode_cut(records.Cut(1, 1))), "truncation record"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(grown: Tree, fault: str) -> None:
    plant, expected = FAULTS[fault]
    grown.put(plant(grown))
    problems = grown.problems()
    assert any(expected in problem for problem in problems), problems


def test_a_page_says_who_has_a_file_open_for_writing() -> None:
    """Seed 2 of the simulation: without it `kvfs fsck` took what a writer had not reported yet for chunks behind the end of the file."""
    tree = Tree()
    written = tree.create("/written", write=True, session=S1).inode
    read = tree.create("/read").inode
    page = trio.run(fsck.Fsck(tree.engine).page, pb.FsckRequest())
    assert {inode.inode: inode.writers for inode in page.inodes if inode.inode in (written, read)} == {written: 1, read: 0}
