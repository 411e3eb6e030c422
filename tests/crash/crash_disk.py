"""What a disk may hold after a crash, from the log of what was written to it.

`CrashDisk.play` takes the log event by event; at any point `everything` is what a killed process leaves, and the others are what a loss of power
may leave. What was synced is always there. Of the rest:
- each sector (512 bytes, or a page of 4096) of a file holds what it held at some moment between the file's last sync and the crash;
- changes of a file's size and holes punched in it come in their order, and the last of them may be missing;
- changes of a directory's names come in their order, and the last since its last sync may be missing; a rename within one is one change.
That is weaker than what ext4, XFS or btrfs do, and what POSIX lets one rely on.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

sys.path.insert(0, str(Path(__file__).parent))
from recorder import ROOT, Event

SECTOR_BYTES = 512
PAGE_BYTES = 4096
State = dict[str, bytes | None]
"""Path to content; None: a directory."""


class _File:
    def __init__(self) -> None:
        self.durable = bytearray()
        self.now = bytearray()
        self.since: list[Event] = []
        """Since the last sync."""

    def play(self, event: Event) -> None:
        if event.kind == "sync":
            self.durable = bytearray(self.now)
            self.since.clear()
        elif event.kind == "sync_range":
            # Only those bytes, and the size that they need.
            end = event.offset + event.size
            if len(self.durable) < end:
                self.durable.extend(bytes(end - len(self.durable)))
            self.durable[event.offset : end] = self.now[event.offset : end]
            self.since = [one for one in self.since if not (one.kind == "write" and (one.offset, len(one.data)) == (event.offset, event.size))]
        else:
            _apply(self.now, event)
            self.since.append(event)


class _Folder:
    def __init__(self) -> None:
        self.durable: dict[bytes, int] = {}
        self.now: dict[bytes, int] = {}
        self.since: list[dict[bytes, int | None]] = []

    def change(self, names: dict[bytes, int | None]) -> None:
        _rename(self.now, names)
        self.since.append(names)

    def after(self, count: int) -> dict[bytes, int]:
        names = dict(self.durable)
        for change in self.since[:count]:
            _rename(names, change)
        return names


def _rename(names: dict[bytes, int], change: dict[bytes, int | None]) -> None:
    for name, inode in change.items():
        if inode is None:
            names.pop(name, None)
        else:
            names[name] = inode


def _apply(data: bytearray, event: Event) -> None:
    if event.kind == "write":
        end = event.offset + len(event.data)
        if len(data) < event.offset:
            data.extend(bytes(event.offset - len(data)))
        data[event.offset : end] = event.data
    elif event.kind == "zero":
        end = min(event.offset + event.size, len(data))
        if end > event.offset:
            data[event.offset : end] = bytes(end - event.offset)
    else:
        if event.kind == "truncate":
            del data[event.offset :]
        data.extend(bytes(max(0, event.offset - len(data))))


class CrashDisk:
    def __init__(self) -> None:
        self._files: dict[int, _File] = {}
        self._folders: dict[int, _Folder] = {ROOT: _Folder()}

    def play(self, event: Event) -> bool:
        """False: nothing changed by this event that a crash could show."""
        kind = event.kind
        if kind == "mark":
            return False
        if kind in ("create", "mkdir"):
            if kind == "create":
                self._files[event.target] = _File()
            else:
                self._folders[event.target] = _Folder()
            self._folders[event.inode].change({event.data: event.target})
        elif kind in ("unlink", "rmdir"):
            self._folders[event.inode].change({event.data: None})
        elif kind == "rename":
            inode = self._folders[event.inode].now[event.data]
            if event.inode == event.target:
                self._folders[event.inode].change({event.data: None, event.to_name: inode})
            else:
                self._folders[event.target].change({event.to_name: inode})
                self._folders[event.inode].change({event.data: None})
        elif kind == "syncdir":
            folder = self._folders[event.inode]
            folder.durable = dict(folder.now)
            folder.since.clear()
        else:
            self._files[event.inode].play(event)
        return True

    # --- what a crash leaves ---

    def everything(self) -> State:
        return self._state(lambda folder: folder.now, lambda file: file.now)

    def nothing_unsynced(self) -> State:
        return self._state(lambda folder: folder.durable, lambda file: file.durable)

    def some_files(self, dice: random.Random) -> State:
        """Each file either as it was or as it was last synced."""
        return self._state(self._names(dice), lambda file: file.now if dice.random() < 0.5 else file.durable)

    def torn(self, dice: random.Random) -> State:
        unit = dice.choice((SECTOR_BYTES, PAGE_BYTES))
        chance = dice.choice((0.03, 0.2, 0.5, 0.9))
        return self._state(self._names(dice), lambda file: _torn(file, unit, chance, dice))

    @staticmethod
    def _names(dice: random.Random) -> Callable[[_Folder], dict[bytes, int]]:
        return lambda folder: folder.after(dice.randint(0, len(folder.since)))

    def _state(self, names: Callable[[_Folder], dict[bytes, int]], content: Callable[[_File], bytes | bytearray]) -> State:
        state: State = {}
        todo = [("", ROOT)]
        while todo:
            path, inode = todo.pop()
            folder = self._folders.get(inode)
            if folder is None:
                state[path] = bytes(content(self._files[inode]))
                continue
            state[path] = None
            todo += [(f"{path}/{os.fsdecode(name)}", child) for name, child in sorted(names(folder).items())]
        return state


def _torn(file: _File, unit: int, chance: float, dice: random.Random) -> bytearray:
    data = bytearray(file.durable)
    shapes = sum(event.kind != "write" for event in file.since)
    kept_shapes = dice.randint(0, shapes)
    lost: set[int] = set()
    roll = dice.random
    for event in file.since:
        if event.kind != "write":
            if kept_shapes:
                kept_shapes -= 1
                _apply(data, event)
            continue
        # What of a sector went out goes out as a whole: once a change of it is lost, so are the later ones.
        offset, end = event.offset, event.offset + len(event.data)
        if len(data) < end:
            data.extend(bytes(end - len(data)))
        for start in range(offset // unit * unit, end, unit):
            if start in lost:
                continue
            if roll() < chance:
                lost.add(start)
                continue
            low, high = max(start, offset), min(start + unit, end)
            data[low:high] = event.data[low - offset : high - offset]
    return data


def digest(state: State) -> int:
    total = xxhash.xxh3_64()
    for path in sorted(state):
        content = state[path]
        total.update(f"{path}\0{-1 if content is None else len(content)}\0".encode())
        if content:
            total.update(content)
    return total.intdigest()


def lay_out(state: State, folder: Path) -> None:
    """Into an empty directory."""
    for path in sorted(state):  # a directory comes before what is in it
        content = state[path]
        if content is None:
            os.makedirs(f"{folder}{path}", exist_ok=True)
        else:
            with open(f"{folder}{path}", "wb", buffering=0) as file:
                file.write(content)


def points(log: list[Event], disk: CrashDisk) -> Iterator[int]:
    """Plays the log and stops after every event that changed something, and before the first; gives how many events have been played."""
    yield 0
    for place, event in enumerate(log, 1):
        if disk.play(event):
            yield place
