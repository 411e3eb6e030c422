"""What clients did and saw: operations with the moment they began and the moment they ended, kept in memory and as JSON lines.

An operation whose outcome nobody knows (time out, killed client) has no end: it may take effect at any time after its call, or never. One that
surely had no effect (refused) is left out. Values are short names; `fill` turns one into bytes and `name_of` turns bytes back into the name, or into
a text that no writer ever used when they are not all of one value.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

Value = str | int | bool | None
CELL_BYTES = 64
"""`fill` writes the name anew in every cell, so a value that is torn anywhere shows two names."""


@dataclass(frozen=True, slots=True)
class Operation:
    client: str
    key: str
    kind: str
    argument: Value
    result: Value
    call_s: float
    end_s: float | None
    """None: nobody knows whether it took effect; then `result` says why, if anything."""

    @property
    def known(self) -> bool:
        return self.end_s is not None

    def __str__(self) -> str:
        said = self.kind if self.argument is None else f"{self.kind} {self.argument}"
        outcome = f"-> {self.result}" if self.known else f"-> unknown ({self.result})"
        end = f"{self.end_s:.6f}" if self.end_s is not None else "?"
        return f"{self.call_s:12.6f} .. {end:>12}  {self.client:>8}  {said} {outcome}"


class Call:
    """An operation under way. Exactly one of `done`, `unknown` and `never` ends it; one that nobody ended is unknown."""

    __slots__ = ("_about", "_call_s", "_history", "ended")

    def __init__(self, history: History, client: str, key: str, kind: str, argument: Value) -> None:
        self._history = history
        self._about = (client, key, kind, argument)
        self._call_s = history.stamp()
        self.ended = False

    def done(self, result: Value = None) -> None:
        self._end(Operation(*self._about, result, self._call_s, self._history.stamp()))

    def unknown(self, why: str = "") -> None:
        self._end(Operation(*self._about, why, self._call_s, None))

    def never(self) -> None:
        """It surely had no effect, and nothing was seen."""
        self._end(None)

    def _end(self, operation: Operation | None) -> None:
        assert not self.ended, f"{self._about} ended twice"
        self.ended = True
        self._history.ended(self, operation)


class History:
    def __init__(self, now: Callable[[], float]) -> None:
        """`now`: one clock for all clients; in several processes CLOCK_MONOTONIC of one machine."""
        self._now = now
        self._last_s = float("-inf")
        self._open: dict[Call, None] = {}
        self._operations: list[Operation] = []

    def stamp(self) -> float:
        """Strictly increasing, so that what came after is known to have come after though the clock (a virtual one) stood still."""
        self._last_s = max(self._now(), self._last_s + 1e-8)
        return self._last_s

    def call(self, client: str, key: str, kind: str, argument: Value = None) -> Call:
        call = Call(self, client, key, kind, argument)
        self._open[call] = None
        return call

    def ended(self, call: Call, operation: Operation | None) -> None:
        del self._open[call]
        if operation is not None:
            self._operations.append(operation)

    def operations(self) -> list[Operation]:
        """All in the order of their calls; those still under way have become unknown."""
        for call in list(self._open):
            call.unknown("still under way at the end")
        self._operations.sort(key=lambda operation: operation.call_s)
        return list(self._operations)


def dump(operations: Iterable[Operation], path: Path) -> None:
    with path.open("w") as file:
        for operation in operations:
            file.write(json.dumps(asdict(operation)) + "\n")


def load(path: Path) -> list[Operation]:
    return [Operation(**json.loads(line)) for line in path.read_text().splitlines() if line.strip()]


def fill(name: str, length: int) -> bytes:
    """The value's bytes: its name over and over, with the number of the cell, so that bytes at a wrong place show too."""
    cells, head = -(-length // CELL_BYTES), f"{name}|".encode()
    parts, first = [], 0
    while first < cells:  # cells with numbers of one width at a time: between two numbers stands always the same
        width = len(str(first))
        end = min(cells, 10**width)
        tail = b"|".ljust(CELL_BYTES - len(head) - width, b".")
        parts.append(head + (tail + head).join(_numbers(first, end)) + tail)
        first = end
    return b"".join(parts)[:length]


@lru_cache(maxsize=256)
def _numbers(first: int, end: int) -> list[bytes]:
    return [b"%d" % number for number in range(first, end)]


def name_of(data: bytes | bytearray | memoryview) -> str | None:
    """The value whose bytes these are, None for none at all; else a description that names the first wrong cell."""
    data = bytes(data)
    if not data:
        return None
    name = data[:CELL_BYTES].split(b"|", 1)[0].decode(errors="replace")
    expected = fill(name, len(data))
    if data == expected:
        return name
    cell = next(at for at in range(0, len(data), CELL_BYTES) if data[at : at + CELL_BYTES] != expected[at : at + CELL_BYTES])
    return f"TORN {name} but at byte {cell} of {len(data)}: {data[cell : cell + CELL_BYTES]!r}"
