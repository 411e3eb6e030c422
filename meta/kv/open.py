"""Which engine an address names: `memory`, or `lmdb:/directory`."""

from __future__ import annotations

from kvfs.common.boundary.real_disk import RealDisk
from kvfs.common.errors import ConfigError
from kvfs.meta.kv.engine import Engine
from kvfs.meta.kv.lmdb_engine import LmdbEngine
from kvfs.meta.kv.memory import MemoryEngine


def open_engine(url: str) -> Engine:
    """Open the store, creating it where there is none. Blocks while a journal is replayed; call it before serving, inside trio."""
    scheme, _, rest = url.partition(":")
    if scheme == "memory" and not rest:
        return MemoryEngine()
    if scheme == "lmdb" and rest:
        disk = RealDisk(rest)
        disk.makedirs("")
        return LmdbEngine(disk)
    raise ConfigError(f"kv = {url!r}: expected 'memory' or 'lmdb:/path/to/a/directory'")
