"""Which blocks go: pure choices over the tables of one target.

Order: what its space's time to live has run out for; then what is over its space's quota; then, while the target is too full, whatever was touched
least recently over all spaces. The quotas of a space's tables in one process are one quota: the more of a space is judged by one order of touches,
the nearer its retention comes to one exact LRU, and a prompt that is spread over many chains is not broken by the one that happens to be fullest.
Within a table the order is the table's, so of blocks touched together the deepest goes first. A choice is bounded by `limit`; nothing is changed
here.
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from kvfs.storage.retention.table import SpaceTable


class Reason(enum.Enum):
    EVICTED = "evicted"
    EXPIRED = "expired"


class Victim(NamedTuple):
    inode: int
    digest: bytes
    space_bytes: int
    """What its removal frees on the disk."""
    reason: Reason


def pooled(tables: Sequence[SpaceTable], limit: int) -> list[int]:
    """Of one space's tables: how many bytes of each are over the quota that they have together, the least recently touched of all of them. Looks at
    `limit` blocks at most, as many as the caller removes before it asks again."""
    over_bytes = sum(table.bytes for table in tables) - sum(table.policy.quota_bytes for table in tables)
    shares = [0] * len(tables)
    if over_bytes > 0:
        ages = heapq.merge(*(_ages(place, table, 0) for place, table in enumerate(tables)))
        for _, place, _, length in islice(ages, limit):
            shares[place] += length
            over_bytes -= length
            if over_bytes <= 0:
                break
    return shares


def choose(tables: Iterable[SpaceTable], now_ms: int, excess_bytes: int, limit: int, over_bytes: Mapping[int, int] | None = None) -> list[Victim]:
    """The next victims; none: there is nothing to do. `excess_bytes`: what must be freed because the target is too full. `over_bytes`: what is over
    the quota, by space; without it, what is over the table's own."""
    victims: list[Victim] = []
    merged: list[Iterator[tuple[int, int, bytes, int]]] = []
    for place, table in enumerate(tables_ := list(tables)):
        taken = _of_space(table, now_ms, limit - len(victims), table.over_bytes if over_bytes is None else over_bytes.get(table.inode, 0))
        victims += taken
        if excess_bytes > 0:
            merged.append(_ages(place, table, len(taken)))
        if len(victims) >= limit:
            return victims
    excess_bytes -= sum(victim.space_bytes for victim in victims)
    for _, place, digest, _ in heapq.merge(*merged):
        if excess_bytes <= 0 or len(victims) >= limit:
            break
        table = tables_[place]
        victims.append(Victim(table.inode, digest, table.slab_bytes, Reason.EVICTED))
        excess_bytes -= table.slab_bytes
    return victims


def _of_space(table: SpaceTable, now_ms: int, limit: int, over_bytes: int) -> list[Victim]:
    """Those that the space's own policy condemns."""
    ttl_ms = table.policy.ttl_ms
    if not ttl_ms and not over_bytes:
        return []
    victims: list[Victim] = []
    for digest, touched_ms, length in table.oldest():
        expired = bool(ttl_ms) and now_ms - touched_ms > ttl_ms
        if len(victims) >= limit or not (expired or over_bytes > 0):
            break
        victims.append(Victim(table.inode, digest, table.slab_bytes, Reason.EXPIRED if expired else Reason.EVICTED))
        over_bytes -= length
    return victims


def _ages(place: int, table: SpaceTable, skip: int) -> Iterator[tuple[int, int, bytes, int]]:
    """(touched_ms, place, digest, length) behind the first `skip`. Not by time where a clock was set back: the table's order is what counts."""
    last_ms = 0
    for number, (digest, touched_ms, length) in enumerate(table.oldest()):
        if number >= skip:
            last_ms = max(last_ms, touched_ms)
            yield last_ms, place, digest, length


def oldest(table: SpaceTable, count: int) -> list[Victim]:
    """The least recently touched blocks of a space."""
    return [Victim(table.inode, digest, table.slab_bytes, Reason.EVICTED) for digest in table.digests(count)]


def excess(members: Iterable[tuple[int, int]], high: float, low: float) -> int:
    """What must be freed on every member of a chain, given as (capacity, used): the fullest one over the high watermark comes down to the low."""
    return max((int(used - low * capacity) for capacity, used in members if used > high * capacity), default=0)
