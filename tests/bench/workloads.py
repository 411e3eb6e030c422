"""The workloads. Each runs in a process of its own per stream: (side, stream number, scale) -> operations done; set-up is not timed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tests.bench.sides import Side

BLOCK = 1 << 20
SMALL = 4096


@dataclass(frozen=True, slots=True)
class Scale:
    file_mib: int
    random_reads: int
    files: int
    listed: int


QUICK = Scale(file_mib=64, random_reads=500, files=200, listed=1000)
FULL = Scale(file_mib=256, random_reads=4000, files=2000, listed=10_000)

Body = Callable[[], int]


def seq_write(side: Side, stream: int, streams: int, scale: Scale) -> Body:
    """1 MiB blocks into a new file, closed at the end."""
    block = random.Random(stream).randbytes(BLOCK)
    side.mkdir("seq")

    def body() -> int:
        with side.open(f"seq/{streams}-{stream}", "wb") as file:
            for _ in range(scale.file_mib // streams):
                file.write(block)
        return scale.file_mib // streams

    return body


def seq_read(side: Side, stream: int, streams: int, scale: Scale) -> Body:
    """1 MiB blocks of the file that seq_write left, to its end; the open is timed."""
    view = memoryview(bytearray(BLOCK))

    def body() -> int:
        blocks = 0
        with side.open(f"seq/{streams}-{stream}", "rb") as file:
            while file.readinto(view):
                blocks += 1
        return blocks

    return body


def random_read(side: Side, stream: int, streams: int, scale: Scale) -> Body:
    """4 KiB at random aligned offsets of the one-stream file."""
    view = memoryview(bytearray(SMALL))
    draw = random.Random(stream)
    offsets = [draw.randrange(scale.file_mib * BLOCK // SMALL) * SMALL for _ in range(scale.random_reads)]
    file = side.open("seq/1-0", "rb")

    def body() -> int:
        for offset in offsets:
            side.pread(file, view, offset)
        file.close()
        return len(offsets)

    return body


def create(side: Side, stream: int, streams: int, scale: Scale) -> Body:
    """New empty files, each opened and closed."""
    side.mkdir("files")

    def body() -> int:
        for number in range(scale.files):
            side.open(f"files/{stream}-{number}", "wb").close()
        return scale.files

    return body


def stat(side: Side, stream: int, streams: int, scale: Scale) -> Body:
    def body() -> int:
        for number in range(scale.files):
            side.stat(f"files/{stream}-{number}")
        return scale.files

    return body


def open_close(side: Side, stream: int, streams: int, scale: Scale) -> Body:
    def body() -> int:
        for number in range(scale.files):
            side.open(f"files/{stream}-{number}", "rb").close()
        return scale.files

    return body


def unlink(side: Side, stream: int, streams: int, scale: Scale) -> Body:
    def body() -> int:
        for number in range(scale.files):
            side.unlink(f"files/{stream}-{number}")
        return scale.files

    return body


def fill_listed(side: Side, stream: int, streams: int, scale: Scale) -> Body:
    """What `listing` lists; only a preparation."""
    side.mkdir("listed")

    def body() -> int:
        for number in range(stream, scale.listed, streams):
            side.open(f"listed/{number:06}", "wb").close()
        return scale.listed // streams

    return body


def listing(side: Side, stream: int, streams: int, scale: Scale) -> Body:
    """Names of one directory."""

    def body() -> int:
        found = side.listdir("listed")
        assert len(found) == scale.listed, f"{len(found)} entries were listed, {scale.listed} are there"
        return scale.listed

    return body


WORKLOADS = {function.__name__: function for function in (seq_write, seq_read, random_read, create, stat, open_close, unlink, fill_listed, listing)}
