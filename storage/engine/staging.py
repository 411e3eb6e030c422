"""Staging: the steps of an update before it is recorded. Versions checked, block taken, bytes verified and written; nothing is visible yet.

Invariant: a staged update either comes into the journal (`Ledger.record`) or is cancelled; its new block belongs to nobody else until then,
and the old block is pinned, so that what is copied from it stays what it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvfs.common.boundary.clock import Clock
from kvfs.common.errors import Busy, InputOutput, InvalidArgument, MissingUpdate, NoSpace, StaleUpdate
from kvfs.storage.engine import content
from kvfs.storage.engine.chunk import EMPTY, ChunkMeta, Content, PendingMeta
from kvfs.storage.engine.classes import Block
from kvfs.storage.engine.ledger import Change, Ledger
from kvfs.storage.engine.requests import Update, UpdateKind


@dataclass(slots=True)
class Staged:
    update: Update
    kind: UpdateKind
    version: int
    mtime_ns: int
    old: ChunkMeta | None
    new_block: Block | None
    content: Content
    pinned: Block | None

    def prepared(self) -> Change:
        """The change that makes it the pending version."""
        base = self.old or ChunkMeta(self.update.chunk_id, 0, 0, 0, EMPTY, None)
        return Change(self.old, replace(base, pending=PendingMeta(self.version, self.kind, self.content, self.mtime_ns, self.update.tag)))

    def applied(self, chain_version: int) -> Change:
        """The change that makes it the committed version at once."""
        if self.kind == UpdateKind.REMOVE:
            return Change(self.old, None)
        return Change(self.old, ChunkMeta(self.update.chunk_id, self.version, chain_version, self.mtime_ns, self.content, None))


class Stager:
    def __init__(self, ledger: Ledger, clock: Clock) -> None:
        self._ledger = ledger
        self._clock = clock
        self._writer = content.ContentWriter(ledger.files)

    def stage(self, update: Update, *, pending: bool = False) -> Staged:
        """Everything but the record. On an error nothing is left behind. Not locked. `pending`: to become the pending version."""
        content.check(update)
        ledger = self._ledger
        new_block: Block | None = None
        with ledger.lock:
            ledger.check_serving()
            if ledger.index_full is not None and update.kind in (UpdateKind.WRITE, UpdateKind.REPLACE):
                raise NoSpace(f"the target's index has no room: {ledger.index_full.message}")
            old = ledger.lookup(update.chunk_id)
            base = old.content if old is not None else EMPTY
            version = _version(update, old.version if old is not None else 0, pending)
            wanted = content.new_block_bytes(base, update)
            slab = update.slab_bytes != 0
            if wanted:
                try:
                    new_block = ledger.allocator.allocate(wanted, slab=slab)
                except NoSpace:
                    pass  # tried again below, after making room, which cannot be done under the lock
            pinned = base.block
            if pinned is not None:
                ledger.allocator.pin(pinned)
        try:
            if wanted and new_block is None:
                new_block = ledger.make_room_and_allocate(wanted, slab=slab)
            made = self._writer.make(base, update, new_block)
        except BaseException as error:
            with ledger.lock:
                self._let_go(pinned, new_block)
                if isinstance(error, InputOutput):
                    ledger.failed = ledger.failed or error
            raise
        kind = update.kind
        if kind == UpdateKind.TRUNCATE and not update.length and (old is None or not old.version):
            kind = UpdateKind.REMOVE  # a chunk that is not there, cut to nothing, is not there
        return Staged(update, kind, version, update.mtime_ns or self._clock.wall_ns(), old, new_block, made, pinned)

    def check_current(self, staged: Staged) -> None:
        """Locked. Busy when another update of the chunk came in between: the caller did not keep them in order."""
        now = self._ledger.lookup(staged.update.chunk_id)
        if now is not staged.old and now != staged.old:
            raise Busy(f"chunk {staged.update.chunk_id.hex()} was changed by another update at the same time")

    def cancel(self, staged: Staged) -> None:
        """Locked."""
        self._let_go(staged.pinned, staged.new_block)

    def recorded(self, staged: Staged) -> None:
        """Locked. It is in the journal."""
        ledger = self._ledger
        block = staged.content.block
        if block is not None and staged.update.kind != UpdateKind.TRUNCATE:
            ledger.written(block, staged.update.length if staged.new_block is None else staged.content.stored)
        if staged.pinned is not None:
            ledger.allocator.unpin(staged.pinned)

    def _let_go(self, pinned: Block | None, new_block: Block | None) -> None:
        if pinned is not None:
            self._ledger.allocator.unpin(pinned)
        if new_block is not None:
            self._ledger.allocator.cancel(new_block)


def _version(update: Update, committed: int, pending: bool) -> int:
    version = update.update_version
    if update.kind == UpdateKind.REPLACE and version < 1:
        raise InvalidArgument("a replacement names its version")
    if update.kind == UpdateKind.REPLACE and not pending:
        return version
    if not version:
        return committed + 1
    if version <= committed:
        raise StaleUpdate(f"chunk {update.chunk_id.hex()} has version {committed}, the update is for {version}")
    if version > committed + 1:
        raise MissingUpdate(f"chunk {update.chunk_id.hex()} has version {committed}, the update is for {version}: at least one is missing")
    return version
