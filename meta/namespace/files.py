"""Files: create, open, close and fsync, append.

Invariants: a file open for writing has a stored session before anyone may write through it; after a close or fsync that reports what was written,
the length is exact; a report made under an older truncate_version never grows the file by itself (the chains are asked instead).
"""

from __future__ import annotations

from kvfs.common.errors import AlreadyExists, BadHandle, FileTooBig, InvalidArgument, IsDirectory, StaleHandle, SymlinkLoop
from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.namespace import access, keys, records
from kvfs.meta.namespace.attributes import check_layout, truncate
from kvfs.meta.namespace.lookup import walk_to_inode, walk_to_place, with_writers
from kvfs.meta.namespace.open_files import check_session
from kvfs.meta.namespace.step import LENGTH_MAX, Step, check_name

APPEND_BYTES_MAX = 1 << 40


def create(step: Step, request: pb.CreateRequest) -> pb.CreateReply:
    number, name = request.parent, request.name
    if request.path:
        number, name = walk_to_place(step, number, request.path, follow_last=request.follow_last)
    parent = step.directory(number, access.EXECUTE)
    if name in (b".", b".."):
        raise AlreadyExists("the name is taken") if request.exclusive else IsDirectory("the name is a directory's")
    check_name(name)
    existing = step.entry(number, name)
    if existing is not None:
        if request.exclusive:
            raise AlreadyExists("the name is taken")
        inode = step.inode(existing.inode)
        if inode.type == pb.DIRECTORY:
            raise IsDirectory("the name is a directory's")
        _open(step, inode, read=request.read, write=request.write, cut=request.truncate, session=request.session)
        return pb.CreateReply(inode=with_writers(step, inode), created=False)
    access.require(parent, step.user, access.WRITE | access.EXECUTE)
    access.require_room(parent)
    if request.write or request.session:
        check_session(request.session)
    inode = new_file(step, parent, request.mode, request.layout if request.HasField("layout") else None)
    step.put(inode)
    step.put_entry(number, name, inode)
    step.touch_directory(number)
    if request.write:
        step.put_session(inode.inode, request.session, write=True)
        inode.writers = 1
    step.files_made += 1
    return pb.CreateReply(inode=inode, created=True)


def new_inode(step: Step, parent: pb.Inode, kind: pb.InodeType, mode: int) -> pb.Inode:
    """A new inode of the user's; a set-gid directory hands on its group."""
    user = step.user
    inode = pb.Inode(inode=step.around.new_inode(), type=kind, uid=user.uid, gid=user.gid, nlink=1)
    if parent.mode & access.SET_GID:
        inode.gid = parent.gid
        if kind == pb.DIRECTORY:
            mode |= access.SET_GID
        elif mode & access.SET_GID and mode & access.GROUP_EXECUTE and user.uid != 0 and not access.in_group(user, parent.gid):
            mode &= ~access.SET_GID
    inode.mode = mode
    inode.atime_ns = inode.mtime_ns = inode.ctime_ns = inode.birth_ns = step.now_ns
    return inode


def new_file(step: Step, parent: pb.Inode, mode: int, layout: pb.Layout | None) -> pb.Inode:
    inode = new_inode(step, parent, pb.FILE, mode & access.PERMISSIONS)
    wanted = pb.Layout()
    wanted.CopyFrom(parent.layout)
    if layout is not None:
        wanted.MergeFrom(layout)
        check_layout(wanted)
    inode.layout.CopyFrom(step.around.place(wanted))
    return inode


def open_file(step: Step, request: pb.OpenRequest) -> pb.InodeReply:
    if request.path:
        inode = walk_to_inode(step, request.inode, request.path, follow_last=request.follow_last)
    else:
        inode = step.inode(request.inode)
    _open(step, inode, read=request.read, write=request.write, cut=request.truncate, session=request.session)
    return pb.InodeReply(inode=with_writers(step, inode))


def _open(step: Step, inode: pb.Inode, *, read: bool, write: bool, cut: bool, session: bytes) -> None:
    """Linux's may_open: what it is, then the mode bits, then the effects."""
    if inode.type == pb.SYMLINK:
        raise SymlinkLoop("a symbolic link cannot be opened")
    if inode.type == pb.DIRECTORY and (write or cut):
        raise IsDirectory("a directory cannot be opened for writing")
    mask = (access.READ if read else 0) | (access.WRITE if write or cut else 0)
    access.require(inode, step.user, mask)
    if write or session:
        check_session(session)
    if inode.type != pb.FILE:
        step.full(inode)
        return
    if cut:
        if step.cutting != inode.inode:
            step.wants_cut = inode.inode
            return
        truncate(step, inode, 0)
        step.put(inode)
    elif write and step.must_settle(inode.inode):
        return
    if write:
        step.put_session(inode.inode, session, write=True)
        step.changed.add(inode.inode)


