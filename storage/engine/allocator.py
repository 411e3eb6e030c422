"""Which blocks are in use: classes of blocks of one size, in memory, rebuilt from the index when the target opens.

For file chunks (groups.py) space is taken from the disk one group (16 MiB, or one larger block) at a time, with fallocate, so that writing into a
block never meets a full disk. Some empty groups are kept (their pages are in the page cache: writing them again costs a fraction of fresh ones), the
others are given back to the disk; when it is full any class may take the space of all. Blocks of KV-cache spaces are packed more densely, in classes
of their own (slabs.py).

Invariants:
- a block is given out only while it is free, and free only when no chunk, no reader and no state that a power loss could bring back uses it:
  a freed block first waits in quarantine until a sync has covered the record that freed it, and until its last reader let go. Where another block
  took its place, the sync must cover the bytes there too; where the chunk was removed, the record alone;
- the sum of what was taken stays under the capacity, and the disk keeps the reserve.
Everything here is called under the engine's lock, but for `give_back`. It must never touch the bytes of a block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from kvfs.common.boundary.disk import Disk
from kvfs.common.errors import NoSpace
from kvfs.storage.engine.classes import Block, Stretch
from kvfs.storage.engine.config import EngineConfig
from kvfs.storage.engine.files import DataFiles
from kvfs.storage.engine.groups import Group, GroupClass
from kvfs.storage.engine.slabs import Segment, SlabClass

_MIN_RESERVE_BYTES = 16 << 20
_MAX_RESERVE_BYTES = 1 << 30
_MIN_WAITING_SLAB_BYTES = 2 << 20
_WAITING_SLAB_SHARE = 64


class Allocator:
    def __init__(self, disk: Disk, files: DataFiles, config: EngineConfig) -> None:
        self._disk = disk
        self._files = files
        self._config = config
        self._classes: dict[int, GroupClass] = {}
        self._slabs: dict[int, SlabClass] = {}
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
        """In quarantine for nothing but the journal ..."""
        self.removed_slab_bytes = 0
        """... and of these, KV-cache blocks."""
        self.slab_bytes_total = 0
        self.untidy = False
        """There may be space of KV-cache blocks that nobody uses: `take_spare_slabs` is due soon."""
        capacity, _ = disk.space()
        self._reserve = config.reserve_bytes or min(_MAX_RESERVE_BYTES, max(_MIN_RESERVE_BYTES, capacity // 100))
        self._keep_bytes = min(config.keep_empty_bytes, capacity // 64)

    # --- giving out and taking back ---

    def allocate(self, block_bytes: int, *, slab: bool = False) -> Block:
        """A free block, `slab`: among those of KV-cache spaces. NoSpace when the target or the disk is full."""
        block = (self._slab_class(block_bytes) if slab else self._class(block_bytes)).allocate(self._take)
        self.used_bytes += block_bytes
        self.in_flight.add(block)
        for watcher in self.watchers:
            watcher.add(block)
        return block

    def _take(self, places: Stretch) -> None:
        size = places.size
        limit = self._config.capacity_bytes
        if limit and self.group_bytes_total + size > limit:
            raise NoSpace(f"the target has used its {limit} bytes: remove files or give it more")
        _, free = self._disk.space()
        if free - size < self._reserve:
            raise NoSpace(f"the target's disk has {free} bytes left and keeps {self._reserve} in reserve: remove files or add disks")
        self._files.get(places.block_bytes, places.file).allocate(places.start, size)
        self._count(places)

    def _count(self, places: Stretch) -> None:
        self.group_bytes_total += places.size
        if places.slab:
            self.slab_bytes_total += places.size

    def cancel(self, block: Block) -> None:
        """Take back a block that never came into the journal: nothing can refer to it, so it is free at once."""
        self.in_flight.discard(block)
        self._free(block)

    def quarantine(self, block: Block, sequence: int, *, removed: bool = False) -> None:
        """The record `sequence` freed this block. `removed`: nothing took its place."""
        if removed:
            self._removed.append((sequence, block))
            self.removed_bytes += block.block_bytes
            if block.slab:
                self.removed_slab_bytes += block.block_bytes
                self.untidy = True
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
            if block.slab:
                self.removed_slab_bytes -= block.block_bytes
            self._leave_quarantine(block)

    def wants_release(self) -> bool:
        """Much waits for the journal: of KV-cache blocks less is let wait, for their spaces are to be full of blocks."""
        if self.removed_bytes > self._config.removed_bytes:
            return True
        return self.removed_slab_bytes > max(_MIN_WAITING_SLAB_BYTES, self.slab_bytes_total // _WAITING_SLAB_SHARE)

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
        if not self._home(block).give(block):
            raise AssertionError(f"{block} is freed twice: a chunk that still holds it would lose its bytes")
        self.used_bytes -= block.block_bytes
        if block.slab:
            self.untidy = True

    # --- giving space back to the disk ---

    def take_empty_groups(self, *, all_of_them: bool = False) -> list[Stretch]:
        """Empty groups beyond those that are kept, taken out of use: pass them to `give_back` and then to `forget`. A class keeps at least one.
        All of them: also the free places of KV-cache blocks."""
        taken: list[Stretch] = []
        left = self._keep_bytes
        for cls in self._classes.values():
            keep = 0 if all_of_them else min(len(cls.empty), max(1, left // cls.group_bytes))
            left = max(0, left - keep * cls.group_bytes)
            taken += cls.trim(keep)
        return taken + self.take_spare_slabs(all_of_them=True) if all_of_them else taken

    def take_spare_slabs(self, *, all_of_them: bool = False) -> list[Stretch]:
        """Free places of KV-cache blocks that no write needed since the last call, taken out of use; for `give_back` and `forget` likewise."""
        taken = [places for cls in self._slabs.values() for places in cls.trim(all_of_them=all_of_them)]
        self.slab_bytes_total -= sum(places.size for places in taken)
        self.untidy = self.removed_slab_bytes > 0 or any(cls.free > cls.spare for cls in self._slabs.values())
        return taken

    def give_back(self, stretches: list[Stretch]) -> None:
        """Punch them out of their files; without the engine's lock."""
        for places in stretches:
            self._files.get(places.block_bytes, places.file).punch(places.start, places.size)

    def forget(self, stretches: list[Stretch]) -> None:
        """Their places may be used again."""
        for places in stretches:
            self._home(places).forget(places)
            self.group_bytes_total -= places.size
        self.remove_vacant({places.block_bytes for places in stretches if places.slab})

    def remove_vacant(self, sizes: Iterable[int] | None = None) -> None:
        """Sizes of KV-cache blocks (None: all) of which none is left have no files either."""
        for block_bytes in list(self._slabs) if sizes is None else sizes:
            slabs = self._slabs.get(block_bytes)
            if slabs is not None and slabs.vacant:
                for number in slabs.file_numbers:
                    self._files.remove((block_bytes, number))
                del self._slabs[block_bytes]

    # --- opening ---

    def load_used(self, block: Block) -> bool:
        """A chunk of the index holds this block. False: another one does too."""
        if not self._home(block).load_used(block, self._count):
            self.disputed.add(block)
            return False
        self.used_bytes += block.block_bytes
        return True

    def load_done(self) -> tuple[list[Stretch], list[Stretch]]:
        """All used blocks are loaded: find (places that nothing holds, places in use that reach past the end of their file).

        A crash may have left space behind the former (`give_back` them), and a power loss may have undone the allocation of the latter though
        its bytes are there (`allocate_again`).
        """
        sizes: dict[GroupClass | SlabClass, dict[int, int]] = {}
        for block_bytes, file in self._files.existing():
            home = self._home(Stretch(block_bytes, file, 0, 0))
            sizes.setdefault(home, {})[file] = self._files.get(block_bytes, file).size()
        unused: list[Stretch] = []
        short: list[Stretch] = []
        homes: list[GroupClass | SlabClass] = [*self._classes.values(), *self._slabs.values()]
        for home in homes:
            without, past = home.load_files(sizes.get(home, {}))
            unused += without
            short += past
        return unused, short

    def allocate_again(self, stretches: list[Stretch]) -> None:
        for places in stretches:
            self._files.get(places.block_bytes, places.file).allocate(places.start, places.size)

    # --- looking ---

    def parts(self) -> list[Group | Segment]:
        """Everything that may have blocks in use, in pieces of bounded size."""
        found: list[Group | Segment] = [group for cls in self._classes.values() for group in cls.parts()]
        return found + [segment for slabs in self._slabs.values() for segment in slabs.parts()]

    def in_use(self, block: Block) -> bool:
        """Taken: by a chunk, in quarantine, or on its way into the journal."""
        return block.block_bytes in (self._slabs if block.slab else self._classes) and self._home(block).in_use(block)

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

    def slab_space(self, block_bytes: int) -> tuple[int, int]:
        """Of the KV-cache blocks of one size: (bytes taken from the disk, blocks that chunks hold)."""
        slabs = self._slabs.get(block_bytes)
        if slabs is None:
            return 0, 0
        waiting = sum(block.block_bytes == block_bytes and block.slab for block in self.waiting())
        return slabs.places * block_bytes, slabs.places - slabs.free - waiting

    def _home(self, place: Block | Stretch) -> GroupClass | SlabClass:
        return self._slab_class(place.block_bytes) if place.slab else self._class(place.block_bytes)

    def _class(self, block_bytes: int) -> GroupClass:
        cls = self._classes.get(block_bytes)
        if cls is None:
            cls = self._classes[block_bytes] = GroupClass(block_bytes, self._config.group_bytes, self._config.files_per_class)
        return cls

    def _slab_class(self, block_bytes: int) -> SlabClass:
        slabs = self._slabs.get(block_bytes)
        if slabs is None:
            slabs = self._slabs[block_bytes] = SlabClass(block_bytes, self._config.files_per_class)
        return slabs
