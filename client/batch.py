"""Grouping of chunk operations into requests: by node, bounded in number and in bytes.

Owns nothing but the cut. One request carries hundreds of chunk reads or writes; a group never mixes nodes and keeps the order of its operations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Group:
    """What goes into one request: the places of the operations in the caller's list, and the target of each."""

    node_id: int
    addresses: tuple[str, ...]
    indexes: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    length_bytes: int = 0


def group_by_node(operations: Iterable[tuple[int, int, int, tuple[str, ...], int]], *, max_ios: int, max_bytes: int) -> list[Group]:
    """`operations`: (index, target id, node id, addresses, bytes). A single operation above `max_bytes` is a group of its own."""
    groups: list[Group] = []
    filling: dict[int, Group] = {}
    for index, target, node_id, addresses, length in operations:
        group = filling.get(node_id)
        if group is None or len(group.indexes) >= max_ios or (group.length_bytes + length > max_bytes and group.indexes):
            group = Group(node_id, addresses)
            filling[node_id] = group
            groups.append(group)
        group.indexes.append(index)
        group.targets.append(target)
        group.length_bytes += length
    return groups
