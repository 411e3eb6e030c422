"""What is true of the cluster under attack, as values for the fields of messages: so that many mutated requests get past the first look.

Owns the choice of a sensible value for a field, by the field's name. A message of any method, also of one that is added later, can be filled in.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from kvfs.common.ids import chunk_id
from kvfs.common.wire.service import Method
from kvfs.meta.cluster.placing import MAX_TABLE_ID

DEPTH = 4
TABLES_MAX = 2
"""Every chain table that is made costs every disk targets, for good: as many as that are enough."""


@dataclass(slots=True)
class Facts:
    values: dict[str, list[Any]] = field(default_factory=dict)
    """By a field's name."""
    scenes: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    """By node: fields that belong together (a chain, its version, this node's target in it, its predecessor)."""
    protected: frozenset[int] = frozenset()
    """Inodes that no request may name: an authorised request may change what it names, and these are to be unharmed."""
    nodes: frozenset[int] = frozenset()
    """Nodes for which nobody but themselves may speak ..."""
    targets: frozenset[int] = frozenset()
    """... and their targets."""

    def fill(self, method: Method, node: int, chance: random.Random) -> Any:
        """A request that makes sense."""
        return self.made(method.request, chance, chance.choice(self.scenes[node]) if node in self.scenes else {})

    def made(self, kind: Any, chance: random.Random, scene: dict[str, Any] | None = None) -> Any:
        """A message of this class."""
        message = kind()
        self._fill(message, scene or {}, chance, DEPTH)
        return message

    def _fill(self, message: Any, scene: dict[str, Any], chance: random.Random, depth: int) -> None:
        for entry in message.DESCRIPTOR.fields:
            if chance.random() < 0.15 or depth == 0 or entry.name == "bulk":
                continue
            if entry.message_type is not None:
                if entry.message_type.GetOptions().map_entry:
                    continue
                if entry.is_repeated:
                    for _ in range(chance.randrange(3)):
                        self._fill(getattr(message, entry.name).add(), scene, chance, depth - 1)
                else:
                    self._fill(getattr(message, entry.name), scene, chance, depth - 1)
                    getattr(message, entry.name).SetInParent()
            elif entry.is_repeated:
                getattr(message, entry.name).extend(self.value(entry, scene, chance) for _ in range(chance.randrange(3)))
            else:
                setattr(message, entry.name, self.value(entry, scene, chance))

    def value(self, entry: Any, scene: dict[str, Any], chance: random.Random) -> Any:
        if entry.name in scene:
            return scene[entry.name]
        if entry.name in self.values:
            return chance.choice(self.values[entry.name])
        if entry.enum_type is not None:
            return chance.choice(entry.enum_type.values).number
        match entry.cpp_type:
            case FieldDescriptor.CPPTYPE_BOOL:
                return chance.random() < 0.5
            case FieldDescriptor.CPPTYPE_STRING:
                return chance.randbytes(16) if entry.type == FieldDescriptor.TYPE_BYTES else f"text-{chance.randrange(4)}"
            case _:
                return chance.choice((0, 1, 2, 7, 100, 4096, 65536))

    def harms(self, message: Any) -> bool:
        """Whether an authorised request that says this may change what is protected, or speaks for a node that lives."""
        if message.DESCRIPTOR.name == "HeartbeatRequest" and message.node_id in self.nodes:
            return True
        if message.DESCRIPTOR.name == "SyncDoneRequest" and message.from_target in self.targets:
            return True  # the predecessor's word that all was copied: believed
        if message.DESCRIPTOR.name == "CreateTargetsRequest" and TABLES_MAX < message.table_id <= MAX_TABLE_ID:
            return True
        return self._names_protected(message)

    def _names_protected(self, message: Any) -> bool:
        for entry, value in message.ListFields():
            if entry.message_type is not None:
                if entry.message_type.GetOptions().map_entry:
                    continue
                if any(self._names_protected(part) for part in (value if entry.is_repeated else (value,))):
                    return True
            elif entry.cpp_type in (FieldDescriptor.CPPTYPE_UINT64, FieldDescriptor.CPPTYPE_STRING):
                for part in value if entry.is_repeated else (value,):
                    number = int.from_bytes(part[:8], "big") if isinstance(part, bytes) else part
                    if number in self.protected:
                        return True
        return False


def chunk_ids(inodes: list[int]) -> list[bytes]:
    return [chunk_id(inode, index) for inode in inodes for index in range(3)]
