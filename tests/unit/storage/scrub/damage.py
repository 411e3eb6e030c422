"""Flipping bits in what a target stores, and asking its service to look."""

from __future__ import annotations

from pathlib import Path

import trio
from mini_cluster import MiniCluster

from kvfs.common.wire import base_pb2 as base
from kvfs.common.wire import storage_pb2 as pb
from kvfs.common.wire.service import method

SCRUB = method("Storage", "Scrub")
STATUS = method("Storage", "Status")
DAMAGE = method("Storage", "Damage")


def folder(world: MiniCluster, target: int) -> Path:
    (found,) = world.path.glob(f"storage-*/disk-*/targets/{target}")
    return found


def flip(path: Path, offset: int, *, mask: int = 1) -> None:
    """In the file, under the nose of the process that has it open."""
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes((byte ^ mask,)))


def find(path: Path, data: bytes) -> int:
    at = path.read_bytes().find(data)
    assert at >= 0, f"{path} does not hold these {len(data)} bytes"
    return at


def data_file(world: MiniCluster, target: int, data: bytes) -> tuple[Path, int]:
    """The file in which a target keeps these bytes, and where."""
    for path in sorted((folder(world, target) / "data").iterdir()):
        at = path.read_bytes().find(data)
        if at >= 0:
            return path, at
    raise AssertionError(f"target {target} does not hold these {len(data)} bytes")


def number_of(world: MiniCluster, target: int) -> int:
    """Of the service that has the target."""
    return int(folder(world, target).relative_to(world.path).parts[0].removeprefix("storage-"))


async def begin(world: MiniCluster, target: int, *, at_once: bool = True) -> int:
    request = pb.ScrubRequest(target_id=target, at_once=at_once)
    reply = await world.pool.call(world.routing.addresses_of_target(target), SCRUB, request, timeout_s=5)
    return int(reply.number)


async def status(world: MiniCluster, target: int) -> pb.ScrubStatus:
    reply = await world.pool.call(world.routing.addresses_of_target(target), STATUS, base.Empty(), timeout_s=5)
    (found,) = [each.scrub for each in reply.targets if each.target_id == target]
    result: pb.ScrubStatus = found
    return result


async def scrub(world: MiniCluster, target: int) -> pb.ScrubStatus:
    """A whole pass."""
    number = await begin(world, target)
    with trio.fail_after(20):
        while (found := await status(world, target)).passes < number:
            await trio.sleep(0.02)
    return found


async def damages(world: MiniCluster, target: int) -> list[pb.Damage]:
    reply = await world.pool.call(world.routing.addresses_of_target(target), DAMAGE, pb.DamageRequest(target_id=target), timeout_s=5)
    return list(reply.damages)
