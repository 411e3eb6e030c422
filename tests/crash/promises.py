"""What a program was told about its data: which states of each key may be found after a crash.

A key goes through states 0, 1, 2 ... Marks in the log say when the work for a state begins and when it was acknowledged, and when a sync of
everything begins and is over. After a kill a key is in a state from the acknowledged one to the last begun; after a loss of power from the one that
the last sync covered. The states themselves go to a file beside the recorded directory, for the program may be killed too.
"""

from __future__ import annotations

import os
import pickle
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Mark = Callable[[bytes], None]


class Promises:
    def __init__(self, keys: list[Any], *, durable: bool = False) -> None:
        """All keys are absent at first (None). `durable`: what is acknowledged survives a loss of power."""
        self.keys = keys
        self._places = {key: place for place, key in enumerate(keys)}
        self._durable = durable
        self._states: dict[int, list[Any]] = {place: [None] for place in range(len(keys))}
        self._now: dict[Any, Any] = {}
        self._guard = threading.Lock()
        self._syncs = 0
        self.reset()

    # --- while the program runs ---

    def begin(self, mark: Mark, file: Path, found: dict[Any, Any]) -> None:
        """A life begins, with what it found."""
        self._mark = mark
        self._file = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._now = dict(found)
        self.load(file)

    def load(self, file: Path) -> None:
        self._states = {place: [None] for place in range(len(self.keys))}
        if file.exists():
            with open(file, "rb") as lines:
                while lines.peek(1):
                    place, state = pickle.load(lines)
                    self._states[place].append(state)

    def now(self, key: Any) -> Any:
        return self._now.get(key)

    @contextmanager
    def change(self, key: Any, state: Any) -> Iterator[int]:
        """The block puts the key into this state; gives its number."""
        place = self._places[key]
        with self._guard:
            os.write(self._file, pickle.dumps((place, state)))
            self._states[place].append(state)
            number = len(self._states[place]) - 1
        self._mark(b"begin %d %d" % (place, number))
        yield number
        self._mark(b"done %d %d" % (place, number))
        self._now[key] = state

    @contextmanager
    def sync(self) -> Iterator[None]:
        with self._guard:
            self._syncs += 1
            number = self._syncs
        self._mark(b"sync %d 0" % number)
        yield
        self._mark(b"synced %d 0" % number)

    # --- when the log is replayed ---

    def reset(self) -> None:
        self._begun: Counter[int] = Counter()
        self._done: Counter[int] = Counter()
        self._synced: Counter[int] = Counter()
        self._syncing: dict[int, Counter[int]] = {}

    def replay(self, mark: bytes) -> None:
        what, place, number = mark.split()
        if what == b"begin":
            self._begun[int(place)] = int(number)
        elif what == b"done":
            self._done[int(place)] = int(number)
            if self._durable:
                self._synced[int(place)] = int(number)
        elif what == b"sync":
            self._syncing[int(place)] = Counter(self._done)
        elif what == b"synced":
            self._synced |= self._syncing.pop(int(place))

    def since(self, key: Any, number: int) -> list[Any]:
        """The states from this one to the last begun."""
        place = self._places[key]
        return self._states[place][number : self._begun[place] + 1]

    def check(self, found: dict[Any, Any], *, power_lost: bool) -> None:
        for key, place in self._places.items():
            allowed = self.since(key, (self._synced if power_lost else self._done)[place])
            assert found.get(key) in allowed, (key, _short(found.get(key)), [_short(one) for one in allowed])


def _short(state: Any) -> Any:
    return f"{len(state)} bytes, {state[:8].hex()}" if isinstance(state, bytes) else state
