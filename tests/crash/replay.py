"""From one recorded life to many crash states, each laid out in a directory in memory, opened and checked."""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).parent))
from crash_disk import CrashDisk, State, digest, lay_out
from promises import Promises
from recorder import Event
from recording import recording

MEMORY = Path("/dev/shm")
Begin = Callable[[dict[Any, Any]], None]


class Life(Protocol):
    """What is recorded, and what must be true after a crash."""

    seed: int
    promises: Promises

    def life(self, folder: Path, number: int, begin: Begin) -> None:
        """One life of the program: it opens what lies in the directory, calls `begin` with the state of every key, and works."""

    def check(self, folder: Path, *, power_lost: bool) -> None: ...


@dataclass
class Report:
    changes: int = 0
    """That the program made on its disk."""
    states: int = 0
    """Different ones, each opened."""
    failures: list[str] = field(default_factory=list)


def states_at(disk: CrashDisk, dice: random.Random, variants: int) -> Iterator[tuple[str, bool, State]]:
    """(name, whether power was lost, state)"""
    yield "killed", False, disk.everything()
    yield "power lost, nothing unsynced is there", True, disk.nothing_unsynced()
    for number in range(variants):
        if number % 3 == 2:
            yield "power lost, some files are as last synced", True, disk.some_files(dice)
        else:
            yield "power lost, unsynced sectors are torn", True, disk.torn(dice)


def recorded(life: Life, lives: int) -> list[Event]:
    """All lives but the last are killed somewhere."""
    dice = random.Random(life.seed)
    with tempfile.TemporaryDirectory(prefix="kvfs-recorded-") as folder:
        base = Path(folder)
        with recording(base) as directory:
            for number in range(lives):

                def work(number: int = number) -> None:
                    life.life(directory.folder, number, lambda found: life.promises.begin(directory.mark, base / "states", found))

                directory.run(work, killed_at=int(2 ** dice.uniform(2, 9)) if number < lives - 1 else 0)
            log = directory.events()
        life.promises.load(base / "states")
    return log


def replay(life: Life, *, lives: int = 4, variants: int = 3, failures_max: int = 3) -> Report:
    """Records the life, and checks it after a crash behind each of its changes."""
    log = recorded(life, lives)
    report = Report(sum(event.kind != "mark" for event in log))
    disk = CrashDisk()
    seen: set[tuple[int, bool]] = set()
    life.promises.reset()
    for place, event in enumerate([Event("sync"), *log]):  # the first stands for nothing having happened yet
        if event.kind == "mark":
            life.promises.replay(event.data)
            seen.clear()  # the same state may break a promise that was just made
            continue
        if place:
            disk.play(event)
        dice = random.Random(f"{life.seed} {place}")
        for name, power_lost, state in states_at(disk, dice, variants):
            known = (digest(state), power_lost)
            if known in seen:
                continue
            seen.add(known)
            report.states += 1
            failure = _try(life, state, power_lost)
            if failure:
                report.failures.append(f"{life!r}, {name}, after change {place} ({event.kind} {event.data[:40]!r}): {failure}")
                if len(report.failures) >= failures_max:
                    return report
    return report


def _try(life: Life, state: State, power_lost: bool) -> str:
    """What is wrong with this state, and where it is kept to be looked at; empty: nothing."""
    base = MEMORY if MEMORY.is_dir() else Path(tempfile.gettempdir())
    folder = Path(tempfile.mkdtemp(prefix="kvfs-crash-", dir=base))
    try:
        lay_out(state, folder)
        life.check(folder, power_lost=power_lost)
    except Exception as error:
        kept = Path(tempfile.mkdtemp(prefix="kvfs-crash-state-"))
        lay_out(state, kept)
        return f"{type(error).__name__}: {str(error)[:1000]} (the state is in {kept})"
    finally:
        shutil.rmtree(folder)
    return ""
