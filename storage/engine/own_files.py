"""The target's own files while it is open: superblock and journal, read again and written anew from memory when they are damaged; and its index,
which can only be looked at, but for the one row that leads to the journal.

All that the first two hold is known to the open target, so nobody else is asked. Invariants: a damaged superblock is replaced by the identity with
which the target was opened; a damaged journal is left behind by a checkpoint, which brings what it held into the index from memory. Runs beside the
target's work: the engine's lock is held for an instant only.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from kvfs.common.errors import NotFound
from kvfs.storage.engine import superblock, tags
from kvfs.storage.engine.journal import decode_record, segment_name
from kvfs.storage.engine.ledger import Ledger
from kvfs.storage.engine.superblock import Superblock

_PAGE_ROWS = 500


def repair(ledger: Ledger, identity: Superblock) -> list[str]:
    """What was written anew. After `check_index`: it is written through the index."""
    found = []
    if not superblock.intact(ledger.disk, identity):
        superblock.write(ledger.disk, identity)
        found.append("the superblock was damaged")
    if not ledger.index.floor_is_intact():
        ledger.checkpoint()
        found.append("the index did not say with which record of the journal it goes on")
    sequence = _damaged_record(ledger)
    if sequence:
        ledger.checkpoint()
        found.append(f"record {sequence} of the journal was damaged")
    return found


def check_index(ledger: Ledger) -> Iterator[int]:
    """Read the index map page by page, and the rows of tags; how many bytes, step by step. Rows of chunks are checked by who reads the chunks.
    IndexCorrupt: what it held cannot be known here."""
    yield from ledger.index.check()
    begin, end = tags.PREFIX, tags.PREFIX + b"\xff" * 21
    while True:
        with ledger.lock:
            page = list(islice(ledger.index.scan(begin, end), _PAGE_ROWS))
        for key, value in page:
            tags.decode(key, value)
        yield sum(len(key) + len(value) for key, value in page)
        if len(page) < _PAGE_ROWS:
            return
        begin = page[-1][0] + b"\0"


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
