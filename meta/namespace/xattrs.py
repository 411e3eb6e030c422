"""Extended attributes of the user.* kind, on files and directories.

Rules are Linux's for user.*: reading needs read permission, changing needs write permission; a sticky directory takes changes from its owner only;
other kinds of inodes have none. "user.kvfs.*" is what the mount shows of the layout: it cannot be set.
"""

from __future__ import annotations

from kvfs.common.errors import AlreadyExists, ArgumentTooBig, InvalidArgument, NoAttribute, NotPermitted, NotSupported, OutOfRange
from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.namespace import access, keys
from kvfs.meta.namespace.step import Step

PREFIX = b"user."
RESERVED = b"user.kvfs."
NAME_BYTES_MAX = 255
VALUE_BYTES_MAX = 64 << 10
LIST_NAMES_MAX = 4096


def _prepare(step: Step, request: pb.XattrRequest, mask: int) -> pb.Inode:
    name = request.name
    if not name or len(name) > NAME_BYTES_MAX:
        raise OutOfRange(f"an attribute name of {len(name)} bytes: 1 to {NAME_BYTES_MAX}")
    inode = step.inode(request.inode)
    if not name.startswith(PREFIX):
        raise NotSupported("only attributes whose names begin with 'user.' are kept")
    if name == PREFIX or b"\0" in name:
        raise InvalidArgument("an attribute needs a name behind 'user.'")
    if inode.type not in (pb.FILE, pb.DIRECTORY):
        raise NotPermitted("only files and directories have user attributes") if mask == access.WRITE else NoAttribute("no such attribute")
    if mask == access.WRITE and inode.type == pb.DIRECTORY and inode.mode & access.STICKY:
        access.require_owner(inode, step.user)
    access.require(inode, step.user, mask)
    return inode


def set_xattr(step: Step, request: pb.XattrRequest) -> pb.InodeReply:
    if len(request.value) > VALUE_BYTES_MAX:
        raise ArgumentTooBig(f"an attribute value of {len(request.value)} bytes: the limit is {VALUE_BYTES_MAX}")
    inode = _prepare(step, request, access.WRITE)
    if request.name.startswith(RESERVED):
        raise NotPermitted("'user.kvfs.*' attributes are read-only")
    if request.create and request.replace:
        raise InvalidArgument("XATTR_CREATE and XATTR_REPLACE exclude each other")
    key = keys.xattr(inode.inode, request.name)
    there = step.txn.get(key) is not None
    if request.create and there:
        raise AlreadyExists("the attribute is there")
    if request.replace and not there:
        raise NoAttribute("no such attribute")
    step.txn.set(key, request.value)
    return _changed(step, inode)


def get_xattr(step: Step, request: pb.XattrRequest) -> pb.XattrReply:
    inode = _prepare(step, request, access.READ)
    value = step.txn.get(keys.xattr(inode.inode, request.name))
    if value is None:
        raise NoAttribute("no such attribute")
    return pb.XattrReply(value=value)


def list_xattr(step: Step, request: pb.XattrRequest) -> pb.XattrReply:
    inode = step.inode(request.inode)
    rows, _ = step.txn.get_range(*keys.xattrs(inode.inode), limit=LIST_NAMES_MAX)
    return pb.XattrReply(names=[keys.tail(key) for key, _ in rows])


def remove_xattr(step: Step, request: pb.XattrRequest) -> pb.InodeReply:
    inode = _prepare(step, request, access.WRITE)
    if request.name.startswith(RESERVED):
        raise NotPermitted("'user.kvfs.*' attributes are read-only")
    key = keys.xattr(inode.inode, request.name)
    if step.txn.get(key) is None:
        raise NoAttribute("no such attribute")
    step.txn.clear(key)
    return _changed(step, inode)


def _changed(step: Step, inode: pb.Inode) -> pb.InodeReply:
    inode.ctime_ns = step.now_ns
    step.put(inode)
    return pb.InodeReply(inode=step.full(inode))