def close(step: Step, request: pb.CloseRequest, *, measured: int | None = None) -> pb.InodeReply:
    """Close, or fsync (still_open): take in what was written, then let go of the session. `measured`: the length as the chains have it."""
    if request.session:
        check_session(request.session)
    inode = step.peek(request.inode)
    if inode is None:  # removed, and freed after its sessions were pruned: nothing is left to tell
        if request.session:
            step.txn.clear(keys.session(request.inode, request.session))
        return pb.InodeReply(inode=pb.Inode(inode=request.inode))
    changed = False
    if (request.wrote or request.uncertain) and inode.type == pb.FILE:
        if request.length > LENGTH_MAX:
            raise FileTooBig(f"a length of {request.length} bytes: the limit is {LENGTH_MAX}")
        held = request.session and step.txn.get(keys.session(inode.inode, request.session)) is not None
        if not held:
            if request.still_open and not inode.nlink and not step.has_sessions(inode.inode):
                raise StaleHandle(f"inode {inode.inode} has no name any more, and its writer was thought dead: it is not kept")
            access.require(inode, step.user, access.WRITE)
        if measured is None and (request.uncertain or request.truncate_version != inode.truncate_version):
            step.measure = inode.inode
            return pb.InodeReply()
        end = request.length if request.truncate_version == inode.truncate_version else 0
        inode.length = max(inode.length, end, measured or 0)
        if not request.mtime_ns:
            inode.mtime_ns = step.now_ns
        elif request.mtime_ns > inode.mtime_set_ns:  # `cp -p` sets the time between its last write and the close
            inode.mtime_ns = request.mtime_ns
        inode.ctime_ns = step.now_ns
        inode.data_version += 1
        inode.chunks_possible = True
        if request.uncertain:
            inode.more_possible = True  # a replica that comes back later may carry out what failed: it was not measured
        if step.user.uid != 0:
            inode.mode = access.without_privileges(inode)
        changed = True
    gone = bool(request.session) and not request.still_open and _end(step, inode, request.session)
    if changed and not gone:
        step.put(inode)
    return pb.InodeReply(inode=with_writers(step, step.full(inode)))


def end_session(step: Step, number: int, session: bytes) -> None:
    """A file was closed with nothing to report, or its reader is gone."""
    inode = step.peek(number)
    if inode is None:  # removed, and freed after its sessions were pruned
        step.txn.clear(keys.session(number, session))
    else:
        _end(step, inode, session)


def _end(step: Step, inode: pb.Inode, session: bytes) -> bool:
    """Clear the session. True: it was the last of a removed file, which goes."""
    step.txn.clear(keys.session(inode.inode, session))
    if inode.nlink or inode.type != pb.FILE or step.has_sessions(inode.inode) or step.around.readers(inode.inode):
        return False
    step.release(inode)
    return True


def append(step: Step, request: pb.AppendRequest) -> pb.AppendReply:
    """Reserve the next bytes of the file for the caller: appends of many clients never overlap. None are asked for by who must only know that no
    truncation is still under way."""
    inode = step.inode(request.inode)
    if inode.type != pb.FILE:
        raise InvalidArgument("only a regular file can be appended to")
    if request.session:
        check_session(request.session)
        data = step.txn.get(keys.session(inode.inode, request.session))
        if data is None or not records.decode_session(data).write:
            raise BadHandle("no such write session: the file was closed, or the client was thought dead")
    else:
        access.require(inode, step.user, access.WRITE)
    if request.length > APPEND_BYTES_MAX or inode.length + request.length > LENGTH_MAX:
        raise FileTooBig(f"an append of {request.length} bytes at {inode.length}")
    if step.must_settle(inode.inode):
        return pb.AppendReply()
    offset = inode.length
    if request.length:
        inode.length += request.length
        inode.mtime_ns = inode.ctime_ns = step.now_ns
        inode.data_version += 1
        inode.chunks_possible = True
        if step.user.uid != 0:
            inode.mode = access.without_privileges(inode)
        step.put(inode)
    return pb.AppendReply(offset=offset, inode=inode)
