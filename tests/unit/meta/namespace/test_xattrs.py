"""Extended attributes: names, sizes, flags, permissions."""

from __future__ import annotations

import errno

import pytest
from tests.unit.meta.namespace.tree import OTHER, OWNER, ROOT, Tree, fails, updates

from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.namespace import xattrs


def names(tree: Tree, path: str, who: pb.User = ROOT) -> list[bytes]:
    return list(tree.xattr(xattrs.list_xattr, path, "", who).names)


def test_set_get_list_remove(tree: Tree) -> None:
    tree.create("/f", 0o644, OWNER)
    with updates(tree, "/f", ctime=True):
        tree.setxattr("/f", "user.b", b"two", OWNER)
    tree.setxattr("/f", "user.a", b"", OWNER)
    tree.setxattr("/f", "user.b", b"\0three", OWNER)
    with updates(tree, "/f"):
        assert tree.xattr(xattrs.get_xattr, "/f", "user.b", OTHER).value == b"\0three"
        assert tree.xattr(xattrs.get_xattr, "/f", "user.a").value == b""
        assert names(tree, "/f", OTHER) == [b"user.a", b"user.b"]
    with updates(tree, "/f", ctime=True):
        tree.xattr(xattrs.remove_xattr, "/f", "user.a", OWNER)
    assert names(tree, "/f") == [b"user.b"]
    for operation in (xattrs.get_xattr, xattrs.remove_xattr):
        with updates(tree, "/f"), fails(errno.ENODATA):
            tree.xattr(operation, "/f", "user.a")


def test_flags(tree: Tree) -> None:
    tree.create("/f")
    with fails(errno.ENODATA):
        tree.setxattr("/f", "user.a", b"1", replace=True)
    tree.setxattr("/f", "user.a", b"1", create=True)
    with fails(errno.EEXIST):
        tree.setxattr("/f", "user.a", b"2", create=True)
    tree.setxattr("/f", "user.a", b"3", replace=True)
    with fails(errno.EINVAL):
        tree.setxattr("/f", "user.a", b"3", replace=True, create=True)
    assert tree.xattr(xattrs.get_xattr, "/f", "user.a").value == b"3"


def test_limits(tree: Tree) -> None:
    tree.create("/f")
    tree.setxattr("/f", "user." + "n" * 250, b"v" * (64 << 10))
    with fails(errno.ERANGE):
        tree.setxattr("/f", "user." + "n" * 251, b"")
    with fails(errno.ERANGE):
        tree.setxattr("/f", "", b"")
    with fails(errno.E2BIG):
        tree.setxattr("/f", "user.a", b"v" * ((64 << 10) + 1))
    for name in ("security.x", "trusted.x", "system.posix_acl_access", "plain"):
        for operation in (xattrs.get_xattr, xattrs.set_xattr, xattrs.remove_xattr):
            with fails(errno.ENOTSUP):
                tree.xattr(operation, "/f", name)
    with fails(errno.EINVAL):
        tree.setxattr("/f", "user.", b"")
    with fails(errno.EPERM):
        tree.setxattr("/f", "user.kvfs.layout", b"")


def test_permissions(tree: Tree) -> None:
    tree.create("/f", 0o640, OWNER)
    tree.setxattr("/f", "user.a", b"1", OWNER)
    for operation in (xattrs.get_xattr, xattrs.set_xattr, xattrs.remove_xattr):
        with fails(errno.EACCES):
            tree.xattr(operation, "/f", "user.a", OTHER)
    tree.chmod("/f", 0o644)
    tree.xattr(xattrs.get_xattr, "/f", "user.a", OTHER)
    with fails(errno.EACCES):
        tree.setxattr("/f", "user.a", b"2", OTHER)
    tree.chmod("/f", 0o646)
    tree.setxattr("/f", "user.a", b"2", OTHER)
    tree.mkdir("/d", 0o777, OWNER)
    tree.chmod("/d", 0o1777)
    with fails(errno.EPERM):
        tree.setxattr("/d", "user.a", b"1", OTHER)
    tree.setxattr("/d", "user.a", b"1", OWNER)
    tree.chmod("/d", 0o777)
    tree.setxattr("/d", "user.a", b"1", OTHER)


@pytest.mark.parametrize("kind", [pb.SYMLINK, pb.FIFO, pb.SOCKET, pb.CHAR_DEVICE])
def test_other_kinds_have_none(tree: Tree, kind: int) -> None:
    tree.make("/x", kind, symlink=b"t" if kind == pb.SYMLINK else b"")
    with fails(errno.EPERM):
        tree.setxattr("/x", "user.a", b"1")
    with fails(errno.EPERM):
        tree.xattr(xattrs.remove_xattr, "/x", "user.a")
    with fails(errno.ENODATA):
        tree.xattr(xattrs.get_xattr, "/x", "user.a")
    assert names(tree, "/x") == []


def test_they_go_with_the_inode(tree: Tree) -> None:
    tree.mkdir("/d")
    tree.setxattr("/d", "user.a", b"1")
    tree.rmdir("/d")  # the tree's check at the end finds records left behind
