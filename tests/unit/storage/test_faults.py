"""Bad disks, full disks, wrong directories, damaged requests: each gets its typed answer, and what is not concerned goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from mini_cluster import CHUNK_SIZE, READ, WRITE, MiniCluster, mini_cluster

from kvfs.common import errors
from kvfs.common.boundary.disk import DiskFile
from kvfs.common.boundary.real_disk import RealDisk
from kvfs.common.checksum import checksums
from kvfs.common.errors import AddressInUse, ConfigError, DirectoryInUse, KvfsError, WrongCluster, WrongDataDirectory
from kvfs.common.ids import chunk_id
from kvfs.common.wire import base_pb2 as base
from kvfs.common.wire import storage_pb2 as pb
from kvfs.common.wire.service import method
from kvfs.storage import server
from kvfs.storage.config import StorageConfig
from kvfs.storage.server import World

STATUS = method("Storage", "Status")


class BadDisk(RealDisk):
    """A disk whose data files fail once `broken` holds a part of its path."""

    broken: str = ""

    def open(self, name: str, *, create: bool = False) -> DiskFile:
        file = super().open(name, create=create)
        write = file.write

        def failing(buffers: object, offset: int) -> None:
            if BadDisk.broken and BadDisk.broken in str(self.path):
                raise errors.InputOutput(f"write {self.path}/{name}: planted")
            write(buffers, offset)  # type: ignore[arg-type]

        class File(type(file)):  # type: ignore[misc]
            pass

        file.__class__ = File
        File.write = lambda _, buffers, offset: failing(buffers, offset)
        return file


@pytest.fixture(autouse=True)
def healthy() -> None:
    BadDisk.broken = ""


def chains_of(world: MiniCluster) -> list[int]:
    return [chain.chain_id for chain in world.routing.chains]


def test_a_failing_disk_takes_its_targets_out_and_no_others(tmp_path: Path) -> None:
    async def main() -> None:
        async with mini_cluster(tmp_path) as world:
            world.services = World(open_disk=BadDisk)
            for number in (1, 2):
                await world.start(number, disks=2)
            await world.create(2, 2, targets_per_disk=1)
            for chain in chains_of(world):
                await world.write(chain, chunk_id(5, chain), b"before")
            BadDisk.broken = "storage-1/disk-0"
            with trio.fail_after(20):
                for chain in chains_of(world):
                    await world.write(chain, chunk_id(5, chain), b"after!")
                    assert await world.read(chain, chunk_id(5, chain), 0, 10) == b"after!"
            serving = [len(world.routing.serving(chain)) for chain in chains_of(world)]
            assert sorted(serving) == [1, 2], "one target is out"
            assert not any(world.ended.values()), "the process goes on"
            problems = []
            for node in world.routing.nodes:
                if node.role == 3:
                    status = await world.pool.call(tuple(node.addresses), STATUS, base.Empty(), timeout_s=5)
                    problems += [target.problem for target in status.targets if target.problem]
            assert len(problems) == 1 and "planted" in problems[0]

    trio.run(main)


def test_a_disk_that_failed_may_have_lost_what_was_not_synced_and_one_that_is_stopped_has_not(tmp_path: Path) -> None:
    """What the kernel could not write it drops from the page cache: the last copy is then as after a loss of power."""

    async def main() -> None:
        async with mini_cluster(tmp_path) as world:
            world.services = World(open_disk=BadDisk)
            chain = await world.one_chain(1)
            await world.write(chain, chunk_id(5, 0), b"before")

            async def restart() -> None:
                world.stop(1)
                await world.over[1].wait()
                await world.start(1)
                await world.link.refresh()
                await world.settled(1)

            await restart()
            assert world.routing.chain(chain).loss == 0
            BadDisk.broken = "storage-1"
            with pytest.raises((KvfsError, trio.TooSlowError)):
                await world.write(chain, chunk_id(5, 0), b"after!", timeout_s=3)
            BadDisk.broken = ""
            await restart()
            assert world.routing.chain(chain).loss == 1

    trio.run(main)


def test_a_target_whose_disk_was_full_at_the_start_serves_when_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed 108 of the simulation: it stayed out of service until the process was started anew."""
    monkeypatch.setattr(server, "REOPEN_S", 0.2)

    class FullDisk(RealDisk):
        full = True

        def write_file(self, name: str, data: bytes) -> None:
            if FullDisk.full and "targets" in str(self.path):
                raise errors.NoSpace("planted")
            super().write_file(name, data)

        def open(self, name: str, *, create: bool = False) -> DiskFile:
            if FullDisk.full and create and "targets" in str(self.path):
                raise errors.NoSpace("planted")
            return super().open(name, create=create)

    async def main() -> None:
        async with mini_cluster(tmp_path) as world:
            chain = await world.one_chain(2)
            await world.write(chain, chunk_id(5, 0), b"before")
            world.stop(1)
            world.services = World(open_disk=FullDisk)
            await world.start(1)
            await world.write(chain, chunk_id(5, 0), b"after!")
            assert len(world.routing.serving(chain)) == 1
            FullDisk.full = False
            await world.settled(2)
            assert await world.assert_identical(chain) == 1

    trio.run(main)


