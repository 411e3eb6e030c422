"""A KV-cache space through a real mount: programs list, find and copy its blocks, nobody writes, rmdir drops it; two mounts and a client agree."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.mount.cluster import Cluster

from kvfs.client import Client
from kvfs.common.errors import NotFound
from kvfs.kvcache import KVCache, Put, Space, SpaceParams

BLOCK = 5_000_000
PARAMS = SpaceParams(block_tokens=16, block_bytes=BLOCK, model="m", dtype="bf16", ttl_s=3600)
COUNT = 12


def key(number: int) -> bytes:
    return hashlib.blake2b(b"%d" % number, digest_size=16).digest()


def content(number: int) -> bytes:
    return random.Random(number).randbytes(BLOCK - number * 100_000)


@pytest.fixture
def cache(cluster: Cluster) -> Iterator[KVCache]:
    with Client(str(cluster.path)) as client:
        yield KVCache(client)


@pytest.fixture
def space(cache: KVCache, request: pytest.FixtureRequest) -> Iterator[Space]:
    made = cache.create(request.node.name, PARAMS)
    for number in range(COUNT):
        assert made.put([key(number)], [content(number)]) == [Put.STORED]
    yield made
    if request.node.name in cache.list():
        cache.drop(request.node.name)


def test_programs_read_a_space(mount_point: Path, space: Space, tmp_path: Path) -> None:
    folder = mount_point / "kvcache" / space.name
    expected = {key(number).hex(): content(number) for number in range(COUNT)}
    assert os.listdir(folder) == sorted(expected)
    for name, data in expected.items():
        assert (folder / name).read_bytes() == data
        found = (folder / name).stat()
        assert found.st_size == len(data) and found.st_mode & 0o7777 == 0o444
        assert [entry.inode() for entry in os.scandir(folder) if entry.name == name] == [found.st_ino]
    first = min(expected)
    assert subprocess.run(["cat", folder / first], capture_output=True, check=True).stdout == expected[first]
    listed = subprocess.run(["ls", "-l", folder], capture_output=True, text=True, check=True).stdout.splitlines()[1:]
    assert [line.split()[-1] for line in listed] == sorted(expected) and all(line.startswith("-r--r--r--") for line in listed)
    subprocess.run(["cp", "-r", folder, tmp_path / "copy"], check=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()} == expected
    subprocess.run(["cp", "-a", folder, tmp_path / "archive"], check=True)
    assert (tmp_path / "archive" / first).stat().st_mtime_ns == (folder / first).stat().st_mtime_ns
    found_files = subprocess.run(["find", folder, "-type", "f", "-size", "+1M"], capture_output=True, text=True, check=True).stdout.split()
    assert sorted(Path(path).name for path in found_files) == sorted(expected)
    used = int(subprocess.run(["du", "-s", "-B1", folder], capture_output=True, text=True, check=True).stdout.split()[0])
    whole = sum(map(len, expected.values()))
    assert whole <= used <= COUNT * (BLOCK + 4096) + 65536, "what the blocks take on disk, replicas not counted"
    with open(folder / first, "rb") as file:
        assert os.pread(file.fileno(), 1000, 3_000_000) == expected[first][3_000_000:3_001_000]
        assert os.pread(file.fileno(), 10, 100_000_000) == b""
    assert not (folder / ("0" * 32)).exists() and not (folder / "file").exists()


def test_a_space_is_read_only(mount_point: Path, space: Space) -> None:
    folder = mount_point / "kvcache" / space.name
    block = folder / key(1).hex()
    refusals = (errno.EROFS, errno.EACCES, errno.EPERM)
    for act in (
        lambda: block.write_bytes(b"x"),
        lambda: (folder / "file").write_bytes(b"x"),
        lambda: (folder / "directory").mkdir(),
        lambda: os.truncate(block, 0),
        lambda: block.chmod(0o600),
        lambda: block.unlink(),
        lambda: block.rename(folder / "other"),
        lambda: os.link(block, mount_point / "linked"),
        lambda: os.setxattr(block, "user.x", b"1"),
        lambda: os.setxattr(folder, "user.kvfs.stats", b"1"),
    ):
        with pytest.raises(OSError) as caught:
            act()
        assert caught.value.errno in refusals, caught.value
    assert block.read_bytes() == content(1)


def test_parameters_and_statistics_are_attributes(mount_point: Path, space: Space, cache: KVCache) -> None:
    folder = mount_point / "kvcache" / space.name
    parameters = json.loads(os.getxattr(folder, "user.kvfs.space"))
    assert (parameters["block_bytes"], parameters["block_tokens"], parameters["ttl_s"]) == (BLOCK, 16, 3600)
    assert parameters["format"] == {"dtype": "bf16", "model": "m"}
    before = json.loads(os.getxattr(folder, "user.kvfs.stats"))
    assert before["blocks"] == COUNT == before["stored"] and before["bytes"] == sum(len(content(number)) for number in range(COUNT))
    space.remove([key(0)])
    after = json.loads(os.getxattr(folder, "user.kvfs.stats"))
    assert after["blocks"] == COUNT - 1 == cache.stats(space.name).blocks, "live"


def test_rmdir_drops_a_space_everywhere_at_once(mount_point: Path, second_mount: Path, space: Space, cache: KVCache) -> None:
    one, two = mount_point / "kvcache" / space.name, second_mount / "kvcache" / space.name
    assert len(os.listdir(one)) == len(os.listdir(two)) == COUNT
    standing = os.open(two, os.O_RDONLY)
    with open(two / key(1).hex(), "rb", buffering=0) as file:
        assert file.read(10) == content(1)[:10]
        one.rmdir()
        assert not one.exists() and not two.exists() and space.name not in os.listdir(two.parent)
        assert not (two / key(1).hex()).exists()
        assert os.listdir(standing) == []
        with pytest.raises(FileNotFoundError):
            os.stat(key(1).hex(), dir_fd=standing)
        got = b""
        try:
            while piece := file.read(1 << 20):
                got += piece
        except OSError as error:
            assert error.errno in (errno.EIO, errno.ENOENT, errno.ESTALE)
        assert content(1)[10:].startswith(got), "what is still read is right"
    os.close(standing)
    with pytest.raises(NotFound):
        cache.open(space.name)


def test_a_block_removed_while_it_is_open_is_an_error_and_put_anew_another_file(mount_point: Path, space: Space) -> None:
    path = mount_point / "kvcache" / space.name / key(2).hex()
    before = path.stat().st_ino
    with open(path, "rb", buffering=0) as file:
        space.remove([key(2)])
        with pytest.raises(OSError) as caught:
            os.pread(file.fileno(), 1000, 4_000_000)
        assert caught.value.errno in (errno.EIO, errno.ENOENT, errno.ESTALE)
        assert space.put([key(2)], [content(3)]) == [Put.STORED]
        with pytest.raises(OSError):
            os.pread(file.fileno(), 1000, 4_000_000)
    assert path.read_bytes() == content(3) and path.stat().st_ino != before
