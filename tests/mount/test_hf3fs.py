"""3FS's Python interface over a mount: its names and errors, and the ways in which SGLang, vLLM and LMCache use it."""

from __future__ import annotations

import errno
import inspect
import os
import random
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import pytest
import trio

DISTRIBUTION = Path(__file__).resolve().parents[2] / "deploy" / "hf3fs_fuse"
sys.path.insert(0, str(DISTRIBUTION))

from hf3fs_fuse import clusters, files, io  # noqa: E402

KIB = 1 << 10
MIB = 1 << 20


@contextmanager
def refuses(number: int) -> Iterator[None]:
    with pytest.raises(OSError) as refused:
        yield
    assert refused.value.errno == number, refused.value


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> Iterator[int]:
    fd = os.open(path, flags)
    io.register_fd(fd)
    try:
        yield fd
    finally:
        io.deregister_fd(fd)
        os.close(fd)


@contextmanager
def shared(mount_point: Path, size: int) -> Iterator[tuple[SharedMemory, Any]]:
    """As SGLang does it: unlinked at once."""
    shm = SharedMemory(size=size, create=True)
    iov = io.make_iovec(shm, str(mount_point))
    shm.unlink()
    yield shm, iov
    shm.close()


def once(mount_point: Path, fd: int, iov: Any, offset: int, *, read: bool, flags: int = 0) -> int:
    ring = io.make_ioring(str(mount_point), 1, for_read=read, flags=flags)
    [done] = ring.prepare(iov, read, fd, offset).submit().wait(min_results=1)
    assert done.base_off == iov.base_off
    result: int = done.result
    return result


def test_the_surface_of_3fs() -> None:
    """Names, argument names and defaults."""
    expected = {
        io.extract_mount_point: "(path)",
        io.register_fd: "(fd, flags=0)",
        io.deregister_fd: "(fd)",
        io.force_fsync: "(fd)",
        io.hardlink: "(target, link_name)",
        io.punch_hole: "(filename_or_fd, start, end, flags=0)",
        io.make_iovec: "(shm, hf3fs_mount_point, block_size=0, numa=-1)",
        io.make_ioring: "(hf3fs_mount_point, entries, for_read=True, io_depth=0, priority=None, timeout=None, numa=-1, flags=0)",
        io.read_file: "(fn, hf3fs_mount_point=None, block_size=1073741824, off=0, priority=None, cb=None)",
        io.ioring.prepare: "(self, iov, read, fd, off, userdata=None)",
        io.ioring.submit: "(self)",
        io.ioring.wait: "(self, *, max_results=0, min_results=0, timeout=None)",
    }
    for function, signature in expected.items():
        found = inspect.signature(function)
        bare = found.replace(
            parameters=[each.replace(annotation=inspect.Parameter.empty) for each in found.parameters.values()],
            return_annotation=inspect.Signature.empty,
        )
        assert str(bare) == signature
    assert (io.IorPriority.HIGH, io.IorPriority.NORMAL, io.IorPriority.LOW) == (-1, 0, 1)
    assert io.ioring.size_for_entries(8) > 0


def test_mount_points(mount_point: Path, work: Path, tmp_path: Path) -> None:
    """LMCache compares with the configured string."""
    assert io.extract_mount_point(str(mount_point)) == str(mount_point)
    assert io.extract_mount_point(str(work / "not" / "there")) == str(mount_point)
    assert io.extract_mount_point("/") is None and io.extract_mount_point(str(tmp_path)) is None
    assert io.extract_mount_point(f"{mount_point}-beside") is None
    (tmp_path / "link").symlink_to(work)
    assert io.extract_mount_point(str(tmp_path / "link" / "file")) == str(mount_point)
    if os.geteuid() == 0:
        bound = tmp_path / "bound"
        bound.mkdir()
        subprocess.run(["mount", "--bind", work, bound], check=True)
        try:
            assert io.extract_mount_point(str(bound / "file")) == str(bound)
            (work / "file").write_bytes(b"through another mount point")
            assert io.read_file(bound / "file") == b"through another mount point"
        finally:
            subprocess.run(["umount", bound], check=True)


def test_registering(work: Path, tmp_path: Path) -> None:
    fd = os.open(work / "file", os.O_RDWR | os.O_CREAT)
    io.register_fd(fd)
    with refuses(errno.EINVAL):
        io.register_fd(fd)
    io.deregister_fd(fd)
    io.deregister_fd(fd)
    io.register_fd(fd, 0)
    io.deregister_fd(fd)
    os.close(fd)
    io.deregister_fd(fd)
    with refuses(errno.EBADF):
        io.register_fd(fd)
    with refuses(errno.EBADF), open(tmp_path / "elsewhere", "wb") as file:
        io.register_fd(file.fileno())
    assert not files._registered


