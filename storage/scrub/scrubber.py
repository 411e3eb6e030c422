"""The scrubber of a storage process: one task a disk that reads its targets again, one after another, and has mended what is damaged.

Invariants: only a serving target is scrubbed, since only its chunks are what the chain has; a pass in the background keeps to the configured rate and
waits while requests wait for a thread; one that somebody asked for goes first and as fast as it can. A pass that is interrupted, by whatever, goes on
where it was. It must never hold up a request for longer than one piece of work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import trio

from kvfs.common.errors import KvfsError
from kvfs.storage.engine.engine import ChunkEngine
from kvfs.storage.engine.inspect import Inspection
from kvfs.storage.host import Host
from kvfs.storage.scrub.mend import mend
from kvfs.storage.scrub.record import Pace
from kvfs.storage.target import Target

log = logging.getLogger("kvfs.storage")

LOOK_S = 60.0
"""How often it is looked whether a pass is due."""
PIECE_BYTES = 4 << 20
PIECE_CHUNKS = 512
SAVE_S = 60.0
YIELD_S = 0.02
YIELDS_MAX = 50
"""So often a piece waits for others: a busy disk is still read through, a piece a second."""


class Scrubber:
    def __init__(self, host: Host, repair_node_files: Callable[[], list[str]]) -> None:
        """`repair_node_files`: blocking; what was wrong with the files beside the targets, which it has mended."""
        self._host = host
        self._repair_node_files = repair_node_files
        self._asked = trio.Event()

    def ask(self, target: Target, *, at_once: bool) -> int:
        """Begin a pass, unless one runs; its number. `at_once`: before all others of the disk, and as fast as it goes."""
        scrub = target.scrub
        if not scrub.record.running or (at_once and not scrub.at_once):
            scrub.begin()  # what was read at leisure, perhaps days ago, is read again for who asks now
        scrub.at_once = scrub.at_once or at_once
        self.look()
        return scrub.record.passes + 1

    def look(self) -> None:
        """A pass may be due now."""
        asked, self._asked = self._asked, trio.Event()
        asked.set()

    async def run(self, disk: int) -> None:
        """Until cancelled."""
        while True:
            asked = self._asked
            target = self._next(disk)
            if target is None:
                with trio.move_on_after(min(LOOK_S, self._host.config.scrub_interval_s or LOOK_S)):
                    await asked.wait()
                continue
            try:
                await self._pass(target)
            except KvfsError as error:
                self._host.note_error(target, error)
                log.warning("target %d: the scrub stopped: %s", target.target_id, error.message)
                await self._host.clock.sleep(LOOK_S / 10)

    def _next(self, disk: int) -> Target | None:
        targets = [target for target in self._host.targets.values() if target.disk == disk and self._may(target)]
        asked = [target for target in targets if target.scrub.at_once]
        if asked:
            return asked[0]
        now_ns, interval_s = self._host.clock.wall_ns(), self._host.config.scrub_interval_s
        due = [target for target in targets if target.scrub.record.due(now_ns, interval_s)]
        return min(due, key=lambda target: (not target.scrub.record.running, target.scrub.record.started_ns), default=None)

    def _may(self, target: Target) -> bool:
        return target.opened and target.replica.serving and self._host.link.lease_valid()

    async def _pass(self, target: Target) -> None:
        """To its end, or until the target leaves its chain or another one is asked for."""
        scrub = target.scrub
        try:
            await self._read(target)
        finally:
            await self._host.workers.run(scrub.save)

    async def _read(self, target: Target) -> None:
        host, scrub = self._host, target.scrub
        if not scrub.record.running:
            scrub.begin()
        if not scrub.record.position and not await self._own_files(target):
            return
        saved_s, turn = host.clock.monotonic(), scrub.turn
        more = True
        while more and self._may(target) and self._next(target.disk) is target:
            began_s, before = host.clock.monotonic(), scrub.record.bytes_read
            inspected, more = await host.workers.run(lambda: _piece(target.engine, scrub.record.position))
            if scrub.turn != turn:
                return
            for chunk_id, inspection in inspected:
                scrub.record.looked_at(chunk_id, inspection.stored if inspection is not None else 0)
                if inspection is not None:
                    await self._judge(target, inspection)
            if scrub.turn != turn:
                return
            now_s = host.clock.monotonic()
            if now_s >= saved_s + SAVE_S:
                saved_s = now_s
                await host.workers.run(scrub.save)
            if more:
                await self._rest(target, scrub.record.bytes_read - before, now_s - began_s)
        if not more:
            scrub.end()
            log.info("target %d: scrubbed: %s", target.target_id, _summary(target))

    async def _own_files(self, target: Target) -> bool:
        """Whether it came to its end. The index first: what is damaged elsewhere is written anew through it, and only a whole one may be written
        into."""
        record = target.scrub.record
        steps = target.engine.check_index()
        count = 1
        while count and self._may(target):
            began_s = self._host.clock.monotonic()
            count = await self._host.workers.run(lambda: _steps(steps))
            await self._rest(target, count, self._host.clock.monotonic() - began_s)
        if count:
            return False  # the target left its chain
        found = await self._host.workers.run(target.engine.repair_own_files)
        found += await self._host.workers.run(target.retention.check_log)
        found += await self._host.workers.run(self._repair_node_files)
        for problem in found:
            log.warning("target %d: %s and was written anew", target.target_id, problem)
        record.found += len(found)
        record.repaired += len(found)
        return True

    async def _judge(self, target: Target, inspection: Inspection) -> None:
        record, chunk_id = target.scrub.record, inspection.chunk_id
        if not inspection.damaged:
            record.mended(chunk_id)
            return
        whole = await mend(self._host, target, inspection)
        if whole is None:
            record.mended(chunk_id)
            return
        record.found += 1
        if whole:
            record.repaired += 1
            record.mended(chunk_id)
            log.warning("target %d: chunk %s was damaged and is mended", target.target_id, chunk_id.hex())
        else:
            record.lost(chunk_id, inspection.version)
            log.error("target %d: chunk %s is damaged, and no replica has it whole", target.target_id, chunk_id.hex())

    async def _rest(self, target: Target, count: int, took_s: float) -> None:
        pace = Pace(0 if target.scrub.at_once else self._host.config.scrub_bytes_per_s)
        asked = self._asked
        with trio.move_on_after(pace.rest_s(count, took_s)):
            await asked.wait()
        for _ in range(0 if target.scrub.at_once else YIELDS_MAX):
            if not self._host.workers.backlog:
                break
            await self._host.clock.sleep(YIELD_S)


def _steps(steps: Iterator[int]) -> int:
    """In a worker thread: some steps of a check of the index; the bytes that were read, 0 at its end."""
    read = 0
    for count in steps:
        read += max(1, count)
        if read >= PIECE_BYTES:
            break
    return read


def _piece(engine: ChunkEngine, after: bytes) -> tuple[list[tuple[bytes, Inspection | None]], bool]:
    """In a worker thread: the next chunks, read; whether there are more."""
    metas, more = engine.list(after=after, limit=PIECE_CHUNKS)
    found: list[tuple[bytes, Inspection | None]] = []
    read = 0
    for place, meta in enumerate(metas):
        inspection = engine.inspect(meta.chunk_id)
        found.append((meta.chunk_id, inspection))
        read += inspection.stored if inspection is not None else 0
        if read >= PIECE_BYTES:
            return found, more or place + 1 < len(metas)
    return found, more


def _summary(target: Target) -> str:
    record = target.scrub.record
    return f"{record.chunks} chunks, {record.bytes_read} bytes, {record.found} damaged places, {record.repaired} mended"
