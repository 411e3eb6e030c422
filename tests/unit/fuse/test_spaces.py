"""KV-cache spaces as users of a mount see them, without a kernel: a whole cluster in one trio run, two mounts, and a client that puts blocks."""

from __future__ import annotations

import hashlib
import json
import os
import random
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import trio
from tests.unit.client.fakes import run
from tests.unit.client.whole import whole

from kvfs.client import AsyncClient
from kvfs.client.config import ClientConfig
from kvfs.client.file import block_file
from kvfs.client.spaces import CHAIN_PAGE_MIN, Block
from kvfs.client.storage_reads import ChunkRead
from kvfs.common.errors import ConnectionLost, KvfsError, NoAttribute, NotFound, NotPermitted, ReadOnly, StaleHandle
from kvfs.common.wire import meta_pb2 as pb
from kvfs.fuse import block_table
from kvfs.fuse.block_table import BLOCK_BIT, BlockTable
from kvfs.fuse.handles import DirectoryHandle
from kvfs.fuse.model import Attributes, Caller, Changes
from kvfs.fuse.operations import FileSystem, directories
from kvfs.fuse.operations.directories import DirectoryOperations
from kvfs.kvcache import AsyncKVCache, AsyncSpace, Put, SpaceParams

ROOT = Caller(0, 0)
BLOCK = 300_000
PARAMS = SpaceParams(block_tokens=4, block_bytes=BLOCK, model="m", quota_bytes=1 << 30, ttl_s=60)


def key(number: int) -> bytes:
    return hashlib.blake2b(b"%d" % number, digest_size=16).digest()


def content(number: int, length: int = BLOCK) -> bytes:
    return random.Random(number).randbytes(length)


@dataclass
class Stage:
    one: FileSystem
    two: FileSystem
    client: AsyncClient
    """Of the first mount."""
    cache: AsyncKVCache
    space: AsyncSpace
    inode: int


@asynccontextmanager
async def stage(params: SpaceParams = PARAMS, **cluster: Any) -> AsyncIterator[Stage]:
    async with whole(**{"storage": 3, "replicas": 2, **cluster}) as made, made.client() as first, made.client() as second, made.client() as third:
        one, two = FileSystem(first), FileSystem(second)
        for client, file_system in ((first, one), (second, two)):
            client.on_revoked(file_system.revoked)
            client.on_lost(file_system.lost)
        while not first.watcher.epoch or not second.watcher.epoch:
            await trio.sleep(0.01)
        cache = AsyncKVCache(third)
        space = await cache.create("s", params)
        kvcache = await one.lookup(1, b"kvcache", ROOT)
        found = await one.lookup(kvcache.inode, b"s", ROOT)
        assert found.inode == space.inode and stat.S_ISDIR(found.mode)
        yield Stage(one, two, first, cache, space, space.inode)
        await one.close()
        await two.close()


def staged(test: Callable[[Stage], Awaitable[None]]) -> Callable[[], None]:
    def main() -> None:
        async def on_stage() -> None:
            async with stage() as ready:
                await test(ready)

        run(on_stage, 60)

    main.__name__ = test.__name__
    return main


async def put(space: AsyncSpace, *numbers: int, length: int = BLOCK) -> None:
    for start in range(0, len(numbers), 64):
        some = numbers[start : start + 64]
        assert set(await space.put([key(number) for number in some], [content(number, length) for number in some])) == {Put.STORED}


async def listing(fs: FileSystem, inode: int, *, room: int = 10, plus: bool = True) -> dict[bytes, tuple[int, Attributes | None]]:
    """What readdir gives, through buffers that take `room` entries each; no name twice."""
    handle = await fs.opendir(inode, ROOT)
    found: dict[bytes, tuple[int, Attributes | None]] = {}
    position = 0
    while True:
        before = position

        def emit(name: bytes, number: int, mode: int, attributes: Attributes | None, after: int, end: int = position + room) -> bool:
            nonlocal position
            if after > end:
                return False
            assert name not in found
            found[name] = (number, attributes)
            position = after
            return True

        await fs.readdir(handle, position, emit, attributes=plus)
        if position == before:
            break
    await fs.releasedir(handle)
    return {name: entry for name, entry in found.items() if name not in (b".", b"..")}


async def read(fs: FileSystem, inode: int, size: int = 128 << 10) -> bytes:
    opened = await fs.open(inode, os.O_RDONLY, ROOT)
    data = b""
    while piece := bytes(await fs.read(opened.handle, len(data), size)):
        data += piece
    await fs.release(opened.handle)
    return data


def name_of(number: int) -> bytes:
    return key(number).hex().encode()


