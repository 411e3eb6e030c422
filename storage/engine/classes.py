"""Block classes: the sizes in which space is given out.

A class is its block size in bytes: a power of two from 64 KiB to 64 MiB for file chunks, or any other multiple of 4 KiB that someone
defined for a KV-cache space. A block is (block_bytes, file, number): the bytes [number * block_bytes, (number + 1) * block_bytes) of one data file.
"""

from __future__ import annotations

from typing import NamedTuple

BLOCK_ALIGNMENT_BYTES = 4096
SMALLEST_BLOCK_BYTES = 64 << 10
LARGEST_BLOCK_BYTES = 64 << 20


class Block(NamedTuple):
    """A place on the disk. A tuple because it is a dictionary key on the hot path."""

    block_bytes: int
    file: int
    number: int

    @property
    def start(self) -> int:
        return self.number * self.block_bytes


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