def test_a_number_that_names_another_file_now(work: Path, mount_point: Path) -> None:
    """Closed without deregister_fd: what was written there is told, and the number may be registered again."""
    fd = os.open(work / "first", os.O_RDWR | os.O_CREAT)
    io.register_fd(fd)
    with shared(mount_point, KIB) as (shm, iov):
        shm.buf[:5] = b"first"
        assert once(mount_point, fd, iov[:5], 0, read=False) == 5
        os.close(fd)
        again = os.open(work / "second", os.O_RDWR | os.O_CREAT)
        assert again == fd
        io.register_fd(again)
        shm.buf[:6] = b"second"
        assert once(mount_point, again, iov[:6], 0, read=False) == 6
        io.deregister_fd(again)
        os.close(again)
    assert (work / "first").read_bytes() == b"first" and (work / "second").read_bytes() == b"second"


def test_parts_of_memory(mount_point: Path) -> None:
    with shared(mount_point, 100) as (shm, iov):
        shm.buf[:100] = bytes(range(100))
        part = iov[10:50][5:]
        assert (len(iov), len(part), part.base_off, part.result, part.userdata) == (100, 35, 15, 0, None)
        assert bytes(part) == bytes(range(15, 50)) == bytes(memoryview(part))
        assert len(iov[:]) == 100 and len(iov[200:300]) == 0 and len(iov[-10:]) == 10
        memoryview(part).cast("B")[0] = 255
        assert shm.buf[15] == 255
        with pytest.raises(ValueError):
            iov[::2]
        with pytest.raises(TypeError):
            iov[3]
    with refuses(errno.EINVAL), shared(mount_point / "below", 10):
        pass
    shm = SharedMemory(size=10, create=True)
    try:
        with refuses(errno.EINVAL):
            io.make_iovec(shm, "/tmp")
        with refuses(errno.EINVAL):
            io.make_iovec(shm, str(mount_point), block_size=-1)
    finally:
        shm.close()
        shm.unlink()


def test_memory_outlives_the_shared_memory(mount_point: Path, work: Path) -> None:
    """Its name and its mapping may go; the parts stay."""
    (work / "file").write_bytes(b"still here")
    shm = SharedMemory(size=MIB, create=True)
    shm.unlink()
    iov = io.make_iovec(shm, str(mount_point))
    shm.close()
    with opened(work / "file", os.O_RDONLY) as fd:
        part = iov[100:110]
        del iov
        assert once(mount_point, fd, part, 0, read=True) == 10
        assert bytes(part) == b"still here"


def test_ends_and_holes(mount_point: Path, work: Path) -> None:
    with opened(work / "file") as fd, shared(mount_point, MIB) as (shm, iov):
        os.ftruncate(fd, 3 * MIB)
        shm.buf[:4] = b"data"
        assert once(mount_point, fd, iov[:4], 2 * MIB + 10, read=False) == 4
        shm.buf[:] = b"x" * MIB
        assert once(mount_point, fd, iov, 3 * MIB - 5, read=True) == 5
        assert once(mount_point, fd, iov, 3 * MIB, read=True) == 0
        assert once(mount_point, fd, iov[:100], 10, read=True) == 100 and bytes(shm.buf[:100]) == bytes(100)
        assert once(mount_point, fd, iov[:100], 10, read=True, flags=2) == -errno.ENODATA
        assert once(mount_point, fd, iov[:14], 2 * MIB, read=True, flags=2) == 14 and bytes(shm.buf[:14]) == bytes(10) + b"data"


