"""The data directories of a storage process: what is found in them at the start."""

from __future__ import annotations

from pathlib import Path

from kvfs.common.boundary.clock import SystemClock
from kvfs.common.boundary.random import SystemRandom
from kvfs.storage.config import StorageConfig
from kvfs.storage.disks import Disks


def test_a_target_whose_making_was_cut_short_is_none_yet(tmp_path: Path) -> None:
    """Opened at the start it would be bound to no cluster, for that is not known before the manager has answered; so it could not be opened again."""
    config = StorageConfig(data=(str(tmp_path),))
    disks = Disks(config, SystemClock(), SystemRandom())
    directory = disks.directories[0]
    disks.open_target(directory, 1001, "demo").close()
    for target_id, file in ((1002, ""), (1003, "LOCK"), (1004, "superblock.77-139710.tmp"), (1005, "superblock")):
        folder = tmp_path / "targets" / str(target_id)
        folder.mkdir()
        if file:
            (folder / file).write_bytes(b"")
    disks.close()
    again = Disks(config, SystemClock(), SystemRandom())
    assert again.directories[0].target_ids == [1001, 1005], "what has a superblock is a target, also when that is damaged"
    for target_id in (1001, 1002, 1003, 1004):
        engine = again.open_target(directory, target_id, "demo")
        assert engine.superblock.cluster_id == "demo"
        engine.close()
    again.close()
