"""The scrub of one target as its process knows it: the record, how it is kept on the disk, and who wants a pass.

Runs in trio's thread, but for `load` and `save`, which wait for the disk and are a worker thread's.
"""

from __future__ import annotations

import logging

from kvfs.common.boundary.clock import Clock
from kvfs.common.errors import KvfsError
from kvfs.common.wire import storage_pb2 as pb
from kvfs.storage.engine.engine import ChunkEngine
from kvfs.storage.scrub.record import NAME, ScrubRecord, decode

log = logging.getLogger("kvfs.storage")


class ScrubState:
    def __init__(self, clock: Clock, engine: ChunkEngine | None) -> None:
        self._clock = clock
        self._engine = engine
        self.record = ScrubRecord()
        self.at_once = False
        """Somebody waits for the pass."""
        self.turn = 0
        """Grows when a pass begins: who works at an earlier one stops."""
        self.problems: list[str] = []
        """Of the target's own files, that could not be mended."""

    def load(self) -> None:
        """Blocking, once. A target without a record counts as scrubbed when it was made: nothing has had time to go bad."""
        if self._engine is None:
            return
        disk = self._engine.disk
        found = decode(disk.read_file(NAME)) if disk.exists(NAME) else None
        if found is not None:
            self.record = found
        else:
            self.record.started_ns = self._clock.wall_ns()
            disk.write_file(NAME, self.record.encode())

    def save(self) -> None:
        """Blocking. It is a help for the next process, so no error of it counts."""
        if self._engine is not None:
            try:
                self._engine.disk.write_file(NAME, self.record.encode())
            except KvfsError as error:
                log.warning("the state of a scrub is not kept: %s", error.message)

    def begin(self) -> None:
        self.turn += 1
        self.problems.clear()
        self.record.begin(self._clock.wall_ns())

    def end(self) -> None:
        self.at_once = False
        self.record.end(self._clock.wall_ns())

    def damaged(self) -> dict[bytes, int]:
        """Chunks that are still as they were when no replica had them whole: written anew or removed, a chunk is none of them."""
        if self._engine is None:
            return {}
        record = self.record
        for chunk_id, version in list(record.damaged.items()):
            meta = self._engine.get(chunk_id)
            if meta is None or meta.version != version:
                record.mended(chunk_id)
        return record.damaged

    def status(self, total_chunks: int) -> pb.ScrubStatus:
        record = self.record
        return pb.ScrubStatus(
            passes=record.passes,
            running=record.running,
            at_once=self.at_once,
            started_ns=record.started_ns,
            finished_ns=record.finished_ns,
            checked_chunks=record.chunks,
            total_chunks=total_chunks,
            checked_bytes=record.bytes_read,
            found=record.found,
            repaired=record.repaired,
            damaged=len(self.damaged()) + len(self.problems),
        )
