"""create, mkdir, mknod, symlink: errors in Linux's order, owner and mode of what is made, times of the directory."""

from __future__ import annotations

import errno

import pytest
from tests.unit.meta.namespace.tree import OTHER, OWNER, ROOT, Tree, fails, updates, user

from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.namespace import entries, files

KINDS = {
    "file": pb.FILE,
    "directory": pb.DIRECTORY,
    "symlink": pb.SYMLINK,
    "fifo": pb.FIFO,
    "socket": pb.SOCKET,
    "char": pb.CHAR_DEVICE,
    "block": pb.BLOCK_DEVICE,
}
every_kind = pytest.mark.parametrize("kind", KINDS)
UNPRIVILEGED = ("file", "directory", "symlink", "fifo", "socket", "created")
every_maker = pytest.mark.parametrize("kind", UNPRIVILEGED)


def make(tree: Tree, kind: str, path: str, who: pb.User = ROOT, mode: int = 0o644) -> pb.Inode:
    if kind == "created":
        return tree.create(path, mode, who)
    return tree.make(path, KINDS[kind], mode, who, symlink=b"target" if kind == "symlink" else b"", rdev=0x0103)


@every_kind
def test_what_is_made(tree: Tree, kind: str) -> None:
    made = make(tree, kind, "/x", OWNER if kind in UNPRIVILEGED else ROOT, 0o640)
    seen = tree.stat("/x")
    assert seen.inode == made.inode
    assert seen.type == KINDS[kind]
    assert seen.mode == (0o777 if kind == "symlink" else 0o640)
    assert (seen.uid, seen.gid) == ((1001, 1001) if kind in UNPRIVILEGED else (0, 0))
    assert seen.nlink == (2 if kind == "directory" else 1)
    assert seen.atime_ns == seen.mtime_ns == seen.ctime_ns == seen.birth_ns == made.birth_ns > 0
    assert seen.rdev == (0x0103 if kind in ("char", "block") else 0)
    assert seen.length == (6 if kind == "symlink" else 0)


@every_maker
def test_the_directory_is_touched(tree: Tree, kind: str) -> None:
    tree.mkdir("/d")
    with updates(tree, "/d", ctime=True, mtime=True):
        make(tree, kind, "/d/x")


@every_maker
def test_a_taken_name_is_refused_before_permission_is_checked(tree: Tree, kind: str) -> None:
    tree.mkdir("/d", 0o555, OWNER)
    tree.mkdir("/d/directory")
    tree.create("/d/file")
    tree.symlink("nowhere", "/d/link")
    for name in ("directory", "file", "link"):
        with updates(tree, "/d"), fails(errno.EEXIST):
            make(tree, kind, f"/d/{name}", OWNER)
    with fails(errno.EACCES):
        make(tree, kind, "/d/free", OWNER)


@every_maker
def test_needs_search_and_write_on_the_directory(tree: Tree, kind: str) -> None:
    tree.mkdir("/d", 0o755, OWNER)
    for mode in (0o600, 0o100, 0o500, 0o400, 0o000):
        tree.chmod("/d", mode)
        with updates(tree, "/d"), fails(errno.EACCES):
            make(tree, kind, "/d/x", OWNER)
    tree.chmod("/d", 0o300)
    make(tree, kind, "/d/x", OWNER)
    with fails(errno.EACCES):
        make(tree, kind, "/d/y", OTHER)


@every_maker
def test_names(tree: Tree, kind: str) -> None:
    make(tree, kind, "/" + "n" * 255)
    with fails(errno.ENAMETOOLONG):
        make(tree, kind, "/" + "n" * 256)
    tree.create("/plain")
    with fails(errno.ENOTDIR):
        make(tree, kind, "/plain/x")
    with fails(errno.ENOENT):
        make(tree, kind, "/missing/x")


@pytest.mark.parametrize("name", [b".", b".."])
def test_dot_names_are_taken(tree: Tree, name: bytes) -> None:
    with fails(errno.EEXIST):
        tree.run(entries.make, pb.MakeRequest(parent=1, name=name, type=pb.DIRECTORY, mode=0o755))
    with fails(errno.EEXIST):
        tree.run(files.create, pb.CreateRequest(parent=1, name=name, exclusive=True))
    with fails(errno.EISDIR):
        tree.run(files.create, pb.CreateRequest(parent=1, name=name))


@pytest.mark.parametrize("name", [b"a/b", b"a\0b"])
def test_names_without_slash_and_zero(tree: Tree, name: bytes) -> None:
    with fails(errno.EINVAL):
        tree.run(entries.make, pb.MakeRequest(parent=1, name=name, type=pb.FIFO))
    with fails(errno.EINVAL):
        tree.run(files.create, pb.CreateRequest(parent=1, name=name))


def test_only_root_makes_devices(tree: Tree) -> None:
    for kind in ("char", "block"):
        with fails(errno.EPERM):
            make(tree, kind, "/x", OWNER)
        make(tree, kind, f"/{kind}")
    tree.chmod("/", 0o755)
    with fails(errno.EACCES):  # the directory's permission comes first
        make(tree, "char", "/x", OWNER)


