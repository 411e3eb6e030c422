"""The data directories of a storage process: whose they are, which targets lie in them, opening and making targets.

Layout of a directory (one per disk): LOCK, node.json, targets/<target id>/ (the chunk engine's). Invariants: a directory of another cluster, node or
role is refused before anything in it changes; a target whose index cannot be read is left alone and out of service, the others serve.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from kvfs.common.boundary.clock import Clock
from kvfs.common.boundary.disk import Disk
from kvfs.common.boundary.random import Random
from kvfs.common.boundary.real_disk import RealDisk, is_leftover
from kvfs.common.checksum import almost
from kvfs.common.errors import KvfsError, SetupError, WrongDataDirectory
from kvfs.common.node_file import NAME as NODE_FILE
from kvfs.common.node_file import NodeFile, check_empty, open_node_file, read_node_file
from kvfs.common.wire import cluster_pb2 as cluster
from kvfs.storage.config import StorageConfig
from kvfs.storage.engine import superblock
from kvfs.storage.engine.config import EngineConfig
from kvfs.storage.engine.engine import DEFAULTS, ChunkEngine
from kvfs.storage.engine.superblock import Superblock

log = logging.getLogger("kvfs.storage")

TARGETS = "targets"
OpenDisk = Callable[[str], Disk]


@dataclass(slots=True)
class DataDirectory:
    number: int
    path: str
    disk: Disk
    target_ids: list[int]
    """Found at the start."""

    def info(self) -> cluster.DiskInfo:
        capacity, free = self.disk.space()
        return cluster.DiskInfo(disk=self.number, capacity_bytes=capacity, free_bytes=free, targets=self.target_ids, path=self.path)


class Disks:
    def __init__(self, config: StorageConfig, clock: Clock, random: Random, open_disk: OpenDisk = RealDisk, engine: EngineConfig = DEFAULTS) -> None:
        """Locks every directory. Raises SetupError and has then changed nothing but, at most, made empty directories."""
        self._config = config
        self._clock = clock
        self._open_disk = open_disk
        self._engine = replace(engine, capacity_bytes=config.target_capacity_bytes)
        self.directories: list[DataDirectory] = []
        try:
            for number, path in enumerate(config.data):
                disk = open_disk(path)
                disk.makedirs("")
                disk.lock()
                self.directories.append(DataDirectory(number, path, disk, []))
            self.node = self._identify(random)
            for directory in self.directories:
                directory.disk.makedirs(TARGETS)
                found = sorted(int(name) for name in directory.disk.list(TARGETS) if name.isdecimal())
                directory.target_ids = [target_id for target_id in found if _begun(self.disk_of(directory, target_id))]
        except BaseException:
            self.close()
            raise
        self.cluster_id = config.cluster_id or self.node.cluster_id

    def _identify(self, random: Random) -> NodeFile:
        """All directories are of one node: checked in full before any is marked. New ones (a disk was replaced) get the others' identity."""
        files = [self._node_file(directory) for directory in self.directories]
        marked = [(directory, file) for directory, file in zip(self.directories, files, strict=True) if file is not None]
        known = marked[0][0] if marked else self.directories[0]
        for other, found in marked[1:]:
            if found.node_uuid != marked[0][1].node_uuid:
                raise WrongDataDirectory(
                    f"{other.path} belongs to another storage node than {known.path}: "
                    "check storage.data (the order of the directories must not change); nothing was touched"
                )
        for directory, file in zip(self.directories, files, strict=True):
            if file is None:
                check_empty(directory.disk, where=directory.path)
        node = open_node_file(known.disk, random, where=known.path, role="storage", cluster_id=self._config.cluster_id)
        for directory, file in zip(self.directories, files, strict=True):
            if file is None and directory is not known:
                directory.disk.write_file(NODE_FILE, node.encode())
        return node

    def _node_file(self, directory: DataDirectory) -> NodeFile | None:
        """What a directory says whose it is; a few flipped bits are mended, when other directories or superblocks of targets say what it was."""
        try:
            return read_node_file(directory.disk, where=directory.path)
        except WrongDataDirectory:
            data = directory.disk.read_file(NODE_FILE)
            node = next((node for node in self._candidates() if almost(data, node.encode())), None)
            if node is None:
                raise
            log.warning("%s/%s was damaged and is written anew", directory.path, NODE_FILE)
            directory.disk.write_file(NODE_FILE, node.encode())
            return node

    def _candidates(self) -> Iterator[NodeFile]:
        """Who this node may be, as far as its directories tell."""
        for directory in self.directories:
            for name in directory.disk.list(TARGETS) if directory.disk.exists(TARGETS) else ():
                try:
                    block = superblock.load(self.disk_of(directory, int(name))) if name.isdecimal() else None
                except KvfsError:
                    continue
                if block is not None:
                    for cluster_id in dict.fromkeys((block.cluster_id, "")):
                        yield NodeFile(cluster_id, "storage", block.node_uuid.hex())
        for directory in self.directories:
            try:
                found = read_node_file(directory.disk, where=directory.path)
            except SetupError:
                continue
            if found is not None:
                yield found

    def repair_node_files(self) -> list[str]:
        """Blocking: the files that say whose the directories are, written again where they are not what they were."""
        found = []
        for directory in self.directories:
            try:
                intact = read_node_file(directory.disk, where=directory.path) == self.node
            except SetupError:
                intact = False
            if not intact:
                directory.disk.write_file(NODE_FILE, self.node.encode())
                found.append(f"{directory.path}/{NODE_FILE} was damaged")
        return found

    def path_of(self, directory: DataDirectory, target_id: int) -> str:
        return f"{directory.path}/{TARGETS}/{target_id}"

    def disk_of(self, directory: DataDirectory, target_id: int) -> Disk:
        """The target's own directory."""
        return self._open_disk(self.path_of(directory, target_id))

    def open_target(self, directory: DataDirectory, target_id: int, cluster_id: str) -> ChunkEngine:
        """Blocking: open a target, or make it when it is not there."""
        name = f"{TARGETS}/{target_id}"
        directory.disk.makedirs(name)
        disk = self.disk_of(directory, target_id)
        if not cluster_id:
            there = superblock.load(disk)
            cluster_id = there.cluster_id if there is not None else ""
        block = Superblock(cluster_id, target_id, bytes.fromhex(self.node.node_uuid)[:16])
        try:
            return ChunkEngine(disk, self._clock, block, self._engine)
        except SetupError as error:
            raise type(error)(f"{self.path_of(directory, target_id)}: {error.message}") from error

    def close(self) -> None:
        for directory in self.directories:
            directory.disk.close()


def _begun(disk: Disk) -> bool:
    """Whether anything was ever put into the target's directory. One whose making was cut short by a crash is made when the manager asks for it."""
    return any(file != "LOCK" and not is_leftover(file) for file in disk.list(""))


def openable(error: BaseException) -> bool:
    """Whether the process should go on without the target that could not be opened: a failed disk or a damaged index, not a wrong setup."""
    return isinstance(error, KvfsError) and not isinstance(error, SetupError)


def infos(directories: Sequence[DataDirectory]) -> list[cluster.DiskInfo]:
    return [directory.info() for directory in directories]
