"""A namespace on the memory engine, driven like a file system: paths in, errnos out. No network, no clock but its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import trio

from kvfs.common.errors import KvfsError, NotDirectory, NotFound
from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.kv import Engine, Transaction
from kvfs.meta.kv.memory import MemoryEngine
from kvfs.meta.namespace import access, attributes, entries, files, fsck, lookup, remove, rename, store, xattrs
from kvfs.meta.namespace.step import Step, Surroundings

T = TypeVar("T")
SECOND = 10**9
ROOT = pb.User()


def user(uid: int, gid: int | None = None, *groups: int) -> pb.User:
    return pb.User(uid=uid, gid=uid if gid is None else gid, groups=groups)


OWNER, OTHER, STRANGER = user(1001), user(1002), user(1003)


class Tree:
    def __init__(self, engine: Engine | None = None, *, first_inode: int = 11, **around: Any) -> None:
        self.engine = engine or MemoryEngine(now=time.monotonic)
        self.now_ns = 1_000 * SECOND
        self._numbers = first_inode - 1
        self.around = Surroundings(
            new_inode=self._number, place=self._place, table=lambda number, replicas: (number or 1, replicas or 2, [1, 2, 3, 4]), **around
        )
        self.last: Step | None = None
        trio.run(self.engine.transact, lambda txn: store.prepare(txn, self.now_ns))
        # Everyone may make things at the top, as in the directory that a conformance suite is run in.
        self.chmod("/", 0o777)

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _place(self, wanted: pb.Layout) -> pb.Layout:
        return pb.Layout(table_id=1, chunk_size=wanted.chunk_size or 1 << 20, stripe=wanted.stripe or 4, chain_ids=[1, 2, 3, 4][: wanted.stripe or 4])

    def run(self, operation: Callable[[Step, Any], T], request: Any, who: pb.User = ROOT, *, client: bytes = b"c" * 16) -> T:
        """One operation as its own transaction, a second later than the one before."""
        self.now_ns += SECOND
        request.context.user.CopyFrom(who)

        cutting = 0

        def attempt(txn: Transaction) -> tuple[T, Step]:
            step = Step(txn, who, client, self.now_ns, self.around, cutting=cutting)
            return operation(step, request), step

        while True:
            reply, self.last = trio.run(self.engine.transact, attempt)
            if not self.last.wants_cut:
                return reply
            cutting = self.last.wants_cut

    def put(self, change: Callable[[Transaction], T]) -> T:
        """Change the store behind the namespace's back."""
        return trio.run(self.engine.transact, change)

    # --- paths

    def lookup(self, path: str, who: pb.User = ROOT, *, follow: bool = True) -> pb.LookupReply:
        names = [part.encode() for part in path.split("/") if part]
        return self.run(lookup.lookup, pb.LookupRequest(parent=1, names=names, follow=True, follow_last=follow), who)

    def find(self, path: str, who: pb.User = ROOT, *, follow: bool = True) -> pb.Inode:
        names = [part for part in path.split("/") if part]
        if not names:
            return self.run(lookup.get_attr, pb.GetAttrRequest(inodes=[1]), who).inodes[0]
        reply = self.lookup(path, who, follow=follow)
        if len(reply.inodes) < len(names):
            raise NotFound(path)
        return reply.inodes[-1]

    def place(self, path: str, who: pb.User = ROOT) -> tuple[int, bytes]:
        above, _, name = path.rpartition("/")
        parent = self.find(above, who)
        if parent.type != pb.DIRECTORY:
            raise NotDirectory(above)
        access.require(parent, who, access.EXECUTE)  # a walk looks at both paths of a call before the call looks at either
        return parent.inode, name.encode()

    def stat(self, path: str) -> pb.Inode:
        return self.find(path, follow=False)

    def exists(self, path: str) -> bool:
        try:
            self.stat(path)
        except KvfsError:
            return False
        return True

    def getattr(self, number: int) -> pb.Inode:
        return self.run(lookup.get_attr, pb.GetAttrRequest(inodes=[number])).inodes[0]

    # --- operations by path

    def create(self, path: str, mode: int = 0o644, who: pb.User = ROOT, **fields: Any) -> pb.Inode:
        parent, name = self.place(path, who)
        fields.setdefault("exclusive", True)
        return self.run(files.create, pb.CreateRequest(parent=parent, name=name, mode=mode, **fields), who).inode

    def open(self, path: str, who: pb.User = ROOT, **fields: Any) -> pb.Inode:
        return self.run(files.open_file, pb.OpenRequest(inode=self.find(path, who).inode, **fields), who).inode

    def close(self, number: int, session: bytes = b"", who: pb.User = ROOT, **fields: Any) -> pb.Inode:
        return self.run(files.close, pb.CloseRequest(inode=number, session=session, **fields), who).inode

    def write(self, path: str, length: int, who: pb.User = ROOT) -> pb.Inode:
        """As if `length` bytes had been written and reported."""
        session = b"w" * 16
        inode = self.open(path, who, write=True, session=session)
        return self.close(inode.inode, session, who, wrote=True, length=length, truncate_version=inode.truncate_version)

    def make(self, path: str, kind: Any, mode: int = 0o644, who: pb.User = ROOT, **fields: Any) -> pb.Inode:
        parent, name = self.place(path, who)
        return self.run(entries.make, pb.MakeRequest(parent=parent, name=name, type=kind, mode=mode, **fields), who).inode

    def mkdir(self, path: str, mode: int = 0o755, who: pb.User = ROOT) -> pb.Inode:
        return self.make(path, pb.DIRECTORY, mode, who)

    def symlink(self, target: str, path: str, who: pb.User = ROOT) -> pb.Inode:
        return self.make(path, pb.SYMLINK, 0o777, who, symlink=target.encode())

    def link(self, old: str, new: str, who: pb.User = ROOT) -> pb.Inode:
        number = self.find(old, who, follow=False).inode
        parent, name = self.place(new, who)
        return self.run(entries.link, pb.LinkRequest(inode=number, parent=parent, name=name), who).inode

    def unlink(self, path: str, who: pb.User = ROOT, **fields: Any) -> pb.Inode:
        parent, name = self.place(path, who)
        return self.run(remove.remove, pb.RemoveRequest(parent=parent, name=name, **fields), who).inode

    def rmdir(self, path: str, who: pb.User = ROOT) -> pb.Inode:
        return self.unlink(path, who, directory=True)

    def rename(self, old: str, new: str, who: pb.User = ROOT, **fields: Any) -> pb.RenameReply:
        parent, name = self.place(old, who)
        new_parent, new_name = self.place(new, who)
        return self.run(rename.rename, pb.RenameRequest(parent=parent, name=name, new_parent=new_parent, new_name=new_name, **fields), who)

    def setattr(self, path: str, who: pb.User = ROOT, **fields: Any) -> pb.Inode:
        number = self.find(path, who).inode
        return self.run(attributes.set_attr, pb.SetAttrRequest(inode=number, **fields), who).inode

    def chmod(self, path: str, mode: int, who: pb.User = ROOT) -> pb.Inode:
        return self.setattr(path, who, mode=mode)

    def chown(self, path: str, uid: int | None, gid: int | None, who: pb.User = ROOT) -> pb.Inode:
        return self.setattr(path, who, uid=uid, gid=gid)

    def truncate(self, path: str, length: int, who: pb.User = ROOT) -> pb.Inode:
        return self.setattr(path, who, length=length)

    def readdir(self, path: str, who: pb.User = ROOT, **fields: Any) -> pb.ReadDirReply:
        return self.run(lookup.read_dir, pb.ReadDirRequest(inode=self.find(path, who).inode, **fields), who)

    def names(self, path: str) -> list[str]:
        return [entry.name.decode() for entry in self.readdir(path).entries]

    def xattr(self, operation: Any, path: str, name: str = "", who: pb.User = ROOT, **fields: Any) -> Any:
        return self.run(operation, pb.XattrRequest(inode=self.find(path, who, follow=False).inode, name=name.encode(), **fields), who)

    def setxattr(self, path: str, name: str, value: bytes, who: pb.User = ROOT, **fields: Any) -> pb.Inode:
        reply: pb.InodeReply = self.xattr(xattrs.set_xattr, path, name, who, value=value, **fields)
        return reply.inode

    # --- the rest

    def problems(self) -> list[str]:
        return trio.run(fsck.check_all, self.engine)


@contextmanager
def fails(errno: int) -> Iterator[None]:
    """The block must end with an error of this errno."""
    with pytest.raises(KvfsError) as caught:
        yield
    assert caught.value.errno == errno, f"{caught.value!r} has errno {caught.value.errno}, expected {errno}"


@contextmanager
def updates(tree: Tree, path: str, *, ctime: bool = False, mtime: bool = False, atime: bool = False) -> Iterator[None]:
    """The block must change exactly these times of the inode (which may have another name or none afterwards)."""
    before = tree.stat(path)
    yield
    after = tree.getattr(before.inode)
    changed = {
        "ctime": after.ctime_ns > before.ctime_ns,
        "mtime": after.mtime_ns > before.mtime_ns,
        "atime": after.atime_ns != before.atime_ns,
    }
    assert changed == {"ctime": ctime, "mtime": mtime, "atime": atime}, f"{path}: {changed}"