def test_refusals(mount_point: Path, work: Path) -> None:
    (work / "file").write_bytes(b"content")
    where = str(mount_point)
    reader, writer = io.make_ioring(where, 2), io.make_ioring(where, 2, for_read=False)
    assert reader.entries == 2
    with shared(mount_point, KIB) as (_, iov), opened(work / "file", os.O_RDONLY) as fd, opened(work / "file", os.O_WRONLY) as out:
        for number, call in [
            (errno.EINVAL, lambda: reader.prepare(iov, False, fd, 0)),
            (errno.EINVAL, lambda: writer.prepare(iov, True, out, 0)),
            (errno.EINVAL, lambda: reader.prepare(iov[5:5], True, fd, 0)),
            (errno.EINVAL, lambda: reader.prepare(iov, True, fd, -1)),
            (errno.EACCES, lambda: writer.prepare(iov, False, fd, 0)),
            (errno.EACCES, lambda: reader.prepare(iov, True, out, 0)),
            (errno.EBADF, lambda: reader.prepare(iov, True, 9999, 0)),
            (errno.EINVAL, lambda: io.make_ioring("/tmp", 2)),
            (errno.EINVAL, lambda: io.make_ioring(where, 0)),
            (errno.EINVAL, lambda: io.make_ioring(where, 2, io_depth=3)),
            (errno.EINVAL, lambda: io.make_ioring(where, 2, flags=4)),
            (errno.EINVAL, lambda: io.make_ioring(where, 2, priority=2)),
            (errno.EINVAL, lambda: io.make_ioring(where, 2, timeout=-1)),
        ]:
            with refuses(number):
                call()
        with pytest.raises(TypeError):
            reader.prepare(bytearray(4), True, fd, 0)
        reader.prepare(iov[:4], True, fd, 0, "a").prepare(iov[4:8], True, fd, 4, userdata="b")
        with refuses(errno.EAGAIN):
            reader.prepare(iov, True, fd, 0)
        done = reader.submit().wait(min_results=2)
        assert [(each.result, each.userdata, bytes(each)[: each.result]) for each in done] == [(4, "a", b"cont"), (3, "b", b"ent")]
        assert reader.wait() == []


