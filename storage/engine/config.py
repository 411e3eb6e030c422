"""What can be set on a chunk engine, with defaults that fit one target on one disk of a small or a large machine."""

from __future__ import annotations

from dataclasses import dataclass

_MIB = 1 << 20
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class EngineConfig:
    capacity_bytes: int = 0
    """What the target may take for blocks; 0: whatever the disk has."""
    reserve_bytes: int = 0
    """Disk space never given to blocks, so that the index and the journal can always go on; 0: 1 % of the disk, within 16 MiB .. 1 GiB."""
    group_bytes: int = 16 * _MIB
    """Space is taken from the disk in groups of blocks of this size, and given back when a group is empty."""
    keep_empty_bytes: int = 512 * _MIB
    """Empty groups kept for the next writes, at most (and no more than 1/64 of the disk)."""
    rest_s: float = 10.0
    """After so long without a change they, too, are given back."""
    files_per_class: int = 4
    """Writes into one file exclude each other in the kernel: several files let them run side by side."""
    index_bytes: int = 64 * _GIB
    """The largest index (an address-space limit, not an allocation): about 400 bytes a chunk of 1 MiB."""
    journal_bytes: int = 8 * _MIB
    """A journal segment of this size is moved into the index ..."""
    overlay_entries: int = 20_000
    """... or one with this many changed chunks."""
    unsynced_bytes: int = 4 * _GIB
    """With this much written since the last sync the engine syncs by itself: it bounds what a restart has to re-read."""
    quarantine_bytes: int = 1 * _GIB
    """The same for freed blocks, which cannot be used again before a sync."""
    removed_bytes: int = 16 * _MIB
    """The same for the blocks of removed chunks, for which it is enough to sync the journal."""
    cached_metas: int = 16_384
    tags: int = 65_536
    """Idempotency records kept, the least recently used go first ..."""
    tag_age_s: float = 3600.0
    """... as do those that have not been used for this long."""
    background: bool = True
    """A thread moves the journal into the index; False: the call that reaches a limit does it (simulation)."""