def test_a_full_target_refuses_and_keeps_what_it_has(tmp_path: Path) -> None:
    async def main() -> None:
        async with mini_cluster(tmp_path) as world:
            world.settings = {"target_capacity_bytes": 32 << 20}
            chain = await world.one_chain(2)
            data = bytes(CHUNK_SIZE)[:-1] + b"x"
            written = 0
            with pytest.raises(errors.NoSpace):
                while True:
                    await world.write(chain, chunk_id(5, written), data)
                    written += 1
            assert written >= 8
            for index in range(written):
                assert await world.read(chain, chunk_id(5, index), 0, CHUNK_SIZE) == data
            assert await world.read(chain, chunk_id(5, written), 0, 10) == b"", "nothing of the refused one"
            assert await world.assert_identical(chain) == written
            # Removal makes room.
            for index in range(written):
                await world.write(chain, chunk_id(5, index), b"", kind=pb.REMOVE)
            await world.write(chain, chunk_id(6, 0), data)

    trio.run(main)


def test_damaged_bytes_are_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with mini_cluster(tmp_path) as world:
            chain = await world.one_chain(2)
            chunk = chunk_id(5, 0)
            io = pb.WriteIO(chunk_id=chunk, length=5, chunk_size=CHUNK_SIZE, checksums=checksums(b"HELLO", 0))
            (result,) = await world.write_once(chain, [io], [b"hello"])
            assert result.status == errors.ChecksumMismatch.code
            await world.settled(2)
            assert await world.read(chain, chunk, 0, 5) == b""
            assert (await world.write(chain, chunk, b"hello")).version == 1
            await world.assert_identical(chain)

    trio.run(main)


def test_bad_requests(tmp_path: Path) -> None:
    async def main() -> None:
        async with mini_cluster(tmp_path) as world:
            chain = await world.one_chain(1)
            head = world.routing.head(chain)
            where = world.routing.addresses_of_target(head)
            version = world.routing.chain(chain).version

            async def status_of(io: pb.WriteIO, data: list[bytes]) -> int:
                for name, value in (("chain_id", chain), ("chain_version", version), ("target_id", head), ("chunk_size", CHUNK_SIZE)):
                    if not getattr(io, name):
                        setattr(io, name, value)
                reply = await world.pool.call(where, WRITE, pb.WriteRequest(writes=[io]), timeout_s=5, send=data)
                return int(reply.results[0].status)

            good = checksums(b"abc", 0)
            assert await status_of(pb.WriteIO(chunk_id=b"short", length=3, checksums=good), [b"abc"]) == errors.InvalidArgument.code
            assert await status_of(pb.WriteIO(chunk_id=chunk_id(5, 0), length=4, checksums=good), [b"abc"]) == errors.BadRequest.code
            assert await status_of(pb.WriteIO(chunk_id=chunk_id(5, 0), length=3, checksums=good, target_id=99), [b"abc"]) == errors.UnknownTarget.code
            assert await status_of(pb.WriteIO(chunk_id=chunk_id(5, 0), length=3, checksums=good, chain_version=99), [b"abc"]) == 401
            assert await status_of(pb.WriteIO(chunk_id=chunk_id(5, 0), length=3, checksums=good, kind=pb.REPLACE), [b"abc"]) == errors.BadRequest.code
            too_far = pb.WriteIO(chunk_id=chunk_id(5, 0), offset=CHUNK_SIZE, length=3, checksums=good)
            assert await status_of(too_far, [b"abc"]) in (errors.FileTooBig.code, errors.InvalidArgument.code)
            assert (
                await status_of(pb.WriteIO(chunk_id=chunk_id(5, 0), length=3, checksums=good, chunk_size=1 << 30), [b"abc"])
                == errors.InvalidArgument.code
            )
            with pytest.raises(errors.BadRequest):
                await world.pool.call(where, WRITE, pb.WriteRequest(writes=[pb.WriteIO(length=3)]), timeout_s=5, send=[b"abc", b"def"])
            reads = [
                pb.ReadIO(chain_id=chain, target_id=head, chunk_id=chunk_id(5, 0), length=10),
                pb.ReadIO(target_id=98, chunk_id=chunk_id(5, 0), length=1),
            ]
            into = [memoryview(bytearray(10)), memoryview(bytearray(1))]
            reply = await world.pool.call(where, READ, pb.ReadRequest(reads=reads), timeout_s=5, receive=into)
            assert [result.status for result in reply.results] == [errors.ChunkNotFound.code, errors.UnknownTarget.code]
            # And it still works.
            assert (await world.write(chain, chunk_id(5, 0), b"abc")).status == 0

    trio.run(main)


