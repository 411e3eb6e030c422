"""link: errors, link counts and times."""

from __future__ import annotations

import errno

from tests.unit.meta.namespace.tree import OTHER, OWNER, Tree, fails, updates

from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.namespace import entries
from kvfs.meta.namespace.step import Surroundings


def test_link(tree: Tree) -> None:
    for path, make in (("/f", lambda: tree.create("/f")), ("/l", lambda: tree.symlink("x", "/l")), ("/p", lambda: tree.make("/p", pb.FIFO))):
        make()
        tree.mkdir("/d")
        with updates(tree, "/d", ctime=True, mtime=True), updates(tree, path, ctime=True):
            tree.link(path, "/d/x")
        one, two = tree.stat(path), tree.stat("/d/x")
        assert one == two
        assert one.nlink == 2
        tree.chmod("/d/x", 0o600) if path == "/f" else None
        tree.unlink("/d/x")
        tree.rmdir("/d")


def test_errors_in_order(tree: Tree) -> None:
    tree.mkdir("/d", 0o555, OWNER)
    tree.create("/f", who=OWNER)
    tree.mkdir("/sub")
    tree.create("/d/taken")
    with fails(errno.EEXIST):  # before the directory's permission
        tree.link("/f", "/d/taken", OWNER)
    with updates(tree, "/f"), updates(tree, "/d"), fails(errno.EACCES):
        tree.link("/f", "/d/x", OWNER)
    with fails(errno.EACCES):  # before what the source is
        tree.link("/sub", "/d/x", OWNER)
    tree.chmod("/d", 0o755)
    with updates(tree, "/d"), fails(errno.EPERM):
        tree.link("/sub", "/d/x", OWNER)
    with fails(errno.ENOENT):
        tree.link("/missing", "/d/x", OWNER)
    with fails(errno.ENAMETOOLONG):
        tree.link("/f", "/d/" + "n" * 256)
    with fails(errno.ENOTDIR):
        tree.link("/f", "/f/x")
    tree.chmod("/d", 0o600)
    with fails(errno.EACCES):
        tree.link("/f", "/d/x", OWNER)
    with fails(errno.EACCES):
        tree.link("/f", "/d/x", OTHER)


def test_the_limit_of_links() -> None:
    tree = Tree(links_max=3)
    tree.create("/f")
    tree.link("/f", "/1")
    tree.link("/f", "/2")
    with updates(tree, "/f"), updates(tree, "/"), fails(errno.EMLINK):
        tree.link("/f", "/3")
    tree.unlink("/1")
    tree.link("/f", "/3")
    assert tree.problems() == []
    assert Surroundings(new_inode=int, place=pb.Layout, table=lambda number, replication: (1, 1, [])).links_max >= 65_000


def test_a_removed_open_file_gets_no_new_name(tree: Tree) -> None:
    number = tree.create("/f", write=True, session=b"s" * 16).inode
    tree.unlink("/f")
    with fails(errno.ENOENT):
        tree.run(entries.link, pb.LinkRequest(inode=number, parent=1, name=b"back"))
