"""What measuring commands share: CPU time of processes, percentiles, steps done, and a progress bar that is drawn only where somebody watches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from kvfs.cli.context import console, err_console

TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def cpu_of(pids: Sequence[int]) -> float:
    """Seconds of CPU that the processes have used so far, all threads."""
    total = 0.0
    for pid in pids:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) * TICK_S
    return total


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of values in order; 0 of none."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def step_teller(*, quiet: bool) -> Callable[[str], None]:
    """Says what a demo has done, a line each."""
    return (lambda text: None) if quiet else (lambda text: console.print(Text("✓ ", style="green") + Text(text)))


Advance = Callable[[int, str], None]
"""(how many more are done, what is being done now; empty: as before)"""


@contextmanager
def steps_bar(total: int, description: str, *, quiet: bool) -> Iterator[Advance]:
    """Progress over so many steps, on standard error."""
    if quiet or not err_console.is_terminal:
        yield lambda count, what: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err_console, transient=True) as bar:
        task = bar.add_task(description, total=total)

        def advance(count: int, what: str) -> None:
            bar.update(task, advance=count, description=what or None)

        yield advance