@staged
async def test_blocks_are_listed_looked_up_and_read(ready: Stage) -> None:
    fs, numbers = ready.one, range(40)
    await put(ready.space, *numbers)
    names = sorted(name_of(number) for number in numbers)
    for room, plus in ((1000, True), (7, False)):
        found = await listing(fs, ready.inode, room=room, plus=plus)
        assert list(found) == names, "all, in the order of names"
        for name, (number, attributes) in found.items():
            assert number & BLOCK_BIT and (attributes is not None) == plus
            shown = await fs.lookup(ready.inode, name, ROOT)
            assert shown.inode == number and shown == await fs.getattr(number, ROOT)
            assert stat.S_ISREG(shown.mode) and stat.S_IMODE(shown.mode) == 0o444 and shown.length == BLOCK
            assert shown.blocks * 512 >= BLOCK and abs(shown.mtime_ns / 1e9 - ready.client.clock.wall_ns() / 1e9) < 60
            assert shown.lease_s == shown.entry_lease_s == 0, "the kernel must not keep what no revocation covers"
    assert (await ready.two.lookup(ready.inode, names[0], ROOT)).inode == (await fs.lookup(ready.inode, names[0], ROOT)).inode
    for number in numbers[:5]:
        assert await read(fs, (await fs.lookup(ready.inode, name_of(number), ROOT)).inode) == content(number)
    for name in (name_of(1).upper(), b"x" * 32, name_of(1)[:-1], b"file", key(1000).hex().encode()):
        with pytest.raises(NotFound):
            await fs.lookup(ready.inode, name, ROOT)


def test_pages_over_many_chains_leave_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directories, "PAGE_ENTRIES", 64)
    held = 0
    wanted = DirectoryOperations._next_page

    async def watched(self: DirectoryOperations, directory: DirectoryHandle, position: int) -> None:
        nonlocal held
        await wanted(self, directory, position)
        held = max(held, len(directory.page))

    monkeypatch.setattr(DirectoryOperations, "_next_page", watched)

    async def test() -> None:
        async with stage() as ready:
            numbers = range(700)
            await put(ready.space, *numbers, length=100)
            chains = len(ready.space.chain_ids)
            assert chains > 1
            for room in (1000, 50):
                assert list(await listing(ready.one, ready.inode, room=room)) == sorted(name_of(number) for number in numbers)
            assert 0 < held <= max(128 + chains, CHAIN_PAGE_MIN * chains) < 700

    run(test, 60)


@staged
async def test_nothing_is_written_in_a_space(ready: Stage) -> None:
    fs = ready.one
    await put(ready.space, 1)
    shown = await fs.lookup(ready.inode, name_of(1), ROOT)
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC):
        with pytest.raises(ReadOnly):
            await fs.open(shown.inode, flags, ROOT)
    with pytest.raises(ReadOnly):
        await fs.setattr(shown.inode, Changes(mode=0o666), None, ROOT)
    with pytest.raises(ReadOnly):
        await fs.setxattr(shown.inode, b"user.x", b"1", ROOT)
    with pytest.raises(ReadOnly):
        await fs.link(shown.inode, 1, b"link", ROOT)
    with pytest.raises(NotPermitted):
        await fs.create(ready.inode, b"file", 0o644, os.O_WRONLY, ROOT)
    with pytest.raises(NotPermitted):
        await fs.mkdir(ready.inode, b"directory", 0o755, ROOT)
    with pytest.raises(NotPermitted):
        await fs.unlink(ready.inode, name_of(1), ROOT)
    for old, new in ((ready.inode, 1), (1, ready.inode)):
        with pytest.raises(NotPermitted):
            await fs.rename(old, name_of(1), new, b"moved", 0, ROOT)
    assert not await fs.access(shown.inode, os.W_OK, ROOT) and await fs.access(shown.inode, os.R_OK, Caller(1000, 1000))
    assert await fs.listxattr(shown.inode, ROOT) == []
    with pytest.raises(NoAttribute):
        await fs.getxattr(shown.inode, b"user.kvfs.stats", ROOT)
    assert await read(fs, shown.inode) == content(1)


@staged
async def test_a_dropped_space_is_gone_at_once_in_every_mount(ready: Stage) -> None:
    one, two = ready.one, ready.two
    await put(ready.space, 1, 2)
    kvcache = (await one.lookup(1, b"kvcache", ROOT)).inode
    for fs in (one, two):
        assert len(await listing(fs, ready.inode)) == 2
        await fs.lookup(kvcache, b"s", ROOT)
    shown = await two.lookup(ready.inode, name_of(1), ROOT)
    await one.rmdir(kvcache, b"s", ROOT)
    for fs in (one, two):
        with pytest.raises(NotFound):
            await fs.lookup(kvcache, b"s", ROOT)
        with pytest.raises(NotFound):
            await fs.lookup(ready.inode, name_of(1), ROOT)
        assert await listing(fs, ready.inode) == {}, "somebody may stand in it"
    for call in (two.getattr(shown.inode, ROOT), two.open(shown.inode, os.O_RDONLY, ROOT)):
        with pytest.raises(KvfsError) as caught:
            await call
        assert isinstance(caught.value, NotFound | StaleHandle)
    assert await ready.cache.list() == {}
    with pytest.raises(NotFound):
        await two.getxattr(ready.inode, b"user.kvfs.stats", ROOT)


