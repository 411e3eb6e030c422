"""The meta process over a real network: registration, requests, restart with the same store, what must not start."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.unit.meta.namespace.service_world import FakeChunks

from kvfs.common.boundary.clock import SystemClock
from kvfs.common.boundary.random import SystemRandom
from kvfs.common.boundary.system_net import SystemNet
from kvfs.common.errors import ConfigError, DirectoryInUse, FormatTooNew, NoServingTarget, NotFound, WrongDataDirectory
from kvfs.common.membership import ManagerLink
from kvfs.common.wire import meta_pb2 as pb
from kvfs.common.wire.channel import ChannelPool
from kvfs.common.wire.cluster_pb2 import ROLE_META
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.service import method
from kvfs.meta import server as meta_server
from kvfs.meta.cluster import server as manager_server
from kvfs.meta.cluster.config import ManagerConfig
from kvfs.meta.config import MetaConfig
from kvfs.meta.kv.memory import MemoryEngine
from kvfs.meta.namespace import keys, records

LIMIT_S = 20.0


@asynccontextmanager
async def cluster(folder: Path, **settings: Any) -> AsyncIterator[tuple[MetaConfig, trio.Nursery, meta_server.World]]:
    """A manager, and what a meta service needs to join it."""
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            manager = ManagerConfig(data=str(folder / "manager"), listen=("tcp://127.0.0.1:0",), kv="memory")
            info = await nursery.start(manager_server.serve, manager)
            config = MetaConfig(data=str(folder / "meta"), managers=tuple(info["addresses"]), kv=f"lmdb:{folder}/kv", **settings)
            yield config, nursery, meta_server.World(chunks=FakeChunks())
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def meta(config: MetaConfig, world: meta_server.World) -> AsyncIterator[dict[str, Any]]:
    async with trio.open_nursery() as nursery:
        yield await nursery.start(lambda task_status: meta_server.serve(config, world=world, task_status=task_status))
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def caller(addresses: list[str]) -> AsyncIterator[Any]:
    async with ChannelPool(SystemNet(), SystemClock(), Identity(client_id=b"t" * 16)) as pool:

        async def call(name: str, request: Any) -> Any:
            return await pool.call(addresses, method("Meta", name), request, timeout_s=5.0)

        yield call


def test_it_registers_serves_and_comes_back_with_its_data(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, attr_lease_ms=50) as (config, _, world):
            async with meta(config, world) as info, caller(info["addresses"]) as call:
                link_pool = ChannelPool(SystemNet(), SystemClock(), Identity(client_id=b"l" * 16))
                async with link_pool:
                    link = ManagerLink(link_pool, SystemClock(), SystemRandom(), config.managers, Identity(client_id=b"l" * 16))
                    routing = await link.refresh()
                    assert await meta_server.list_clients(link) == set()
                    nodes = routing.nodes_with_role(ROLE_META, alive=True)
                    assert [list(node.addresses) for node in nodes] == [info["addresses"]]
                await call("Make", pb.MakeRequest(parent=1, name=b"d", type=pb.DIRECTORY, mode=0o755))
                with pytest.raises(NoServingTarget):
                    await call("Create", pb.CreateRequest(parent=1, name=b"f"))
                with pytest.raises(NotFound):
                    await call("Remove", pb.RemoveRequest(parent=1, name=b"missing"))
                with pytest.raises(DirectoryInUse):
                    await meta_server.serve(config)
                first = info["node_id"]
            async with meta(config, world) as info, caller(info["addresses"]) as call:
                assert info["node_id"] == first
                reply = await call("Lookup", pb.LookupRequest(parent=1, names=[b"d"]))
                assert reply.inodes[0].type == pb.DIRECTORY
                await call("Remove", pb.RemoveRequest(parent=1, name=b"d", directory=True))
                assert len((await call("ReadDir", pb.ReadDirRequest(inode=1))).entries) == 0

    trio.run(main)


def test_grpc_serves_the_same(tmp_path: Path) -> None:
    grpc = pytest.importorskip("grpc")

    async def main() -> None:
        async with cluster(tmp_path, grpc_listen="127.0.0.1:0") as (config, _, world), meta(config, world) as info:

            def ask() -> Any:
                with grpc.insecure_channel(info["grpc_address"]) as channel:
                    call = channel.unary_unary(
                        "/kvfs.wire.Meta/GetAttr",
                        request_serializer=pb.GetAttrRequest.SerializeToString,
                        response_deserializer=pb.GetAttrReply.FromString,
                    )
                    return call(pb.GetAttrRequest(inodes=[1]), timeout=5)

            reply = await trio.to_thread.run_sync(ask)
            assert reply.inodes[0].type == pb.DIRECTORY

    trio.run(main)


def test_what_must_not_start(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(ConfigError):
            await meta_server.serve(MetaConfig())
        async with cluster(tmp_path) as (config, _, world):
            async with meta(config, world):
                pass
            with pytest.raises(WrongDataDirectory):
                await meta_server.serve(replace(config, data=str(tmp_path / "manager2"), cluster_id="x"), world=await _foreign(tmp_path / "manager2"))
            engine = MemoryEngine()
            await engine.transact(lambda txn: txn.set(keys.FORMAT, records.encode_number(records.FORMAT_VERSION + 1)))
            with pytest.raises(FormatTooNew):
                await meta_server.serve(config, world=replace(world, engine=engine))
            rows, _ = await engine.transact(lambda txn: txn.get_range(b"\0", b"\xff"))
            assert len(rows) == 1

    trio.run(main)


async def _foreign(folder: Path) -> meta_server.World:
    """A directory that belongs to another cluster."""
    folder.mkdir()
    (folder / "node.json").write_text('{"format": 1, "cluster_id": "y", "role": "meta", "node_uuid": "u"}')
    return meta_server.World()


@pytest.mark.parametrize("fields", [{"managers": ()}, {"attr_lease_ms": -1}, {"gc_delay_s": -1.0}, {"attr_lease_ms": 10**9}])
def test_bad_configuration(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        MetaConfig(data="/tmp/x", **fields)
