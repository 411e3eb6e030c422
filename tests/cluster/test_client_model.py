"""The native client against a local directory: hypothesis makes sequences of calls, both must answer alike; fsck of the whole cluster at the end."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from kvfs.client import Client
from kvfs.common.wire import meta_pb2

if TYPE_CHECKING:
    from tests.real_cluster import RealCluster

pytestmark = pytest.mark.cluster

PATHS = st.lists(st.sampled_from(["a", "b", "d1", "d2"]), min_size=1, max_size=3).map("/".join)
LENGTHS = st.sampled_from([0, 1, 32_768, 100_000, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 2_500_000])
SIZES = st.sampled_from([0, 1, 4096, 70_000, 1_100_000])
EXAMPLES = int(os.environ.get("KVFS_MODEL_EXAMPLES", "25"))
SAME = {errno.EEXIST: errno.ENOTEMPTY}
"""What POSIX lets a system choose between."""


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except OSError as error:
        return f"errno {errno.errorcode[SAME.get(error.errno or 0, error.errno or 0)]}"


class ClientAgainstLocal(RuleBasedStateMachine):
    client: Client

    def __init__(self) -> None:
        super().__init__()
        self.local = Path(tempfile.mkdtemp(prefix="kvfs-client-model-"))
        self.remote = f"/{self.local.name}"
        self.client.mkdir(self.remote, 0o700)

    def both(self, local: Callable[[Path], Any], remote: Callable[[str], Any], path: str) -> None:
        expected, got = outcome(lambda: local(self.local / path)), outcome(lambda: remote(f"{self.remote}/{path}"))
        assert got == expected, f"{path}: the client answers {got!r}, the local directory {expected!r}"

    @rule(path=PATHS)
    def mkdir(self, path: str) -> None:
        self.both(os.mkdir, self.client.mkdir, path)

    @rule(path=PATHS)
    def rmdir(self, path: str) -> None:
        self.both(os.rmdir, self.client.rmdir, path)

    @rule(path=PATHS)
    def unlink(self, path: str) -> None:
        self.both(os.unlink, self.client.unlink, path)

    @rule(path=PATHS, size=SIZES)
    def write(self, path: str, size: int) -> None:
        data = os.urandom(size)
        self.both(lambda p: p.write_bytes(data), lambda p: self.store(p, "wb", data), path)

    @rule(path=PATHS, size=SIZES)
    def append(self, path: str, size: int) -> None:
        data = os.urandom(size)

        def local(p: Path) -> int:
            with open(p, "ab") as file:
                return file.write(data)

        self.both(local, lambda p: self.store(p, "ab", data), path)

    @rule(path=PATHS, offset=LENGTHS, size=SIZES)
    def overwrite(self, path: str, offset: int, size: int) -> None:
        data = os.urandom(size)

        def local(p: Path) -> int:
            with open(p, "r+b") as file:
                file.seek(offset)
                return file.write(data)

        def remote(p: str) -> int:
            with self.client.open(p, "r+b") as file:
                file.seek(offset)
                return int(file.write(data))

        self.both(local, remote, path)

    def store(self, path: str, mode: str, data: bytes) -> int:
        with self.client.open(path, mode) as file:
            return int(file.write(data))

    @rule(path=PATHS)
    def read(self, path: str) -> None:
        self.both(lambda p: p.read_bytes(), self.client.read_bytes, path)

    @rule(path=PATHS, length=LENGTHS)
    def truncate(self, path: str, length: int) -> None:
        self.both(lambda p: os.truncate(p, length), lambda p: self.client.truncate(p, length), path)

    @rule(old=PATHS, new=PATHS)
    def rename(self, old: str, new: str) -> None:
        self.both(lambda p: os.rename(self.local / old, p), lambda p: self.client.rename(f"{self.remote}/{old}", p), new)

    @rule(old=PATHS, new=PATHS)
    def link(self, old: str, new: str) -> None:
        self.both(lambda p: os.link(self.local / old, p), lambda p: self.client.link(f"{self.remote}/{old}", p), new)

    @rule(to=PATHS, path=PATHS)
    def symlink(self, to: str, path: str) -> None:
        self.both(lambda p: os.symlink(to, p), lambda p: self.client.symlink(to, p), path)

    @rule(path=PATHS)
    def stat(self, path: str) -> None:
        def local(p: Path) -> tuple[int, int, int]:
            found = os.stat(p)
            is_file = found.st_mode & 0o170000 == 0o100000
            return found.st_mode & 0o7777, found.st_nlink, found.st_size if is_file else 0

        def remote(p: str) -> tuple[int, int, int]:
            found = self.client.stat(p)
            return found.mode, found.nlink, found.length if found.type == meta_pb2.FILE else 0

        self.both(local, remote, path)

    @rule(path=PATHS)
    def listdir(self, path: str) -> None:
        self.both(lambda p: sorted(os.listdir(p)), lambda p: sorted(self.client.listdir(p)), path)

    def teardown(self) -> None:
        try:
            expected = {}
            for directory, _, names in os.walk(self.local):
                for name in names:
                    path = Path(directory, name)
                    if path.is_file() and not path.is_symlink():
                        expected[str(path.relative_to(self.local))] = path.read_bytes()
            got = {}
            for directory, _, names in self.client.walk(self.remote):
                for name in names:
                    path_there = f"{directory}/{name}"
                    if self.client.lstat(path_there).type == meta_pb2.FILE:
                        got[os.path.relpath(path_there, self.remote)] = self.client.read_bytes(path_there)
            assert got.keys() == expected.keys()
            assert [name for name in expected if got[name] != expected[name]] == []
        finally:
            self.client.rmtree(self.remote)
            shutil.rmtree(self.local)


def test_client_against_a_local_directory(cluster: RealCluster) -> None:
    if os.geteuid() != 0:
        pytest.skip("root and an ordinary user are refused differently; the model is root's")
    before = os.umask(0o022)
    try:
        with Client(str(cluster.path)) as client:
            ClientAgainstLocal.client = client
            run_state_machine_as_test(
                ClientAgainstLocal,
                settings=settings(
                    max_examples=EXAMPLES,
                    stateful_step_count=40,
                    deadline=None,
                    suppress_health_check=list(HealthCheck),
                    print_blob=True,
                    phases=[phase for phase in Phase if phase is not Phase.shrink],
                ),
            )
    finally:
        os.umask(before)
    report = cluster.json("fsck")
    assert report["clean"], report["problems"]
