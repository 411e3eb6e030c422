"""Taking entries away: unlink, rmdir, recursive removal.

Order of checks is Linux's: search the directory, ENOENT, write permission on the directory, the sticky bit, what kind it is, whether it is empty.
A recursive removal cuts the directory off in one transaction; what is below it goes in the background (gc), its own entries by entry. A KV-cache
space is dropped by rmdir though it holds blocks: they are no entries.
"""

from __future__ import annotations

from kvfs.common.errors import InvalidArgument, IsDirectory, NotDirectory, NotEmpty, TooManyLinks
from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.namespace import access, keys, records
from kvfs.meta.namespace.lookup import walk_to_inode
from kvfs.meta.namespace.spaces import drop_space
from kvfs.meta.namespace.step import Step, check_name

WALK_ENTRIES_MAX = 200_000
"""A recursive removal by someone else than root looks at every directory below first; a larger tree is refused."""


def remove(step: Step, request: pb.RemoveRequest) -> pb.RemoveReply:
    number = walk_to_inode(step, request.parent, request.path, follow_last=True).inode if request.path else request.parent
    parent = step.directory(number, access.EXECUTE)
    name = request.name
    if name in (b".", b".."):
        if not (request.directory or request.recursive):
            raise IsDirectory("a directory is not removed by unlink")
        raise InvalidArgument("'.' cannot be removed") if name == b"." else NotEmpty("'..' cannot be removed")
    check_name(name)
    _, inode = step.linked(number, name)
    may_take_away(step, parent, inode)
    if inode.type != pb.DIRECTORY:
        if request.directory:
            raise NotDirectory("only a directory is removed by rmdir")
        after = step.drop_link(inode)
    elif request.recursive:
        _check_tree(step, inode)
        step.add_links(parent.inode, -1)
        after = cut_off(step, inode)
    elif request.directory and inode.HasField("space"):
        step.add_links(parent.inode, -1)
        after = drop_space(step, inode)
    elif request.directory:
        remove_empty(step, inode)
        step.add_links(parent.inode, -1)
        after = inode
        after.nlink = 0
    else:
        raise IsDirectory("a directory is not removed by unlink")
    step.txn.clear(keys.entry(number, name))
    step.touch_directory(number)
    return pb.RemoveReply(inode=after)


def may_take_away(step: Step, parent: pb.Inode, victim: pb.Inode) -> None:
    access.require(parent, step.user, access.WRITE | access.EXECUTE)
    access.require_unstuck(parent, victim, step.user)


def is_empty(step: Step, directory: int) -> bool:
    """By a range read: an entry that is made meanwhile makes the transaction fail."""
    rows, _ = step.txn.get_range(*keys.entries(directory), limit=1)
    return not rows


def remove_empty(step: Step, directory: pb.Inode) -> None:
    """The directory's inode goes; its entry and its parent's link count are the caller's."""
    if not is_empty(step, directory.inode):
        raise NotEmpty("the directory has entries")
    step.erase(directory)


def cut_off(step: Step, directory: pb.Inode) -> pb.Inode:
    """The directory keeps its entries and has no name any more: nobody can make entries in it, and the garbage queue takes it apart."""
    if directory.HasField("space"):
        return drop_space(step, directory)
    directory.nlink = 0
    directory.ctime_ns = step.now_ns
    step.put(directory)
    step.discard(directory.inode, records.TREE_GARBAGE)
    return directory


def _check_tree(step: Step, top: pb.Inode) -> None:
    """`rm -r` would need to list, search and change every directory below: so does this."""
    if step.user.uid == 0:
        return
    seen = 0
    waiting = [top]
    while waiting:
        directory = waiting.pop()
        begin, end = keys.entries(directory.inode)
        more, first = True, True
        while more:
            rows, more = step.txn.snapshot_get_range(begin, end, limit=1000)
            if rows and first:
                access.require(directory, step.user, access.READ | access.WRITE | access.EXECUTE)
                first = False
            seen += len(rows)
            if seen > WALK_ENTRIES_MAX:
                raise TooManyLinks(f"a tree of more than {WALK_ENTRIES_MAX} entries: remove it in parts, or as root")
            for _, value in rows:
                entry = records.decode_entry(value)
                if entry.type == pb.DIRECTORY or directory.mode & access.STICKY:
                    child = step.inode(entry.inode)
                    access.require_unstuck(directory, child, step.user)
                    if entry.type == pb.DIRECTORY:
                        waiting.append(child)
            if rows:
                begin = rows[-1][0] + b"\0"
