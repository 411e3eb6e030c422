"""The target's own files while it is open: superblock and journal, read again and written anew from memory when they are damaged.

Everything that they hold is known to the open target, so nobody else is asked. Invariants: a damaged superblock is replaced by the identity with
which the target was opened; a damaged journal is left behind by a checkpoint, which brings what it held into the index from memory. Runs beside the
target's work: the engine's lock is held for an instant only.
"""

from __future__ import annotations

from kvfs.common.errors import NotFound
from kvfs.storage.engine import superblock
from kvfs.storage.engine.journal import decode_record, segment_name
from kvfs.storage.engine.ledger import Ledger
from kvfs.storage.engine.superblock import Superblock


def repair(ledger: Ledger, identity: Superblock) -> list[str]:
    found = []
    if not superblock.intact(ledger.disk, identity):
        superblock.write(ledger.disk, identity)
        found.append("the superblock was damaged")
    sequence = _damaged_record(ledger)
    if sequence:
        ledger.checkpoint()
        found.append(f"record {sequence} of the journal was damaged")
    return found


def _damaged_record(ledger: Ledger) -> int:
    """The sequence of the first record that is not what was written; 0: all are. A segment that a checkpoint removes meanwhile is not missed."""
    with ledger.lock:
        starts = ledger.journal.starts()
        behind = ledger.journal.next_sequence
    for first, end in zip(starts, [*starts[1:], behind], strict=True):
        try:
            data = memoryview(ledger.disk.read_file(segment_name(first)))
        except NotFound:
            continue
        at = 0
        for sequence in range(first, end):
            found = decode_record(data[at:])
            if found is None or found[0].sequence != sequence:
                return sequence if _still_needed(ledger, first) else 0
            at += found[1]
    return 0


def _still_needed(ledger: Ledger, first: int) -> bool:
    with ledger.lock:
        return first in ledger.journal.starts()
