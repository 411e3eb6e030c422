"""The blocks of file chunks of one size: groups of consecutive blocks, and which blocks of them are free, in memory.

Space is taken from the disk and given back by the group, so that few calls are made and a file's blocks lie side by side. Called under the engine's
lock. It must never touch the disk: `allocate` is told how to take space.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping

from kvfs.common.errors import NoSpace
from kvfs.storage.engine.classes import Block, Stretch

TakeSpace = Callable[[Stretch], None]
"""Has space put behind these places; NoSpace."""


class Group:
    """Consecutive blocks of one file. Bit i of `free` is block first + i."""

    __slots__ = ("block_bytes", "blocks", "file", "free", "number")

    def __init__(self, block_bytes: int, file: int, number: int, blocks: int) -> None:
        self.block_bytes = block_bytes
        self.file = file
        self.number = number
        self.blocks = blocks
        self.free = (1 << blocks) - 1

    @property
    def stretch(self) -> Stretch:
        return Stretch(self.block_bytes, self.file, self.number * self.blocks, self.blocks)

    def used(self) -> Iterator[Block]:
        first = self.number * self.blocks
        for bit in range(self.blocks):
            if not self.free >> bit & 1:
                yield Block(self.block_bytes, self.file, first + bit)


class GroupClass:
    """`_spacious[f]` are the groups of file f that have a free block, the one in use last (ordered sets)."""

    def __init__(self, block_bytes: int, group_bytes: int, files: int) -> None:
        self.block_bytes = block_bytes
        self.blocks_per_group = max(1, group_bytes // block_bytes)
        self.group_bytes = self.blocks_per_group * block_bytes
        self._groups: dict[tuple[int, int], Group] = {}
        self._spacious: list[dict[Group, None]] = [{} for _ in range(files)]
        self._holes: list[list[int]] = [[] for _ in range(files)]
        """Group places of each file without space behind them, below `_ends`: a heap, lowest first."""
        self._ends: list[int] = [0] * files
        self.empty: dict[Group, None] = {}
        self._files = files
        self._turn = 0

    # --- giving out and taking back ---

    def allocate(self, take: TakeSpace) -> Block:
        group = self._group_with_space(take)
        free = group.free
        lowest = free & -free
        self.empty.pop(group, None)
        group.free = free ^ lowest
        if not group.free:
            del self._spacious[group.file][group]
        return Block(self.block_bytes, group.file, group.number * group.blocks + lowest.bit_length() - 1)

    def _group_with_space(self, take: TakeSpace) -> Group:
        """The group to take the next block from, last in its list. Files take turns, so that parallel writes meet different files, but a class
        that fits one group stays in one file: small targets should not hold four half-empty groups of every class."""
        turn = self._turn
        self._turn = (turn + 1) % self._files
        if self._spacious[turn]:
            return next(reversed(self._spacious[turn]))
        refused: NoSpace | None = None
        if len(self._groups) > 1 or not any(self._spacious):
            try:
                return self._new_group(turn, take)
            except NoSpace as error:
                refused = error
        for groups in self._spacious:
            if groups:
                return next(reversed(groups))
        raise refused or NoSpace("the target has no free block")

    def _new_group(self, file: int, take: TakeSpace) -> Group:
        number = self._holes[file][0] if self._holes[file] else self._ends[file]
        group = Group(self.block_bytes, file, number, self.blocks_per_group)
        take(group.stretch)
        if self._holes[file]:
            heapq.heappop(self._holes[file])
        else:
            self._ends[file] += 1
        self._groups[file, number] = group
        self._spacious[file][group] = None
        self.empty[group] = None
        return group

    def give(self, block: Block) -> bool:
        """The block is free. False: it was already."""
        number, bit = divmod(block.number, self.blocks_per_group)
        group = self._groups[block.file, number]
        if group.free >> bit & 1:
            return False
        if not group.free:
            self._spacious[block.file][group] = None
        group.free |= 1 << bit
        if group.free == (1 << group.blocks) - 1:
            self.empty[group] = None
        return True

    def in_use(self, block: Block) -> bool:
        number, bit = divmod(block.number, self.blocks_per_group)
        group = self._groups.get((block.file, number))
        return group is not None and not group.free >> bit & 1

    # --- the disk ---

    def trim(self, keep: int) -> list[Stretch]:
        """All empty groups but `keep` are leaving; the newest stay: they are the likeliest to be in the page cache."""
        taken = []
        for group in list(self.empty)[: len(self.empty) - keep]:
            del self._groups[group.file, group.number], self._spacious[group.file][group], self.empty[group]
            taken.append(group.stretch)
        return taken

    def forget(self, places: Stretch) -> None:
        """Nothing is behind them any more."""
        heapq.heappush(self._holes[places.file], places.first // self.blocks_per_group)

    # --- opening ---

    def load_used(self, block: Block, taken: TakeSpace) -> bool:
        """A chunk holds it; `taken` is told where there must be space. False: another chunk holds it too."""
        self._ensure_file(block.file)
        number, bit = divmod(block.number, self.blocks_per_group)
        group = self._groups.get((block.file, number))
        if group is None:
            group = self._groups[block.file, number] = Group(block.block_bytes, block.file, number, self.blocks_per_group)
            taken(group.stretch)
        if not group.free >> bit & 1:
            return False
        group.free ^= 1 << bit
        return True

    def load_files(self, sizes: Mapping[int, int]) -> tuple[list[Stretch], list[Stretch]]:
        """All used ones are loaded: (places without a group inside the files, groups that reach past the end of theirs). `sizes`: by file."""
        for file, size in sizes.items():
            self._ensure_file(file)
            self._ends[file] = -(-size // self.group_bytes)
        unused, short = [], []
        for (file, number), group in sorted(self._groups.items()):
            self._ends[file] = max(self._ends[file], number + 1)
            if (number + 1) * self.group_bytes > sizes.get(file, 0):
                short.append(group.stretch)
            if group.free:
                self._spacious[file][group] = None
        for file, end in enumerate(self._ends):
            missing = [number for number in range(end) if (file, number) not in self._groups]
            self._holes[file] = missing
            unused += [Group(self.block_bytes, file, number, self.blocks_per_group).stretch for number in missing]
        return unused, short

    def _ensure_file(self, file: int) -> None:
        """A directory may have been written with more files a class than are configured now."""
        while len(self._ends) <= file:
            self._spacious.append({})
            self._holes.append([])
            self._ends.append(0)

    # --- looking ---

    def parts(self) -> list[Group]:
        return list(self._groups.values())
