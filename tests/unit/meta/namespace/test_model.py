"""Random operations by several users, on the namespace and on a real directory here: the same errno, the same tree, the same times touched.

As root every user's calls are made under that user's ids; otherwise all calls are made by the one user who runs the test. Ends with a check of
the metadata. The kernel's file systems stamp a time anew for each change that follows a stat, which is what makes `touched` comparable; where a
kernel is too old for that, times are not compared.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, assume, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tests.unit.meta.namespace.tree import Tree

from kvfs.common.errors import KvfsError
from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.gc.collector import _erase_removed
from kvfs.meta.kv import Transaction
from kvfs.meta.namespace import files, keys, lookup
from kvfs.meta.namespace.step import Step

ROOT_USER = os.geteuid() == 0
USERS = (
    [pb.User(), pb.User(uid=1001, gid=1001), pb.User(uid=1002, gid=1002, groups=[1001]), pb.User(uid=1003, gid=1003)]
    if ROOT_USER
    else [pb.User(uid=os.geteuid(), gid=os.getegid(), groups=os.getgroups())]
)
IDS = [0, 1001, 1002, 1003]
KINDS = {stat.S_IFREG: pb.FILE, stat.S_IFDIR: pb.DIRECTORY, stat.S_IFLNK: pb.SYMLINK, stat.S_IFIFO: pb.FIFO}
MODES = [0o777, 0o755, 0o700, 0o644, 0o666, 0o600, 0o000, 0o111, 0o444, 0o555, 0o222, 0o333, 0o070, 0o007, 0o1777, 0o2775, 0o2755, 0o4755, 0o6777]

users = st.sampled_from(USERS)
modes = st.sampled_from(MODES)
names = st.sampled_from(["a", "b", "c"])
paths = st.lists(names, min_size=1, max_size=3).map("/".join)
# No "..": the real directory has something above it. No "a/": open(O_CREAT) through it is EISDIR by a rule of paths alone.
targets = st.one_of(paths, st.sampled_from([".", "./b"]))
lengths = st.sampled_from([0, 1, 4096, 100_000])
times = st.sampled_from([0, 1_000_000_001, 2_000_000_000_000_000_003])


@contextlib.contextmanager
def acting_as(who: pb.User) -> Iterator[None]:
    """The calling process with the user's ids; its own come back at the end."""
    if not ROOT_USER or who.uid == 0:
        yield
        return
    os.setgroups(list(who.groups))
    os.setegid(who.gid)
    os.seteuid(who.uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups([])


Seen = dict[str, tuple[Any, ...]]


class Namespace(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.top = tempfile.mkdtemp(prefix="kvfs-model-")
        os.chmod(self.top, 0o777)
        self.tree = Tree()
        if not ROOT_USER:
            self.tree.chown("/", os.geteuid(), os.getegid())
        self.umask = os.umask(0)
        self.real_seen = self.walk_real()
        self.our_seen = self.walk_ours()

    def teardown(self) -> None:
        os.umask(self.umask)
        if not ROOT_USER:
            for folder, _, _ in os.walk(self.top):
                os.chmod(folder, 0o700)
        shutil.rmtree(self.top)
        assert self.tree.problems() == []

    # --- both sides

    def both(self, who: pb.User, real: Callable[[], Any], ours: Callable[[], Any]) -> None:
        expected = got = 0
        with acting_as(who):
            try:
                real()
            except OSError as error:
                expected = error.errno or 0
        try:
            ours()
        except KvfsError as error:
            got = error.errno
        assert got == expected, f"the kernel says {errno.errorcode.get(expected, 'success')}, we say {errno.errorcode.get(got, 'success')}"

    def path(self, path: str) -> str:
        return f"{self.top}/{path}"

    def walk_real(self) -> Seen:
        seen: Seen = {}

        def visit(path: str) -> None:
            info = os.lstat(self.path(path) if path else self.top)
            seen[path] = (
                KINDS[stat.S_IFMT(info.st_mode)],
                stat.S_IMODE(info.st_mode),
                (info.st_uid, info.st_gid) if path else (),
                info.st_nlink,
                info.st_size if not stat.S_ISDIR(info.st_mode) else 0,
                os.readlink(self.path(path)) if stat.S_ISLNK(info.st_mode) else "",
                (info.st_ino, info.st_mtime_ns, info.st_ctime_ns),
            )
            if stat.S_ISDIR(info.st_mode):
                for name in sorted(os.listdir(self.path(path) if path else self.top)):
                    visit(f"{path}/{name}" if path else name)

        visit("")
        return seen

    def walk_ours(self) -> Seen:
        seen: Seen = {}
        with Transaction(self.tree.engine) as txn:
            step = Step(txn, pb.User(), b"", 0, self.tree.around)

            def visit(path: str, inode: pb.Inode) -> None:
                seen[path] = (
                    inode.type,
                    inode.mode,
                    (inode.uid, inode.gid) if path else (),
                    inode.nlink,
                    inode.length,
                    inode.symlink.decode(),
                    (inode.inode, inode.mtime_ns, inode.ctime_ns),
                )
                if inode.type == pb.DIRECTORY:
                    for entry in lookup.read_dir(step, pb.ReadDirRequest(inode=inode.inode, attributes=True)).entries:
                        name = entry.name.decode()
                        visit(f"{path}/{name}" if path else name, entry.attributes)

            visit("", step.full(step.inode(1)))
        return seen

    @staticmethod
    def touched(before: Seen, after: Seen) -> dict[str, tuple[bool, bool]]:
        """By path: did the mtime, did the ctime of an inode that was there before change?"""
        old = {entry[-1][0]: entry[-1] for entry in before.values()}
        changed = {}
        for path, entry in after.items():
            number, mtime_ns, ctime_ns = entry[-1]
            if number in old:
                changed[path] = (mtime_ns != old[number][1], ctime_ns != old[number][2])
        return changed

    @invariant()
    def same_tree(self) -> None:
        real, ours = self.walk_real(), self.walk_ours()
        assert {path: entry[:-1] for path, entry in ours.items()} == {path: entry[:-1] for path, entry in real.items()}
        if STAMPS_ARE_FINE and self.reused(self.real_seen, real) == self.reused(self.our_seen, ours):
            mine, kernel = self.touched(self.our_seen, ours), self.touched(self.real_seen, real)
            assert mine == kernel, (
                f"(mtime, ctime) touched: kernel {set(kernel.items()) - set(mine.items())}, here {set(mine.items()) - set(kernel.items())}"
            )
        self.real_seen, self.our_seen = real, ours

    @staticmethod
    def reused(before: Seen, after: Seen) -> set[str]:
        """Paths whose inode number was there before: a real file system gives a freed number out again, we never do."""
        old = {entry[-1][0] for entry in before.values()}
        return {path for path, entry in after.items() if entry[-1][0] in old}

    # --- operations

    @rule(who=users, path=paths, mode=modes)
    def mkdir(self, who: pb.User, path: str, mode: int) -> None:
        self.both(who, lambda: os.mkdir(self.path(path), mode), lambda: self.tree.mkdir(path, mode, who))

    @rule(who=users, path=paths, mode=modes)
    def mkfifo(self, who: pb.User, path: str, mode: int) -> None:
        self.both(who, lambda: os.mkfifo(self.path(path), mode), lambda: self.tree.make(path, pb.FIFO, mode, who))

    @rule(who=users, path=paths, leading=targets)
    def symlink(self, who: pb.User, path: str, leading: str) -> None:
        self.both(who, lambda: os.symlink(leading, self.path(path)), lambda: self.tree.symlink(leading, path, who))

    @rule(
        who=users,
        path=paths,
        mode=modes,
        access=st.sampled_from([os.O_RDONLY, os.O_WRONLY, os.O_RDWR]),
        exclusive=st.booleans(),
        truncate=st.booleans(),
    )
    def create(self, who: pb.User, path: str, mode: int, access: int, exclusive: bool, truncate: bool) -> None:
        truncate = truncate and access != os.O_RDONLY  # O_RDONLY | O_TRUNC is unspecified
        flags = access | os.O_CREAT | os.O_NONBLOCK | (os.O_EXCL if exclusive else 0) | (os.O_TRUNC if truncate else 0)
        self.both(who, lambda: self.open_real(path, flags, mode), lambda: self.open_ours(path, flags, mode, who))

    @rule(who=users, path=paths, access=st.sampled_from([os.O_RDONLY, os.O_WRONLY, os.O_RDWR]), truncate=st.booleans())
    def open(self, who: pb.User, path: str, access: int, truncate: bool) -> None:
        flags = access | os.O_NONBLOCK | (os.O_TRUNC if truncate and access != os.O_RDONLY else 0)
        self.both(who, lambda: self.open_real(path, flags), lambda: self.open_ours(path, flags, 0, who))

    def open_real(self, path: str, flags: int, mode: int = 0) -> None:
        try:
            os.close(os.open(self.path(path), flags, mode))
        except OSError as error:
            if error.errno != errno.ENXIO:  # a FIFO without a reader: the kernel's business, after the permissions
                raise

    def open_ours(self, path: str, flags: int, mode: int, who: pb.User) -> None:
        access = flags & os.O_ACCMODE
        session = os.urandom(16)
        fields: dict[str, Any] = {
            "read": access in (os.O_RDONLY, os.O_RDWR),
            "write": access in (os.O_WRONLY, os.O_RDWR),
            "truncate": bool(flags & os.O_TRUNC),
            "session": session,
        }
        if flags & os.O_CREAT:
            exclusive = bool(flags & os.O_EXCL)
            if exclusive:
                parent, name = self.tree.place(path, who)
            else:
                reply = self.tree.lookup(path, who)
                if not reply.final_name:
                    raise self.missing()
                parent, name = reply.final_parent, reply.final_name
            request = pb.CreateRequest(parent=parent, name=name, mode=mode, exclusive=exclusive, **fields)
            inode = self.tree.run(files.create, request, who).inode
        else:
            inode = self.tree.open(path, who, **fields)
        self.tree.close(inode.inode, session, who)
        self.carry_out_cuts()

    @staticmethod
    def missing() -> KvfsError:
        from kvfs.common.errors import NotFound

        return NotFound("no such directory")

    def carry_out_cuts(self) -> None:
        """What the service does behind a truncate."""
        self.tree.put(lambda txn: txn.clear_range(*keys.span(keys.CUT)))

    @rule(who=users, path=paths)
    def unlink(self, who: pb.User, path: str) -> None:
        self.both(who, lambda: os.unlink(self.path(path)), lambda: self.tree.unlink(path, who))

    @rule(who=users, path=paths)
    def rmdir(self, who: pb.User, path: str) -> None:
        self.both(who, lambda: os.rmdir(self.path(path)), lambda: self.tree.rmdir(path, who))

    @rule(who=users, old=paths, new=paths)
    def rename(self, who: pb.User, old: str, new: str) -> None:
        self.both(who, lambda: os.rename(self.path(old), self.path(new)), lambda: self.tree.rename(old, new, who))

    @rule(who=users, old=paths, new=paths, flag=st.sampled_from(["no_replace", "exchange"]))
    def rename_with_flag(self, who: pb.User, old: str, new: str, flag: str) -> None:
        number = {"no_replace": 1, "exchange": 2}[flag]
        self.both(who, lambda: renameat2(self.path(old), self.path(new), number), lambda: self.tree.rename(old, new, who, **{flag: True}))

    @rule(who=users, old=paths, new=paths)
    def link(self, who: pb.User, old: str, new: str) -> None:
        with contextlib.suppress(KvfsError):  # fs.protected_hardlinks is the kernel's own rule, for files of others
            assume(who.uid in (0, self.tree.find(old, follow=False).uid))
        self.both(who, lambda: os.link(self.path(old), self.path(new), follow_symlinks=False), lambda: self.tree.link(old, new, who))

    @rule(who=users, path=paths, mode=modes)
    def chmod(self, who: pb.User, path: str, mode: int) -> None:
        with contextlib.suppress(KvfsError):  # a writer may drop privileges here (see attributes.py); before a mount the kernel refuses it
            found = self.tree.find(path)
            assume(who.uid in (0, found.uid) or not found.mode & 0o6000)
        self.both(who, lambda: os.chmod(self.path(path), mode), lambda: self.tree.chmod(path, mode, who))

    @rule(who=users, path=paths, uid=st.sampled_from([None, *IDS]), gid=st.sampled_from([None, *IDS]))
    def chown(self, who: pb.User, path: str, uid: int | None, gid: int | None) -> None:
        assume(uid is not None or gid is not None)
        real_ids = (-1 if uid is None else uid, -1 if gid is None else gid)
        self.both(who, lambda: os.chown(self.path(path), *real_ids), lambda: self.tree.chown(path, uid, gid, who))

    @rule(who=users, path=paths, length=lengths)
    def truncate(self, who: pb.User, path: str, length: int) -> None:
        self.both(who, lambda: os.truncate(self.path(path), length), lambda: self.tree.truncate(path, length, who))
        self.carry_out_cuts()

    @rule(who=users, path=paths, atime=times, mtime=times)
    def utimens(self, who: pb.User, path: str, atime: int, mtime: int) -> None:
        self.both(who, lambda: os.utime(self.path(path), ns=(atime, mtime)), lambda: self.tree.setattr(path, who, atime_ns=atime, mtime_ns=mtime))

    @rule(who=users, path=paths)
    def touch(self, who: pb.User, path: str) -> None:
        self.both(who, lambda: os.utime(self.path(path)), lambda: self.tree.setattr(path, who, atime_now=True, mtime_now=True))

    @rule(who=users, path=paths, follow=st.booleans())
    def stat(self, who: pb.User, path: str, follow: bool) -> None:
        self.both(who, lambda: os.stat(self.path(path), follow_symlinks=follow), lambda: self.tree.find(path, who, follow=follow))

    @rule(who=users, path=paths)
    def listdir(self, who: pb.User, path: str) -> None:
        self.both(who, lambda: os.listdir(self.path(path)), lambda: self.tree.readdir(path, who))

    @rule(path=paths)
    def remove_tree(self, path: str) -> None:
        """`rm -r` by root, against the recursive removal and the garbage queue."""
        full = self.path(path)
        try:
            there = stat.S_ISDIR(os.lstat(full).st_mode)
        except OSError:
            there = False
        assume(there)
        shutil.rmtree(full)
        self.tree.unlink(path, recursive=True)
        self.collect()

    def collect(self) -> None:
        from kvfs.meta.gc.collector import _remove_children

        while True:
            rows, _ = self.tree.put(lambda txn: txn.get_range(*keys.span(keys.GARBAGE)))
            if not rows:
                return
            for key, value in rows:
                number = keys.garbage_parts(key)[1]
                work = _erase_removed if value[1] == 1 else _remove_children
                self.tree.put(
                    lambda txn, work=work, key=key, number=number: work(  # type: ignore[misc]
                        Step(txn, pb.User(), b"", self.tree.now_ns, self.tree.around), key, number
                    )
                )


def renameat2(old: str, new: str, flags: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags):
        raise OSError(ctypes.get_errno(), "renameat2")


def _stamps_are_fine() -> bool:
    """Does the file system stamp two changes right after each other differently, if a stat lies between?"""
    with tempfile.TemporaryDirectory() as folder:
        stamps = set()
        for index in range(50):
            with open(f"{folder}/{index}", "w"):
                pass
            stamps.add(os.stat(folder).st_mtime_ns)
        return len(stamps) == 50


STAMPS_ARE_FINE = _stamps_are_fine()

TestNamespace = Namespace.TestCase
TestNamespace.settings = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
