"""Runs a program's work over the recorder and gives back what it wrote, in order."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvfs.common.errors import MountError
from kvfs.fuse import kernel

sys.path.insert(0, str(Path(__file__).parent))
from recorder import END, KILL, MARK, Event


def why_not() -> str:
    """Why nothing can be recorded on this machine; empty: it can."""
    try:
        kernel.check_device()
    except MountError as error:
        return str(error)
    return ""


class Recorded:
    """A directory whose changes are written down. The recorder is another process: this one would wait for itself."""

    def __init__(self, base: Path) -> None:
        self.folder = base / "mount"
        self._log = base / "log"

    def mark(self, data: bytes) -> None:
        os.setxattr(self.folder, MARK, data)

    def run(self, work: Callable[[], None], *, killed_at: int = 0) -> bool:
        """In a process of its own, which dies at its change of that number. False: it did."""
        child = os.fork()
        if not child:
            try:
                os.setxattr(self.folder, KILL, b"%d %d" % (os.getpid(), killed_at))
                work()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        _, status = os.waitpid(child, 0)
        os.setxattr(self.folder, KILL, b"0 0")
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return False
        assert status == 0, "the recorded program failed, its words are above"
        return True

    def events(self) -> list[Event]:
        """All until now."""
        os.setxattr(self.folder, END, b"")
        events: list[tuple[object, ...]] = pickle.loads(self._log.read_bytes())
        return [Event(*event) for event in events]  # type: ignore[arg-type]


@contextmanager
def recording(base: Path) -> Iterator[Recorded]:
    """`base`: an empty directory for the recording."""
    recorded = Recorded(base)
    recorded.folder.mkdir()
    mount_point = str(recorded.folder)
    command = [sys.executable, str(Path(__file__).with_name("recorder.py")), mount_point, str(base / "log")]
    recorder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert recorder.stdout is not None
    try:
        assert recorder.stdout.readline() == "up\n", "the recorder did not start"
        yield recorded
    finally:
        if kernel.mount_entry(mount_point) is not None:
            kernel.unmount(mount_point, lazy=True)
        recorder.kill()  # it would not end by itself while a mount namespace that was made meanwhile has a copy of the mount
        recorder.wait()
        recorder.stdout.close()
