"""fsck of one target: index against allocator against data files, and every stored byte against its checksum when asked.

Runs beside the target's work: it never holds the engine's lock for longer than a page. Finds; never repairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from kvfs.common.checksum import CHECKSUM_BYTES
from kvfs.common.errors import IndexCorrupt, KvfsError
from kvfs.storage.engine import chunk
from kvfs.storage.engine.chunk import ChunkMeta, Content, units_of
from kvfs.storage.engine.classes import Block
from kvfs.storage.engine.ledger import CHUNK_PREFIX, CHUNKS_END, Ledger
from kvfs.storage.engine.reader import damaged_units
from kvfs.storage.engine.requests import CheckReport

_MAX_PROBLEMS = 1000
_PAGE_CHUNKS = 500
_PAGE_PARTS = 20


def check_target(ledger: Ledger, read_data: bool) -> CheckReport:
    problems: list[str] = []
    chunks, total = _Structure(ledger, problems).check()
    if read_data:
        _check_data(ledger, problems)
    return CheckReport(chunks, total, problems[:_MAX_PROBLEMS])


class _Structure:
    """One look at everything, a page at a time, while the target goes on. What looks wrong because it changed between two looks is looked at
    again under the lock; blocks given out since the beginning are known from `Allocator.watch_given_out`."""

    def __init__(self, ledger: Ledger, problems: list[str]) -> None:
        self._ledger = ledger
        self._problems = problems
        self._holders: dict[Block, bytes] = {}
        self._bytes = 0

    def check(self) -> tuple[int, int]:
        """(chunks, their bytes)"""
        ledger = self._ledger
        with ledger.lock:
            given_out = ledger.allocator.watch_given_out()
            begun = ledger.journal.next_sequence
        try:
            chunks = 0
            for key, value in _rows(ledger):
                chunks += 1
                self._check_row(key[1:], value)
            self._check_allocator(given_out)
            with ledger.lock:
                if begun == ledger.journal.next_sequence and chunks != ledger.chunks:
                    self._problems.append(f"the target counts {ledger.chunks} chunks, its index has {chunks}")
        finally:
            with ledger.lock:
                ledger.allocator.stop_watching(given_out)
        return chunks, self._bytes

    def _check_row(self, chunk_id: bytes, value: bytes) -> None:
        try:
            meta = chunk.decode(chunk_id, value)
        except IndexCorrupt as error:
            self._problems.append(error.message)
            return
        self._bytes += meta.length
        name = f"chunk {chunk_id.hex()}"
        self._problems += [f"{name}: {problem}" for problem in meta_problems(meta)]
        for block in meta.blocks():
            other = self._holders.setdefault(block, chunk_id)
            if other != chunk_id and self._holds(chunk_id, block) and self._holds(other, block):
                self._problems.append(f"{name}: its block {block} is also held by chunk {other.hex()}")
            if not self._inside(block) and self._holds(chunk_id, block):
                self._problems.append(f"{name}: its block {block} lies outside its data file")

    def _holds(self, chunk_id: bytes, block: Block) -> bool:
        """Now, under the lock."""
        with self._ledger.lock:
            value = self._ledger.index.get(CHUNK_PREFIX + chunk_id)
        return value is not None and block in chunk.decode(chunk_id, value).blocks()

    def _inside(self, block: Block) -> bool:
        files = self._ledger.files
        if not files.exists(block.block_bytes, block.file):
            return False
        return block.start + block.block_bytes <= files.get(block.block_bytes, block.file).size()

    def _check_allocator(self, given_out: set[Block]) -> None:
        """A block that was in use at the beginning, is still, and is not new, must have been seen with its chunk; blocks never change hands."""
        ledger, allocator = self._ledger, self._ledger.allocator
        with ledger.lock:
            parts = allocator.parts()
        used: set[Block] = set()
        for at in range(0, len(parts), _PAGE_PARTS):
            with ledger.lock:
                for part in parts[at : at + _PAGE_PARTS]:
                    used.update(part.used())
        with ledger.lock:
            lost = used - self._holders.keys() - given_out - allocator.waiting() - allocator.in_flight
            lost = {block for block in lost if allocator.in_use(block)}
        for block in sorted(lost):
            self._problems.append(f"{block} is taken, but no chunk holds it: its space is lost until the target is opened again")
        for block in sorted(self._holders.keys() - used):
            with ledger.lock:
                taken = allocator.in_use(block)
            if not taken and self._holds(self._holders[block], block):
                self._problems.append(f"{block} is held by chunk {self._holders[block].hex()}, but the allocator has it free")


def _rows(ledger: Ledger) -> Iterator[tuple[bytes, bytes]]:
    """The rows of all chunks, in pages: the lock is let go in between."""
    begin = CHUNK_PREFIX
    while True:
        with ledger.lock:
            page = list(islice(ledger.index.scan(begin, CHUNKS_END), _PAGE_CHUNKS))
        yield from page
        if len(page) < _PAGE_CHUNKS:
            return
        begin = page[-1][0] + b"\0"


def meta_problems(meta: ChunkMeta) -> list[str]:
    """What is wrong with a meta taken by itself."""
    found = _content_problems("committed", meta.content)
    pending = meta.pending
    if pending is not None:
        found += _content_problems("pending", pending.content)
        if pending.version != meta.version + 1:
            found.append(f"its pending version {pending.version} does not follow its committed version {meta.version}")
    elif not meta.version:
        found.append("it has neither a committed nor a pending version")
    return found


def _content_problems(which: str, content: Content) -> list[str]:
    found = []
    if len(content.checksums) != units_of(content.length) * CHECKSUM_BYTES:
        found.append(f"its {which} length is {content.length}, but it has {len(content.checksums) // CHECKSUM_BYTES} unit checksums")
    if content.stored > content.length:
        found.append(f"its {which} version stores {content.stored} bytes of {content.length}")
    room = content.block.block_bytes if content.block is not None else 0
    if content.stored > room:
        found.append(f"its {which} version stores {content.stored} bytes in a block of {room}")
    if content.block is not None and not content.stored:
        found.append(f"its {which} version holds a block without a byte in it")
    return found


def _check_data(ledger: Ledger, problems: list[str]) -> None:
    after = b""
    while True:
        with ledger.lock:
            page = ledger.metas(after, b"", _PAGE_CHUNKS)
        for meta in page:
            problems += _data_problems(ledger, meta.chunk_id)
        if len(page) < _PAGE_CHUNKS:
            return
        after = page[-1].chunk_id + b"\0"


def _data_problems(ledger: Ledger, chunk_id: bytes) -> list[str]:
    """Read the chunk as it is now, its blocks held so that they are not reused meanwhile."""
    with ledger.lock:
        meta = ledger.lookup(chunk_id)
        if meta is None:
            return []
        pins = meta.blocks()
        for block in pins:
            ledger.allocator.pin(block)
    found = []
    try:
        contents = [("committed", meta.content)]
        if meta.pending is not None:
            contents.append(("pending", meta.pending.content))
        for which, content in contents:
            for unit in damaged_units(ledger.files, content):
                found.append(f"chunk {chunk_id.hex()}: unit {unit} of its {which} version in {content.block} does not have its checksum")
    except KvfsError as error:
        found.append(f"chunk {chunk_id.hex()}: {error.message}")
    finally:
        with ledger.lock:
            for block in pins:
                ledger.allocator.unpin(block)
    return found
