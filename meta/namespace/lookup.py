"""Reading the tree: walking paths, attributes, listing. One snapshot each, no writes.

Invariants: a walk follows at most 40 symbolic links; every directory on the way needs search permission; "." and ".." are understood, ".." of the
root is the root. A listing page costs one range read and one read for each entry whose attributes are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvfs.common.errors import NotDirectory, NotFound, SymlinkLoop
from kvfs.common.ids import ROOT_INODE
from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.namespace import access, keys, records
from kvfs.meta.namespace.step import Step, check_name

SYMLINKS_MAX = 40
PATH_COMPONENTS_MAX = 4096
PAGE_ENTRIES = 1024
PAGE_ENTRIES_MAX = 4096
GET_ATTR_MAX = 4096


@dataclass(slots=True)
class Walk:
    """Where a walk of path components ended."""

    found: list[pb.Inode]
    """The inode of each component that is there, after following, as it is stored. Fewer than components: the next one is missing."""
    parent: int
    """The directory that holds, or would hold, the last component; 0 when an earlier one is missing."""
    name: bytes
    """The last component's name there."""


def lookup(step: Step, request: pb.LookupRequest) -> pb.LookupReply:
    ended = walk(step, request.parent, request.names, follow=request.follow, follow_last=request.follow_last)
    reply = pb.LookupReply(final_parent=ended.parent, final_name=ended.name)
    for found in ended.found:
        reply.inodes.append(step.full(found))
    return reply


def walk(step: Step, parent: int, names: Sequence[bytes], *, follow: bool, follow_last: bool) -> Walk:
    directory = step.peek(parent)
    if directory is None:
        raise NotFound(f"directory {parent} is gone")
    left = SYMLINKS_MAX
    last = len(names) - 1
    if last >= PATH_COMPONENTS_MAX:
        raise SymlinkLoop(f"a path of {last + 1} components: the limit is {PATH_COMPONENTS_MAX}")
    ended = Walk([], parent, b"")
    for index, component in enumerate(names):
        follows = follow and (index < last or follow_last)
        # A symbolic link puts the components of its target in place of itself.
        waiting = [component]
        found: pb.Inode | None = None
        while waiting:
            name = waiting.pop()
            if directory is None or directory.type != pb.DIRECTORY:
                raise NotDirectory("a component of the path is not a directory")
            access.require(directory, step.user, access.EXECUTE)
            ended.parent = directory.inode
            ended.name = name
            found = _child(step, directory, name)
            if found is None:
                if waiting:
                    raise NotFound("a symbolic link on the path leads nowhere")
                break
            if found.type == pb.SYMLINK and (follows or waiting):
                left -= 1
                if left < 0:
                    raise SymlinkLoop(f"more than {SYMLINKS_MAX} symbolic links on the path")
                target = found.symlink
                if target.startswith(b"/"):
                    directory = step.inode(ROOT_INODE)
                parts = [part for part in target.split(b"/") if part]
                if target.endswith(b"/"):
                    parts.append(b".")
                if not parts:
                    found = directory
                    ended.parent, ended.name = directory.inode, b"."
                    if not waiting:
                        break
                    continue
                if len(parts) + len(waiting) > PATH_COMPONENTS_MAX:
                    raise SymlinkLoop("symbolic links make the path too long")
                waiting.extend(reversed(parts))
                continue
            directory = found
        if found is None:
            if index < last:
                ended.parent, ended.name = 0, b""
            break
        directory = found
        ended.found.append(found)
    return ended


def walk_to_place(step: Step, parent: int, path: Sequence[bytes], *, follow_last: bool) -> tuple[int, bytes]:
    """The directory that holds, or would hold, the last component of a path, and the name there. What the walk read is read by the operation."""
    ended = walk(step, parent, path, follow=True, follow_last=follow_last)
    if not ended.parent:
        raise NotFound("a directory on the path is not there")
    return ended.parent, ended.name


def walk_to_inode(step: Step, start: int, path: Sequence[bytes], *, follow_last: bool) -> pb.Inode:
    """The inode that a path leads to, as it is stored."""
    ended = walk(step, start, path, follow=True, follow_last=follow_last)
    if len(ended.found) < len(path):
        raise NotFound("no such file or directory")
    return ended.found[-1]


def _child(step: Step, directory: pb.Inode, name: bytes) -> pb.Inode | None:
    if name == b".":
        return directory
    if name == b"..":
        return directory if directory.inode == ROOT_INODE else step.peek(directory.parent)
    check_name(name)
    entry = step.entry(directory.inode, name)
    return None if entry is None else step.peek(entry.inode)


def get_attr(step: Step, request: pb.GetAttrRequest) -> pb.GetAttrReply:
    reply = pb.GetAttrReply()
    for number in request.inodes[:GET_ATTR_MAX]:
        reply.inodes.append(_attributes(step, number))
    return reply


def get_one(step: Step, request: pb.CloseRequest) -> pb.InodeReply:
    """What the close of a file with nothing to report answers."""
    return pb.InodeReply(inode=_attributes(step, request.inode))


def _attributes(step: Step, number: int) -> pb.Inode:
    """An inode that is gone has no type."""
    found = step.peek(number)
    return pb.Inode(inode=number) if found is None else with_writers(step, step.full(found))


def with_writers(step: Step, inode: pb.Inode) -> pb.Inode:
    """Adds how many write sessions are open."""
    if inode.type == pb.FILE:
        rows, _ = step.txn.snapshot_get_range(*keys.sessions(inode.inode))
        if rows:
            closing = step.around.closing(inode.inode)
            inode.writers = sum(1 for key, value in rows if keys.tail(key) not in closing and records.decode_session(value).write)
    return inode


def read_dir(step: Step, request: pb.ReadDirRequest) -> pb.ReadDirReply:
    directory = step.inode(request.inode)
    if directory.type != pb.DIRECTORY:
        raise NotDirectory(f"inode {request.inode} is not a directory")
    access.require(directory, step.user, access.READ)
    limit = min(request.limit or PAGE_ENTRIES, PAGE_ENTRIES_MAX)
    begin, end = keys.entries(request.inode)
    if request.after:
        begin = keys.entry(request.inode, request.after) + b"\0"
    rows, more = step.txn.snapshot_get_range(begin, end, limit=limit)
    reply = pb.ReadDirReply(more=more)
    add = reply.entries.add
    get = step.txn.snapshot_get
    for key, value in rows:
        entry = records.decode_entry(value)
        item = add(name=keys.tail(key), inode=entry.inode, type=entry.type)
        if request.attributes:
            data = get(keys.inode(entry.inode))
            if data is not None:
                records.decode_inode_into(item.attributes, data)
                if entry.type == pb.DIRECTORY:
                    step.full(item.attributes)
    return reply