@staged
async def test_a_block_that_goes_while_it_is_open_is_an_error_and_another_of_its_name_another_file(ready: Stage) -> None:
    fs = ready.one
    await put(ready.space, 1)
    shown = await fs.lookup(ready.inode, name_of(1), ROOT)
    opened = await fs.open(shown.inode, os.O_RDONLY, ROOT)
    assert await ready.space.remove([key(1)]) == [True]
    with pytest.raises(StaleHandle):
        await fs.read(opened.handle, 0, 4096)
    with pytest.raises(StaleHandle):
        await fs.open(shown.inode, os.O_RDONLY, ROOT)
    with pytest.raises(NotFound):
        await fs.lookup(ready.inode, name_of(1), ROOT)
    other = content(2)
    assert await ready.space.put([key(1)], [other]) == [Put.STORED]
    with pytest.raises(StaleHandle):
        await fs.read(opened.handle, 0, 4096)
    await fs.release(opened.handle)
    again = await fs.lookup(ready.inode, name_of(1), ROOT)
    assert again.inode != shown.inode and await read(fs, again.inode) == other


@staged
async def test_a_block_replaced_between_a_read_and_the_next_never_mixes(ready: Stage) -> None:
    """Also when it happens between the reading of bytes and the look at what was read."""
    await put(ready.space, 1)
    fs = ready.one
    shown = await fs.lookup(ready.inode, name_of(1), ROOT)
    opened = await fs.open(shown.inode, os.O_RDONLY, ROOT)
    storage, before = ready.client.storage, ready.client.storage.read

    async def replaced_first(reads: list[ChunkRead], **options: Any) -> Any:
        await ready.space.remove([key(1)])
        await ready.space.put([key(1)], [content(2)])
        return await before(reads, **options)

    storage.read = replaced_first  # type: ignore[method-assign, assignment]
    with pytest.raises(StaleHandle):
        await fs.read(opened.handle, 0, 4096)
    storage.read = before  # type: ignore[method-assign]
    await fs.release(opened.handle)


@staged
async def test_what_is_read_ahead_is_bounded_and_given_back(ready: Stage) -> None:
    fs, count = ready.one, block_file.WINDOWS_MAX + 5
    await put(ready.space, *range(count))
    opened = [await fs.open((await fs.lookup(ready.inode, name_of(number), ROOT)).inode, os.O_RDONLY, ROOT) for number in range(count)]
    requests = ready.client.storage.counters.read_requests
    for number, each in enumerate(opened):
        assert bytes(await fs.read(each.handle, 0, 1000)) == content(number)[:1000]
        assert bytes(await fs.read(each.handle, 1000, 50_000)) == content(number)[1000:51_000]
    assert ready.client.storage.counters.read_requests - requests == count, "a block is fetched once, not once a read"
    assert len(fs._block_reader._holding) == block_file.WINDOWS_MAX
    for number, each in enumerate(opened):
        assert bytes(await fs.read(each.handle, 200_001, BLOCK)) == content(number)[200_001:]
        assert bytes(await fs.read(each.handle, 7, 9)) == content(number)[7:16], "backwards"
        assert bytes(await fs.read(each.handle, BLOCK, 10)) == b""
        await fs.release(each.handle)
    assert not fs._block_reader._holding and not fs._cached_opens


