"""Which blocks are in use: groups of blocks per class, in memory, rebuilt from the index when the target opens.

Space is taken from the disk one group (16 MiB, or one larger block) at a time with fallocate, so that writing into a block never meets a full
disk. Some empty groups are kept (their pages are in the page cache: writing them again costs a fraction of fresh ones), the others are given back to
the disk; when it is full any class may take the space of all.

Invariants:
- a block is given out only while it is free, and free only when no chunk, no reader and no state that a power loss could bring back uses it:
  a freed block first waits in quarantine until a sync has covered the record that freed it, and until its last reader let go. Where another block
  took its place, the sync must cover the bytes there too; where the chunk was removed, the record alone;
- the sum of groups stays under the capacity, and the disk keeps the reserve.
Everything here is called under the engine's lock, but for `give_back`. It must never touch the bytes of a block.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator

from kvfs.common.boundary.disk import Disk
from kvfs.common.errors import NoSpace
from kvfs.storage.engine.classes import Block
from kvfs.storage.engine.config import EngineConfig
from kvfs.storage.engine.files import DataFiles

_MIN_RESERVE_BYTES = 16 << 20
_MAX_RESERVE_BYTES = 1 << 30
GROUPS_A_FILE = 16
"""A KV-cache space's class with fewer groups than this stays in one file."""


class _Group:
    """Consecutive blocks of one file. Bit i of `free` is block first + i."""

    __slots__ = ("block_bytes", "blocks", "file", "free", "number")

    def __init__(self, block_bytes: int, file: int, number: int, blocks: int) -> None:
        self.block_bytes = block_bytes
        self.file = file
        self.number = number
        self.blocks = blocks
        self.free = (1 << blocks) - 1

    def used(self) -> Iterator[Block]:
        first = self.number * self.blocks
        for bit in range(self.blocks):
            if not self.free >> bit & 1:
                yield Block(self.block_bytes, self.file, first + bit)


