"""New entries: mkdir, mknod, symlink (one request, Make) and link.

Order of checks is Linux's: search the directory, EEXIST, write permission, then what the kind of file demands.
"""

from __future__ import annotations

from kvfs.common.errors import AlreadyExists, InvalidArgument, NameTooLong, NotFound, NotPermitted, TooManyLinks
from kvfs.common.ids import SPACE_BIT
from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.namespace import access, keys, records
from kvfs.meta.namespace.attributes import check_layout
from kvfs.meta.namespace.files import new_file, new_inode
from kvfs.meta.namespace.spaces import new_space
from kvfs.meta.namespace.step import Step, check_name

SYMLINK_BYTES_MAX = 4095


def make(step: Step, request: pb.MakeRequest) -> pb.InodeReply:
    kind = request.type
    if kind == pb.SYMLINK:  # the kernel looks at the target before it looks for the place
        if not request.symlink:
            raise NotFound("an empty symbolic link")
        if len(request.symlink) > SYMLINK_BYTES_MAX:
            raise NameTooLong(f"a symbolic link of {len(request.symlink)} bytes: the limit is {SYMLINK_BYTES_MAX}")
        if b"\0" in request.symlink:
            raise InvalidArgument("a symbolic link has no zero byte")
    parent = new_place(step, request.parent, request.name)
    if request.HasField("space") and kind != pb.DIRECTORY:
        raise InvalidArgument("a KV-cache space is a directory")
    if kind in (pb.CHAR_DEVICE, pb.BLOCK_DEVICE) and step.user.uid != 0:
        raise NotPermitted("only root may make device files")
    if kind == pb.FILE:
        inode = new_file(step, parent, request.mode, None)
    elif kind == pb.DIRECTORY:
        inode = _new_directory(step, parent, request)
    elif kind == pb.SYMLINK:
        inode = new_inode(step, parent, kind, 0o777)
        inode.symlink = request.symlink
        inode.length = len(request.symlink)
    elif kind in (pb.FIFO, pb.SOCKET, pb.CHAR_DEVICE, pb.BLOCK_DEVICE):
        inode = new_inode(step, parent, kind, request.mode & access.PERMISSIONS)
        if kind in (pb.CHAR_DEVICE, pb.BLOCK_DEVICE):
            inode.rdev = request.rdev
    else:
        raise InvalidArgument(f"no such type of file: {kind}")
    step.put(inode)
    step.put_entry(request.parent, request.name, inode)
    step.touch_directory(request.parent)
    step.files_made += 1
    return pb.InodeReply(inode=inode)


def new_place(step: Step, parent: int, name: bytes) -> pb.Inode:
    """The directory for a new entry whose name is free and which the user may change."""
    directory = step.directory(parent, access.EXECUTE)
    if name in (b".", b".."):
        raise AlreadyExists("the name is taken")
    check_name(name)
    if step.entry(parent, name) is not None:
        raise AlreadyExists("the name is taken")
    access.require(directory, step.user, access.WRITE | access.EXECUTE)
    access.require_room(directory)
    return directory


def _new_directory(step: Step, parent: pb.Inode, request: pb.MakeRequest) -> pb.Inode:
    inode = new_inode(step, parent, pb.DIRECTORY, request.mode & (0o777 | access.STICKY))
    if request.HasField("space"):
        inode.inode |= SPACE_BIT
        inode.space.CopyFrom(new_space(step, request.space))
    inode.nlink = 2
    inode.parent = parent.inode
    inode.layout.CopyFrom(parent.layout)
    if request.HasField("layout"):
        inode.layout.MergeFrom(request.layout)
        inode.layout.ClearField("chain_ids")
        check_layout(inode.layout)
    step.add_links(parent.inode, 1)
    step.txn.set(keys.directory_links(inode.inode), records.encode_links(2))
    return inode


def link(step: Step, request: pb.LinkRequest) -> pb.InodeReply:
    inode = step.peek(request.inode)
    if inode is None:
        raise NotFound(f"inode {request.inode} is gone")
    new_place(step, request.parent, request.name)
    if inode.type == pb.DIRECTORY:
        raise NotPermitted("a directory has one name only")
    if inode.nlink == 0:
        raise NotFound("the file was removed")
    if inode.nlink >= step.around.links_max:
        raise TooManyLinks(f"a file has {step.around.links_max} names at most")
    inode.nlink += 1
    inode.ctime_ns = step.now_ns
    step.put(inode)
    step.put_entry(request.parent, request.name, inode)
    step.touch_directory(request.parent)
    return pb.InodeReply(inode=inode)
