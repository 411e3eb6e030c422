"""The file system operations without a kernel: a whole cluster in one trio run, and two FileSystems on it as two mounts would be."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio
from tests.unit.client.whole import whole

from kvfs.common.errors import AlreadyExists, BadHandle, DeadlineExceeded, InvalidArgument, NoAttribute, NotFound, NotPermitted, NotSupported
from kvfs.fuse.entry_cache import RENEW_S
from kvfs.fuse.model import Attributes, Caller, Changes
from kvfs.fuse.names import KernelNames
from kvfs.fuse.operations import FileSystem

ROOT = Caller(0, 0)
USER = Caller(1000, 1000)
MIB = 1 << 20


@dataclass
class Kernel:
    """What the operations told the kernel to forget."""

    attributes_of: list[int] = field(default_factory=list)
    data_of: list[int] = field(default_factory=list)

    def attributes(self, inode: int) -> None:
        self.attributes_of.append(inode)

    def data(self, inode: int) -> None:
        self.data_of.append(inode)

    async def attributes_now(self, inode: int) -> None:
        self.attributes_of.append(inode)

    async def data_now(self, inode: int) -> None:
        self.data_of.append(inode)

    def all_names(self) -> None:
        self.attributes_of.append(-1)


@dataclass
class Stage:
    one: FileSystem
    two: FileSystem
    kernel: Kernel
    calls: Callable[[], int]
    """Calls that the first one has made to the metadata service."""


@asynccontextmanager
async def stage() -> AsyncIterator[Stage]:
    async with whole(storage=2, replicas=2) as cluster, cluster.client() as first, cluster.client() as second:
        kernel = Kernel()
        one, two = FileSystem(first, invalidate=kernel), FileSystem(second)
        for client, file_system in ((first, one), (second, two)):
            client.on_revoked(file_system.revoked)
            client.on_lost(file_system.lost)
        made = 0
        call = first.meta._call

        async def counted(method: str, *arguments: object, **options: object) -> object:
            nonlocal made
            made += method != "Watch"
            return await call(method, *arguments, **options)  # type: ignore[arg-type]

        first.meta._call = counted
        while not first.watcher.epoch or not second.watcher.epoch:
            await trio.sleep(0.01)
        yield Stage(one, two, kernel, lambda: made)
        await one.close()
        await two.close()


def staged(test: Callable[[Stage], Awaitable[None]]) -> Callable[[], None]:
    """The decorated test runs on a fresh stage, within a minute."""

    def run() -> None:
        async def main() -> None:
            with trio.fail_after(60):
                async with stage() as ready:
                    await test(ready)

        trio.run(main)

    run.__name__ = test.__name__
    return run


async def write_file(fs: FileSystem, name: bytes, data: bytes, parent: int = 1) -> Attributes:
    opened, attributes = await fs.create(parent, name, stat.S_IFREG | 0o644, os.O_WRONLY, ROOT)
    for offset in range(0, len(data), MIB):
        await fs.write(opened.handle, offset, data[offset : offset + MIB])
    await fs.flush(opened.handle)
    await fs.release(opened.handle)
    return attributes


async def read_file(fs: FileSystem, inode: int, length: int) -> bytes:
    opened = await fs.open(inode, os.O_RDONLY, ROOT)
    data = b"".join([bytes(await fs.read(opened.handle, offset, min(MIB, length - offset))) for offset in range(0, length, MIB)])
    await fs.flush(opened.handle)
    await fs.release(opened.handle)
    return data


async def listing(fs: FileSystem, inode: int = 1, *, room: int = 10) -> list[bytes]:
    """All names, through buffers that take `room` entries each."""
    handle = await fs.opendir(inode, ROOT)
    names: list[bytes] = []
    position = 0
    while True:
        taken: list[tuple[bytes, int]] = []

        def emit(name: bytes, inode: int, mode: int, shown: Attributes | None, after: int, taken: list[tuple[bytes, int]] = taken) -> bool:
            if len(taken) >= room:
                return False
            taken.append((name, after))
            return True

        await fs.readdir(handle, position, emit)
        if not taken:
            break
        names += [name for name, _ in taken]
        position = taken[-1][1]
    await fs.releasedir(handle)
    return names


@staged
async def test_files(ready: Stage) -> None:
    fs = ready.one
    data = os.urandom(3 * MIB + 77)
    made = await write_file(fs, b"f", data)
    assert await read_file(fs, made.inode, len(data) + 1000) == data
    found = await fs.lookup(1, b"f", ROOT)
    assert (found.length, found.mode, found.nlink) == (len(data), stat.S_IFREG | 0o644, 1)
    assert found.blocks * 512 == pytest.approx(len(data), abs=64 * 1024)
    assert await read_file(ready.two, made.inode, len(data)) == data
    with pytest.raises(AlreadyExists):
        await fs.create(1, b"f", 0o644, os.O_WRONLY | os.O_EXCL, ROOT)


@staged
async def test_unflushed_writes_are_seen_here_and_flushed_ones_everywhere(ready: Stage) -> None:
    opened, made = await ready.one.create(1, b"f", 0o644, os.O_RDWR, ROOT)
    assert (await ready.two.lookup(1, b"f", ROOT)).length == 0
    await ready.one.write(opened.handle, 0, b"hello")
    for attributes in (await ready.one.getattr(made.inode, ROOT), await ready.one.lookup(1, b"f", ROOT)):
        assert attributes.length == 5 and attributes.mtime_ns > made.mtime_ns
    assert bytes(await ready.one.read(opened.handle, 0, 100)) == b"hello"
    await ready.one.flush(opened.handle)
    assert (await ready.two.lookup(1, b"f", ROOT)).length == 5
    assert await read_file(ready.two, made.inode, 5) == b"hello"


@staged
async def test_path_under_leases_costs_no_call(ready: Stage) -> None:
    fs = ready.one
    directory = await fs.mkdir(1, b"d", 0o755, ROOT)
    await write_file(fs, b"f", b"x", directory.inode)
    await fs.getattr(1, ROOT)
    for name, parent in ((b"d", 1), (b"f", directory.inode)):
        await fs.lookup(parent, name, ROOT)
    before = ready.calls()
    for _ in range(20):
        assert (await fs.lookup(1, b"d", ROOT)).inode == directory.inode
        assert (await fs.lookup(directory.inode, b"f", ROOT)).length == 1
        assert (await fs.getattr(directory.inode, ROOT)).nlink == 2
    assert ready.calls() == before


@staged
async def test_looking_at_every_entry_costs_few_calls(ready: Stage) -> None:
    directory = (await ready.two.mkdir(1, b"d", 0o755, ROOT)).inode
    for number in range(100):
        await ready.two.mknod(directory, b"n%03d" % number, stat.S_IFREG | number, 0, ROOT)
    await ready.one.lookup(1, b"d", ROOT)
    before = ready.calls()
    for number in range(100):
        assert (await ready.one.lookup(directory, b"n%03d" % number, ROOT)).mode & 0o777 == number
    assert ready.calls() - before < 20
    await ready.two.setattr((await ready.two.lookup(directory, b"n050", ROOT)).inode, Changes(mode=0o777), None, ROOT)
    assert (await ready.one.lookup(directory, b"n050", ROOT)).mode & 0o777 == 0o777
    assert ready.one.kept_entry(directory, b"n051") is not None
    before = ready.calls()
    await listing(ready.two, directory)
    assert ready.calls() == before


@staged
async def test_what_the_other_mount_changes_is_seen_at_once(ready: Stage) -> None:
    one, two = ready.one, ready.two
    directory = (await one.mkdir(1, b"d", 0o755, ROOT)).inode
    await two.lookup(1, b"d", ROOT)
    for number in range(10):
        name = b"n%d" % number
        made = await write_file(one, name, b"x" * number, directory)
        assert (await two.lookup(directory, name, ROOT)).length == number
        assert (await one.lookup(directory, name, ROOT)).inode == made.inode
        await two.setattr(made.inode, Changes(mode=0o600), None, ROOT)
        assert (await one.lookup(directory, name, ROOT)).mode & 0o777 == 0o600
        await two.rename(directory, name, directory, b"moved", 0, ROOT)
        with pytest.raises(NotFound):
            await one.lookup(directory, name, ROOT)
        assert (await one.lookup(directory, b"moved", ROOT)).inode == made.inode
        await one.unlink(directory, b"moved", ROOT)
        with pytest.raises(NotFound):
            await two.lookup(directory, b"moved", ROOT)


@staged
async def test_own_changes_are_seen_through_the_cache(ready: Stage) -> None:
    fs = ready.one
    directory = (await fs.mkdir(1, b"d", 0o755, ROOT)).inode
    await fs.lookup(1, b"d", ROOT)
    before = await fs.getattr(directory, ROOT)
    made = await fs.mkdir(directory, b"sub", 0o755, ROOT)
    after = await fs.getattr(directory, ROOT)
    assert after.nlink == before.nlink + 1 and after.mtime_ns > before.mtime_ns
    assert after == await ready.two.getattr(directory, ROOT) or after.mtime_ns == (await ready.two.getattr(directory, ROOT)).mtime_ns
    linked = await write_file(fs, b"f", b"x", directory)
    assert (await fs.link(linked.inode, directory, b"g", ROOT)).nlink == 2
    assert (await fs.lookup(directory, b"f", ROOT)).nlink == 2
    await fs.unlink(directory, b"g", ROOT)
    assert (await fs.lookup(directory, b"f", ROOT)).nlink == 1
    await fs.rmdir(directory, b"sub", ROOT)
    with pytest.raises(NotFound):
        await fs.lookup(directory, b"sub", ROOT)
    assert (await fs.getattr(made.inode, ROOT)).nlink == 0, "somebody may stand in it"
    fs.forget([(made.inode, 1)])
    with pytest.raises(NotFound):
        await fs.getattr(made.inode, ROOT)
    assert (await fs.getattr(directory, ROOT)).nlink == before.nlink


@staged
async def test_append_goes_to_the_end_wherever_the_kernel_thinks_it_is(ready: Stage) -> None:
    made = await write_file(ready.one, b"log", b"")
    first = await ready.one.open(made.inode, os.O_WRONLY | os.O_APPEND, ROOT)
    second = await ready.two.open(made.inode, os.O_WRONLY | os.O_APPEND, ROOT)
    assert first.direct_io, "the kernel's cached pages would be in the wrong place"
    for number in range(5):
        await ready.one.write(first.handle, 0, b"a%d" % number)
        await ready.two.write(second.handle, 0, b"b%d" % number)
    for fs, opened in ((ready.one, first), (ready.two, second)):
        await fs.flush(opened.handle)
        await fs.release(opened.handle)
    assert await read_file(ready.one, made.inode, 100) == b"a0b0a1b1a2b2a3b3a4b4"


@staged
async def test_write_past_the_page_cache_invalidates_what_readers_have(ready: Stage) -> None:
    fs = ready.one
    writer, made = await fs.create(1, b"f", 0o644, os.O_WRONLY, ROOT)
    assert writer.direct_io
    await fs.write(writer.handle, 0, b"one")
    assert ready.kernel.data_of == [], "nobody reads it"
    reader = await fs.open(made.inode, os.O_RDONLY, ROOT)
    both = await fs.open(made.inode, os.O_RDWR, ROOT)
    assert not reader.direct_io and not both.direct_io
    await fs.write(writer.handle, 0, b"two")
    assert ready.kernel.data_of == [made.inode]
    await fs.write(both.handle, 0, b"three")
    assert ready.kernel.data_of == [made.inode], "through the page cache: the kernel knows"
    for opened in (reader, both):
        await fs.release(opened.handle)
    await fs.write(writer.handle, 0, b"four")
    assert ready.kernel.data_of == [made.inode]
    await fs.release(writer.handle)


@staged
async def test_kernel_pages_are_kept_only_of_the_same_version(ready: Stage) -> None:
    made = await write_file(ready.one, b"f", b"one")

    async def kept() -> bool:
        opened = await ready.one.open(made.inode, os.O_RDONLY, ROOT)
        await ready.one.release(opened.handle)
        return opened.keep_cache

    assert [await kept(), await kept(), await kept()][1:] == [True, True]
    opened = await ready.two.open(made.inode, os.O_WRONLY, ROOT)
    await ready.two.write(opened.handle, 0, b"two")
    await ready.two.flush(opened.handle)
    await ready.two.release(opened.handle)
    assert [await kept(), await kept()] == [False, True]
    ready.one.forget([(made.inode, 1)])
    assert not await kept(), "a forgotten inode has no pages"


@staged
async def test_truncate(ready: Stage) -> None:
    fs = ready.one
    opened, made = await fs.create(1, b"f", 0o644, os.O_RDWR, ROOT)
    await fs.write(opened.handle, 0, b"0123456789")
    assert (await fs.setattr(made.inode, Changes(length=4), opened.handle, ROOT)).length == 4
    await fs.write(opened.handle, 8, b"89")
    assert bytes(await fs.read(opened.handle, 0, 100)) == b"0123\0\0\0\x0089"
    again = await fs.open(made.inode, os.O_WRONLY | os.O_TRUNC, ROOT)
    assert bytes(await fs.read(opened.handle, 0, 100)) == b"" and (await fs.getattr(made.inode, ROOT)).length == 0
    for handle in (again.handle, opened.handle):
        await fs.flush(handle)
        await fs.release(handle)
    assert (await ready.two.lookup(1, b"f", ROOT)).length == 0


@staged
async def test_unlinked_file_stays_until_closed(ready: Stage) -> None:
    made = await write_file(ready.one, b"f", b"content")
    reader = await ready.one.open(made.inode, os.O_RDONLY, ROOT)
    await ready.two.unlink(1, b"f", ROOT)
    assert bytes(await ready.one.read(reader.handle, 0, 7)) == b"content"
    assert (await ready.one.getattr(made.inode, ROOT)).nlink == 0
    await ready.one.release(reader.handle)
    with pytest.raises(NotFound):
        await ready.two.lookup(1, b"f", ROOT)


@staged
async def test_listing(ready: Stage) -> None:
    fs = ready.one
    directory = (await fs.mkdir(1, b"d", 0o755, ROOT)).inode
    names = [b"n%04d" % number for number in range(300)]
    for name in names:
        await fs.mknod(directory, name, stat.S_IFREG | 0o644, 0, ROOT)
    for room in (1, 7, 1000):
        assert await listing(fs, directory, room=room) == [b".", b"..", *names]
    await fs.unlink(directory, names[0], ROOT)
    assert await listing(fs, directory) == [b".", b"..", *names[1:]]


@staged
async def test_position_survives_changes(ready: Stage) -> None:
    fs = ready.one
    directory = (await fs.mkdir(1, b"d", 0o755, ROOT)).inode
    names = [b"n%03d" % number for number in range(60)]
    for name in names:
        await fs.mknod(directory, name, stat.S_IFREG | 0o644, 0, ROOT)
    handle = await fs.opendir(directory, ROOT)
    places: dict[bytes, int] = {}

    async def read(position: int, room: int) -> list[bytes]:
        taken: list[bytes] = []

        def emit(name: bytes, inode: int, mode: int, shown: Attributes | None, after: int) -> bool:
            if len(taken) >= room:
                return False
            taken.append(name)
            places[name] = after
            return True

        await fs.readdir(handle, position, emit)
        return taken

    assert await read(0, 32) == [b".", b"..", *names[:30]]
    await ready.two.unlink(directory, names[3], ROOT)
    await ready.two.unlink(directory, names[29], ROOT)
    await ready.two.mknod(directory, b"n029a", stat.S_IFREG | 0o644, 0, ROOT)
    assert (await read(places[names[29]], 100))[-1] == names[59]
    assert (await read(places[names[10]], 5)) == names[11:16]
    assert (await read(0, 4)) == [b".", b"..", names[0], names[1]]


@staged
async def test_types_links_and_refusals(ready: Stage) -> None:
    fs = ready.one
    assert (await fs.mknod(1, b"fifo", stat.S_IFIFO | 0o600, 0, ROOT)).mode == stat.S_IFIFO | 0o600
    device = os.makedev(259, 70_000)
    assert (await fs.mknod(1, b"dev", stat.S_IFBLK | 0o600, device, ROOT)).rdev == device
    link = await fs.symlink(1, b"link", b"to/somewhere", ROOT)
    assert link.mode == stat.S_IFLNK | 0o777 and link.length == 12
    assert await fs.readlink(link.inode, ROOT) == b"to/somewhere"
    with pytest.raises(InvalidArgument):
        await fs.readlink(1, ROOT)
    with pytest.raises(InvalidArgument):
        await fs.rename(1, b"fifo", 1, b"x", 3, ROOT)
    with pytest.raises(NotPermitted):
        await fs.setattr(link.inode, Changes(uid=5), None, USER)
    with pytest.raises(BadHandle):
        await fs.read(12345, 0, 1)
    while not (await fs.statfs(ROOT)).blocks:  # known with the storage services' first heartbeats
        await trio.sleep(0.05)


@staged
async def test_time_now_is_for_whoever_may_write_and_a_given_time_for_the_owner(ready: Stage) -> None:
    fs = ready.one
    made = await write_file(fs, b"f", b"x")
    await fs.setattr(made.inode, Changes(mode=0o666), None, ROOT)
    now = time.time_ns()
    found = await fs.setattr(made.inode, Changes(atime_ns=now, mtime_ns=now, times_are_now=True), None, USER)
    assert abs(found.mtime_ns - now) < 5 * 10**9
    for given in (Changes(mtime_ns=12345), Changes(atime_ns=now, mtime_ns=now), Changes(mode=0o600, mtime_ns=now, times_are_now=True)):
        with pytest.raises(NotPermitted):
            await fs.setattr(made.inode, given, None, USER)


@staged
async def test_closing_a_reader_waits_for_no_call_and_ends_its_session_once(ready: Stage) -> None:
    fs = ready.one
    made = await write_file(fs, b"f", b"x")
    opened = await fs.open(made.inode, os.O_RDONLY, ROOT)
    before = ready.calls()
    with trio.move_on_after(0):  # nothing that waits gets through
        await fs.release(opened.handle)
    assert ready.calls() == before
    await trio.sleep(0.2)
    assert ready.calls() <= before + 1


@staged
async def test_write_of_an_ordinary_user_clears_setuid(ready: Stage) -> None:
    fs = ready.one
    made = await write_file(fs, b"f", b"x")
    await fs.setattr(made.inode, Changes(mode=0o6777), None, ROOT)
    opened = await fs.open(made.inode, os.O_WRONLY, USER)
    await fs.write(opened.handle, 0, b"y")
    assert (await fs.getattr(made.inode, ROOT)).mode & 0o7777 == 0o777
    assert ready.kernel.attributes_of == [made.inode], "the kernel has the old mode cached"
    await fs.release(opened.handle)


@staged
async def test_xattrs(ready: Stage) -> None:
    fs = ready.one
    made = await write_file(fs, b"f", b"x")
    await fs.setxattr(made.inode, b"user.a", b"1", ROOT)
    assert await fs.getxattr(made.inode, b"user.a", ROOT) == b"1" and await fs.listxattr(made.inode, ROOT) == [b"user.a"]
    await fs.removexattr(made.inode, b"user.a", ROOT)
    layout = json.loads(await fs.getxattr(made.inode, b"user.kvfs.layout", ROOT))
    chains = json.loads(await fs.getxattr(made.inode, b"user.kvfs.chains", ROOT))
    assert layout["chunk_size"] == MIB and [chain["chain"] for chain in chains] == layout["chains"]
    assert all(target["state"] == "serving" for chain in chains for target in chain["targets"])
    cluster = json.loads(await fs.getxattr(1, b"user.kvfs.cluster", USER))
    assert cluster["cluster_id"] == "whole" and cluster["managers"][0].startswith("tcp://")
    for name in (b"user.kvfs.layout", b"user.kvfs.cluster"):
        with pytest.raises(NotPermitted):
            await fs.setxattr(made.inode, name, b"x", ROOT)
    with pytest.raises(NoAttribute):
        await fs.getxattr(1, b"user.kvfs.chains", ROOT)
    before = ready.calls()
    with pytest.raises(NoAttribute):
        await fs.getxattr(made.inode, b"security.capability", ROOT)
    for name in (b"system.posix_acl_access", b"security.selinux", b"trusted.x"):
        with pytest.raises(NotSupported):
            await fs.getxattr(made.inode, name, ROOT)
    assert ready.calls() == before, "the kernel asks these before every write: no call"


@staged
async def test_blocks_of_a_sparse_file_are_those_stored(ready: Stage) -> None:
    fs = ready.one
    opened, made = await fs.create(1, b"f", 0o644, os.O_RDWR, ROOT)
    await fs.setattr(made.inode, Changes(length=1 << 40), opened.handle, ROOT)
    await fs.write(opened.handle, 1 << 39, b"middle")
    await fs.flush(opened.handle)
    await fs.release(opened.handle)
    found = await fs.lookup(1, b"f", ROOT)
    assert found.length == 1 << 40 and 0 < found.blocks * 512 <= 2 * MIB
    assert bytes(await read_at(fs, made.inode, (1 << 39) - 2, 10)) == b"\0\0middle\0\0"


async def read_at(fs: FileSystem, inode: int, offset: int, length: int) -> bytes:
    opened = await fs.open(inode, os.O_RDONLY, ROOT)
    data = bytes(await fs.read(opened.handle, offset, length))
    await fs.release(opened.handle)
    return data


@staged
async def test_close_of_the_mount_flushes_what_is_open(ready: Stage) -> None:
    opened, made = await ready.one.create(1, b"f", 0o644, os.O_WRONLY, ROOT)
    await ready.one.write(opened.handle, 0, b"unflushed")
    await ready.one.close()
    assert await read_file(ready.two, made.inode, 100) == b"unflushed"


@staged
async def test_kernel_keeps_names_for_as_long_as_the_directory_is_leased(ready: Stage) -> None:
    one, two, names = ready.one, ready.two, KernelNames(trio.current_time)
    directory = (await two.mkdir(1, b"d", 0o755, ROOT)).inode
    made = await two.mknod(directory, b"f", stat.S_IFREG | 0o644, 0, ROOT)
    assert (await one.lookup(1, b"d", ROOT)).entry_lease_s == 0, "a kernel that cannot be told to forget keeps no names"
    one._names = names
    for parent in (1, directory):
        await one.getattr(parent, ROOT)
    assert 0 < (await one.lookup(1, b"d", ROOT)).entry_lease_s <= 1
    assert 0 < (await one.lookup(directory, b"f", ROOT)).entry_lease_s <= 1
    kept = one.kept_entry(directory, b"f")
    assert kept is not None and kept.entry_lease_s > 0
    assert one.known_absent(directory, b"none") < 0
    with pytest.raises(NotFound):
        await one.lookup(directory, b"none", ROOT)
    before = ready.calls()
    with pytest.raises(NotFound):
        await one.lookup(directory, b"none", ROOT)
    assert one.known_absent(directory, b"none") > 0 and ready.calls() == before
    await two.mknod(directory, b"none", stat.S_IFREG | 0o644, 0, ROOT)  # a change by another mount
    assert one.kept_entry(directory, b"f") is None and one.known_absent(directory, b"none") < 0
    assert set((names.recall(directory) or pytest.fail("nothing to take back")).names) == {b"f", b"none"}
    assert (await one.lookup(directory, b"f", ROOT)).inode == made.inode
    await one.getattr(directory, ROOT)
    assert (await one.lookup(directory, b"f", ROOT)).entry_lease_s == 0, "others are at work in this directory"
    assert (await one.lookup(1, b"d", ROOT)).entry_lease_s > 0
    await one.lost()
    assert ready.kernel.attributes_of == [-1], "after a restart of the service no name may be used without asking"


@staged
async def test_name_moved_by_this_mount_is_taken_back_where_it_is_now(ready: Stage) -> None:
    one, two = ready.one, ready.two
    one._names = names = KernelNames(trio.current_time)
    for name in (b"from", b"to"):
        await two.mkdir(1, name, 0o755, ROOT)
    await one.getattr(1, ROOT)
    source, target = (await one.lookup(1, b"from", ROOT)).inode, (await one.lookup(1, b"to", ROOT)).inode
    await two.mkdir(source, b"d", 0o755, ROOT)
    await one.getattr(source, ROOT)
    assert (await one.lookup(source, b"d", ROOT)).entry_lease_s > 0
    await one.rename(source, b"d", target, b"e", 0, ROOT)
    recall = names.recall(target)
    assert recall is not None and recall.names == [b"e"] and names.recall(source) is None


@staged
async def test_a_read_out_of_time_is_not_tried_again_for_the_kernels_second_request(ready: Stage) -> None:
    fs = ready.one
    opened, _ = await fs.create(1, b"late", 0o644, os.O_RDWR, ROOT)
    await fs.write(opened.handle, 0, b"content")
    tries = 0

    async def late(offset: int, length: int) -> memoryview:
        nonlocal tries
        tries += 1
        raise DeadlineExceeded("nobody answers")

    file = fs._files.get(opened.handle).file
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(file), "pread", lambda self, offset, length: late(offset, length))
        for _ in range(3):
            with pytest.raises(DeadlineExceeded):
                await fs.read(opened.handle, 0, 7)
        assert tries == 1
    await trio.sleep(0.3)
    assert bytes(await fs.read(opened.handle, 0, 7)) == b"content", "a later read is tried"
    await fs.release(opened.handle)


@staged
async def test_creating_file_after_file_needs_no_lookup_also_when_the_lease_is_renewed(ready: Stage) -> None:
    fs = ready.one
    for attempt in range(5):
        directory = (await fs.mkdir(1, b"d%d" % attempt, 0o755, ROOT)).inode
        started = before = trio.current_time()
        number = looked_up = 0
        slowest_s = 0.0
        while before < started + 2.5:
            name = b"f%d" % number
            if fs.known_absent(directory, name) < 0:
                looked_up += 1
                with pytest.raises(NotFound):
                    await fs.lookup(directory, name, ROOT)
            opened, _ = await fs.create(directory, name, stat.S_IFREG | 0o644, os.O_WRONLY, ROOT)
            await fs.release(opened.handle)
            number += 1
            before, slowest_s = trio.current_time(), max(slowest_s, trio.current_time() - before)
        if slowest_s < RENEW_S / 2:
            assert looked_up <= max(5, 0.1 * number) < number  # once a lease, also where few files are made in one
            return
        # A creation that outlives the lease ends what is known of the directory: this machine stood still.
    pytest.skip("this machine stood still for a tenth of a second again and again")
