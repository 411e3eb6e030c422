"""What programs do with files on a mount: mappings, O_DIRECT, sparse files, du and df, layout attributes, copying trees, many handles."""

from __future__ import annotations

import errno
import json
import mmap
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from tests.mount.cluster import eventually

MIB = 1 << 20
TIB = 1 << 40


def test_mapped_read_of_a_large_file(work: Path) -> None:
    data = os.urandom(9 * MIB + 123)
    (work / "f").write_bytes(data)
    with open(work / "f", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        assert mapping[:] == data
        assert mapping[5 * MIB : 5 * MIB + 100] == data[5 * MIB : 5 * MIB + 100]


def test_mapped_shared_write(work: Path) -> None:
    (work / "f").write_bytes(bytes(2 * MIB))
    with open(work / "f", "r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[MIB - 5 : MIB + 5] = b"0123456789"
        mapping.flush()
    with open(work / "f", "rb") as file:
        file.seek(MIB - 5)
        assert file.read(10) == b"0123456789"


def test_private_mapping_of_a_program(work: Path) -> None:
    shutil.copy("/bin/true", work / "program")
    assert subprocess.run([work / "program"], check=False).returncode == 0


def test_direct_io(work: Path) -> None:
    data = mmap.mmap(-1, 4 * MIB)
    data[:] = os.urandom(4 * MIB)
    fd = os.open(work / "f", os.O_CREAT | os.O_RDWR | os.O_DIRECT, 0o644)
    try:
        assert os.pwritev(fd, [data], 0) == 4 * MIB
        into = mmap.mmap(-1, 4 * MIB)
        assert os.preadv(fd, [into], 0) == 4 * MIB
        assert into[:] == data[:]
        small = mmap.mmap(-1, 4096)
        small[:] = b"z" * 4096
        assert os.pwritev(fd, [small], MIB - 4096) == 4096
        assert os.preadv(fd, [small], 2 * MIB) == 4096 and small[:] == data[2 * MIB : 2 * MIB + 4096]
    finally:
        os.close(fd)
    expected = bytearray(data[:])
    expected[MIB - 4096 : MIB] = b"z" * 4096
    assert (work / "f").read_bytes() == expected


def test_sparse_file_of_one_tebibyte(work: Path) -> None:
    path = work / "sparse"
    path.touch()
    os.truncate(path, TIB)
    assert path.stat().st_size == TIB
    with open(path, "r+b") as file:
        assert file.read(100) == bytes(100)
        file.seek(TIB // 2)
        file.write(b"middle")
        file.seek(TIB - 3)
        assert file.read() == bytes(3)
    with open(path, "rb") as file:
        file.seek(TIB // 2 - 2)
        assert file.read(10) == b"\0\0middle\0\0"
    used = int(subprocess.run(["du", "-B1", path], capture_output=True, text=True, check=True).stdout.split()[0])
    assert 0 < used <= 4 * MIB
    os.truncate(path, 10)
    assert path.read_bytes() == bytes(10)


def test_du_of_files_and_holes(work: Path) -> None:
    (work / "dense").write_bytes(os.urandom(3 * MIB))
    (work / "small").write_bytes(b"x" * 10_000)
    with open(work / "hole", "wb") as file:
        file.seek(64 * MIB)
        file.write(b"end")

    def used(name: str) -> int:
        return int(subprocess.run(["du", "-B1", work / name], capture_output=True, text=True, check=True).stdout.split()[0])

    assert 3 * MIB <= used("dense") <= 4 * MIB
    assert 10_000 <= used("small") <= 64 * 1024
    eventually(lambda: used("hole") <= 2 * MIB, message=f"du of the hole: {used('hole')}")
    assert (work / "hole").stat().st_size == 64 * MIB + 3


def test_df(mount_point: Path) -> None:
    found = os.statvfs(mount_point)
    assert found.f_blocks >= found.f_bfree > 0 and found.f_bavail > 0 and found.f_namemax == 255
    lines = subprocess.run(
        ["df", "-B1", "--output=source,fstype,size,avail", mount_point], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    source, kind, size, available = lines[1].split()
    assert source.startswith("kvfs#") and kind == "fuse.kvfs" and int(size) >= int(available) > 0
    assert subprocess.run(["df", "-i", mount_point], capture_output=True, check=False).returncode == 0


def test_layout_attributes(work: Path) -> None:
    (work / "f").write_bytes(b"x" * (2 * MIB))
    layout = json.loads(os.getxattr(work / "f", "user.kvfs.layout"))
    assert layout["chunk_size"] == MIB and layout["stripe"] == len(layout["chains"]) >= 1
    chains = json.loads(os.getxattr(work / "f", "user.kvfs.chains"))
    assert [chain["chain"] for chain in chains] == layout["chains"]
    assert all(len(chain["targets"]) == 2 and {"target", "node", "state"} <= set(chain["targets"][0]) for chain in chains)
    assert json.loads(os.getxattr(work, "user.kvfs.layout"))["chunk_size"] == MIB
    for name in ("user.kvfs.layout", "user.kvfs.chains"):
        with pytest.raises(OSError) as refused:
            os.setxattr(work / "f", name, b"mine")
        assert refused.value.errno == errno.EPERM
    assert os.listxattr(work / "f") == [], "copying tools would try to set what is listed"


def test_attributes_of_other_namespaces(work: Path) -> None:
    (work / "f").touch()
    for name in ("trusted.x", "security.x", "system.posix_acl_access"):
        with pytest.raises(OSError) as refused:
            os.setxattr(work / "f", name, b"v")
        assert refused.value.errno in (errno.ENOTSUP, errno.EINVAL)
    with pytest.raises(OSError) as none:
        os.getxattr(work / "f", "security.capability")
    assert none.value.errno in (errno.ENODATA, errno.ENOTSUP)


def test_tree_copied_with_everything(work: Path) -> None:
    source = Path(json.__file__).parent
    shutil.copytree(source, work / "copy", symlinks=True)
    subprocess.run(["diff", "-r", source, work / "copy"], check=True)
    subprocess.run(["cp", "-a", work / "copy", work / "again"], check=True)
    subprocess.run(["diff", "-r", source, work / "again"], check=True)
    for path in source.rglob("*.py"):
        again = work / "again" / path.relative_to(source)
        assert again.stat().st_mtime_ns == path.stat().st_mtime_ns
    with tarfile.open(work / "tree.tar", "w") as tar:
        tar.add(work / "again", "again")
    shutil.rmtree(work / "again")
    with tarfile.open(work / "tree.tar") as tar:
        tar.extraction_filter = getattr(tarfile, "fully_trusted_filter", None)  # Debian 12's Python knows no filters, and needs none
        tar.extractall(work)
    subprocess.run(["diff", "-r", source, work / "again"], check=True)


def test_git(work: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments], cwd=work / "r", check=True, capture_output=True)

    (work / "r").mkdir()
    git("init", "-q")
    for number in range(20):
        (work / "r" / f"f{number}").write_text(f"{number}\n" * 100)
    git("add", ".")
    git("commit", "-q", "-m", "one")
    git("fsck", "--strict")
    git("clone", "-q", ".", "../clone")
    assert (work / "clone" / "f7").read_text() == "7\n" * 100


def test_many_open_files(work: Path) -> None:
    handles = [os.open(work / f"f{number}", os.O_CREAT | os.O_RDWR, 0o644) for number in range(300)]
    for number, fd in enumerate(handles):
        os.write(fd, b"%d" % number)
    for number, fd in enumerate(handles):
        assert os.pread(fd, 10, 0) == b"%d" % number
        os.close(fd)


def test_write_after_the_name_moved(work: Path) -> None:
    fd = os.open(work / "f", os.O_CREAT | os.O_WRONLY, 0o644)
    os.write(fd, b"before")
    os.rename(work / "f", work / "g")
    os.write(fd, b" after")
    os.close(fd)
    assert (work / "g").read_bytes() == b"before after"


def test_duplicated_descriptor_closes_twice(work: Path) -> None:
    fd = os.open(work / "f", os.O_CREAT | os.O_WRONLY, 0o644)
    second = os.dup(fd)
    os.write(fd, b"one")
    os.close(fd)
    assert (work / "f").read_bytes() == b"one"
    os.write(second, b"two")
    os.close(second)
    assert (work / "f").read_bytes() == b"onetwo"


def test_length_past_what_a_file_can_hold(work: Path) -> None:
    fd = os.open(work / "f", os.O_CREAT | os.O_RDWR, 0o644)
    with pytest.raises(OSError) as refused:
        os.pwrite(fd, b"x" * 100, (1 << 63) - 50)
    assert refused.value.errno in (errno.EFBIG, errno.EINVAL, errno.EOVERFLOW)
    os.close(fd)
    assert (work / "f").stat().st_size == 0
