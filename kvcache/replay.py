"""Replaying request traces against a space: what of each prompt is in the cache, beside what an exact LRU of the same size would have had.

Owns the format (Mooncake's JSON lines), the rule of counting, the two oracles (exact LRU, unlimited) and the replay itself. The rule: the blocks of a
prompt are looked up from its start to the first miss; hit tokens = min(block tokens * blocks found, input tokens); the hit rate is hit tokens over
input tokens of all requests; after the lookup all blocks of the prompt are stored or touched, the last one first, so that a cache loses ends of
prompts before their beginnings. Requests go one after another, so that a replay is the same every time. This module must never read clocks.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from kvfs.common.errors import InvalidArgument
from kvfs.kvcache.async_space import AsyncSpace
from kvfs.kvcache.buffers import BlockBuffers
from kvfs.kvcache.outcomes import Put

TRACE_BLOCK_TOKENS = 512
"""Of Mooncake's published traces."""
READ_AT_ONCE = 64
_KEY_BYTES = 16


@dataclass(frozen=True, slots=True)
class Request:
    timestamp_ms: int
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    """Equal number: equal block behind an equal prefix."""


@dataclass(slots=True)
class Tally:
    """What a replay, or an oracle, counted."""

    requests: int = 0
    input_tokens: int = 0
    hit_tokens: int = 0
    blocks_found: int = 0
    blocks_refused: int = 0
    """That could not be stored: trouble with storage."""
    blocks_read: int = 0
    wrong_bytes: int = 0
    """Blocks read that did not hold what was put. Must stay 0."""
    points: list[tuple[int, int, int]] = field(default_factory=list)
    """(timestamp_ms, hit tokens, input tokens) of each request, for curves over time."""

    def note(self, request: Request, found: int, block_tokens: int) -> None:
        hit = min(found * block_tokens, request.input_tokens)
        self.requests += 1
        self.input_tokens += request.input_tokens
        self.hit_tokens += hit
        self.blocks_found += found
        self.points.append((request.timestamp_ms, hit, request.input_tokens))

    @property
    def hit_rate(self) -> float:
        """0 to 1."""
        return self.hit_tokens / self.input_tokens if self.input_tokens else 0.0


def read_trace(path: str | Path, *, block_tokens: int = TRACE_BLOCK_TOKENS) -> Iterator[Request]:
    """The requests of a file, one line each. InvalidArgument names the line that is none."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _request(line, f"{path}:{number}", block_tokens)


def _request(line: str, where: str, block_tokens: int) -> Request:
    try:
        row = json.loads(line)
        numbers = [row["timestamp"], row["input_length"], row["output_length"], *row["hash_ids"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidArgument(
            f"{where}: not a request of a trace, which is a JSON object with timestamp, input_length, output_length and hash_ids: {error!r}"
        ) from None
    if any(not isinstance(value, int) or isinstance(value, bool) or value < 0 for value in numbers):
        raise InvalidArgument(f"{where}: timestamp, lengths and hash_ids are whole numbers from 0 on")
    timestamp_ms, input_tokens, output_tokens, *blocks = numbers
    if len(blocks) != -(-input_tokens // block_tokens):
        raise InvalidArgument(f"{where}: {len(blocks)} hash_ids for {input_tokens} tokens: one is due for each {block_tokens} tokens or part of them")
    return Request(timestamp_ms, input_tokens, output_tokens, tuple(blocks))


def oracle(requests: Iterable[Request], capacity_blocks: int | None = None, *, block_tokens: int = TRACE_BLOCK_TOKENS) -> Tally:
    """What one exact LRU of so many blocks would have found; None: of unlimited size."""
    tally = Tally()
    cache: OrderedDict[int, None] = OrderedDict()
    for request in requests:
        found = 0
        for block in request.blocks:
            if block not in cache:
                break
            found += 1
        tally.note(request, found, block_tokens)
        for block in reversed(request.blocks):
            cache[block] = None
            cache.move_to_end(block)
            if capacity_blocks is not None and len(cache) > capacity_blocks:
                cache.popitem(last=False)
    return tally


def trace_key(block: int) -> bytes:
    """The key under which a block of a trace is stored."""
    return blake2b(block.to_bytes(16, "little"), digest_size=_KEY_BYTES, person=b"kvfs-trace").digest()


def trace_content(key: bytes, length: int) -> bytes:
    """What stands for the cache of a block: its key, over and over, so that a reader knows whose bytes it has."""
    return (key * (length // _KEY_BYTES + 1))[:length]


async def replay(
    space: AsyncSpace,
    requests: Iterable[Request],
    *,
    read: bool = False,
    block_tokens: int = TRACE_BLOCK_TOKENS,
    progress: Callable[[Request, Tally], None] | None = None,
) -> Tally:
    """Run the requests against a space, whose blocks stand for `block_tokens` tokens each, whatever their size. `read`: also get what was found, and
    compare it. `progress` is told the tally so far after each request."""
    tally = Tally()
    buffers = space.buffers(READ_AT_ONCE) if read else None
    try:
        for request in requests:
            keys = [trace_key(block) for block in request.blocks]
            found = await space.match_keys(keys)
            tally.note(request, found, block_tokens)
            if buffers is not None:
                await _read(space, keys[:found], buffers, tally)
            missing = keys[found:]
            results = await space.put(missing, [trace_content(key, space.block_bytes) for key in missing], prefix=keys[:found])
            tally.blocks_refused += results.count(Put.REFUSED)
            if progress is not None:
                progress(request, tally)
    finally:
        if buffers is not None:
            buffers.close()
    return tally


async def _read(space: AsyncSpace, keys: Sequence[bytes], buffers: BlockBuffers, tally: Tally) -> None:
    for start in range(0, len(keys), READ_AT_ONCE):
        batch = keys[start : start + READ_AT_ONCE]
        for place, length in enumerate(await space.get(batch, [buffers[place] for place in range(len(batch))])):
            if length is not None:
                tally.blocks_read += 1
                tally.wrong_bytes += bytes(buffers[place][:length]) != trace_content(batch[place], space.block_bytes)  # a view compares byte by byte