def test_mkdir_takes_permissions_and_the_sticky_bit_only(tree: Tree) -> None:
    assert tree.mkdir("/d", 0o7777).mode == 0o1777
    assert tree.create("/f", 0o7777).mode == 0o7777


def test_a_set_gid_directory_hands_on_its_group(tree: Tree) -> None:
    tree.mkdir("/d", 0o777)
    tree.chown("/d", 0, 500)
    tree.chmod("/d", 0o2777)
    made = tree.create("/d/f", 0o644, OWNER)
    assert (made.uid, made.gid) == (1001, 500)
    below = tree.mkdir("/d/sub", 0o755, OWNER)
    assert (below.gid, below.mode) == (500, 0o2755)
    assert tree.symlink("x", "/d/l", OWNER).gid == 500
    # set-gid for a group that the maker is not in is dropped, with group execution only
    assert tree.create("/d/g", 0o2755, OWNER).mode == 0o755
    assert tree.create("/d/h", 0o2745, OWNER).mode == 0o2745
    assert tree.create("/d/i", 0o2755, user(1001, 1001, 500)).mode == 0o2755
    assert tree.create("/d/j", 0o2755, ROOT).mode == 0o2755


def test_subdirectories_count_as_links(tree: Tree) -> None:
    tree.mkdir("/d")
    for index in range(3):
        tree.mkdir(f"/d/{index}")
    tree.create("/d/file")
    assert tree.stat("/d").nlink == 5
    tree.rmdir("/d/1")
    assert tree.stat("/d").nlink == 4
    assert tree.stat("/").nlink == 3


def test_symlink_targets(tree: Tree) -> None:
    assert tree.symlink("t" * 4095, "/longest").symlink == b"t" * 4095
    with fails(errno.ENAMETOOLONG):
        tree.symlink("t" * 4096, "/longer")
    with fails(errno.ENOENT):
        tree.symlink("", "/empty")


def test_layouts_are_inherited(tree: Tree) -> None:
    tree.make("/d", pb.DIRECTORY, 0o755, layout=pb.Layout(chunk_size=65536, stripe=2))
    tree.mkdir("/d/e")
    made = tree.create("/d/e/f")
    assert (made.layout.chunk_size, made.layout.stripe, len(made.layout.chain_ids)) == (65536, 2, 2)
    own = tree.create("/d/e/g", layout=pb.Layout(chunk_size=1 << 26))
    assert (own.layout.chunk_size, own.layout.stripe) == (1 << 26, 2)
    for size in (1000, 32768, 1 << 27, 65537):
        with fails(errno.EINVAL):
            tree.create("/d/h", layout=pb.Layout(chunk_size=size))
    with fails(errno.EINVAL):
        tree.create("/d/h", layout=pb.Layout(stripe=10_000))


# --- create as open(O_CREAT)


def test_create_opens_what_is_there(tree: Tree) -> None:
    made = tree.create("/f", 0o600, OWNER)
    again = tree.create("/f", 0o777, OWNER, exclusive=False)
    assert (again.inode, again.mode) == (made.inode, 0o600)
    with fails(errno.EEXIST):
        tree.create("/f", who=OWNER)


def test_create_of_what_is_there_checks_its_permissions(tree: Tree) -> None:
    tree.create("/f", 0o400, OWNER)
    tree.create("/f", who=OWNER, exclusive=False, read=True)
    with fails(errno.EACCES):
        tree.create("/f", who=OWNER, exclusive=False, write=True, session=b"s" * 16)
    with fails(errno.EACCES):
        tree.create("/f", who=OWNER, exclusive=False, truncate=True)
    with fails(errno.EACCES):
        tree.create("/f", who=OTHER, exclusive=False, read=True)


def test_create_makes_a_file_that_its_mode_would_not_let_open(tree: Tree) -> None:
    made = tree.create("/f", 0o000, OWNER, write=True, session=b"s" * 16)
    assert made.mode == 0 and made.writers == 1
    assert tree.getattr(made.inode).writers == 1


def test_create_does_not_touch_what_is_there(tree: Tree) -> None:
    tree.mkdir("/d")
    tree.create("/d/f")
    with updates(tree, "/d"), updates(tree, "/d/f"):
        tree.create("/d/f", exclusive=False)
    tree.write("/d/f", 10)
    with updates(tree, "/d"), updates(tree, "/d/f", ctime=True, mtime=True):
        tree.create("/d/f", exclusive=False, truncate=True)
    assert tree.stat("/d/f").length == 0


def test_create_on_other_kinds(tree: Tree) -> None:
    tree.mkdir("/d")
    tree.symlink("nowhere", "/l")
    for fields in ({}, {"write": True, "session": b"s" * 16}):
        with fails(errno.EISDIR):
            tree.create("/d", exclusive=False, **fields)
    with fails(errno.ELOOP):
        tree.create("/l", exclusive=False)
    for path in ("/d", "/l"):
        with fails(errno.EEXIST):
            tree.create(path)


def test_a_write_session_needs_a_name_of_16_bytes(tree: Tree) -> None:
    with fails(errno.EINVAL):
        tree.create("/f", write=True, session=b"short")
    assert not tree.exists("/f")
