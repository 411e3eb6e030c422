"""Targets that leave for good and targets that begin anew, with real services: a drain under writes, a chain given up, a damaged index."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from mini_cluster import CHUNK_SIZE, MiniCluster, mini_cluster

from kvfs.common.errors import ChecksumMismatch, ChunkLost, NotEnoughTargets
from kvfs.common.ids import SPACE_BIT, block_id, chunk_id
from kvfs.common.wire import base_pb2 as base
from kvfs.common.wire import cluster_pb2 as cluster
from kvfs.common.wire import storage_pb2 as pb
from kvfs.common.wire.service import method

DRAIN = method("Manager", "Drain")
LIST_DRAINS = method("Manager", "ListDrains")
ACCEPT_LOSS = method("Manager", "AcceptLoss")


def directory(world: MiniCluster, target: int) -> Path:
    return next(world.path.glob(f"storage-*/disk-*/targets/{target}"), Path("/nowhere"))


def number_of(world: MiniCluster, target: int) -> int:
    return int(directory(world, target).relative_to(world.path).parts[0].removeprefix("storage-"))


@asynccontextmanager
async def single_copies(path: Path) -> AsyncIterator[tuple[MiniCluster, int, int]]:
    """One service, and two chains of one replica on its disk."""
    async with mini_cluster(path, lease_ms=1000) as world:
        world.settings = {"node_id": 100}
        await world.start(1)
        await world.create(1, 1, targets_per_disk=2)
        chain, other = (each.chain_id for each in world.routing.chains)
        yield world, chain, other


async def until_drained(world: MiniCluster) -> None:
    with trio.fail_after(60):
        while not all(drain.done for drain in (await world.link.call(LIST_DRAINS, base.Empty(), timeout_s=5)).drains):
            await trio.sleep(0.05)


def test_a_target_is_drained_while_its_chain_is_written(tmp_path: Path) -> None:
    """No write is lost, no read is stale, never fewer than two serve; its data is gone from its disk, and the service may go."""

    async def main() -> None:
        async with mini_cluster(tmp_path, lease_ms=2000) as world:
            for number in (1, 2, 3):
                await world.start(number)
            await world.create(2, 3, targets_per_disk=2)
            node = world.routing.nodes_with_role(cluster.ROLE_STORAGE)[0].node_id
            chains = [chain.chain_id for chain in world.routing.chains]
            model = {(chain, index): os.urandom(50_000) for chain in chains for index in range(6)}
            for (chain, index), data in model.items():
                await world.write(chain, chunk_id(9, index), data)
            leaving = [target.target_id for target in world.routing.targets_of_node(node)]
            done = False

            async def write() -> None:
                turn = 0
                while not done:
                    for (chain, index), data in list(model.items()):
                        turn += 1
                        part = turn.to_bytes(8, "big") * 100
                        await world.write(chain, chunk_id(9, index), part, 800 * (turn % 50))
                        at = 800 * (turn % 50)
                        model[chain, index] = data[:at] + part + data[at + 800 :]
                        for target in world.routing.serving(chain):
                            try:
                                found = await world.read(chain, chunk_id(9, index), at, 800, target=target)
                            except Exception:
                                continue  # it has just left
                            assert found == part, f"target {target} is behind"

            fewest = 2
            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                await world.link.call(DRAIN, cluster.DrainRequest(node_id=node), timeout_s=5)
                world.link.on_routing(lambda routing: None)
                with trio.fail_after(60):
                    while any(world.routing.target(target).chain_id for target in leaving):
                        fewest = min([fewest, *(len(world.routing.serving(chain)) for chain in chains)])
                        await trio.sleep(0.01)
                done = True
            await until_drained(world)
            assert fewest == 2
            with trio.fail_after(10):
                while any(directory(world, target).exists() for target in leaving):
                    await trio.sleep(0.05)
            for (chain, index), data in model.items():
                assert await world.read(chain, chunk_id(9, index), 0, 60_000) == data
            for chain in chains:
                assert await world.assert_identical(chain) == 6
                assert len(world.routing.chain(chain).targets) == 2
            world.stop(next(number for number, started in world.started.items() if started["node_id"] == node))
            await trio.sleep(0.5)
            assert all(len(world.routing.serving(chain)) == 2 for chain in chains), "nobody misses it"
            with pytest.raises(NotEnoughTargets):
                other = next(each.node_id for each in world.routing.nodes_with_role(cluster.ROLE_STORAGE, alive=True) if each.node_id != node)
                await world.link.call(DRAIN, cluster.DrainRequest(node_id=other), timeout_s=5)

    trio.run(main)


def test_a_chain_whose_only_copy_is_gone_waits_and_goes_on_empty_when_told_to(tmp_path: Path) -> None:
    """Its disk was replaced: nothing is made in its place before. Afterwards what was there reads as an error, what is new as what it is."""

    async def main() -> None:
        async with single_copies(tmp_path) as (world, chain, other):
            for each in (chain, other):
                await world.write(each, chunk_id(9, 0), b"old" * 1000)
            (target,) = world.routing.serving(chain)
            (whole,) = world.routing.serving(other)
            world.stop(1)
            await world.over[1].wait()
            kept = tmp_path / "unplugged"
            shutil.move(directory(world, target), kept)
            await world.start(1)
            with trio.fail_after(20):
                while world.routing.serving(other) != [whole]:
                    await trio.sleep(0.05)
            await trio.sleep(0.5)
            assert world.routing.serving(chain) == [] and world.routing.target(target).blank
            assert not directory(world, target).exists(), "an empty one would be in the way of the old one"
            # Plugged in again, it serves as it was.
            world.stop(1)
            await world.over[1].wait()
            shutil.move(kept, tmp_path / "storage-1" / "disk-0" / "targets" / str(target))
            await world.start(1)
            await world.settled(1)
            assert await world.read(chain, chunk_id(9, 0), 0, 3000) == b"old" * 1000
            world.stop(1)
            await world.over[1].wait()
            shutil.rmtree(directory(world, target))
            await world.start(1)
            with trio.fail_after(20):
                while world.routing.serving(other) != [whole] or world.routing.serving(chain):
                    await trio.sleep(0.05)
            request = cluster.AcceptLossRequest(chain_id=chain, chain_version=world.routing.chain(chain).version, lost_below=10)
            await world.link.call(ACCEPT_LOSS, request, timeout_s=5)
            await world.write(chain, chunk_id(10, 0), b"new")  # as soon as it serves
            with pytest.raises(ChunkLost):
                await world.read(chain, chunk_id(9, 0), 0, 10)
            with pytest.raises(ChunkLost):
                await world.write(chain, chunk_id(9, 0), b"a part of what is lost", 10)
            await world.write(chain, chunk_id(9, 0), b"", kind=pb.REMOVE)
            assert await world.read(chain, chunk_id(10, 1), 0, 10) == b"", "a file that is made afterwards has holes"
            assert await world.read(chain, block_id(SPACE_BIT | 1, b"d" * 16), 0, 10) == b"", "a block that is lost is a miss"
            await world.write(chain, chunk_id(9, 1), bytes(CHUNK_SIZE))
            assert await world.read(chain, chunk_id(10, 0), 0, 10) == b"new"
            assert await world.read(chain, chunk_id(9, 1), 0, 10) == bytes(10), "written whole, nothing of it is lost any more"
            assert await world.read(other, chunk_id(9, 0), 0, 3000) == b"old" * 1000

    trio.run(main)


def test_what_no_replica_has_whole_is_copied_as_it_is(tmp_path: Path) -> None:
    """A returning target is filled though one chunk of its predecessor is damaged. That chunk is an error there too, and no hole."""

    async def main() -> None:
        async with mini_cluster(tmp_path, lease_ms=2000) as world:
            chain = await world.one_chain(2)
            data = {chunk_id(9, index): os.urandom(size) for index, size in enumerate((70_000, 20_000, CHUNK_SIZE))}
            for chunk, content in data.items():
                await world.write(chain, chunk, content)
            head, tail = world.routing.serving(chain)
            number = number_of(world, tail)
            world.stop(number)
            await world.over[number].wait()
            shutil.rmtree(directory(world, tail))
            for chunk in (chunk_id(9, 0), chunk_id(9, 2)):
                flip_of(directory(world, head), data[chunk])
            await world.start(number)
            with trio.fail_after(30):
                while len(world.routing.serving(chain)) < 2:
                    await trio.sleep(0.05)
            for target in (head, tail):
                assert await world.read(chain, chunk_id(9, 1), 0, 20_000, target=target) == data[chunk_id(9, 1)]
                for chunk in (chunk_id(9, 0), chunk_id(9, 2)):
                    with pytest.raises(ChecksumMismatch):
                        await world.read(chain, chunk, 10, 20, target=target)
                    assert await world.read(chain, chunk, 40_000, 20_000, target=target) == data[chunk][40_000:60_000], "the rest is whole"

    trio.run(main)


def flip_of(folder: Path, data: bytes) -> None:
    """The first bit of these bytes."""
    for path in (folder / "data").iterdir():
        at = path.read_bytes().find(data[:100])
        if at >= 0:
            with open(path, "r+b") as file:
                file.seek(at)
                file.write(bytes((data[0] ^ 1,)))
            return
    raise AssertionError("not there")


@pytest.mark.parametrize("what", ["a flipped bit", "a new first disk"])
def test_whose_a_directory_is_is_known_from_the_others(tmp_path: Path, what: str) -> None:
    async def main() -> None:
        async with mini_cluster(tmp_path, lease_ms=1000) as world:
            disks = 2 if what == "a new first disk" else 1
            await world.start(1, disks=disks)
            await world.start(2, disks=disks)
            await world.create(2, 2)
            chains = [each.chain_id for each in world.routing.chains]
            for chain in chains:
                await world.write(chain, chunk_id(9, 0), b"kept")
            first = tmp_path / "storage-1" / "disk-0"
            before = (first / "node.json").read_bytes()
            world.stop(1)
            await world.over[1].wait()
            if disks == 2:
                shutil.rmtree(first)
            else:
                damaged = bytearray(before)
                damaged[damaged.index(b"node_uuid") + 14] ^= 1
                (first / "node.json").write_bytes(damaged)
            await world.start(1, disks=disks)
            await world.settled(2)
            assert (first / "node.json").read_bytes() == before
            for chain in chains:
                for target in world.routing.serving(chain):
                    assert await world.read(chain, chunk_id(9, 0), 0, 10, target=target) == b"kept"

    trio.run(main)


@pytest.mark.parametrize("running", [True, False])
def test_a_damaged_index_is_made_anew_and_filled_by_the_chain(tmp_path: Path, running: bool) -> None:
    """Found while it runs or when it is opened: the target leaves its chain, begins empty, and is filled, with nobody's help."""

    async def main() -> None:
        async with mini_cluster(tmp_path, lease_ms=2000) as world:
            chain = await world.one_chain(2)
            data = {chunk_id(9, index): os.urandom(20_000) for index in range(300)}
            for chunk, content in data.items():
                await world.write(chain, chunk, content)
            target = world.routing.serving(chain)[1]
            number = number_of(world, target)
            page = directory(world, target) / "index" / "data.mdb"
            world.stop(number)
            await world.over[number].wait()
            if not running:
                damage(page)
            await world.start(number)
            if running:
                await world.settled(2)
                damage(page)
                request = pb.ScrubRequest(target_id=target, at_once=True)
                await world.pool.call(world.routing.addresses_of_target(target), method("Storage", "Scrub"), request, timeout_s=5)
                with trio.fail_after(20):
                    while len(world.routing.serving(chain)) == 2:
                        await trio.sleep(0.01)
            with trio.fail_after(30):
                while len(world.routing.serving(chain)) < 2:
                    await trio.sleep(0.05)
            await world.settled(2)
            assert await world.assert_identical(chain) == 300
            for chunk, content in data.items():
                assert await world.read(chain, chunk, 0, 30_000, target=target) == content
            with trio.fail_after(10):
                while (directory(world, target) / "aside").exists():
                    await trio.sleep(0.05)
            assert not world.routing.target(target).blank

    trio.run(main)