@staged
async def test_parameters_and_statistics_are_attributes(ready: Stage) -> None:
    fs = ready.one
    await put(ready.space, *range(10))
    assert await ready.space.exists([key(number) for number in range(5, 15)]) == [True] * 5 + [False] * 5
    space = json.loads(await fs.getxattr(ready.inode, b"user.kvfs.space", ROOT))
    assert space["block_bytes"] == BLOCK and space["block_tokens"] == 4 and space["format"] == {"model": "m"}
    assert space["digest"] == PARAMS.digest.hex() and space["chains"] == list(ready.space.chain_ids) and space["inode"] == ready.inode
    stats = json.loads(await fs.getxattr(ready.inode, b"user.kvfs.stats", ROOT))
    known = await ready.cache.stats("s")
    assert stats["blocks"] == 10 and stats["bytes"] == 10 * BLOCK and stats["hits"] == 5 == stats["misses"] and stats["stored"] == 10
    assert (stats["evicted"], stats["expired"], stats["quota_bytes"], stats["ttl_s"]) == (0, 0, 1 << 30, 60)
    assert stats["targets"] == known.targets and stats["allocated_bytes"] == known.allocated_bytes
    assert json.loads(await ready.client.getxattr("/kvcache/s", "user.kvfs.stats"))["blocks"] == 10
    assert json.loads(await ready.client.getxattr("/kvcache/s", "user.kvfs.space")) == space
    for call in (fs.getxattr(1, b"user.kvfs.space", ROOT), ready.client.getxattr("/", "user.kvfs.stats")):
        with pytest.raises(NoAttribute):
            await call
    for name in (b"user.kvfs.space", b"user.kvfs.stats"):
        with pytest.raises(NotPermitted):
            await fs.setxattr(ready.inode, name, b"1", ROOT)
    assert await fs.listxattr(ready.inode, ROOT) == []


@staged
async def test_the_kernel_s_knowledge_is_counted(ready: Stage) -> None:
    fs = ready.one
    await put(ready.space, 1)
    shown = await fs.lookup(ready.inode, name_of(1), ROOT)
    await fs.lookup(ready.inode, name_of(1), ROOT)
    await listing(fs, ready.inode)
    fs.forget([(shown.inode, 2)])
    assert await fs.getattr(shown.inode, ROOT) == shown, "the listing gave it to the kernel too"
    opened = await fs.open(shown.inode, os.O_RDONLY, ROOT)
    fs.forget([(shown.inode, 1)])
    assert await fs.getattr(shown.inode, ROOT) == shown, "it is open"
    await fs.release(opened.handle)
    assert len(fs._blocks) == 0
    with pytest.raises(StaleHandle):
        await fs.getattr(shown.inode, ROOT)


def test_a_replica_stands_in_and_what_nobody_can_list_is_an_error_not_a_gap() -> None:
    async def test() -> None:
        async with whole(storage=2, replicas=2) as cluster, cluster.client(config=ClientConfig(buffer_pool_bytes=64 << 20, deadline_s=3)) as client:
            fs = FileSystem(client)
            space = await AsyncKVCache(client).create("s", PARAMS)
            await put(space, *range(20))
            caller = client.storage._peers.caller
            call, deaf = caller.call, client.routing.addresses_of_target(client.routing.head(space.chain_ids[0]))

            async def one_is_deaf(addresses: tuple[str, ...], *arguments: Any, **options: Any) -> Any:
                if addresses == deaf:
                    raise ConnectionLost("the service closed the connection")
                return await call(addresses, *arguments, **options)

            caller.call = one_is_deaf
            with trio.fail_after(2.5):  # before the deadline: the other replica is asked at once
                assert list(await listing(fs, space.inode)) == sorted(name_of(number) for number in range(20))
                assert await read(fs, (await fs.lookup(space.inode, name_of(3), ROOT)).inode) == content(3)
            caller.call = call
            cluster.stop_storage(0)
            cluster.stop_storage(1)
            with trio.fail_after(10):  # it answers what has begun, then it is gone
                while any(client.routing.serving(chain) for chain in space.chain_ids):
                    await trio.sleep(0.05)
            with pytest.raises(KvfsError) as caught:
                await listing(fs, space.inode)
            assert not isinstance(caught.value, NotFound)
            await fs.close()

    run(test, 40)


def test_numbers_are_stable_and_the_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    space = pb.Inode(inode=1 << 59 | 7)
    blocks = [Block(key(number), 100, number, 5, 4096) for number in range(20)]
    table, other = BlockTable(lambda: now, 10), BlockTable(lambda: now)
    numbers = [other.heard(space, block).number for block in blocks]
    assert len(set(numbers)) == 20 and all(number & BLOCK_BIT and number < 1 << 63 for number in numbers)
    kept = table.heard(space, blocks[0])
    kept.opens = 1
    assert [table.heard(space, block).number for block in blocks[1:]] == numbers[1:], "the same in every mount"
    assert len(table) == 10 and table.get(numbers[0]) is kept and table.get(numbers[1]) is None
    assert table.named(space.inode, key(19)) is table.get(numbers[19]) and table.named(space.inode, key(1)) is None
    now = block_table.RECENT_S + 0.1
    assert table.named(space.inode, key(19)) is None, "seen too long ago"
    monkeypatch.setattr(block_table, "xxh3_64_intdigest", lambda data: 5)
    meeting = BlockTable(lambda: now)
    pair = [meeting.heard(space, block).number for block in (*blocks[:2], *blocks[:2])]
    assert pair[:2] == pair[2:] and pair[0] != pair[1], "two that meet have numbers of their own"
