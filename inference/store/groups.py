"""How a page's layers are read: in how many steps, and where these begin and end.

Owns `Group` and `groups`. Each step costs something for every page (GROUP_S: places looked up, a system call, checksums of their own), and lets the
model begin sooner. With n steps the first one is there after 1/n of the time that the bytes take, and n steps cost n times GROUP_S a page, so n is
the root of the bytes' time over GROUP_S: small pages come whole. Invariants: the steps cover the page, in order, and the bytes of a step's layers
are there when it has ended; steps begin and end on units of checksums (a unit read in part is read whole, and copied), which are pages of memory,
too, so services may write into the pool directly. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from kvfs.common.checksum import CHECKSUM_UNIT_BYTES
from kvfs.inference.cache.format import PageFormat

GROUPS_MAX = 8
GROUP_S = 40e-6
"""Measured through AsyncSpace.get_range, bytes in the page cache: 20 to 60 us of CPU for each page and step, whatever its size."""
PAGE_S_PER_BYTE = 1 / 5e9
"""Of one page, as long as nothing was measured: from the page cache."""


@dataclass(frozen=True, slots=True)
class Group:
    first_layer: int
    offset: int
    length: int


def groups(format: PageFormat, page_seconds: float = 0.0) -> list[Group]:
    """`page_seconds`: what a page more takes to read, as measured; 0: not known."""
    count = round(sqrt((page_seconds or format.page_bytes * PAGE_S_PER_BYTE) / GROUP_S))
    layers = -(-format.layers // max(1, min(count, GROUPS_MAX)))
    found: list[Group] = []
    at = 0
    for first in range(0, format.layers, layers):
        end = min(first + layers, format.layers) * format.layer_bytes
        end = min(-(-end // CHECKSUM_UNIT_BYTES) * CHECKSUM_UNIT_BYTES, format.page_bytes)
        if end > at:
            found.append(Group(first, at, end - at))
            at = end
    return found
