"""The POSIX suite's stage: every test runs on a local directory (the control, which proves the suite itself) and on the mount.

`posix.dir` is a fresh directory, owner root, mode 0755. Agents make the calls; `posix.expect(errno, agent, call, ...)` is the assertion.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.mount.agent import Agent

ROOT = (0, 0, ())
OWNER = (65534, 65533, ())
OTHER = (65532, 65531, ())


class Posix:
    def __init__(self, directory: bytes, agents: dict[tuple[int, int, tuple[int, ...]], Agent]) -> None:
        self.dir = directory
        self._agents = agents
        self._count = 0

    def agent(self, uid: int = 0, gid: int = 0, groups: Sequence[int] = ()) -> Agent:
        identity = (uid, gid, tuple(groups))
        found = self._agents.get(identity)
        if found is None:
            found = self._agents[identity] = Agent(*identity)
        return found

    @property
    def root(self) -> Agent:
        return self.agent()

    @property
    def owner(self) -> Agent:
        """An ordinary user."""
        return self.agent(*OWNER)

    @property
    def other(self) -> Agent:
        """Another ordinary user, who shares no group with `owner`."""
        return self.agent(*OTHER)

    def name(self) -> bytes:
        """A path in the test's directory that does not exist."""
        self._count += 1
        return self.dir + b"/n%d" % self._count

    def make(
        self, kind: str, path: bytes | None = None, *, mode: int | None = None, owner: tuple[int, int] | None = None, data: bytes = b""
    ) -> bytes:
        """A file, dir, fifo, socket, char, block or symlink at `path` (a fresh one), with exactly this mode and owner."""
        path = path or self.name()
        if kind == "file":
            with open(path, "wb") as file:
                file.write(data)
        elif kind == "dir":
            os.mkdir(path)
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            os.mknod(path, 0o140644)
        elif kind == "char":
            os.mknod(path, 0o020644, os.makedev(1, 3))
        elif kind == "block":
            os.mknod(path, 0o060644, os.makedev(7, 99))
        elif kind == "symlink":
            os.symlink(b"target", path)
        else:
            raise AssertionError(kind)
        if owner is not None:
            os.lchown(path, *owner)
        if kind != "symlink":
            os.chmod(path, mode if mode is not None else 0o755 if kind == "dir" else 0o644)
        return path

    @staticmethod
    def tick() -> None:
        """Long enough that a time stamped after is later than one stamped before, on file systems that stamp by the timer tick."""
        time.sleep(0.012)

    @contextmanager
    def touches(self, *paths: bytes, times: str = "mc", unchanged: bool = False) -> Iterator[None]:
        """The block changes (or, `unchanged`, leaves) these times of each path: m mtime, c ctime."""
        fields = [{"m": "st_mtime_ns", "c": "st_ctime_ns", "a": "st_atime_ns"}[letter] for letter in times]
        before = [os.lstat(path) for path in paths]
        self.tick()
        yield
        for path, old in zip(paths, before, strict=True):
            new = os.lstat(path)
            for field in fields:
                was, now = getattr(old, field), getattr(new, field)
                assert now == was if unchanged else now > was, f"{field} of {path!r}: {was} before, {now} after"

    def expect(self, expected: int | tuple[int, ...], agent: Agent, call: str, *arguments: Any, **keywords: Any) -> None:
        got = agent.errno(call, *arguments, **keywords)
        wanted = expected if isinstance(expected, tuple) else (expected,)
        names = " or ".join(errno.errorcode.get(number, "success") for number in wanted)
        assert got in wanted, f"{call}{arguments} as {agent.identity}: {errno.errorcode.get(got, 'success')}, expected {names}"


@pytest.fixture(scope="session")
def agents() -> Iterator[dict[tuple[int, int, tuple[int, ...]], Agent]]:
    made: dict[tuple[int, int, tuple[int, ...]], Agent] = {}
    yield made
    for agent in made.values():
        agent.stop()


@pytest.fixture(scope="session")
def local_base() -> Iterator[bytes]:
    path = tempfile.mkdtemp(prefix="kvfs-posix-")
    os.chmod(path, 0o755)
    yield os.fsencode(path)
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session", params=["local", "kvfs"])
def posix_base(request: pytest.FixtureRequest) -> bytes:
    if os.geteuid() != 0:
        pytest.skip("the POSIX suite changes users: it needs root")
    if request.param == "local":
        base: bytes = request.getfixturevalue("local_base")
        return base
    mounted: Path = request.getfixturevalue("mount_point")
    base = os.fsencode(mounted) + b"/posix"
    os.makedirs(base, exist_ok=True)
    os.chmod(base, 0o755)
    return base


_count = 0


@pytest.fixture
def posix(posix_base: bytes, agents: dict[tuple[int, int, tuple[int, ...]], Agent]) -> Iterator[Posix]:
    global _count
    _count += 1
    directory = posix_base + b"/t%d" % _count
    old_umask = os.umask(0)
    os.mkdir(directory, 0o755)
    try:
        yield Posix(directory, agents)
    finally:
        os.umask(old_umask)
        shutil.rmtree(directory, ignore_errors=True)
