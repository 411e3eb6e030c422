"""Programs whose every write, sync and rename was recorded are opened again from what a crash at any of them may leave: thousands of states, each
opened, checked against what was promised, used, and opened again. KVFS_CRASH_STATES says how many (`make crash-states`: 50,000)."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from crash_disk import CrashDisk, lay_out
from recording import recording, why_not
from replay import Life, replay
from store_life import StoreLife
from target_life import TargetLife

from kvfs.common.boundary import real_disk
from kvfs.common.boundary.real_disk import RealDisk

STATES = int(os.environ.get("KVFS_CRASH_STATES", "5000"))
pytestmark = [pytest.mark.mount, pytest.mark.skipif(why_not() != "", reason=f"nothing can be recorded: {why_not()}")]


@pytest.mark.timeout(max(300, STATES // 10))
def test_every_crash_state_opens() -> None:
    command = [sys.executable, str(Path(__file__).with_name("run.py")), "--states", str(STATES), "--processes", "1"]  # others use the other cores
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def no_file_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_disk.RealFile, "sync", lambda self: None)


def no_directory_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_disk, "_sync_directory", lambda path: None)


def no_map_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = real_disk.lmdb.open
    monkeypatch.setattr(real_disk.lmdb, "open", lambda *args, **more: opened(*args, **more, sync=False))


@pytest.mark.parametrize(
    ("life", "fault"),
    [(TargetLife(5, steps=12), no_file_syncs), (StoreLife(5, steps=12), no_directory_syncs), (TargetLife(6, steps=12), no_map_syncs)],
    ids=("files", "directories", "maps"),
)
def test_a_program_that_does_not_sync_is_found(
    life: Life, fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The states are worth something."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # what is found wrong is kept there, to be looked at
    fault(monkeypatch)
    assert replay(life, lives=2, failures_max=1).failures


def test_what_an_opened_map_says_is_durable(tmp_path: Path) -> None:
    """Killed anywhere in a commit, the next process may find it in the page cache and act on it; so a loss of power must not take it back."""

    def commits(folder: Path) -> None:
        disk = RealDisk(folder)
        disk.makedirs("")
        rows = disk.open_map("map", size_bytes=1 << 24)
        for value in (b"1", b"2", b"3"):
            rows.commit({b"key": value})
        rows.close()

    def act_on(folder: Path) -> None:
        disk = RealDisk(folder)
        disk.makedirs("")
        rows = disk.open_map("map", size_bytes=1 << 24)
        disk.write_file("acted on", rows.get(b"key") or b"nothing")
        rows.close()

    with recording(tmp_path) as recorded:
        kills, whole = 0, False
        while not whole:
            kills += 1
            folder = recorded.folder / str(kills)
            whole = recorded.run(lambda folder=folder: commits(folder), killed_at=kills)
            recorded.run(lambda folder=folder: act_on(folder))
        log = recorded.events()
    disk = CrashDisk()
    for event in log:
        disk.play(event)
    lay_out(disk.nothing_unsynced(), tmp_path / "after")
    for number in range(1, kills + 1):
        after = RealDisk(tmp_path / "after" / str(number))
        rows = after.open_map("map", size_bytes=1 << 24)
        assert (rows.get(b"key") or b"nothing") == after.read_file("acted on"), f"killed at change {number}"
        rows.close()
    assert kills > 15
