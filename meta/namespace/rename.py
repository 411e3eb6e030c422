"""Rename: replace, NOREPLACE, EXCHANGE, of files and directories.

Order of checks is Linux's renameat2. Invariants: a directory never becomes its own descendant (every ancestor of the destination is read with
conflicts, so two renames that would together make a loop cannot both commit); two names of one inode stay as they are.
"""

from __future__ import annotations

from kvfs.common.errors import AlreadyExists, Busy, InvalidArgument, IsDirectory, NotDirectory, NotEmpty, NotFound
from kvfs.common.ids import ROOT_INODE
from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.namespace import access, keys
from kvfs.meta.namespace.remove import may_take_away, remove_empty
from kvfs.meta.namespace.step import Step, check_name

DEPTH_MAX = 100_000


def rename(step: Step, request: pb.RenameRequest) -> pb.RenameReply:
    if request.no_replace and request.exchange:
        raise InvalidArgument("NOREPLACE and EXCHANGE exclude each other")
    same_parent = request.parent == request.new_parent
    old_parent = step.directory(request.parent, access.EXECUTE)
    new_parent = old_parent if same_parent else step.directory(request.new_parent, access.EXECUTE)
    for name in (request.name, request.new_name):
        if name in (b".", b".."):
            raise Busy("'.' and '..' cannot be renamed")
    check_name(request.name)
    _, moved = step.linked(request.parent, request.name)
    check_name(request.new_name)
    entry = step.entry(request.new_parent, request.new_name)
    target = step.peek(entry.inode) if entry is not None else None
    if request.no_replace and entry is not None:
        raise AlreadyExists("the new name is taken")
    if request.exchange and target is None:
        raise NotFound("nothing to exchange with")
    if not same_parent:
        _check_loops(step, request, moved, target)
    if target is not None and target.inode == moved.inode:
        return pb.RenameReply(moved=step.full(moved))

    moved_is_directory = moved.type == pb.DIRECTORY
    may_take_away(step, old_parent, moved)
    access.require_room(new_parent)
    if target is None:
        access.require(new_parent, step.user, access.WRITE | access.EXECUTE)
    else:
        may_take_away(step, new_parent, target)
        if not request.exchange:
            if moved_is_directory and target.type != pb.DIRECTORY:
                raise NotDirectory("a directory only replaces a directory")
            if not moved_is_directory and target.type == pb.DIRECTORY:
                raise IsDirectory("only a directory replaces a directory")
            if target.HasField("space"):
                raise NotEmpty("a KV-cache space is not replaced: drop it first, or exchange the two")
    if not same_parent:  # a directory that moves has its ".." changed: that is a write to it
        if moved_is_directory:
            access.require(moved, step.user, access.WRITE)
        if request.exchange and target is not None and target.type == pb.DIRECTORY:
            access.require(target, step.user, access.WRITE)

    reply = pb.RenameReply()
    old_links, new_links = 0, 0
    if moved_is_directory:
        old_links, new_links = -1, 1
    if target is not None and request.exchange:
        if target.type == pb.DIRECTORY:
            old_links, new_links = old_links + 1, new_links - 1
        target.ctime_ns = step.now_ns
        if target.type == pb.DIRECTORY:
            target.parent = request.parent
        step.put(target)
        step.put_entry(request.parent, request.name, target)
    else:
        if target is not None:
            if target.type == pb.DIRECTORY:
                remove_empty(step, target)
                new_links -= 1
                target.nlink = 0
            else:
                step.drop_link(target)
        step.txn.clear(keys.entry(request.parent, request.name))
    if moved_is_directory:
        moved.parent = request.new_parent
    moved.ctime_ns = step.now_ns
    step.put(moved)
    step.put_entry(request.new_parent, request.new_name, moved)
    step.touch_directory(request.parent)
    if same_parent:
        old_links += new_links
    else:
        step.touch_directory(request.new_parent)
        if new_links:
            step.add_links(request.new_parent, new_links)
    if old_links:
        step.add_links(request.parent, old_links)
    reply.moved.CopyFrom(step.full(moved))
    if target is not None:
        reply.replaced.CopyFrom(step.full(target))
    return reply


def _check_loops(step: Step, request: pb.RenameRequest, moved: pb.Inode, target: pb.Inode | None) -> None:
    """The source must not be an ancestor of the destination, nor the destination one of the source."""
    if moved.type == pb.DIRECTORY and _is_ancestor(step, moved.inode, request.new_parent):
        raise InvalidArgument("a directory cannot move below itself")
    if target is not None and target.type == pb.DIRECTORY and _is_ancestor(step, target.inode, request.parent):
        if request.exchange:
            raise InvalidArgument("a directory cannot be exchanged with what is below it")
        raise NotEmpty("the directory to replace holds the one that moves")


def _is_ancestor(step: Step, ancestor: int, directory: int) -> bool:
    for _ in range(DEPTH_MAX):
        if directory == ancestor:
            return True
        if directory == ROOT_INODE:
            return False
        inode = step.peek(directory)
        if inode is None or inode.nlink == 0:
            raise NotFound("a directory on the path was removed")
        directory = inode.parent
    raise InvalidArgument(f"directories nested deeper than {DEPTH_MAX}")
