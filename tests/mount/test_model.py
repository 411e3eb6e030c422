"""A mount against a local directory: hypothesis makes sequences of calls, and both must answer alike, call by call, and look alike at the end."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

NAMES = st.sampled_from(["a", "b", "c", "dir1", "dir2"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
OFFSETS = st.one_of(st.integers(0, 100), st.sampled_from([4095, 4096, 65_535, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3_000_000]))
SIZES = st.sampled_from([0, 1, 10, 4096, 70_000])
MODES = st.sampled_from([0o644, 0o600, 0o755, 0o000, 0o777])

EXAMPLES = int(os.environ.get("KVFS_MODEL_EXAMPLES", "30"))

PHASES = [phase for phase in Phase if phase is not Phase.shrink or "KVFS_MODEL_SHRINK" in os.environ]
"""Every step goes to three file systems: shrinking takes many minutes, and is asked for when it is wanted."""

SAME = {errno.EEXIST: errno.ENOTEMPTY}
"""What POSIX lets a system choose between."""


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except OSError as error:
        return f"errno {errno.errorcode[SAME.get(error.errno or 0, error.errno or 0)]}"


def tree(base: Path) -> dict[str, tuple[Any, ...]]:
    """Everything below, as far as both sides must agree."""
    found: dict[str, tuple[Any, ...]] = {}
    for folder, directories, files in os.walk(base):
        for name in directories + files:
            path = Path(folder, name)
            about = path.lstat()
            kind = stat.S_IFMT(about.st_mode)
            facts: tuple[Any, ...] = (kind, stat.S_IMODE(about.st_mode), about.st_nlink)
            if kind == stat.S_IFREG:
                facts += (about.st_size, path.read_bytes())
            elif kind == stat.S_IFLNK:
                facts += (os.readlink(path),)
            found[str(path.relative_to(base))] = facts
    return found


class MountAgainstLocal(RuleBasedStateMachine):
    mounted_base: Path
    other_base: Path

    def __init__(self) -> None:
        super().__init__()
        self.local = Path(tempfile.mkdtemp(prefix="kvfs-model-"))
        self.mounted = Path(tempfile.mkdtemp(dir=self.mounted_base))
        self.other = self.other_base / self.mounted.name
        self.handles: list[tuple[int, int]] = []

    def both(self, call: Callable[[Path], Any]) -> Any:
        expected, got = outcome(lambda: call(self.local)), outcome(lambda: call(self.mounted))
        assert got == expected, f"the mount answers {got!r}, the local directory {expected!r}"
        return expected

    @rule(path=PATHS, mode=MODES)
    def mkdir(self, path: str, mode: int) -> None:
        self.both(lambda base: os.mkdir(base / path, mode))

    @rule(path=PATHS)
    def rmdir(self, path: str) -> None:
        self.both(lambda base: os.rmdir(base / path))

    @rule(path=PATHS)
    def unlink(self, path: str) -> None:
        self.both(lambda base: os.unlink(base / path))

    @rule(path=PATHS, size=SIZES)
    def write_file(self, path: str, size: int) -> None:
        data = os.urandom(size)
        self.both(lambda base: (base / path).write_bytes(data))

    @rule(path=PATHS)
    def read_file(self, path: str) -> None:
        self.both(lambda base: (base / path).read_bytes())

    @rule(path=PATHS)
    def read_on_the_other_mount(self, path: str) -> None:
        expected, got = outcome(lambda: (self.local / path).read_bytes()), outcome(lambda: (self.other / path).read_bytes())
        if not self.handles:  # what an open handle has written the other mount sees only after its close
            assert got == expected

    @rule(old=PATHS, new=PATHS)
    def rename(self, old: str, new: str) -> None:
        self.both(lambda base: os.rename(base / old, base / new))

    @rule(old=PATHS, new=PATHS)
    def link(self, old: str, new: str) -> None:
        self.both(lambda base: os.link(base / old, base / new, follow_symlinks=False))

    @rule(to=PATHS, path=PATHS)
    def symlink(self, to: str, path: str) -> None:
        self.both(lambda base: os.symlink(to, base / path))

    @rule(path=PATHS)
    def mkfifo(self, path: str) -> None:
        self.both(lambda base: os.mknod(base / path, stat.S_IFSOCK | 0o600))

    @rule(path=PATHS, mode=MODES)
    def chmod(self, path: str, mode: int) -> None:
        self.both(lambda base: os.chmod(base / path, mode))

    @rule(path=PATHS, length=OFFSETS)
    def truncate(self, path: str, length: int) -> None:
        self.both(lambda base: os.truncate(base / path, length))

    @rule(path=PATHS, times=st.tuples(st.integers(0, 2**33 * 10**9), st.integers(0, 2**33 * 10**9)))
    def utime(self, path: str, times: tuple[int, int]) -> None:
        def call(base: Path) -> tuple[int, int]:
            os.utime(base / path, ns=times)
            found = os.stat(base / path)
            return found.st_atime_ns, found.st_mtime_ns

        self.both(call)

    @rule(path=PATHS, flags=st.sampled_from([os.O_RDWR, os.O_RDWR | os.O_CREAT, os.O_RDWR | os.O_CREAT | os.O_EXCL, os.O_RDWR | os.O_TRUNC]))
    def open(self, path: str, flags: int) -> None:
        if len(self.handles) >= 4:
            return
        local, mounted = (outcome(lambda base=base: os.open(base / path, flags | os.O_NONBLOCK, 0o644)) for base in (self.local, self.mounted))
        assert isinstance(local, int) == isinstance(mounted, int), f"the mount answers {mounted!r}, the local directory {local!r}"
        if isinstance(local, int) and isinstance(mounted, int):
            self.handles.append((local, mounted))
        else:
            assert local == mounted

    @rule(which=st.integers(0, 3), offset=OFFSETS, size=SIZES)
    def handle_write(self, which: int, offset: int, size: int) -> None:
        if which < len(self.handles):
            data = os.urandom(size)
            local, mounted = (outcome(lambda fd=fd: os.pwrite(fd, data, offset)) for fd in self.handles[which])
            assert local == mounted

    @rule(which=st.integers(0, 3), offset=OFFSETS, size=SIZES)
    def handle_read(self, which: int, offset: int, size: int) -> None:
        if which < len(self.handles):
            local, mounted = (outcome(lambda fd=fd: os.pread(fd, size, offset)) for fd in self.handles[which])
            assert local == mounted

    @rule(which=st.integers(0, 3), length=OFFSETS)
    def handle_truncate(self, which: int, length: int) -> None:
        if which < len(self.handles):
            local, mounted = (outcome(lambda fd=fd: os.ftruncate(fd, length)) for fd in self.handles[which])
            assert local == mounted

    @rule(which=st.integers(0, 3))
    def handle_stat(self, which: int) -> None:
        if which < len(self.handles):
            local, mounted = (os.fstat(fd) for fd in self.handles[which])
            assert (local.st_size, local.st_nlink, local.st_mode) == (mounted.st_size, mounted.st_nlink, mounted.st_mode)

    @rule(which=st.integers(0, 3))
    def handle_close(self, which: int) -> None:
        if which < len(self.handles):
            for fd in self.handles.pop(which):
                os.close(fd)

    @invariant()
    def top_level_listing_is_the_same(self) -> None:
        assert sorted(os.listdir(self.local)) == sorted(os.listdir(self.mounted)) == sorted(os.listdir(self.other))

    def teardown(self) -> None:
        for pair in self.handles:
            for fd in pair:
                os.close(fd)
        try:
            local = tree(self.local)
            assert tree(self.mounted) == local
            assert tree(self.other) == local
        finally:
            shutil.rmtree(self.local, ignore_errors=True)
            shutil.rmtree(self.mounted, ignore_errors=True)


def test_mount_against_a_local_directory(mount_point: Path, second_mount: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("root and an ordinary user are refused differently; the model is root's")
    MountAgainstLocal.mounted_base = mount_point
    MountAgainstLocal.other_base = second_mount
    run_state_machine_as_test(
        MountAgainstLocal,
        settings=settings(
            max_examples=EXAMPLES, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True, phases=PHASES
        ),
    )
