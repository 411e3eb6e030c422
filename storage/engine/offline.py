"""fsck of a target's directory while no service has it open: `kvfs fsck --target DIR`.

Opening a target completes what a crash left half done, exactly as the storage service would at its start; nothing else in the directory changes.
"""

from __future__ import annotations

from pathlib import Path

from kvfs.common.boundary.clock import SystemClock
from kvfs.common.boundary.real_disk import RealDisk
from kvfs.common.errors import WrongDataDirectory
from kvfs.storage.engine import superblock
from kvfs.storage.engine.config import EngineConfig
from kvfs.storage.engine.engine import ChunkEngine


def check_directory(path: Path, *, read_data: bool = False) -> tuple[int, int, list[str]]:
    """(chunks, bytes, problems). Raises what opening raises: DirectoryInUse, WrongDataDirectory, FormatTooNew, IndexCorrupt."""
    disk = RealDisk(path)
    identity = superblock.load(disk)
    if identity is None:
        raise WrongDataDirectory(f"{path} is not the directory of a target: it has no superblock (look in DATA/targets/<target id>)")
    engine = ChunkEngine(disk, SystemClock(), identity, EngineConfig(background=False))
    try:
        report = engine.check(read_data=read_data)
    finally:
        engine.close()
    return report.chunks, report.bytes, report.problems
