"""Changing attributes: chmod, chown, utimens, truncate, layouts.

Rules are Linux's setattr_prepare, in its order: size, owner, group, mode, times. Invariant: the times a change sets are ctime always, mtime too when
the content changes. A shrinking truncate only notes here what the chains must cut; the service does it after the commit.
"""

from __future__ import annotations

from kvfs.common.errors import AccessDenied, FileTooBig, InvalidArgument, IsDirectory, NotPermitted
from kvfs.common.ids import CHUNK_BYTES_MAX, CHUNK_BYTES_MIN
from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.namespace import access, keys, records
from kvfs.meta.namespace.records import Cut
from kvfs.meta.namespace.step import LENGTH_MAX, Step

STRIPE_MAX = 256


def set_attr(step: Step, request: pb.SetAttrRequest) -> pb.InodeReply:
    inode = step.inode(request.inode)
    user = step.user
    has = request.HasField
    privileged = request.session != b"" and step.txn.get(keys.session(inode.inode, request.session)) is not None

    if has("length"):
        if inode.type == pb.DIRECTORY:
            raise IsDirectory("a directory has no length to set")
        if inode.type != pb.FILE:
            raise InvalidArgument("only a regular file has a length to set")
        if not privileged:
            access.require(inode, user, access.WRITE)
        if request.length > LENGTH_MAX:
            raise FileTooBig(f"a length of {request.length} bytes: the limit is {LENGTH_MAX}")

    changes_owner = has("uid") or has("gid")
    if has("uid") and user.uid != 0 and not (user.uid == inode.uid and request.uid == inode.uid):
        raise NotPermitted("only root may give a file away")
    if has("gid") and user.uid != 0 and not (user.uid == inode.uid and (request.gid == inode.gid or access.in_group(user, request.gid))):
        raise NotPermitted("only the owner may change the group, and only to one of his own")
    if has("mode") and not access.owns(inode, user) and not _only_drops_privileges(step, inode, request.mode, privileged):
        raise NotPermitted("only the owner or root may change the mode")
    _check_times(step, inode, request)

    if not (changes_owner or has("mode") or has("length") or has("ctime_ns") or _sets_times(request)):
        return pb.InodeReply(inode=step.full(inode))

    if has("length"):
        truncate(step, inode, request.length)
    if changes_owner:
        if inode.type != pb.DIRECTORY:
            inode.mode = access.without_privileges(inode)
        if has("uid"):
            inode.uid = request.uid
        if has("gid"):
            inode.gid = request.gid
    if has("mode"):
        mode = request.mode & access.PERMISSIONS
        if user.uid != 0 and mode & access.SET_GID and not access.in_group(user, inode.gid):
            mode &= ~access.SET_GID
        inode.mode = mode
    _apply_times(step, inode, request)
    inode.ctime_ns = request.ctime_ns if has("ctime_ns") and user.uid == 0 else step.now_ns
    step.put(inode)
    return pb.InodeReply(inode=step.full(inode))


def _only_drops_privileges(step: Step, inode: pb.Inode, mode: int, privileged: bool) -> bool:
    """The kernel in front of a mount drops set-uid and set-gid when someone other than the owner writes: that comes as a chmod by the writer."""
    mode &= access.PERMISSIONS
    dropped = inode.mode & ~mode
    writes = privileged or access.allows(inode, step.user, access.WRITE)
    return inode.type == pb.FILE and writes and mode & ~inode.mode == 0 and dropped != 0 and dropped & ~(access.SET_UID | access.SET_GID) == 0


def _sets_times(request: pb.SetAttrRequest) -> bool:
    return request.atime_now or request.mtime_now or request.HasField("atime_ns") or request.HasField("mtime_ns")


def _check_times(step: Step, inode: pb.Inode, request: pb.SetAttrRequest) -> None:
    if not _sets_times(request) or access.owns(inode, step.user):
        return
    if request.atime_now and request.mtime_now:  # "touch": who may write may
        if not access.allows(inode, step.user, access.WRITE):
            raise AccessDenied("setting both times to now needs write permission")
        return
    if request.HasField("length") and not (request.HasField("atime_ns") or request.HasField("mtime_ns")):
        return  # a truncate that carries mtime_now along: the right to write was checked
    raise NotPermitted("only the owner or root may set times")


def _apply_times(step: Step, inode: pb.Inode, request: pb.SetAttrRequest) -> None:
    if request.atime_now:
        inode.atime_ns = step.now_ns
    elif request.HasField("atime_ns"):
        inode.atime_ns = request.atime_ns
    mtime_ns: int | None = None
    if request.mtime_now:
        mtime_ns = step.now_ns
    elif request.HasField("mtime_ns"):
        mtime_ns = request.mtime_ns
    if mtime_ns is None:
        return
    inode.mtime_ns = mtime_ns
    inode.mtime_set_ns = step.now_ns
    if inode.type == pb.DIRECTORY:  # a directory's mtime lives where its entries' changes put it
        step.txn.set(keys.directory_times(inode.inode), records.encode_times(mtime_ns, step.now_ns))


def truncate(step: Step, inode: pb.Inode, length: int) -> None:
    """Set the length; what lies behind it is to be cut off the chains if anything can be there. The caller stores the inode."""
    number = inode.inode
    # What an open writer has not reported yet may lie anywhere, also behind the length that is known.
    if (inode.chunks_possible and (length < inode.length or inode.more_possible)) or step.has_sessions(number):
        pending = step.txn.get(keys.cut(number))
        cut_to = min(length, records.decode_cut(pending).length) if pending is not None else length
        inode.truncate_version += 1
        step.txn.set(keys.cut(number), records.encode_cut(Cut(cut_to, inode.truncate_version)))
        step.cuts.append(number)
        inode.more_possible = False
        inode.chunks_possible = True  # the cut leaves the boundary chunk with the new length, also where there was none
    elif length < inode.length:
        inode.truncate_version += 1
    if length != inode.length or step.cuts:
        inode.data_version += 1
    inode.length = length
    inode.mtime_ns = inode.ctime_ns = step.now_ns
    if step.user.uid != 0:
        inode.mode = access.without_privileges(inode)


def set_layout(step: Step, request: pb.SetLayoutRequest) -> pb.InodeReply:
    """What files made in this directory from now on get. A file's own layout is fixed at its creation."""
    inode = step.inode(request.inode)
    access.require_owner(inode, step.user)
    if inode.type != pb.DIRECTORY:
        raise InvalidArgument("only a directory takes a layout: a file keeps the one it was made with")
    access.require_room(inode)
    check_layout(request.layout)
    inode.layout.CopyFrom(request.layout)
    inode.layout.ClearField("chain_ids")
    inode.ctime_ns = step.now_ns
    step.put(inode)
    return pb.InodeReply(inode=step.full(inode))


def check_layout(layout: pb.Layout) -> None:
    """Fields of 0 mean the default."""
    size = layout.chunk_size
    if size and (size & (size - 1) or not CHUNK_BYTES_MIN <= size <= CHUNK_BYTES_MAX):
        raise InvalidArgument(f"a chunk size of {size} bytes: it must be a power of two from {CHUNK_BYTES_MIN} to {CHUNK_BYTES_MAX}")
    if layout.stripe > STRIPE_MAX:
        raise InvalidArgument(f"a stripe over {layout.stripe} chains: the limit is {STRIPE_MAX}")
