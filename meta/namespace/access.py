"""Who may do what: POSIX permission checks as Linux makes them.

Owns the rules that depend on nothing but an inode and a user. The meta service decides alone: the native client has no kernel in front of it that
would check first. Root (uid 0) has every capability. This module must never read or write the store.
"""

from __future__ import annotations

from kvfs.common.errors import AccessDenied, NotPermitted
from kvfs.common.wire import meta_pb2 as pb

READ, WRITE, EXECUTE = 4, 2, 1

SET_UID, SET_GID, STICKY = 0o4000, 0o2000, 0o1000
GROUP_EXECUTE = 0o010
PERMISSIONS = 0o7777


def in_group(user: pb.User, gid: int) -> bool:
    return user.gid == gid or gid in user.groups


def allows(inode: pb.Inode, user: pb.User, mask: int) -> bool:
    """Whether the mode bits let the user: the first class that matches (owner, group, others) decides alone."""
    mode = inode.mode
    uid = user.uid
    if uid == 0:
        # Root reads and writes anything, and executes what anyone may execute; directories are always searched.
        return not (mask & EXECUTE and inode.type != pb.DIRECTORY and not mode & 0o111)
    if uid == inode.uid:
        mode >>= 6
    elif in_group(user, inode.gid):
        mode >>= 3
    return mode & mask == mask


def require(inode: pb.Inode, user: pb.User, mask: int) -> None:
    if not allows(inode, user, mask):
        raise AccessDenied("permission denied by the mode bits")


def require_room(directory: pb.Inode) -> None:
    """No file operation makes an entry in a KV-cache space: what it holds are blocks, and blocks have no entries."""
    if directory.HasField("space"):
        raise NotPermitted("a KV-cache space holds blocks only: they are put through kvfs.kvcache or `kvfs kv put`")


def owns(inode: pb.Inode, user: pb.User) -> bool:
    return user.uid in (0, inode.uid)


def require_owner(inode: pb.Inode, user: pb.User) -> None:
    if not owns(inode, user):
        raise NotPermitted("only the owner or root may do this")


def require_unstuck(directory: pb.Inode, victim: pb.Inode, user: pb.User) -> None:
    """In a sticky directory only the owner of the entry's inode, the directory's owner and root may remove or rename."""
    if directory.mode & STICKY and user.uid not in (0, victim.uid, directory.uid):
        raise NotPermitted("the directory is sticky: only the owner of the file or of the directory may remove or rename it")


def without_privileges(inode: pb.Inode) -> int:
    """The mode after a change by someone without privileges: set-uid goes, set-gid goes where it means execution with the group."""
    mode = inode.mode
    if inode.type != pb.FILE:
        return mode
    mode &= ~SET_UID
    if mode & GROUP_EXECUTE:
        mode &= ~SET_GID
    return mode