def test_rights_are_those_of_the_process(mount_point: Path, work: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    (work / "private").write_bytes(b"secret")
    (work / "private").chmod(0o600)
    fd = os.open(work / "private", os.O_RDONLY)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setresuid(12345, 12345, 12345)
            io.register_fd(fd)
        except PermissionError:
            status = 0
        finally:
            os._exit(status)
    os.close(fd)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_links_holes_and_lengths(mount_point: Path, second_mount: Path, work: Path) -> None:
    path = work / "file"
    data = random.Random(1).randbytes(3 * MIB + 100)
    path.write_bytes(data)
    io.hardlink(str(path), str(work / "link"))
    assert os.stat(work / "link").st_nlink == 2
    with refuses(errno.EEXIST):
        io.hardlink(str(path), str(work / "link"))
    io.punch_hole(path, [0, 2 * MIB], [MIB, 3 * MIB])
    expected = bytes(MIB) + data[MIB : 2 * MIB] + bytes(MIB) + data[3 * MIB :]
    assert path.read_bytes() == expected
    with opened(path, os.O_RDWR) as fd:
        io.punch_hole(fd, [3 * MIB], [4 * MIB])
        assert path.read_bytes() == expected[: 3 * MIB] + bytes(100)
        for start, end in (([1], [MIB]), ([0], [100]), ([0], []), ([0] * 1001, [MIB] * 1001)):
            with refuses(errno.EINVAL):
                io.punch_hole(fd, start, end)
        with shared(mount_point, MIB) as (shm, iov):
            shm.buf[:] = b"n" * MIB
            assert once(mount_point, fd, iov, 8 * MIB, read=False) == MIB
        assert io.force_fsync(fd) == 0
        other = second_mount / work.name / "file"
        assert os.stat(path).st_size == os.stat(other).st_size == 9 * MIB
        assert other.read_bytes()[8 * MIB :] == b"n" * MIB
    with open(path, "rb") as file, refuses(errno.EBADF):
        io.punch_hole(file.fileno(), [0], [MIB])


def test_reading_a_whole_file(work: Path) -> None:
    data = random.Random(2).randbytes(2 * MIB + 77)
    path = work / "file"
    path.write_bytes(data)
    assert io.read_file(path) == data == io.read_file(str(path), block_size=300_000)
    assert io.read_file(path, off=MIB) == data[MIB:] and io.read_file(path, off=9 * MIB) == b""
    seen: list[tuple[int, bytes]] = []

    def skip(block: memoryview, offset: int) -> int | bool:
        seen.append((offset, bytes(block)))
        return 2 * MIB if offset == MIB else offset == 2 * MIB + KIB

    assert io.read_file(path, block_size=MIB, cb=skip) is None
    assert [(offset, len(block)) for offset, block in seen] == [(0, MIB), (MIB, MIB), (2 * MIB, 77)]
    assert all(block == data[offset : offset + len(block)] for offset, block in seen)
    (work / "empty").touch()
    assert io.read_file(work / "empty") == b""
    with pytest.raises(FileNotFoundError):
        io.read_file(work / "nothing")


def test_a_forked_child_goes_on_by_itself(mount_point: Path, work: Path) -> None:
    """As torch's data loaders: registered before the fork, used after it on both sides."""
    (work / "file").write_bytes(b"content")
    with opened(work / "file", os.O_RDONLY) as fd, shared(mount_point, KIB) as (_, iov):
        ring = io.make_ioring(str(mount_point), 1)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                [done] = ring.prepare(iov[:100], True, fd, 3).submit().wait(min_results=1)
                io.deregister_fd(fd)
                status = 0 if (done.result, bytes(done)[:4]) == (4, b"tent") else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert once(mount_point, fd, iov[:7], 0, read=True) == 7 and bytes(iov[:7]) == b"content"


class SglangFile:
    """What SGLang's (and vLLM's) Hf3fsUsrBioClient does, step by step."""

    def __init__(self, path: str, size: int, page: int, entries: int) -> None:
        self.page, self.entries = page, entries
        self.file = os.open(path, os.O_RDWR | os.O_CREAT)
        os.ftruncate(self.file, size)
        io.register_fd(self.file)
        mount = io.extract_mount_point(path)
        assert mount is not None
        self.shm_r = SharedMemory(size=page * entries, create=True)
        self.shm_w = SharedMemory(size=page * entries, create=True)
        self.ior_r = io.make_ioring(mount, entries, for_read=True, timeout=1, numa=-1)
        self.ior_w = io.make_ioring(mount, entries, for_read=False, timeout=1, numa=-1)
        self.iov_r = io.make_iovec(self.shm_r, mount)
        self.iov_w = io.make_iovec(self.shm_w, mount)
        self.shm_r.unlink()
        self.shm_w.unlink()

    def read(self, offsets: list[int], *, timeout_s: float = 20) -> tuple[list[int], list[bytes]]:
        for place, offset in enumerate(offsets):
            self.ior_r.prepare(self.iov_r[place * self.page : (place + 1) * self.page], True, self.file, offset)
        done = self.ior_r.submit().wait(min_results=len(offsets), timeout=timedelta(seconds=timeout_s))
        return [each.result for each in done], [bytes(self.shm_r.buf[place * self.page : (place + 1) * self.page]) for place in range(len(offsets))]

    def write(self, offsets: list[int], pages: list[bytes]) -> list[int]:
        self.shm_w.buf[: len(pages) * self.page] = b"".join(pages)
        for place, offset in enumerate(offsets):
            self.ior_w.prepare(self.iov_w[place * self.page : (place + 1) * self.page], False, self.file, offset)
        return [each.result for each in self.ior_w.submit().wait(min_results=len(offsets), timeout=timedelta(seconds=20))]

    def close(self) -> None:
        io.deregister_fd(self.file)
        os.close(self.file)
        del self.ior_r, self.ior_w, self.iov_r, self.iov_w
        self.shm_r.close()
        self.shm_w.close()


def side_by_side(count: int, job: Callable[[int], None]) -> None:
    failures: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            job(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures, failures


def test_sixteen_jobs_of_sglang(work: Path) -> None:
    """numjobs 16, entries 8, one file: pages written by one job are read by the next."""
    page, pages = 221_184, 16 * 8
    path = str(work / "hicache.0.bin")
    jobs = [SglangFile(path, pages * page, page, 8) for _ in range(16)]
    content = [random.Random(index).randbytes(page) for index in range(pages)]

    def write(number: int) -> None:
        mine = range(number, pages, 16)
        assert jobs[number].write([index * page for index in mine], [content[index] for index in mine]) == [page] * 8

    def read(number: int) -> None:
        order = list(range((number + 1) % 16, pages, 16))
        random.Random(number).shuffle(order)
        results, found = jobs[number].read([index * page for index in order])
        assert results == [page] * 8
        assert found == [content[index] for index in order]

    side_by_side(16, write)
    side_by_side(16, read)
    for job in jobs:
        job.close()
    assert Path(path).read_bytes() == b"".join(content)
    io.deregister_fd(jobs[0].file)  # the second close, from atexit
    with refuses(errno.EBADF):
        os.close(jobs[0].file)


def test_a_batch_that_ran_out_of_time_gives_nothing_to_the_next(work: Path, mount_point: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang pairs results with keys by position: late answers of the batch before must not be among them, nor write over its pages."""
    page = 64 * KIB
    job = SglangFile(str(work / "file"), 4 * page, page, 4)
    content = [bytes([65 + index]) * page for index in range(4)]
    assert job.write([index * page for index in range(4)], content) == [page] * 4
    mount = clusters.mount_over(mount_point)
    assert mount is not None
    storage = clusters.client_of(mount).portal.client.storage
    real = storage.read_each
    slow = [True]

    async def read_each(reads: Any, **options: Any) -> Any:
        while slow[0]:
            await trio.sleep(0.01)
        return await real(reads, **options)

    async def places(ranges: Any) -> Any:
        return [None] * len(ranges)

    monkeypatch.setattr(storage, "places", places)
    monkeypatch.setattr(storage, "read_each", read_each)
    results, _ = job.read([0, page], timeout_s=0.05)
    assert results == [-errno.ETIMEDOUT] * 2
    slow[0] = False
    results, found = job.read([2 * page, 3 * page])
    assert results == [page] * 2 and found == content[2:]
    job.close()


def test_objects_of_lmcache(work: Path, mount_point: Path) -> None:
    """A client a thread, with memory and rings of its own; an object is a file: opened, registered, transferred in steps, deregistered, closed,
    renamed."""
    step = 256 * KIB

    def job(number: int) -> None:
        shm_read = SharedMemory(name=f"kvfs_test_{os.getpid()}_{number}_read", size=step, create=True)
        shm_write = SharedMemory(name=f"kvfs_test_{os.getpid()}_{number}_write", size=step, create=True)
        iov_read = io.make_iovec(shm=shm_read, hf3fs_mount_point=str(mount_point), numa=-1)
        iov_write = io.make_iovec(shm=shm_write, hf3fs_mount_point=str(mount_point), numa=-1)
        ior_read = io.make_ioring(str(mount_point), 128, for_read=True, timeout=200, numa=-1)
        ior_write = io.make_ioring(str(mount_point), 128, for_read=False, timeout=200, numa=-1)
        for turn in range(4):
            header, body = bytes([number]) * 28, random.Random(number * 10 + turn).randbytes(700_001)
            temporary, final = work / f"{number}-{turn}.tmp", work / f"{number}-{turn}.data"
            with opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
                at = 0
                for part in (header, *(body[start : start + step] for start in range(0, len(body), step))):
                    shm_write.buf[: len(part)] = part
                    ior_write.prepare(iov_write[: len(part)], False, fd, at)
                    assert ior_write.submit().wait(min_results=1)[0].result == len(part)
                    at += len(part)
                os.rename(temporary, final)
            with opened(final, os.O_RDONLY) as fd:
                found = bytearray()
                for at in range(0, 28 + len(body), step):
                    length = min(step, 28 + len(body) - at)
                    ior_read.prepare(iov_read[:length], True, fd, at)
                    assert ior_read.submit().wait(min_results=1)[0].result == length
                    found += shm_read.buf[:length]
                assert found == header + body
            assert os.stat(final).st_size == 28 + len(body)
            if turn % 2:
                os.remove(final)
        del ior_read, ior_write, iov_read, iov_write
        for shm in (shm_read, shm_write):
            shm.close()
            shm.unlink()

    side_by_side(4, job)
    assert len(list(work.iterdir())) == 8 and not files._registered


def test_a_program_that_ends_without_a_word(work: Path, mount_point: Path) -> None:
    """Nothing deregistered, rings and memory alive at exit, a close from atexit: it ends well, and what was acknowledged is there."""
    program = textwrap.dedent(
        f"""
        import atexit, os, sys
        sys.path.insert(0, {str(DISTRIBUTION)!r})
        from multiprocessing.shared_memory import SharedMemory
        from hf3fs_fuse.io import *
        first = os.open({str(work / "first")!r}, os.O_RDWR | os.O_CREAT)
        second = os.open({str(work / "second")!r}, os.O_RDWR | os.O_CREAT)
        register_fd(first), register_fd(second)
        atexit.register(lambda: (deregister_fd(second), os.close(second), deregister_fd(second)))
        shm = SharedMemory(size=1 << 20, create=True)
        iov, ring = make_iovec(shm, {str(mount_point)!r}), make_ioring({str(mount_point)!r}, 2, for_read=False)
        shm.unlink()
        shm.buf[:4] = b"mine"
        ring.prepare(iov[:4], False, first, 0).prepare(iov[:4], False, second, 0)
        print([done.result for done in ring.submit().wait(min_results=2)])
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "[4, 4]\n"), done.stderr
    assert "Traceback" not in done.stderr
    assert (work / "first").read_bytes() == (work / "second").read_bytes() == b"mine"
