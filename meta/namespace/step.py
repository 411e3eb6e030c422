"""One attempt of one operation: its transaction, who asks, and what the service must do after the commit.

A Step is made afresh for every attempt, so that what a lost attempt noted is forgotten with it. The operations of this package are functions
(Step, request) -> reply that touch nothing but the step. Invariants: an operation that raises has changed nothing that is committed; every inode
whose attributes or entries change is in `changed`, so that leases on it are revoked before the change is answered. This module must never await.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from kvfs.common.errors import InvalidArgument, NameTooLong, NotDirectory, NotFound, StaleHandle
from kvfs.common.wire import meta_pb2 as pb
from kvfs.meta.kv.transaction import Transaction
from kvfs.meta.namespace import access, keys, records
from kvfs.meta.namespace.records import Entry, Session

NAME_BYTES_MAX = 255
LINKS_MAX = 65_000
LENGTH_MAX = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Reader:
    """An open file that is known to this service only: reading sessions are not stored at once."""

    session: bytes
    client_id: bytes
    opened_ns: int
    nameless: bool = False
    """The file had no name any more when it was opened."""


def _nobody(inode: int) -> Sequence[Reader]:
    return ()


def _none(inode: int) -> Collection[bytes]:
    return ()


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What an operation needs that is not in the store."""

    new_inode: Callable[[], int]
    place: Callable[[pb.Layout], pb.Layout]
    """Chains for a new file; raises NoServingTarget while there is no chain table."""
    table: Callable[[int, int], tuple[int, int, Sequence[int]]]
    """(table id, replication), 0 for any -> table id, replication and chains of the table that fits; raises InvalidArgument, NoServingTarget."""
    readers: Callable[[int], Sequence[Reader]] = _nobody
    closing: Callable[[int], Collection[bytes]] = _none
    """Stored sessions of an inode that were closed and only wait to be cleared."""
    keep: Callable[[int], Sequence[Reader]] = _nobody
    """Like `readers`, for the one who stores them: from now on a reader's close clears a record."""
    gc_delay_ns: int = 0
    links_max: int = LINKS_MAX


