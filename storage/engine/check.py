"""fsck of one target: index against allocator against data files, and every stored byte against its checksum when asked.

The structural part holds the engine's lock, so that it sees one state; reading data does not. Finds; never repairs.
"""

from __future__ import annotations

from kvfs.common.errors import IndexCorrupt, KvfsError
from kvfs.storage.engine import chunk
from kvfs.storage.engine.chunk import CHECKSUM_BYTES, ChunkMeta, Content, units_of
from kvfs.storage.engine.classes import Block
from kvfs.storage.engine.ledger import CHUNK_PREFIX, Ledger
from kvfs.storage.engine.reader import damaged_units
from kvfs.storage.engine.requests import CheckReport

_MAX_PROBLEMS = 1000
_PAGE_CHUNKS = 500


def check_target(ledger: Ledger, read_data: bool) -> CheckReport:
    problems: list[str] = []
    with ledger.lock:
        chunks, total = _check_structure(ledger, problems)
    if read_data:
        _check_data(ledger, problems)
    return CheckReport(chunks, total, problems[:_MAX_PROBLEMS])


def _check_structure(ledger: Ledger, problems: list[str]) -> tuple[int, int]:
    holders: dict[Block, bytes] = {}
    sizes = {key: ledger.files.get(*key).size() for key in ledger.files.existing()}
    chunks = total = 0
    for key, value in ledger.index.scan(CHUNK_PREFIX, b"d"):
        chunks += 1
        try:
            meta = chunk.decode(key[1:], value)
        except IndexCorrupt as error:
            problems.append(error.message)
            continue
        total += meta.length
        name = f"chunk {meta.chunk_id.hex()}"
        problems += [f"{name}: {problem}" for problem in meta_problems(meta)]
        for block in meta.blocks():
            other = holders.setdefault(block, meta.chunk_id)
            if other != meta.chunk_id:
                problems.append(f"{name}: its block {block} is also held by chunk {other.hex()}")
            if block.start + block.block_bytes > sizes.get((block.block_bytes, block.file), 0):
                problems.append(f"{name}: its block {block} lies outside its data file")
    allocator = ledger.allocator
    used = allocator.used() - allocator.waiting() - allocator.in_flight
    for block in sorted(holders.keys() - used):
        problems.append(f"{block} is held by chunk {holders[block].hex()}, but the allocator has it free")
    for block in sorted(used - holders.keys()):
        problems.append(f"{block} is taken, but no chunk holds it: its space is lost until the target is opened again")
    if chunks != ledger.chunks:
        problems.append(f"the target counts {ledger.chunks} chunks, its index has {chunks}")
    return chunks, total


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