def test_one_request_with_many_updates_of_many_chunks(tmp_path: Path) -> None:
    """Updates of one chunk in one request keep their order; requests that share chunks do not deadlock."""

    async def main() -> None:
        async with mini_cluster(tmp_path) as world:
            chain = await world.one_chain(2)

            async def batch(letter: bytes, order: list[int]) -> None:
                ios = []
                for place, index in enumerate(order):
                    offset = place % 3
                    ios.append(
                        pb.WriteIO(chunk_id=chunk_id(5, index), offset=offset, length=1, chunk_size=CHUNK_SIZE, checksums=checksums(letter, offset))
                    )
                results = await world.write_once(chain, ios, [letter] * len(ios))
                assert all(result.status == 0 for result in results), results

            with trio.fail_after(10):
                for _ in range(20):
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(batch, b"a", [0, 1, 2, 3, 0])
                        nursery.start_soon(batch, b"b", [3, 2, 1, 0, 3])
                        nursery.start_soon(batch, b"c", [2, 0, 2, 0, 2])
            await world.assert_identical(chain)
            versions = {chunk.chunk_id: chunk.version for chunk in await world.listing(world.routing.tail(chain))}
            assert versions == {chunk_id(5, 0): 100, chunk_id(5, 1): 40, chunk_id(5, 2): 100, chunk_id(5, 3): 60}

    trio.run(main)


def test_wrong_directories_are_refused_untouched(tmp_path: Path) -> None:
    async def main() -> None:
        async with mini_cluster(tmp_path) as world:
            await world.start(1, disks=2)
            await world.start(2)
            await world.create(1, 2)
            world.stop(1)
            world.stop(2)
            for number in (1, 2):
                await world.over[number].wait()

            async def refused(data: tuple[Path, ...], cluster_id: str, error: type[KvfsError]) -> None:
                config = StorageConfig(data=tuple(map(str, data)), cluster_id=cluster_id, managers=(world.manager,))
                with pytest.raises(error):
                    await server.serve(config)

            one, two = tmp_path / "storage-1" / "disk-0", tmp_path / "storage-1" / "disk-1"
            other = tmp_path / "storage-2" / "disk-0"
            await refused((one, two), "another", WrongDataDirectory)
            await refused((one, other), "test", WrongDataDirectory)
            (tmp_path / "new").mkdir()
            (tmp_path / "new" / "thesis.tex").touch()
            await refused((tmp_path / "new", two), "test", WrongDataDirectory)
            await refused((tmp_path / "manager",), "test", DirectoryInUse)
            assert not (tmp_path / "new" / "node.json").exists()
            await world.start(1, disks=2)

    trio.run(main)


def test_a_process_that_cannot_start_says_why(tmp_path: Path) -> None:
    async def main() -> None:
        async with mini_cluster(tmp_path) as world:
            await world.start(1)
            taken = next(address for address in world.started[1]["addresses"] if address.startswith("tcp"))
            data = (str(tmp_path / "new"),)
            with pytest.raises(AddressInUse):
                await server.serve(StorageConfig(data=data, listen=(taken,), cluster_id="test", managers=(world.manager,)))
            data = (str(tmp_path / "foreign"),)
            with pytest.raises(WrongCluster):
                await server.serve(StorageConfig(data=data, cluster_id="another", managers=(world.manager,)))
            with pytest.raises(DirectoryInUse):
                await server.serve(StorageConfig(data=(str(tmp_path / "storage-1" / "disk-0"),), cluster_id="test", managers=(world.manager,)))

    trio.run(main)


def test_config() -> None:
    good: dict[str, object] = {"data": ("a",)}
    with pytest.raises(ConfigError):
        trio.run(server.serve, StorageConfig())
    for wrong in ({"data": ("a", "a")}, {"threads": 0}, {"listen": ()}, {"managers": ()}):
        with pytest.raises(ConfigError):
            StorageConfig(**(good | wrong))  # type: ignore[arg-type]
