"""The names that the kernel keeps: which, until when, and how it is made to ask again before their time.

A name in a directory is true for as long as this mount's lease on the directory (entry_cache.py), and so the kernel may keep it for that long. When
another client changes the directory, the kernel must have given up its names before the revocation is acknowledged. It has two ways:
  - one name by one (INVAL_ENTRY, only expiring it: what is behind it stays, page cache and all). An answer that gave the name a moment ago may reach
    the kernel's table only afterwards, so a name is taken back SETTLED_S after it was given at the earliest. And it takes the directory's lock,
    which an operation of this mount may hold while it waits for the other mount, which waits for our acknowledgement: it gets EXPIRE_WITHIN_S;
  - all names of the mount at once (INC_EPOCH): no lock, but what is looked up again loses its cached pages, and open files the path that /proc
    shows. Only where the first way is blocked.
Invariants: `grant` is asked for at the moment the kernel is answered; every name granted is either over or in the table; the table is bounded.
Taking back must stay rare: a directory that others change gets no grants for a while, twice as long each time; one that this mount changes gets
none but for the directories in it; and when many are taken back, the whole mount pauses.
It must never decide whether a name is true.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

NAMES_MAX = 2048
"""Of one directory, at a time."""
DIRECTORIES_MAX = 4096
REMEMBERED_MAX = 4096
SETTLED_S = 0.05
EXPIRE_WITHIN_S = 0.05
PAUSE_FIRST_S = 10.0
PAUSE_MAX_S = 3600.0
PAUSE_FORGET = 4
"""A directory that was left in peace for that many times its last pause begins anew."""
OWN_CHANGE_S = 10.0
RECALLS_MAX = 16
"""More than that many directories taken back within PAUSE_FIRST_S: nothing is granted for that long."""


@dataclass(slots=True)
class _Granted:
    until: float
    since: float


@dataclass(frozen=True, slots=True)
class Recall:
    """The names of a directory that the kernel must ask for again."""

    names: list[bytes]
    settled_at: float


class KernelNames:
    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._granted: OrderedDict[int, dict[bytes, _Granted]] = OrderedDict()
        self._paused: OrderedDict[int, tuple[float, float]] = OrderedDict()
        """directory -> (until when it gets no grants, how long that pause is)."""
        self._own: OrderedDict[int, float] = OrderedDict()
        """directory -> when this mount last changed it."""
        self._recalls: deque[float] = deque(maxlen=RECALLS_MAX)

    def grant(self, directory: int, name: bytes, lease_s: float, *, is_directory: bool) -> float:
        """For how long the kernel may keep the name; it is told now."""
        now = self._now()
        if lease_s <= 0 or not self._may(directory, is_directory, now):
            lease_s = 0.0
        names = self._granted.get(directory)
        if lease_s <= 0:
            if names:
                names.pop(name, None)  # the answer replaces what the kernel was told before
            return 0.0
        if names is None:
            if len(self._granted) >= DIRECTORIES_MAX and not self._make_room(now):
                return 0.0
            names = self._granted[directory] = {}
        if len(names) >= NAMES_MAX and name not in names:
            names = self._granted[directory] = {name: each for name, each in names.items() if each.until > now}
            if len(names) >= NAMES_MAX:
                return 0.0
        names[name] = _Granted(now + lease_s, now)
        return lease_s

    def _may(self, directory: int, is_directory: bool, now: float) -> bool:
        if directory in self._paused and now < self._paused[directory][0]:
            return False
        if not is_directory and directory in self._own and now < self._own[directory] + OWN_CHANGE_S:
            return False
        many = len(self._recalls) == RECALLS_MAX and self._recalls[-1] - self._recalls[0] < PAUSE_FIRST_S
        return not (many and now < self._recalls[-1] + PAUSE_FIRST_S)

    def changing(self, directory: int) -> None:
        """This mount changes an entry of the directory: the kernel holds its lock."""
        self._own[directory] = self._now()
        self._own.move_to_end(directory)
        if len(self._own) > REMEMBERED_MAX:
            self._own.popitem(last=False)

    def moved(self, directory: int, name: bytes, new_directory: int, new_name: bytes, *, exchanged: bool = False) -> None:
        """This mount has renamed: the kernel has taken the time that it keeps the name for along to the new one."""
        there = self._pop(new_directory, new_name) if exchanged else None
        here = self._pop(directory, name)
        for granted, parent, known_as in ((here, new_directory, new_name), (there, directory, name)):
            if granted is not None:
                self._granted.setdefault(parent, {})[known_as] = granted

    def recall(self, directory: int) -> Recall | None:
        """Another client has changed the directory. None: the kernel has no names of it."""
        now = self._now()
        live = {name: granted for name, granted in self._granted.pop(directory, {}).items() if granted.until > now}
        if not live:
            return None
        self._recalls.append(now)
        self._pause(directory, now)
        return Recall(list(live), max(granted.since for granted in live.values()) + SETTLED_S)

    def lose_all(self) -> bool:
        """No lease holds any more. Must the kernel be told?"""
        now = self._now()
        live = any(granted.until > now for names in self._granted.values() for granted in names.values())
        self._granted.clear()
        return live

    def _pop(self, directory: int, name: bytes) -> _Granted | None:
        return self._granted.get(directory, {}).pop(name, None)

    def _pause(self, directory: int, now: float) -> None:
        until, length = self._paused.pop(directory, (now, 0.0))
        again = length > 0 and now < until + PAUSE_FORGET * length
        length = min(2 * length, PAUSE_MAX_S) if again else PAUSE_FIRST_S
        self._paused[directory] = (now + length, length)
        if len(self._paused) > REMEMBERED_MAX:
            self._paused.popitem(last=False)

    def _make_room(self, now: float) -> bool:
        for directory in [each for each, names in self._granted.items() if all(granted.until <= now for granted in names.values())]:
            del self._granted[directory]
        return len(self._granted) < DIRECTORIES_MAX
