"""The header that LMCache puts before a chunk."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum


class MemoryFormat(Enum):
    UNDEFINED = 0
    KV_2LTD = 1
    KV_MLA_FMT = 5


@dataclass
class RemoteMetadata:
    length: int
    shapes: list[tuple[int, ...]]
    dtypes: list[str]
    fmt: MemoryFormat

    def serialize(self) -> bytes:
        numbers = [self.length, self.fmt.value]
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            numbers += [{"bfloat16": 3}[dtype], *shape]
        return struct.pack(f"{len(numbers)}i", *numbers)

    @staticmethod
    def deserialize(s: bytes) -> RemoteMetadata:
        length, fmt, *groups = struct.unpack(f"{len(s) // 4}i", s)
        shapes = [tuple(groups[start + 1 : start + 5]) for start in range(0, len(groups), 5)]
        return RemoteMetadata(length, shapes, ["bfloat16"] * len(shapes), MemoryFormat(fmt))
