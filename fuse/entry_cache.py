"""Lookups and attributes that need no call: what the metadata service has told under a lease that still runs.

A name in a directory is true for as long as the lease on the DIRECTORY's attributes: every creation, removal and rename in it changes its
mtime, and so
revokes that lease before it is answered. A child's attributes are true for as long as the child's own lease.
Invariants:
  - nothing is answered after its lease, or after a revocation, or after a change that this mount made and whose outcome it has not heard;
  - an answer that was on its way while any of this happened is not kept: `tick()` before the call, `heard`/`entered` with that tick after it;
  - entries outlive a lapse of the directory's lease only when the directory comes back with the same mtime and ctime;
  - all tables are bounded.
It must never be asked about files that are being written here: their attributes change without a call.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from kvfs.common.wire import meta_pb2 as pb

ATTRIBUTES_MAX = 16_384
DIRECTORIES_MAX = 1024
ENTRIES_MAX = 16_384
"""Of one directory."""
CHANGED_MAX = 65_536
NAME_MAX = 255
RENEW_S = 0.2
"""A lease that ends within this is renewed before a creation, which would otherwise outlive it."""
LEASE_USE = 0.9
"""The service counts a lease from when it answered, we from when we asked; the rest is for clocks that run apart."""


@dataclass(slots=True)
class _Directory:
    until: float
    since: float
    """The lease has held from here on."""
    mtime_ns: int
    ctime_ns: int
    entries: dict[bytes, int] = field(default_factory=dict)
    """name -> inode; 0: there is no such entry."""
    complete: bool = False
    """`entries` has every name: the directory was made here, and so was everything in it."""
    changing: dict[bytes, int] = field(default_factory=dict)
    """Entries that this mount is changing, with how many changes of each are under way."""


@dataclass(frozen=True, slots=True)
class EntryChange:
    """An entry that this mount is changing: from `begin_entry` to `end_entry`."""

    parent: int
    name: bytes
    child: int
    begun: tuple[int, float]
    before: tuple[pb.Inode, float] | None
    directory: _Directory | None


class EntryCache:
    def __init__(self, now: Callable[[], float], *, enabled: bool = True) -> None:
        self._now = now
        self._enabled = enabled
        self._tick = 0
        self._floor = 0
        """The newest change that is no longer remembered in `_changed`: what was asked before it is not kept."""
        self._changed: OrderedDict[int, int] = OrderedDict()
        self._attributes: OrderedDict[int, tuple[pb.Inode, float]] = OrderedDict()
        self._directories: OrderedDict[int, _Directory] = OrderedDict()

    def tick(self) -> tuple[int, float]:
        """Take this before a call, and give it to `heard` and `entered` with the answer."""
        return self._tick, self._now()

    # --- asking ---

    def lookup(self, parent: int, name: bytes) -> tuple[pb.Inode, float] | None:
        """The entry's attributes and the seconds left of their lease, or None: ask the service."""
        directory = self._directories.get(parent)
        if directory is None or self._now() >= directory.until:
            return None
        child = directory.entries.get(name)
        return self.attributes(child) if child else None

    def absent(self, parent: int, name: bytes) -> float:
        """Surely no such entry, for that many seconds; 0: not known. It was looked for, or all of the directory's are known."""
        directory = self._directories.get(parent)
        if directory is None or len(name) > NAME_MAX or name in (b".", b".."):
            return 0.0
        child = directory.entries.get(name)
        if child or (child is None and (not directory.complete or directory.changing)):
            return 0.0
        return max(0.0, directory.until - self._now())

    def entry(self, parent: int, name: bytes) -> int | None:
        """The inode that the name stands for, 0 for none; None: not known."""
        directory = self._directories.get(parent)
        return None if directory is None or self._now() >= directory.until else directory.entries.get(name)

    def names_last(self, parent: int) -> float:
        """The seconds for which what is known of the directory's entries stays true."""
        directory = self._directories.get(parent)
        return 0.0 if directory is None else max(0.0, directory.until - self._now())

    def ending(self, parent: int) -> bool:
        """All of the directory's entries are known, and the lease that keeps this true needs a new one: ask for its attributes."""
        directory = self._directories.get(parent)
        return directory is not None and directory.complete and not directory.changing and self._now() >= directory.until - RENEW_S

    def attributes(self, inode: int) -> tuple[pb.Inode, float] | None:
        kept = self._attributes.get(inode)
        if kept is None:
            return None
        left_s = kept[1] - self._now()
        return (kept[0], left_s) if left_s > 0 else None

    # --- hearing ---

    def lease(self, inode: pb.Inode, since: tuple[int, float]) -> float:
        """The seconds left of the lease on attributes that a call asked for at `since` has brought; 0 when they may be out of date already."""
        if not inode.attr_lease_ms or not self._enabled or self._changed.get(inode.inode, self._floor) > since[0]:
            return 0.0
        return max(0.0, since[1] + inode.attr_lease_ms / 1000 * LEASE_USE - self._now())

    def heard(self, inode: pb.Inode, since: tuple[int, float]) -> float:
        """Attributes that a call asked for at `since` has brought. Gives the seconds left of their lease; 0: they may not be kept."""
        left_s = self.lease(inode, since)
        if left_s <= 0:
            return 0.0
        number, until = inode.inode, self._now() + left_s
        self._attributes[number] = (inode, until)
        self._attributes.move_to_end(number)
        if len(self._attributes) > ATTRIBUTES_MAX:
            self._attributes.popitem(last=False)
        if inode.type == pb.DIRECTORY:
            self._heard_directory(inode, until)
        return left_s

    def _heard_directory(self, inode: pb.Inode, until: float) -> None:
        known = self._directories.get(inode.inode)
        if known is not None and (self._now() < known.until or (known.mtime_ns == inode.mtime_ns and known.ctime_ns == inode.ctime_ns)):
            if self._now() >= known.until:
                known.since = self._now()
            known.until = max(known.until, until)
            known.mtime_ns, known.ctime_ns = inode.mtime_ns, inode.ctime_ns
        else:
            self._directories[inode.inode] = _Directory(until, self._now(), inode.mtime_ns, inode.ctime_ns)
        self._directories.move_to_end(inode.inode)
        if len(self._directories) > DIRECTORIES_MAX:
            self._directories.popitem(last=False)

    def entered(self, parent: int, name: bytes, child: int, since: tuple[int, float]) -> None:
        """A call that was made at `since` found the entry; `child` 0: found that there is none."""
        directory = self._directories.get(parent)
        if directory is None or self._now() >= directory.until or self._changed.get(parent, self._floor) > since[0]:
            return
        # The lease must have held when the call was made, or a change after its answer could have been missed; and of an entry that is just
        # being changed here, nobody knows which answer is the newer.
        if directory.since <= since[1] and name not in directory.changing:
            self._enter(directory, name, child)

    @staticmethod
    def _enter(directory: _Directory, name: bytes, child: int) -> None:
        if len(directory.entries) >= ENTRIES_MAX:
            directory.entries.clear()
            directory.complete = False
        directory.entries[name] = child

    def made(self, directory: pb.Inode, since: tuple[int, float]) -> None:
        """This mount has made the directory, at `since`, and heard its attributes: it is empty, and whatever comes into it comes through here or
        with a revocation."""
        known = self._directories.get(directory.inode)
        if (
            known is not None
            and self._changed.get(directory.inode, self._floor) <= since[0]
            and not any(known.entries.values())
            and not known.changing
        ):
            known.complete = True

    # --- forgetting ---

    def changing(self, inode: int) -> int:
        """This mount changes the inode, or has just changed it: call it before and after. The number is for `changed`."""
        self._tick += 1
        self._changed[inode] = self._tick
        self._changed.move_to_end(inode)
        if len(self._changed) > CHANGED_MAX:
            self._floor = self._changed.popitem(last=False)[1]
        self._attributes.pop(inode, None)
        return self._tick

    def changed(self, inode: int, begun: tuple[int, float]) -> tuple[int, float] | None:
        """After a change that began with `begun` (the number of `changing`, the time before it): a tick under which the answer may be `heard`,
        or None when somebody else touched the inode meanwhile: then nobody knows which answer is the newer."""
        alone = self._changed.get(inode) == begun[0]
        tick = self.changing(inode)
        return (tick, begun[1]) if alone else None

    def begin_entry(self, parent: int, name: bytes) -> EntryChange:
        """This mount changes an entry. The directory's other entries stay true: its lease is still ours."""
        before = self._attributes.get(parent)
        directory = self._directories.get(parent)
        child = 0
        if directory is not None:
            child = directory.entries.pop(name, 0)
            directory.changing[name] = directory.changing.get(name, 0) + 1
        if child:
            self.changing(child)
        started_s = self._now()
        return EntryChange(parent, name, child, (self.changing(parent), started_s), before, directory)

    def end_entry(self, change: EntryChange, *, entry: int | None = None, at_ns: int = 0, links: int = 0) -> None:
        """It is over. `entry`: the name now stands for this inode, 0 for none; None when that is not known (it failed, perhaps only the answer was
        lost). `at_ns`: the service set the directory's mtime and ctime to this; its link count grew by `links`: then the directory's attributes,
        if known before, are known again."""
        alone = self.changed(change.parent, change.begun) is not None
        if change.child:
            self.changing(change.child)
        directory = change.directory
        if directory is None:
            return
        if directory.changing[change.name] == 1:
            del directory.changing[change.name]
        else:
            directory.changing[change.name] -= 1
        directory.entries.pop(change.name, None)
        held = self._directories.get(change.parent) is directory and directory.since <= change.begun[1] and self._now() < directory.until
        if entry is None or not held:
            directory.complete = False
        elif entry or not directory.complete:
            self._enter(directory, change.name, entry)
        if held and alone and at_ns:
            directory.mtime_ns = directory.ctime_ns = at_ns
        if not held or not (alone and at_ns and change.before) or self._now() >= change.before[1]:
            return
        attributes = pb.Inode()
        attributes.CopyFrom(change.before[0])
        attributes.mtime_ns = attributes.ctime_ns = at_ns
        attributes.nlink += links
        self._attributes[change.parent] = (attributes, change.before[1])

    def revoked(self, inode: int) -> None:
        """Another client has changed it: nothing about it is true any more."""
        self.changing(inode)
        self._directories.pop(inode, None)

    def lose_all(self) -> None:
        self._tick += 1
        self._floor = self._tick
        self._changed.clear()
        self._attributes.clear()
        self._directories.clear()
