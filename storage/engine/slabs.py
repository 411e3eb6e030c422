"""The blocks of KV-cache spaces of one size: which are free, in memory; kept so that nearly all bytes taken from the disk are bytes of blocks.

Space is taken and given back by the block (a fallocate costs some microseconds, the bytes of the smallest usual block 17), in files of their own:
chunks of files never share a file with them. A place is absent (nothing is behind it), free, taken, or leaving (on its way back to the disk).

Invariants:
- blocks are given out lowest first, and a new place is taken only when no place is free, so that churn does not spread;
- of H blocks held no more than H / 64 free ones are kept for long, and places are taken H / 128 at a time: a full space is packed to 98 % or
  better, whatever its size;
- what is on its way back to the disk is neither given out nor taken anew before `forget`.
Called under the engine's lock. It must never touch the disk: `allocate` is told how to take space.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sortedcontainers import SortedSet

from kvfs.common.errors import NoSpace
from kvfs.storage.engine.classes import SLAB_FILE, Block, Stretch
from kvfs.storage.engine.groups import TakeSpace

SEGMENT_BLOCKS = 256
_ALL = (1 << SEGMENT_BLOCKS) - 1
_SPARE_SHARE = 64
_GROWTH_SHARE = 128
_GROWTH_BYTES = 2 << 20
_BLOCKS_A_FILE = 16
"""A further file, for writes side by side, only where there are so many blocks: small classes need no more than one descriptor."""


class Segment:
    """SEGMENT_BLOCKS places of one file; bit i of a mask is place first + i. Taken: neither free nor absent nor leaving."""

    __slots__ = ("absent", "block_bytes", "file", "free", "leaving", "number")

    def __init__(self, block_bytes: int, file: int, number: int) -> None:
        self.block_bytes = block_bytes
        self.file = file
        self.number = number
        self.free = 0
        self.absent = _ALL
        self.leaving = 0

    def stretch(self, low: int, count: int) -> Stretch:
        return Stretch(self.block_bytes, self.file, self.number * SEGMENT_BLOCKS + low, count)

    def below(self, number: int) -> int:
        """The mask of places with a smaller number in the file."""
        return (1 << max(0, min(SEGMENT_BLOCKS, number - self.number * SEGMENT_BLOCKS))) - 1

    def used(self) -> Iterator[Block]:
        for low, count in _runs(_ALL & ~(self.free | self.absent | self.leaving)):
            yield from self.stretch(low, count).places()


class _File:
    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.spacious = SortedSet()
        """Numbers of segments with a free place ..."""
        self.growable = SortedSet()
        """... and of those with an absent one."""
        self.places = 0
        """Taken from the disk."""


class SlabClass:
    def __init__(self, block_bytes: int, files: int) -> None:
        self.block_bytes = block_bytes
        self._files_max = files
        self._files = [_File()]
        self._turn = 0
        self.places = 0
        """Taken from the disk: used and free."""
        self.free = 0
        self._idle = 0
        """The fewest that were free since the last `trim`."""
        self._leaving = 0

    @property
    def file_numbers(self) -> range:
        return range(SLAB_FILE, SLAB_FILE + len(self._files))

    @property
    def vacant(self) -> bool:
        """Nothing is behind any place, and nothing on its way back."""
        return not self.places and not self._leaving

    @property
    def spare(self) -> int:
        """As many free places are kept for the next writes."""
        return (self.places - self.free) // _SPARE_SHARE

    # --- giving out and taking back ---

    def allocate(self, take: TakeSpace) -> Block:
        """Files take turns, so that parallel writes meet different files."""
        if not self.free:
            self._grow(take)
        while not self._files[self._turn].spacious:
            self._turn = (self._turn + 1) % len(self._files)
        file = self._files[self._turn]
        self._turn = (self._turn + 1) % len(self._files)
        number = file.spacious[0]
        segment = file.segments[number]
        lowest = segment.free & -segment.free
        segment.free ^= lowest
        if not segment.free:
            file.spacious.remove(number)
        self.free -= 1
        self._idle = min(self._idle, self.free)
        return Block(self.block_bytes, segment.file, number * SEGMENT_BLOCKS + lowest.bit_length() - 1)

    def give(self, block: Block) -> bool:
        """The block is free. False: it was already."""
        file, segment, bit = self._at(block)
        if (segment.free | segment.absent | segment.leaving) & bit:
            return False
        segment.free |= bit
        file.spacious.add(segment.number)
        self.free += 1
        return True

    def in_use(self, block: Block) -> bool:
        place, number = block.file - SLAB_FILE, block.number // SEGMENT_BLOCKS
        if place >= len(self._files) or number >= len(self._files[place].segments):
            return False
        _, segment, bit = self._at(block)
        return not (segment.free | segment.absent | segment.leaving) & bit

    def _at(self, block: Block) -> tuple[_File, Segment, int]:
        file = self._files[block.file - SLAB_FILE]
        number, bit = divmod(block.number, SEGMENT_BLOCKS)
        return file, file.segments[number], 1 << bit

    # --- the disk ---

    def _grow(self, take: TakeSpace) -> None:
        """Take the lowest absent places of the file that has the fewest."""
        wanted = max(1, min((self.places - self.free) // _GROWTH_SHARE, _GROWTH_BYTES // self.block_bytes))
        if len(self._files) < min(self._files_max, 1 + self.places // _BLOCKS_A_FILE):
            self._files.append(_File())
        place = min(range(len(self._files)), key=lambda place: self._files[place].places)
        file = self._files[place]
        if not file.growable:
            self._extend(place, len(file.segments) + 1)
        segment = file.segments[file.growable[0]]
        low, count = next(_runs(segment.absent))
        places = segment.stretch(low, min(count, wanted))
        try:
            take(places)
        except NoSpace:
            if places.blocks == 1:
                raise
            places = segment.stretch(low, 1)
            take(places)
        _, _, mask = self._mask(places)
        segment.absent ^= mask
        segment.free |= mask
        if not segment.absent:
            file.growable.remove(segment.number)
        file.spacious.add(segment.number)
        file.places += places.blocks
        self.places += places.blocks
        self.free += places.blocks

    def trim(self, *, all_of_them: bool = False) -> list[Stretch]:
        """Free places beyond the spare ones that no write needed since the last call, the highest first: they are leaving."""
        left = self.free if all_of_them else self._idle - self.spare
        taken: list[Stretch] = []
        for file in sorted(self._files, key=lambda file: -file.places):
            while left > 0 and file.spacious:
                segment = file.segments[file.spacious[-1]]
                runs = list(_runs(segment.free))
                for low, count in reversed(runs):
                    gone = min(count, left)
                    stretch = segment.stretch(low + count - gone, gone)
                    _, _, mask = self._mask(stretch)
                    segment.free ^= mask
                    segment.leaving |= mask
                    taken.append(stretch)
                    file.places -= gone
                    self.places -= gone
                    self.free -= gone
                    left -= gone
                    self._leaving += gone
                    if not left:
                        break
                if not segment.free:
                    file.spacious.remove(segment.number)
        self._idle = self.free
        return taken

    def forget(self, places: Stretch) -> None:
        """Nothing is behind them any more."""
        file, segment, mask = self._mask(places)
        self._leaving -= places.blocks
        segment.leaving ^= mask
        segment.absent |= mask
        file.growable.add(segment.number)

    def _mask(self, places: Stretch) -> tuple[_File, Segment, int]:
        file, segment, lowest = self._at(Block(places.block_bytes, places.file, places.first))
        return file, segment, (1 << places.blocks) * lowest - lowest

    # --- opening ---

    def load_used(self, block: Block, taken: TakeSpace) -> bool:
        """A chunk holds it; `taken` is told where there must be space. False: another chunk holds it too."""
        self._reach(block.file - SLAB_FILE, block.number // SEGMENT_BLOCKS + 1)
        file, segment, bit = self._at(block)
        if not segment.absent & bit:
            return False
        taken(Stretch(*block, 1))
        segment.absent ^= bit
        if not segment.absent:
            file.growable.remove(segment.number)
        file.places += 1
        self.places += 1
        return True

    def load_files(self, sizes: Mapping[int, int]) -> tuple[list[Stretch], list[Stretch]]:
        """All used ones are loaded: (absent places inside the files, used places that reach past the end of theirs). `sizes`: by file."""
        for number, size in sizes.items():
            self._reach(number - SLAB_FILE, -(-size // (self.block_bytes * SEGMENT_BLOCKS)))
        unused: list[Stretch] = []
        short: list[Stretch] = []
        for segment in self.parts():
            size = sizes.get(segment.file, 0)
            inside = segment.below(-(-size // self.block_bytes))
            whole = segment.below(size // self.block_bytes)
            unused += [segment.stretch(low, count) for low, count in _runs(segment.absent & inside)]
            short += [segment.stretch(low, count) for low, count in _runs(_ALL & ~segment.absent & ~whole)]
        return unused, short

    def _reach(self, place: int, segments: int) -> None:
        while len(self._files) <= place:
            self._files.append(_File())
        self._extend(place, segments)

    def _extend(self, place: int, segments: int) -> None:
        file = self._files[place]
        while len(file.segments) < segments:
            number = len(file.segments)
            file.segments.append(Segment(self.block_bytes, SLAB_FILE + place, number))
            file.growable.add(number)

    # --- looking ---

    def parts(self) -> list[Segment]:
        return [segment for file in self._files for segment in file.segments]


def _runs(mask: int) -> Iterator[tuple[int, int]]:
    """(lowest bit, how many) of each run of set bits."""
    low = 0
    while mask:
        zeros = (mask & -mask).bit_length() - 1
        mask >>= zeros
        low += zeros
        ones = (~mask & mask + 1).bit_length() - 1
        yield low, ones
        mask >>= ones
        low += ones
