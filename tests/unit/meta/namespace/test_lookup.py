"""lookup of paths, attributes, listing in pages."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from tests.unit.meta.namespace.tree import OTHER, OWNER, Tree, fails, updates, user

from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.namespace import files, lookup, remove


def walk(tree: Tree, *names: str, follow: bool = True, last: bool = True, parent: int = 1) -> pb.LookupReply:
    return tree.run(lookup.lookup, pb.LookupRequest(parent=parent, names=[name.encode() for name in names], follow=follow, follow_last=last))


def test_many_components_in_one_call(tree: Tree) -> None:
    numbers = [tree.mkdir("/a").inode, tree.mkdir("/a/b").inode, tree.create("/a/b/c").inode]
    reply = walk(tree, "a", "b", "c")
    assert [inode.inode for inode in reply.inodes] == numbers
    assert reply.inodes[0].nlink == 3
    assert (reply.final_parent, reply.final_name) == (numbers[1], b"c")


def test_what_is_missing(tree: Tree) -> None:
    number = tree.mkdir("/a").inode
    reply = walk(tree, "a", "x")
    assert len(reply.inodes) == 1 and (reply.final_parent, reply.final_name) == (number, b"x")
    reply = walk(tree, "x", "y")
    assert len(reply.inodes) == 0 and reply.final_parent == 0
    tree.create("/a/f")
    with fails(errno.ENOTDIR):
        walk(tree, "a", "f", "x")
    with fails(errno.ENOENT):
        walk(tree, "x", parent=999)


def test_dots(tree: Tree) -> None:
    a, b = tree.mkdir("/a").inode, tree.mkdir("/a/b").inode
    assert [inode.inode for inode in walk(tree, "a", ".", "b", "..", "..", "..").inodes] == [a, a, b, a, 1, 1]
    tree.create("/f")
    with fails(errno.ENOTDIR):
        walk(tree, "f", ".")


def test_search_permission_on_every_directory(tree: Tree) -> None:
    tree.mkdir("/a", 0o755, OWNER)
    tree.mkdir("/a/b", 0o755, OWNER)
    tree.create("/a/b/f", 0o000, OWNER)
    tree.find("/a/b/f", OTHER)
    tree.chmod("/a", 0o744)
    with fails(errno.EACCES):
        tree.find("/a/b/f", OTHER)
    with fails(errno.EACCES):
        tree.find("/a/missing", OTHER)
    tree.find("/a", OTHER)
    tree.find("/a/b/f")
    tree.chmod("/a", 0o644)
    with fails(errno.EACCES):
        tree.find("/a/b", OWNER)


def test_the_first_class_that_matches_decides(tree: Tree) -> None:
    tree.mkdir("/d", 0o755, OWNER)
    tree.chown("/d", 1001, 500)
    tree.create("/d/f")
    members = (user(1002, 500), user(1002, 7, 8, 500))
    tree.chmod("/d", 0o077)
    with fails(errno.EACCES):
        tree.find("/d/f", OWNER)
    for who in (*members, OTHER):
        tree.find("/d/f", who)
    tree.chmod("/d", 0o707)
    for who in members:
        with fails(errno.EACCES):
            tree.find("/d/f", who)
    for who in (OWNER, OTHER):
        tree.find("/d/f", who)


def test_symbolic_links(tree: Tree) -> None:
    tree.mkdir("/a")
    tree.mkdir("/a/b")
    number = tree.create("/a/b/f").inode
    tree.symlink("a/b", "/relative")
    tree.symlink("/a/b", "/absolute")
    tree.symlink("../../relative/./f", "/a/b/up")
    tree.symlink("b/", "/a/slash")
    for path in ("/relative/f", "/absolute/f", "/a/b/up", "/relative/up", "/a/slash/f"):
        assert tree.find(path).inode == number, path
    link = walk(tree, "relative", last=False).inodes[-1]
    assert (link.type, link.symlink, link.length) == (pb.SYMLINK, b"a/b", 3)
    assert walk(tree, "relative", "f", last=False).inodes[0].type == pb.DIRECTORY  # on the way it is always followed
    assert walk(tree, "relative", follow=False).inodes[-1].type == pb.SYMLINK
    tree.symlink("/", "/top")
    assert tree.find("/top").inode == 1
    assert tree.find("/top/a/slash").inode == tree.stat("/a/b").inode


def test_where_a_dangling_link_leads(tree: Tree) -> None:
    number = tree.mkdir("/a").inode
    tree.symlink("a/new", "/l")
    reply = walk(tree, "l")
    assert len(reply.inodes) == 0 and (reply.final_parent, reply.final_name) == (number, b"new")
    tree.symlink("nowhere/new", "/m")
    with fails(errno.ENOENT):
        walk(tree, "m")
    tree.create("/f")
    tree.symlink("f/", "/n")
    with fails(errno.ENOTDIR):
        walk(tree, "n")


def test_links_need_search_permission_too(tree: Tree) -> None:
    tree.mkdir("/a", 0o700, OWNER)
    tree.create("/a/f", 0o644, OWNER)
    tree.symlink("a/f", "/l")
    with fails(errno.EACCES):
        tree.find("/l", OTHER)
    tree.find("/l", OWNER)


def test_too_many_links(tree: Tree) -> None:
    tree.create("/f")
    tree.symlink("f", "/l0")
    for index in range(1, 41):
        tree.symlink(f"l{index - 1}", f"/l{index}")
    tree.find("/l39")  # 40 links
    with fails(errno.ELOOP):
        tree.find("/l40")
    tree.symlink("loop", "/loop")
    tree.symlink("two", "/one")
    tree.symlink("one", "/two")
    for path in ("/loop", "/one", "/loop/x"):
        with fails(errno.ELOOP):
            tree.find(path)


def test_a_name_that_is_too_long(tree: Tree) -> None:
    with fails(errno.ENAMETOOLONG):
        walk(tree, "n" * 256)
    assert len(walk(tree, "n" * 255).inodes) == 0


# --- walking and acting in one step


def parts(path: str) -> list[bytes]:
    return [part.encode() for part in path.split("/") if part]


def create(tree: Tree, path: str, who: pb.User = OWNER, *, follow: bool = True, **fields: Any) -> pb.CreateReply:
    return tree.run(files.create, pb.CreateRequest(parent=1, path=parts(path), follow_last=follow, mode=0o644, **fields), who)


def open_path(tree: Tree, path: str, who: pb.User = OWNER, *, follow: bool = True, **fields: Any) -> pb.Inode:
    return tree.run(files.open_file, pb.OpenRequest(inode=1, path=parts(path), follow_last=follow, **fields), who).inode


def remove_path(tree: Tree, path: str, who: pb.User = OWNER, **fields: Any) -> None:
    *above, name = parts(path)
    tree.run(remove.remove, pb.RemoveRequest(parent=1, path=above, name=name, **fields), who)


def test_create_by_path(tree: Tree) -> None:
    tree.mkdir("/a", 0o777)
    tree.symlink("a", "/to-a")
    tree.symlink("a/new", "/to-new")
    with updates(tree, "/a", mtime=True, ctime=True):
        made = create(tree, "/to-a/f", exclusive=True)
    assert made.created and tree.stat("/a/f").inode == made.inode.inode
    assert create(tree, "/a/../a/f").inode.inode == made.inode.inode
    assert create(tree, "/to-new").created and tree.stat("/a/new").uid == OWNER.uid
    with fails(errno.EEXIST):
        create(tree, "/to-new", follow=False, exclusive=True)
    with fails(errno.ELOOP):
        create(tree, "/to-new", follow=False)
    for path, expected in (("/no/f", errno.ENOENT), ("/a/f/x", errno.ENOTDIR), ("/a/..", errno.EISDIR), ("/a", errno.EISDIR)):
        with fails(expected):
            create(tree, path)
    tree.mkdir("/closed", 0o700)
    for path in ("/closed/f", "/closed/a/f"):
        with fails(errno.EACCES):
            create(tree, path, OTHER)


def test_open_by_path(tree: Tree) -> None:
    tree.mkdir("/a", 0o711)
    number = tree.create("/a/f", 0o644).inode
    tree.symlink("/a/f", "/to-f")
    assert open_path(tree, "/a/f", read=True).inode == open_path(tree, "/to-f", read=True).inode == number
    with fails(errno.ELOOP):
        open_path(tree, "/to-f", follow=False, read=True)
    with fails(errno.EACCES):
        open_path(tree, "/a/f", write=True, session=b"s" * 16)
    for path in ("/a/x", "/x/f"):
        with fails(errno.ENOENT):
            open_path(tree, path, read=True)
    tree.chmod("/a", 0o600)
    with fails(errno.EACCES):
        open_path(tree, "/to-f", read=True)


def test_remove_by_path(tree: Tree) -> None:
    tree.mkdir("/a", 0o777)
    tree.create("/a/f")
    tree.symlink("a", "/to-a")
    tree.symlink("f", "/a/to-f")
    remove_path(tree, "/to-a/to-f")
    assert tree.exists("/a/f") and not tree.exists("/a/to-f")
    for path, expected in (("/a/x", errno.ENOENT), ("/x/f", errno.ENOENT), ("/a/f/x", errno.ENOTDIR), ("/a", errno.EISDIR)):
        with fails(expected):
            remove_path(tree, path)
    with updates(tree, "/a", mtime=True, ctime=True):
        remove_path(tree, "/to-a/f")
    tree.mkdir("/a/d")
    tree.chmod("/a", 0o755)
    with fails(errno.EACCES):
        remove_path(tree, "/to-a/d", directory=True)


def test_get_attr_of_many(tree: Tree) -> None:
    number = tree.create("/f").inode
    reply = tree.run(lookup.get_attr, pb.GetAttrRequest(inodes=[number, 12345, 1]))
    assert [(inode.inode, inode.type) for inode in reply.inodes] == [(number, pb.FILE), (12345, pb.TYPE_INVALID), (1, pb.DIRECTORY)]


# --- listing


@pytest.mark.parametrize("attributes", [False, True])
def test_pages(tree: Tree, attributes: bool) -> None:
    tree.mkdir("/d")
    names = sorted(f"{index:x}" * 3 for index in range(25))
    for name in names:
        tree.create(f"/d/{name}") if int(name[0], 16) % 2 else tree.mkdir(f"/d/{name}")
    tree.mkdir("/e")
    tree.create("/e/other")
    seen: list[pb.DirEntry] = []
    after, more = b"", True
    while more:
        page = tree.readdir("/d", after=after, limit=7, attributes=attributes)
        assert len(page.entries) <= 7
        seen.extend(page.entries)
        after, more = page.entries[-1].name, page.more
    assert [entry.name.decode() for entry in seen] == names
    for entry in seen:
        found = tree.stat(f"/d/{entry.name.decode()}")
        assert (entry.inode, entry.type) == (found.inode, found.type)
        assert entry.attributes == (found if attributes else pb.Inode())
    assert not tree.readdir("/d", after=b"zzz").entries


def test_entries_made_behind_the_cursor_do_not_disturb(tree: Tree) -> None:
    tree.mkdir("/d")
    for name in "bdfh":
        tree.create(f"/d/{name}")
    first = tree.readdir("/d", limit=2)
    tree.create("/d/a")
    tree.unlink("/d/d")
    tree.create("/d/e")
    rest = tree.readdir("/d", after=first.entries[-1].name)
    assert [entry.name for entry in rest.entries] == [b"e", b"f", b"h"]


def test_listing_needs_read_permission_only(tree: Tree) -> None:
    tree.mkdir("/d", 0o755, OWNER)
    tree.create("/d/f")
    tree.chmod("/d", 0o400)
    with updates(tree, "/d"):
        assert len(tree.readdir("/d", OWNER, attributes=True).entries) == 1
    tree.chmod("/d", 0o300)
    with fails(errno.EACCES):
        tree.readdir("/d", OWNER)
    tree.create("/f")
    with fails(errno.ENOTDIR):
        tree.readdir("/f")


def test_names_of_any_bytes(tree: Tree) -> None:
    from kvfs.meta.namespace import entries

    names = [b"\x01", b"\xff" * 255, "ü".encode(), b" ", b"a\nb"]
    for name in names:
        tree.run(entries.make, pb.MakeRequest(parent=1, name=name, type=pb.FIFO))
    reply = tree.run(lookup.read_dir, pb.ReadDirRequest(inode=1, limit=2))
    more = tree.run(lookup.read_dir, pb.ReadDirRequest(inode=1, after=reply.entries[-1].name))
    assert [entry.name for entry in (*reply.entries, *more.entries)] == sorted(names)
