"""Block classes: the sizes in which space is given out.

A class is its block size in bytes: a power of two from 64 KiB to 64 MiB for file chunks, or any multiple of 4 KiB for the blocks of a KV-cache
space, in data files of their own (slabs.py). A block is (block_bytes, file, number): the bytes [number * block_bytes, (number + 1) * block_bytes) of
one data file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

BLOCK_ALIGNMENT_BYTES = 4096
SMALLEST_BLOCK_BYTES = 64 << 10
LARGEST_BLOCK_BYTES = 64 << 20
SLAB_FILE = 1 << 15
"""Data files of KV-cache blocks are numbered from here, those of file chunks below."""


class Block(NamedTuple):
    """A place on the disk. A tuple because it is a dictionary key on the hot path."""

    block_bytes: int
    file: int
    number: int

    @property
    def start(self) -> int:
        return self.number * self.block_bytes

    @property
    def slab(self) -> bool:
        """Whether it lies among the blocks of KV-cache spaces."""
        return self.file >= SLAB_FILE


class Stretch(NamedTuple):
    """Places of consecutive blocks in one data file, from block number `first`."""

    block_bytes: int
    file: int
    first: int
    blocks: int

    @property
    def start(self) -> int:
        return self.first * self.block_bytes

    @property
    def size(self) -> int:
        return self.blocks * self.block_bytes

    @property
    def slab(self) -> bool:
        return self.file >= SLAB_FILE

    def places(self) -> Iterator[Block]:
        return (Block(self.block_bytes, self.file, number) for number in range(self.first, self.first + self.blocks))


def block_bytes_for(length: int) -> int:
    """The smallest class that holds `length` bytes (1 .. 64 MiB)."""
    if not 0 < length <= LARGEST_BLOCK_BYTES:
        raise ValueError(f"no block class holds {length} bytes")
    return max(SMALLEST_BLOCK_BYTES, 1 << (length - 1).bit_length())


def data_file_name(block_bytes: int, file: int) -> str:
    return f"data/{block_bytes}.{file}"


def parse_data_file_name(name: str) -> tuple[int, int] | None:
    """(block_bytes, file) of a name in the data folder; None when it is not one of ours."""
    size, dot, number = name.partition(".")
    if not dot or not size.isdecimal() or not number.isdecimal():
        return None
    block_bytes = int(size)
    if block_bytes == 0 or block_bytes % BLOCK_ALIGNMENT_BYTES:
        return None
    return block_bytes, int(number)