def damage(page: Path) -> None:
    """A bit in the middle of every leaf and branch, and nothing in the two meta pages."""
    data = bytearray(page.read_bytes())
    for at in range(8192, len(data), 4096):
        data[at + 10] ^= 2
    with open(page, "r+b") as file:
        file.write(data)


@pytest.mark.parametrize("journal", [False, True], ids=["index", "index and journal"])
def test_the_only_copy_with_a_damaged_index_is_left_as_it_is_and_told(tmp_path: Path, journal: bool) -> None:
    """Found while it serves: it ends to, says what is wrong and what to do, and nobody touches its files, however often the process is started; the
    other chain of the disk goes on. When its data is given up, the chain goes on empty."""

    async def main() -> None:
        async with single_copies(tmp_path) as (world, chain, other):
            for each in (chain, other):
                for index in range(300):
                    await world.write(each, chunk_id(9, index), b"old" * 1000)
            (target,) = world.routing.serving(chain)
            world.stop(1)
            await world.over[1].wait()
            await world.start(1)  # what the journal had is in the index now
            await world.settled(1)
            await world.write(chain, chunk_id(9, 0), b"in the journal")
            page = directory(world, target) / "index" / "data.mdb"
            damage(page)
            if journal:  # what would be written anew from memory, through that index
                (segment,) = (directory(world, target) / "journal").iterdir()
                with open(segment, "r+b") as file:
                    file.seek(20)
                    file.write(b"?")
            files = contents(directory(world, target))
            addresses = world.routing.addresses_of_target(target)
            request = pb.ScrubRequest(target_id=target, at_once=True)
            await world.pool.call(addresses, method("Storage", "Scrub"), request, timeout_s=5)
            with trio.fail_after(20):
                while world.routing.serving(chain):
                    await trio.sleep(0.01)
            for _ in range(2):
                await trio.sleep(1)
                status = await world.pool.call(world.routing.addresses_of_target(target), method("Storage", "Status"), base.Empty(), timeout_s=5)
                (problem,) = [each.problem for each in status.targets if each.target_id == target]
                assert "is damaged" in problem and "Restore" in problem and str(page) in problem
                assert world.routing.serving(chain) == [] and not world.routing.target(target).blank
                now = contents(directory(world, target))
                assert {path for path in {*now, *files} if now.get(path) != files.get(path)} == set()
                assert not (directory(world, target) / "aside").exists()
                assert await world.read(other, chunk_id(9, 0), 0, 3000) == b"old" * 1000
                world.stop(1)
                await world.over[1].wait()
                await world.start(1)
                with trio.fail_after(20):
                    while not world.routing.serving(other):
                        await trio.sleep(0.05)
            accept = cluster.AcceptLossRequest(chain_id=chain, chain_version=world.routing.chain(chain).version, lost_below=10)
            await world.link.call(ACCEPT_LOSS, accept, timeout_s=5)
            await world.write(chain, chunk_id(10, 0), b"new")
            with pytest.raises(ChunkLost):
                await world.read(chain, chunk_id(9, 0), 0, 10)

    trio.run(main)


def contents(folder: Path) -> dict[Path, bytes]:
    """Of what a target cannot do without."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name not in ("scrub", "lock.mdb", "LOCK")}