@dataclass(slots=True)
class Step:
    txn: Transaction
    user: pb.User
    client_id: bytes
    now_ns: int
    around: Surroundings
    read_only: bool = False
    cutting: int = 0
    """The inode that an open may truncate: the caller keeps other truncations of it away."""
    changed: set[int] = field(default_factory=set)
    cuts: list[int] = field(default_factory=list)
    """Inodes with a truncation to carry out on the chains."""
    garbage: bool = False
    """Something went into the garbage queue."""
    measure: int = 0
    """An inode whose length only the chains know; the operation stopped before it changed anything."""
    wants_cut: int = 0
    """An inode, not the one in `cutting`, that an open would truncate, or that has a truncation to be carried out before anything else is written to
    it; the operation stopped before it changed anything."""
    recalled: bool = False
    """The request had been applied before: nothing was done now."""
    files_made: int = 0
    files_gone: int = 0

    def must_settle(self, number: int) -> bool:
        """Whether a truncation of the file has not reached its chains: it would cut off what is written from now on. `wants_cut` is set then."""
        if self.cutting == number or self.txn.get(keys.cut(number)) is None:
            return False
        self.wants_cut = number
        return True

    # --- loads

    def fetch(self, key: bytes) -> bytes | None:
        """A change conflicts with whoever changes what it has read; a read need not be tracked."""
        return self.txn.snapshot_get(key) if self.read_only else self.txn.get(key)

    def peek(self, number: int) -> pb.Inode | None:
        """The stored inode. Of a directory it lacks times and links of its entries' changes: `full` adds them."""
        data = self.fetch(keys.inode(number))
        return None if data is None else records.decode_inode(data)

    def inode(self, number: int) -> pb.Inode:
        """An inode named by number; StaleHandle if it is gone (the caller looked it up before)."""
        found = self.peek(number)
        if found is None:
            raise StaleHandle(f"inode {number} is gone")
        return found

    def directory(self, number: int, mask: int) -> pb.Inode:
        """A directory in which a name is looked up or changed: it must exist, be a directory, and let the user."""
        found = self.peek(number)
        if found is None:
            raise NotFound(f"directory {number} is gone")
        if found.type != pb.DIRECTORY:
            raise NotDirectory(f"inode {number} is not a directory")
        if found.nlink == 0:
            raise NotFound(f"directory {number} was removed")
        access.require(found, self.user, mask)
        return found

    def entry(self, parent: int, name: bytes) -> Entry | None:
        data = self.fetch(keys.entry(parent, name))
        return None if data is None else records.decode_entry(data)

    def linked(self, parent: int, name: bytes) -> tuple[Entry, pb.Inode]:
        """An entry and its inode; NotFound if there is no such entry."""
        entry = self.entry(parent, name)
        if entry is None:
            raise NotFound("no such file or directory")
        found = self.peek(entry.inode)
        if found is None:
            raise NotFound(f"the entry names inode {entry.inode}, which is not there: run fsck")
        return entry, found

    def full(self, inode: pb.Inode) -> pb.Inode:
        """The inode as a reader must see it: a directory with the times and links that its entries give it."""
        if inode.type == pb.DIRECTORY:
            times = self.txn.snapshot_get(keys.directory_times(inode.inode))
            if times is not None:
                mtime_ns, ctime_ns = records.decode_times(times)
                inode.mtime_ns = mtime_ns
                inode.ctime_ns = max(inode.ctime_ns, ctime_ns)
            if inode.nlink:
                links = self.txn.snapshot_get(keys.directory_links(inode.inode))
                inode.nlink = records.decode_links(links) if links is not None else 2
        return inode

    # --- stores

    def put(self, inode: pb.Inode) -> None:
        self.txn.set(keys.inode(inode.inode), records.encode_inode(inode))
        self.changed.add(inode.inode)

    def put_entry(self, parent: int, name: bytes, inode: pb.Inode) -> None:
        self.txn.set(keys.entry(parent, name), records.encode_entry(inode.inode, inode.type))

    def touch_directory(self, number: int) -> None:
        """An entry of the directory changed: its mtime and ctime are now. Written blind: creations side by side must not conflict on it."""
        self.txn.set(keys.directory_times(number), records.encode_times(self.now_ns, self.now_ns))
        self.changed.add(number)

    def add_links(self, number: int, by: int) -> None:
        """Change a directory's link count (its subdirectories changed)."""
        key = keys.directory_links(number)
        data = self.txn.get(key)
        nlink = records.decode_links(data) if data is not None else 2
        self.txn.set(key, records.encode_links(nlink + by))

    # --- sessions

    def sessions(self, number: int) -> list[tuple[bytes, Session]]:
        """The stored sessions of a file, by name."""
        rows, _ = self.txn.get_range(*keys.sessions(number))
        return [(keys.tail(key), records.decode_session(value)) for key, value in rows]

    def has_sessions(self, number: int) -> bool:
        rows, _ = self.txn.get_range(*keys.sessions(number))
        if not rows:
            return False
        closing = self.around.closing(number)
        return any(keys.tail(key) not in closing for key, _ in rows)

    def put_session(self, number: int, name: bytes, *, write: bool) -> None:
        self.txn.set(keys.session(number, name), records.encode_session(Session(self.client_id, write, self.now_ns)))

    # --- ends of life

    def erase(self, inode: pb.Inode) -> None:
        """The inode and everything beside it goes now. Its chunks must be gone."""
        number = inode.inode
        self.txn.clear(keys.inode(number))
        rows, _ = self.txn.get_range(*keys.xattrs(number), limit=1)
        if rows:
            self.txn.clear_range(*keys.xattrs(number))
        if inode.type == pb.DIRECTORY:
            self.txn.clear(keys.directory_times(number))
            self.txn.clear(keys.directory_links(number))
        elif inode.type == pb.FILE:
            self.txn.clear(keys.cut(number))
            rows, _ = self.txn.get_range(*keys.sessions(number), limit=1)
            if rows:  # closed, and not cleared yet
                self.txn.clear_range(*keys.sessions(number))
        self.files_gone += 1
        self.changed.add(number)

    def discard(self, number: int, kind: int, *, delay_ns: int | None = None) -> None:
        """Into the garbage queue."""
        due_ns = self.now_ns + (self.around.gc_delay_ns if delay_ns is None else delay_ns)
        self.txn.set(keys.garbage(due_ns, number), records.encode_garbage(kind))
        self.garbage = True

    def drop_link(self, inode: pb.Inode) -> pb.Inode:
        """One name less for something that is not a directory; with the last name it goes, a file at the end of its last session."""
        inode.nlink -= 1
        inode.ctime_ns = self.now_ns
        if inode.nlink > 0:
            self.put(inode)
            return inode
        if inode.type != pb.FILE:
            self.erase(inode)
            return inode
        if self.keep_readers(inode.inode) or self.has_sessions(inode.inode):
            self.put(inode)
        else:
            self.release(inode)
        return inode

    def keep_readers(self, number: int) -> bool:
        """Store the sessions that are known to this process only: the file has no name any more, and must outlive this process for them."""
        readers = self.around.keep(number)
        for reader in readers:
            self.txn.set(keys.session(number, reader.session), records.encode_session(Session(reader.client_id, False, reader.opened_ns)))
        return bool(readers)

    def release(self, inode: pb.Inode) -> None:
        """A file without name and session: to the garbage queue, or gone at once if it never had a chunk."""
        if inode.chunks_possible:
            self.put(inode)
            self.discard(inode.inode, records.FILE_GARBAGE)
        else:
            self.erase(inode)


def check_name(name: bytes) -> None:
    """A name for an entry. Checked after the directory's permissions, as Linux does."""
    if len(name) > NAME_BYTES_MAX:
        raise NameTooLong(f"a name of {len(name)} bytes: the limit is {NAME_BYTES_MAX}")
    if not name:
        raise NotFound("an empty name")
    if b"/" in name or b"\0" in name:
        raise InvalidArgument("a name has neither '/' nor a zero byte")
