"""A disk in memory that remembers every change in order, and can be rebuilt as a crash at any point would leave it; and short ways to call an engine.

`LogDisk.after_kill(n)`: the first n changes happened (the process died, the kernel lives). `LogDisk.after_power_loss(n, random)`: of those, what was
synced is there, and of every other page (512 bytes) some earlier state since the last sync; unsynced names may be missing, newest first.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvfs.common.boundary.clock import Clock
from kvfs.common.boundary.disk import Disk, DiskFile, OrderedMap
from kvfs.common.checksum import checksums
from kvfs.common.errors import InputOutput, NoSpace, NotFound
from kvfs.common.ids import chunk_id
from kvfs.storage.engine.config import EngineConfig
from kvfs.storage.engine.engine import ChunkEngine
from kvfs.storage.engine.requests import Update, UpdateKind
from kvfs.storage.engine.superblock import Superblock

PAGE_BYTES = 512
IDENTITY = Superblock("cluster", 7, b"n" * 16)
SMALL = EngineConfig(
    group_bytes=256 << 10,
    keep_empty_bytes=512 << 10,
    files_per_class=2,
    overlay_entries=40,
    journal_bytes=16 << 10,
    removed_bytes=128 << 10,
    background=False,
    reserve_bytes=1,
)


class ManualClock(Clock):
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def wall_ns(self) -> int:
        return int(self.now * 1e9)

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


class _Bytes:
    """File contents as the process sees them."""

    def __init__(self) -> None:
        self.data = bytearray()


class LogFile(DiskFile):
    def __init__(self, disk: LogDisk, name: str) -> None:
        self._disk, self._name = disk, name

    @property
    def _data(self) -> bytearray:
        return self._disk.files[self._name].data

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        total = 0
        for view in buffers:
            part = self._data[offset : offset + len(view)]
            view[: len(part)] = part
            offset += len(part)
            total += len(part)
        return total

    def try_read_into(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        return None if self._disk.cold else self.read_into(buffers, offset)

    def write(self, buffers: Sequence[Any], offset: int) -> None:
        self._disk.change("write", self._name, offset, b"".join(bytes(part) for part in buffers))

    def allocate(self, offset: int, length: int) -> None:
        if self._disk.full:
            raise NoSpace("the disk is full")
        self._disk.change("grow", self._name, offset + length, b"")

    def punch(self, offset: int, length: int) -> None:
        end = min(offset + length, self.size())
        if end > offset:
            self._disk.change("write", self._name, offset, bytes(end - offset))

    def truncate(self, length: int) -> None:
        self._disk.change("truncate", self._name, length, b"")

    def size(self) -> int:
        return len(self._data)

    def sync(self) -> None:
        if self._disk.fail_sync:
            raise InputOutput("planted: the device failed in fsync")
        self._disk.change("sync", self._name, 0, b"")

    def close(self) -> None:
        pass


class LogMap(OrderedMap):
    def __init__(self, disk: LogDisk, name: str) -> None:
        self._disk, self._name = disk, name

    def get(self, key: bytes) -> bytes | None:
        return self._disk.maps[self._name].get(key)

    def range(self, begin: bytes, end: bytes | None, *, limit: int = 0, reverse: bool = False) -> list[tuple[bytes, bytes]]:
        rows = sorted((key, value) for key, value in self._disk.maps[self._name].items() if key >= begin and (end is None or key < end))
        rows = rows[::-1] if reverse else rows
        return rows[:limit] if limit else rows

    def commit(self, writes: Mapping[bytes, bytes | None]) -> None:
        if self._disk.full:
            raise NoSpace("the index is full")
        self._disk.change("map", self._name, 0, dict(writes))

    def check(self) -> Iterator[int]:
        yield 0

    def count(self) -> int:
        return len(self._disk.maps[self._name])

    def close(self) -> None:
        pass


class LogDisk(Disk):
    def __init__(self) -> None:
        self.log: list[tuple[str, str, int, Any]] = []
        self.files: dict[str, _Bytes] = {}
        self.maps: dict[str, dict[bytes, bytes]] = {}
        self.base: LogDisk | None = None
        """What was there before the log began."""
        self.capacity_bytes = 1 << 30
        self.full = False
        self.cold = False
        self.fail_sync = False
        self.fail_write = ""
        """Writes to files whose name starts with this fail."""

    def change(self, what: str, name: str, offset: int, data: Any) -> None:
        if what == "write" and self.fail_write and name.startswith(self.fail_write):
            raise InputOutput("planted: the device failed in write")
        self.log.append((what, name, offset, data))
        self.play(what, name, offset, data)

    def play(self, what: str, name: str, offset: int, data: Any) -> None:
        if what == "create":
            self.files.setdefault(name, _Bytes())
        elif what == "unlink":
            self.files.pop(name, None)
        elif what == "map":
            rows = self.maps.setdefault(name, {})
            for key, value in data.items():
                if value is None:
                    rows.pop(key, None)
                else:
                    rows[key] = value
        elif what == "file":
            self.files[name] = _Bytes()
            self.files[name].data[:] = data
        elif what in ("write", "grow", "truncate"):
            target = self.files[name].data
            end = offset + len(data)
            if len(target) < end:
                target.extend(bytes(end - len(target)))
            if what == "write":
                target[offset:end] = data
            elif what == "truncate":
                del target[offset:]

    def copy(self) -> LogDisk:
        twin = LogDisk()
        twin.capacity_bytes = self.capacity_bytes
        for name, file in self.files.items():
            twin.files[name] = _Bytes()
            twin.files[name].data[:] = file.data
        twin.maps = {name: dict(rows) for name, rows in self.maps.items()}
        return twin

    def remove_tree(self, name: str) -> None:
        for known in [known for known in self.files if known == name or known.startswith(f"{name}/")]:
            self.change("unlink", known, 0, b"")
        assert not any(known == name or known.startswith(f"{name}/") for known in self.maps), "nobody removes a map here"

    def start_log(self) -> None:
        self.log.clear()
        self.base = self.copy()

    def after_kill(self, count: int) -> LogDisk:
        disk = self.base.copy() if self.base else LogDisk()
        for entry in self.log[:count]:
            disk.play(*entry)
        return disk

    def after_power_loss(self, count: int, dice: random.Random) -> LogDisk:
        disk = self.base.copy() if self.base else LogDisk()
        log = self.log[:count]
        last_sync: dict[str, int] = {}
        for place, (what, name, _, _) in enumerate(log):
            if what in ("sync", "syncdir"):
                last_sync[what + name] = place
        names_lost_from = self._first_lost_name(log, last_sync, dice)
        chance = dice.choice([0.0, 0.1, 0.5, 0.9])
        fate: dict[tuple[str, int], bool] = {}
        for place, (what, name, offset, data) in enumerate(log):
            if what in ("map", "file"):
                disk.play(what, name, offset, data)
            elif what in ("create", "unlink"):
                if place < names_lost_from or place < last_sync.get("syncdir" + name.rpartition("/")[0], -1):
                    disk.play(what, name, offset, data)
            elif what in ("sync", "syncdir") or name not in disk.files:
                continue
            elif place < last_sync.get("sync" + name, -1):
                disk.play(what, name, offset, data)
            elif what != "write":
                if dice.random() < 0.5:
                    disk.play(what, name, offset, data)
            else:
                # Once a page's write is lost, its later ones are too: a page goes out as a whole or not.
                for start in range(offset // PAGE_BYTES * PAGE_BYTES, offset + len(data), PAGE_BYTES):
                    page = (name, start)
                    if fate.get(page, True) and dice.random() >= chance:
                        low, high = max(start, offset), min(start + PAGE_BYTES, offset + len(data))
                        disk.play("write", name, low, data[low - offset : high - offset])
                    else:
                        fate[page] = False
        return disk

    @staticmethod
    def _first_lost_name(log: list[tuple[str, str, int, Any]], last_sync: Mapping[str, int], dice: random.Random) -> int:
        unsynced = [
            place
            for place, (what, name, _, _) in enumerate(log)
            if what in ("create", "unlink") and place > last_sync.get("syncdir" + name.rpartition("/")[0], -1)
        ]
        return dice.choice([*unsynced, len(log)])

    # --- Disk ---

    def open(self, name: str, *, create: bool = False) -> DiskFile:
        if name not in self.files:
            if not create:
                raise NotFound(name)
            self.change("create", name, 0, b"")
        return LogFile(self, name)

    def exists(self, name: str) -> bool:
        return name in self.files or any(other.startswith(name + "/") for other in self.files)

    def list(self, name: str = "") -> list[str]:
        prefix = name + "/" if name else ""
        names = {other[len(prefix) :].partition("/")[0] for other in (*self.files, *(f"{m}/data.mdb" for m in self.maps)) if other.startswith(prefix)}
        return sorted(names)

    def makedirs(self, name: str) -> None:
        pass

    def rename(self, old: str, new: str) -> None:
        raise NotImplementedError

    def unlink(self, name: str) -> None:
        self.change("unlink", name, 0, b"")

    def sync_directory(self, name: str = "") -> None:
        self.change("syncdir", name, 0, b"")

    def read_file(self, name: str) -> bytes:
        if name not in self.files:
            raise NotFound(name)
        return bytes(self.files[name].data)

    def write_file(self, name: str, data: bytes) -> None:
        self.change("file", name, 0, data)

    def space(self) -> tuple[int, int]:
        return self.capacity_bytes, self.capacity_bytes - sum(len(file.data) for name, file in self.files.items() if name.startswith("data/"))

    def lock(self) -> None:
        pass

    def open_map(self, name: str, *, size_bytes: int) -> OrderedMap:
        self.maps.setdefault(name, {})
        return LogMap(self, name)

    def close(self) -> None:
        pass


def open_engine(disk: Disk, config: EngineConfig = SMALL, clock: Clock | None = None) -> ChunkEngine:
    return ChunkEngine(disk, clock or ManualClock(), IDENTITY, config)


def cid(index: int, inode: int = 5) -> bytes:
    return chunk_id(inode, index)


def write(chunk: bytes, offset: int, data: bytes, **more: Any) -> Update:
    return Update(chunk, UpdateKind.WRITE, offset, len(data), memoryview(data), checksums(data, offset), **more)


def truncate(chunk: bytes, length: int, **more: Any) -> Update:
    return Update(chunk, UpdateKind.TRUNCATE, length=length, **more)


def remove(chunk: bytes, **more: Any) -> Update:
    return Update(chunk, UpdateKind.REMOVE, **more)


def replacement(chunk: bytes, data: bytes, version: int, chain_version: int = 1) -> Update:
    return Update(chunk, UpdateKind.REPLACE, 0, len(data), memoryview(data), checksums(data, 0), update_version=version, chain_version=chain_version)


def content_of(engine: ChunkEngine, chunk: bytes, version: int = 0) -> bytes | None:
    """The chunk's bytes, read whole and with their checksums verified; None: no such chunk."""
    meta = engine.get(chunk)
    if meta is None or (not meta.version and not version):
        return None
    buffer = memoryview(bytearray(max(meta.length, meta.pending.length if meta.pending is not None else 0)))
    found = engine.read(chunk, 0, len(buffer), buffer, version=version)
    assert found is not None
    data = bytes(buffer[: found.length])
    assert found.checksums == checksums(data, 0), "what the engine says about the bytes is not true"
    if found.chunk_length > found.length:  # another thread appended since its length was asked for
        return content_of(engine, chunk, version)
    assert found.chunk_length == found.length
    return data


def noise(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)
