"""A target's own files, mended while it is open."""

from __future__ import annotations

import pytest
from engine_world import IDENTITY, SMALL, ManualClock, cid, noise, write

from kvfs.common.boundary.random import SeededRandom
from kvfs.common.errors import IndexCorrupt
from kvfs.common.sim.disk import SimDisk
from kvfs.storage.engine.engine import ChunkEngine


def test_the_row_that_leads_to_the_journal_is_mended_while_it_is_known() -> None:
    """Nobody reads it until the next opening, which cannot go on without it."""
    disk = SimDisk()
    engine = ChunkEngine(disk, ManualClock(), IDENTITY, SMALL)
    data = noise(1, 5000)
    engine.apply(write(cid(1), 0, data), 1)
    engine._ledger.checkpoint()
    assert engine.repair_own_files() == []

    def flip() -> None:
        rows = disk.open_map("index", size_bytes=1 << 20)
        row = bytearray(rows.get(b"s") or b"")
        row[3] ^= 4
        rows.commit({b"s": bytes(row)})

    flip()
    assert engine.repair_own_files() == ["the index did not say with which record of the journal it goes on"]
    assert engine.repair_own_files() == []
    disk.kill()
    again = ChunkEngine(disk.reopen(), ManualClock(), IDENTITY, SMALL)
    assert again.get(cid(1)) is not None
    disk.crash(SeededRandom(1))
    disk = disk.reopen()
    flip()
    with pytest.raises(IndexCorrupt, match="which record of the journal"):
        ChunkEngine(disk, ManualClock(), IDENTITY, SMALL)