class _Class:
    """The groups of one block size. `spacious[f]` are the groups of file f that have a free block, the one in use last (ordered sets)."""

    def __init__(self, block_bytes: int, group_bytes: int, files: int) -> None:
        self.block_bytes = block_bytes
        self.blocks_per_group = max(1, group_bytes // block_bytes)
        self.group_bytes = self.blocks_per_group * block_bytes
        self.groups: dict[tuple[int, int], _Group] = {}
        self.spacious: list[dict[_Group, None]] = [{} for _ in range(files)]
        self.holes: list[list[int]] = [[] for _ in range(files)]
        """Group places of each file without space behind them, below `ends`: a heap, lowest first."""
        self.ends: list[int] = [0] * files
        self.empty: dict[_Group, None] = {}
        self.turn = 0
        self.sparing = block_bytes & block_bytes - 1 != 0
        """A KV-cache space's own class: it takes a further file only where one more half-empty group does not count."""

    def ensure_file(self, file: int) -> None:
        """A directory may have been written with more files a class than are configured now."""
        while len(self.ends) <= file:
            self.spacious.append({})
            self.holes.append([])
            self.ends.append(0)


class Allocator:
    def __init__(self, disk: Disk, files: DataFiles, config: EngineConfig) -> None:
        self._disk = disk
        self._files = files
        self._config = config
        self._classes: dict[int, _Class] = {}
        self._quarantine: deque[tuple[int, Block]] = deque()
        self._removed: deque[tuple[int, Block]] = deque()
        self._lingering: set[Block] = set()
        """Out of quarantine, but with a reader inside."""
        self._pins: dict[Block, int] = {}
        self.disputed: set[Block] = set()
        """Blocks that more than one chunk claimed when the target was opened: never given out again, so that damage cannot spread."""
        self.in_flight: set[Block] = set()
        """Given out, but in no record of the journal yet; the ledger takes out what it records."""
        self.watchers: list[set[Block]] = []
        """Each gets the blocks that are given out while it is in the list."""
        self.group_bytes_total = 0
        self.used_bytes = 0
        self.quarantined_bytes = 0
        self.removed_bytes = 0
        """In quarantine for nothing but the journal."""
        capacity, _ = disk.space()
        self._reserve = config.reserve_bytes or min(_MAX_RESERVE_BYTES, max(_MIN_RESERVE_BYTES, capacity // 100))
        self._keep_bytes = min(config.keep_empty_bytes, capacity // 64)

    # --- giving out and taking back ---

    def allocate(self, block_bytes: int) -> Block:
        """A free block; NoSpace when the target or the disk is full."""
        cls = self._class(block_bytes)
        group = self._group_with_space(cls)
        free = group.free
        lowest = free & -free
        cls.empty.pop(group, None)
        group.free = free ^ lowest
        if not group.free:
            del cls.spacious[group.file][group]
        block = Block(block_bytes, group.file, group.number * group.blocks + lowest.bit_length() - 1)
        self.used_bytes += block_bytes
        self.in_flight.add(block)
        for watcher in self.watchers:
            watcher.add(block)
        return block

    def _group_with_space(self, cls: _Class) -> _Group:
        """The group to take the next block from, last in its list. Files take turns, so that parallel writes meet different files, but a class
        that fits one group stays in one file: small targets should not hold four half-empty groups of every class."""
        files = self._config.files_per_class
        if cls.sparing:
            files = min(files, 1 + len(cls.groups) // GROUPS_A_FILE)
        turn = cls.turn
        cls.turn = (turn + 1) % files
        if cls.spacious[turn]:
            return next(reversed(cls.spacious[turn]))
        refused: NoSpace | None = None
        if len(cls.groups) > 1 or not any(cls.spacious):
            try:
                return self._new_group(cls, turn)
            except NoSpace as error:
                refused = error
        for groups in cls.spacious:
            if groups:
                return next(reversed(groups))
        raise refused or NoSpace("the target has no free block")

    def _new_group(self, cls: _Class, file: int) -> _Group:
        size = cls.group_bytes
        limit = self._config.capacity_bytes
        if limit and self.group_bytes_total + size > limit:
            raise NoSpace(f"the target has used its {limit} bytes: remove files or give it more")
        _, free = self._disk.space()
        if free - size < self._reserve:
            raise NoSpace(f"the target's disk has {free} bytes left and keeps {self._reserve} in reserve: remove files or add disks")
        number = cls.holes[file][0] if cls.holes[file] else cls.ends[file]
        self._files.get(cls.block_bytes, file).allocate(number * size, size)
        if cls.holes[file]:
            heapq.heappop(cls.holes[file])
        else:
            cls.ends[file] += 1
        group = _Group(cls.block_bytes, file, number, cls.blocks_per_group)
        cls.groups[file, number] = group
        cls.spacious[file][group] = None
        cls.empty[group] = None
        self.group_bytes_total += size
        return group

    def cancel(self, block: Block) -> None:
        """Take back a block that never came into the journal: nothing can refer to it, so it is free at once."""
        self.in_flight.discard(block)
        self._free(block)

    def quarantine(self, block: Block, sequence: int, *, removed: bool = False) -> None:
        """The record `sequence` freed this block. `removed`: nothing took its place."""
        if removed:
            self._removed.append((sequence, block))
            self.removed_bytes += block.block_bytes
        else:
            self._quarantine.append((sequence, block))
            self.quarantined_bytes += block.block_bytes

    def release(self, below: int) -> None:
        """A sync has covered all records with a sequence under `below`, and the bytes that they speak of."""
        while self._quarantine and self._quarantine[0][0] < below:
            _, block = self._quarantine.popleft()
            self.quarantined_bytes -= block.block_bytes
            self._leave_quarantine(block)
        self.release_removed(below)

    def release_removed(self, below: int) -> None:
        """The journal is synced under `below`."""
        while self._removed and self._removed[0][0] < below:
            _, block = self._removed.popleft()
            self.removed_bytes -= block.block_bytes
            self._leave_quarantine(block)

    def _leave_quarantine(self, block: Block) -> None:
        if block in self._pins:
            self._lingering.add(block)
        else:
            self._free(block)

    def pin(self, block: Block) -> None:
        """A reader goes in."""
        self._pins[block] = self._pins.get(block, 0) + 1

    def unpin(self, block: Block) -> None:
        left = self._pins[block] - 1
        if left:
            self._pins[block] = left
            return
        del self._pins[block]
        if block in self._lingering:
            self._lingering.discard(block)
            self._free(block)

    def _free(self, block: Block) -> None:
        if block in self.disputed:
            return
        cls = self._classes[block.block_bytes]
        number, bit = divmod(block.number, cls.blocks_per_group)
        group = cls.groups[block.file, number]
        if group.free >> bit & 1:
            raise AssertionError(f"{block} is freed twice: a chunk that still holds it would lose its bytes")
        if not group.free:
            cls.spacious[block.file][group] = None
        group.free |= 1 << bit
        self.used_bytes -= block.block_bytes
        if group.free == (1 << group.blocks) - 1:
            cls.empty[group] = None

    # --- giving space back to the disk ---

    def take_empty_groups(self, *, all_of_them: bool = False) -> list[_Group]:
        """Empty groups beyond those that are kept, taken out of use: pass them to `give_back` and then to `forget`. A class keeps at least one."""
        taken = []
        left = self._keep_bytes
        for cls in self._classes.values():
            keep = 0 if all_of_them else min(len(cls.empty), max(1, left // cls.group_bytes))
            left = max(0, left - keep * cls.group_bytes)
            for group in list(cls.empty)[: len(cls.empty) - keep]:  # the newest stay: they are the likeliest to be in the page cache
                del cls.groups[group.file, group.number], cls.spacious[group.file][group], cls.empty[group]
                taken.append(group)
        return taken

    def give_back(self, groups: list[_Group]) -> None:
        """Punch them out of their files; without the engine's lock."""
        for group in groups:
            size = group.blocks * group.block_bytes
            self._files.get(group.block_bytes, group.file).punch(group.number * size, size)

    def forget(self, groups: list[_Group]) -> None:
        """Their places may be used again."""
        for group in groups:
            cls = self._classes[group.block_bytes]
            heapq.heappush(cls.holes[group.file], group.number)
            self.group_bytes_total -= cls.group_bytes

    # --- opening ---

    def load_used(self, block: Block) -> bool:
        """A chunk of the index holds this block. False: another one does too."""
        cls = self._class(block.block_bytes)
        cls.ensure_file(block.file)
        number, bit = divmod(block.number, cls.blocks_per_group)
        group = cls.groups.get((block.file, number))
        if group is None:
            group = _Group(block.block_bytes, block.file, number, cls.blocks_per_group)
            cls.groups[block.file, number] = group
            self.group_bytes_total += cls.group_bytes
        if not group.free >> bit & 1:
            self.disputed.add(block)
            return False
        group.free ^= 1 << bit
        self.used_bytes += block.block_bytes
        return True

    def load_done(self) -> tuple[list[_Group], list[_Group]]:
        """All used blocks are loaded: find (places without a group, groups that reach past the end of their file).

        A crash may have left space behind the former (`give_back` them), and a power loss may have undone the allocation of the latter though
        its bytes are there (`allocate_again`).
        """
        sizes = {key: self._files.get(*key).size() for key in self._files.existing()}
        for (block_bytes, file), size in sizes.items():
            cls = self._class(block_bytes)
            cls.ensure_file(file)
            cls.ends[file] = -(-size // cls.group_bytes)
        unused, short = [], []
        for cls in self._classes.values():
            for (file, number), group in sorted(cls.groups.items()):
                cls.ends[file] = max(cls.ends[file], number + 1)
                if (number + 1) * cls.group_bytes > sizes.get((cls.block_bytes, file), 0):
                    short.append(group)
                if group.free:
                    cls.spacious[file][group] = None
            for file, end in enumerate(cls.ends):
                missing = [number for number in range(end) if (file, number) not in cls.groups]
                cls.holes[file] = missing
                unused += [_Group(cls.block_bytes, file, number, cls.blocks_per_group) for number in missing]
        return unused, short

    def allocate_again(self, groups: list[_Group]) -> None:
        for group in groups:
            size = group.blocks * group.block_bytes
            self._files.get(group.block_bytes, group.file).allocate(group.number * size, size)

    # --- looking ---

    def groups(self) -> list[_Group]:
        return [group for cls in self._classes.values() for group in cls.groups.values()]

    def in_use(self, block: Block) -> bool:
        """Taken: by a chunk, in quarantine, or on its way into the journal."""
        cls = self._classes.get(block.block_bytes)
        if cls is None:
            return False
        number, bit = divmod(block.number, cls.blocks_per_group)
        group = cls.groups.get((block.file, number))
        return group is not None and not group.free >> bit & 1

    def watch_given_out(self) -> set[Block]:
        """The set of blocks that come to a chunk from now on (with those under way), kept up until `stop_watching`."""
        given_out = set(self.in_flight)
        self.watchers.append(given_out)
        return given_out

    def stop_watching(self, given_out: set[Block]) -> None:
        self.watchers = [watcher for watcher in self.watchers if watcher is not given_out]

    def waiting(self) -> set[Block]:
        """Freed, but not free yet."""
        return {block for queue in (self._quarantine, self._removed) for _, block in queue} | self._lingering

    def space(self) -> tuple[int, int]:
        """(bytes in blocks that chunks hold, bytes that blocks may still take)."""
        held = self.used_bytes - self.quarantined_bytes - self.removed_bytes
        _, disk_free = self._disk.space()
        growth = max(0, disk_free - self._reserve)
        if self._config.capacity_bytes:
            growth = min(growth, max(0, self._config.capacity_bytes - self.group_bytes_total))
        return held, self.group_bytes_total - held + growth

    def class_space(self, block_bytes: int) -> tuple[int, int]:
        """(bytes of its groups, blocks of it that chunks hold)."""
        cls = self._classes.get(block_bytes)
        if cls is None:
            return 0, 0
        taken = sum(group.blocks - group.free.bit_count() for group in cls.groups.values())
        waiting = sum(block.block_bytes == block_bytes for block in self.waiting())
        return len(cls.groups) * cls.group_bytes, taken - waiting

    def _class(self, block_bytes: int) -> _Class:
        cls = self._classes.get(block_bytes)
        if cls is None:
            cls = self._classes[block_bytes] = _Class(block_bytes, self._config.group_bytes, self._config.files_per_class)
        return cls
