"""The client against real services, all in one trio run."""

from __future__ import annotations

import random

import pytest
import trio
from tests.unit.client.fakes import run
from tests.unit.client.whole import whole

from kvfs.client.config import ClientConfig
from kvfs.common.errors import AlreadyExists, IsDirectory, NotDirectory, NotEmpty, NotFound
from kvfs.common.wire import meta_pb2 as pb


def test_files_and_names() -> None:
    async def test() -> None:
        async with whole() as cluster, cluster.client() as client:
            data = random.Random(1).randbytes(5_000_001)
            await client.makedirs("/a/b/c")
            await client.makedirs("/a/b/c", exist_ok=True)
            with pytest.raises(AlreadyExists):
                await client.makedirs("/a/b/c")
            await client.write_bytes("/a/b/c/file", data)
            assert await client.read_bytes("a/b/c/file") == data
            assert (await client.stat("/a/b/c/file")).length == len(data)
            await client.symlink("../b/c/file", "/a/b/link")
            assert await client.readlink("/a/b/link") == "../b/c/file"
            assert await client.read_bytes("/a/b/link") == data
            assert (await client.lstat("/a/b/link")).type == pb.SYMLINK
            await client.write_bytes("/a/b/link", b"through the link")
            assert await client.read_bytes("/a/b/c/file") == b"through the link"
            await client.link("/a/b/c/file", "/a/hard")
            assert (await client.stat("/a/hard")).nlink == 2
            assert await client.listdir("/a") == ["b", "hard"]
            assert [name for name, inode in await client.scandir("/a") if inode.type == pb.DIRECTORY] == ["b"]
            assert [step async for step in client.walk("/a")] == [("/a", ["b"], ["hard"]), ("/a/b", ["c"], ["link"]), ("/a/b/c", [], ["file"])]
            await client.rename("/a/hard", "/a/b/moved")
            with pytest.raises(NotFound):
                await client.stat("/a/hard")
            with pytest.raises(NotDirectory):
                await client.stat("/a/b/moved/x")
            with pytest.raises(NotEmpty):
                await client.rmdir("/a/b")
            with pytest.raises(IsDirectory):
                await client.open("/a")
            with pytest.raises(NotFound):
                await client.open("/nowhere/x", "wb")
            with pytest.raises(AlreadyExists):
                await client.open("/a/b/moved", "xb")
            await client.chmod("/a/b/moved", 0o600)
            await client.utimens("/a/b/moved", 5, 7)
            inode = await client.stat("/a/b/moved")
            assert (inode.mode, inode.atime_ns, inode.mtime_ns) == (0o600, 5, 7)
            await client.setxattr("/a/b/moved", "user.colour", b"green")
            assert await client.getxattr("/a/b/moved", "user.colour") == b"green"
            assert await client.listxattr("/a/b/moved") == ["user.colour"]
            await client.removexattr("/a/b/moved", "user.colour")
            await client.truncate("/a/b/moved", 3)
            assert await client.read_bytes("/a/b/moved") == b"thr"
            assert await client.exists("/a/b/c")
            await client.unlink("/a/b/moved")
            await client.rmtree("/a")
            assert await client.listdir("/") == []
            assert (await client.statfs()).capacity_bytes > 0

    run(test, 30)


def test_modes_of_open() -> None:
    async def test() -> None:
        async with whole() as cluster, cluster.client() as client:
            async with await client.open("/f", "wb") as file:
                await file.write(b"hello")
                file.seek(1)
                await file.write(b"E")
            async with await client.open("/f", "ab") as file:
                await file.write(b" world")
                assert file.tell() == 11
            async with await client.open("/f", "r+b") as file:
                assert bytes(await file.read(2)) == b"hE"
                file.seek(-5, 2)
                await file.write(b"W")
                file.seek(0)
                target = bytearray(100)
                assert await file.readinto(target) == 11
                assert bytes(target[:11]) == b"hEllo World"
                await file.truncate(5)
                await file.fsync()
            assert await client.read_bytes("/f") == b"hEllo"
            async with await client.open("/f", "wb"):
                pass
            assert await client.read_bytes("/f") == b""

    run(test, 30)


def test_to_create_to_open_and_to_unlink_cost_one_call_each_and_closing_none() -> None:
    async def test() -> None:
        config = ClientConfig(buffer_pool_bytes=64 << 20, session_end_s=60, watch=False)
        async with whole() as cluster, cluster.client(config=config) as client:
            await client.makedirs("/a/b")
            await client.symlink("/a/b", "/to")
            for number in range(3):
                before = client.counters.meta_calls
                await (await client.open(f"/to/{number}", "wb")).aclose()
                await (await client.open(f"/a/b/{number}", "rb")).aclose()
                await (await client.open(f"/a/b/{number}", "r+b")).aclose()
                await client.unlink(f"/to/{number}")
                assert client.counters.meta_calls == before + 4
            while (await client.meta.status()).sessions:
                await trio.sleep(0.02)
            assert await client.listdir("/a/b") == []

    run(test, 30)


def test_two_clients_see_each_others_closes_and_names() -> None:
    async def test() -> None:
        async with whole() as cluster, cluster.client() as one, cluster.client() as two:
            await one.write_bytes("/f", b"1" * 3_000_000)
            reader = await two.open("/f")
            assert bytes(await reader.read(10)) == b"1" * 10
            file = await one.open("/f", "r+b")
            await file.write(b"2" * 3_000_000)
            await file.fsync()
            assert bytes(await reader.read(10)) == b"2" * 10
            await file.truncate(4)
            reader.seek(0)
            assert bytes(await reader.read(10)) == b"2222"
            await one.rename("/f", "/g")
            assert not await two.exists("/f")
            assert await two.read_bytes("/g") == b"2222"
            await one.unlink("/g")
            assert bytes(await reader.read(10)) == b""
            reader.seek(0)
            assert bytes(await reader.read(10)) == b"2222"  # open, though removed
            await file.aclose()
            await reader.aclose()

    run(test, 30)


def test_sparse_files() -> None:
    async def test() -> None:
        async with whole() as cluster, cluster.client() as client:
            async with await client.open("/sparse", "w+b") as file:
                await file.truncate(1 << 40)
                file.seek(-3, 2)
                await file.write(b"end")
                file.seek(-1_000_000, 2)
                assert bytes(await file.read()) == bytes(999_997) + b"end"
            assert (await client.stat("/sparse")).length == 1 << 40
            with trio.fail_after(3):
                await client.truncate("/sparse", 10)
            assert await client.read_bytes("/sparse") == bytes(10)

    run(test, 30)


def test_a_storage_service_dies_while_files_are_written_and_read() -> None:
    async def test() -> None:
        async with whole(storage=3, replicas=2) as cluster, cluster.client() as client:
            data = random.Random(3).randbytes(20 << 20)
            await client.write_bytes("/before", data)
            file = await client.open("/during", "wb")
            for start in range(0, len(data), 1 << 20):
                if start == 5 << 20:
                    cluster.stop_storage(0)
                await file.write(data[start : start + (1 << 20)])
            with trio.fail_after(1.5):
                assert await client.read_bytes("/before") == data  # replicas answer at once
            await file.aclose()
            assert await client.read_bytes("/during") == data
            await cluster.start_storage(0)
            while not all(len(client.routing.serving(chain.chain_id)) == 2 for chain in client.routing.chains):
                await trio.sleep(0.05)
            assert await client.read_bytes("/during") == data

    run(test, 60)
