"""Which blocks go: pure choices over the tables of one target.

Order: what its space's time to live has run out for; then what is over its space's quota; then, while the target is too full, whatever was touched
least recently over all spaces. Within a table the order is the table's, so of blocks touched together the deepest goes first. A choice is bounded by
`limit`; nothing is changed here.
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Iterable, Iterator
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


def choose(tables: Iterable[SpaceTable], now_ms: int, excess_bytes: int, limit: int) -> list[Victim]:
    """The next victims; none: there is nothing to do. `excess_bytes`: what must be freed because the target is too full."""
    victims: list[Victim] = []
    merged: list[Iterator[tuple[int, int, bytes]]] = []
    for place, table in enumerate(tables_ := list(tables)):
        taken = _of_space(table, now_ms, limit - len(victims))
        victims += taken
        if excess_bytes > 0:
            merged.append(_ages(place, table, len(taken)))
        if len(victims) >= limit:
            return victims
    excess_bytes -= sum(victim.space_bytes for victim in victims)
    for _, place, digest in heapq.merge(*merged):
        if excess_bytes <= 0 or len(victims) >= limit:
            break
        table = tables_[place]
        victims.append(Victim(table.inode, digest, table.slab_bytes, Reason.EVICTED))
        excess_bytes -= table.slab_bytes
    return victims


def _of_space(table: SpaceTable, now_ms: int, limit: int) -> list[Victim]:
    """Those that the space's own policy condemns."""
    ttl_ms, over_bytes = table.policy.ttl_ms, table.over_bytes
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


def _ages(place: int, table: SpaceTable, skip: int) -> Iterator[tuple[int, int, bytes]]:
    """(touched_ms, place, digest) behind the first `skip`. Not sorted by time where a clock was set back: the table's order is what counts."""
    last_ms = 0
    for number, (digest, touched_ms, _) in enumerate(table.oldest()):
        if number >= skip:
            last_ms = max(last_ms, touched_ms)
            yield last_ms, place, digest


def oldest(table: SpaceTable, count: int) -> list[Victim]:
    """The least recently touched blocks of a space."""
    return [Victim(table.inode, digest, table.slab_bytes, Reason.EVICTED) for digest in table.digests(count)]


def excess(members: Iterable[tuple[int, int]], high: float, low: float) -> int:
    """What must be freed on every member of a chain, given as (capacity, used): the fullest one over the high watermark comes down to the low."""
    return max((int(used - low * capacity) for capacity, used in members if used > high * capacity), default=0)
