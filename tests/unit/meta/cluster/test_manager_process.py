"""The manager's `serve` with real sockets, a real directory, LMDB and gRPC."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import trio

from kvfs.common.boundary.clock import SystemClock
from kvfs.common.boundary.random import SystemRandom
from kvfs.common.boundary.system_net import SystemNet
from kvfs.common.errors import AddressInUse, AlreadyExists, ConfigError, DirectoryInUse, KvfsError, WrongDataDirectory
from kvfs.common.membership import ManagerLink
from kvfs.common.wire import cluster_pb2 as pb
from kvfs.common.wire.channel import ChannelPool
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.service import method
from kvfs.meta.cluster.config import ManagerConfig
from kvfs.meta.cluster.server import serve

CREATE = method("Manager", "CreateTargets")


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(30.0):
            await test()

    trio.run(main)


def config(data: Path, **fields: Any) -> ManagerConfig:
    return ManagerConfig(**{"data": str(data), "listen": ("tcp://127.0.0.1:0",), "cluster_id": "c", "lease_ms": 10_000, **fields})


async def with_manager(data: Path, use: Callable[[dict[str, Any]], Awaitable[None]], **fields: Any) -> None:
    async with trio.open_nursery() as nursery:
        info = await nursery.start(serve, config(data, **fields))
        await use(info)
        nursery.cancel_scope.cancel()


async def linked(address: str, use: Callable[[ManagerLink], Awaitable[None]]) -> None:
    identity = Identity(cluster_id="c", client_id=bytes(16), role="admin")
    async with ChannelPool(SystemNet(), SystemClock(), identity) as pool:
        await use(ManagerLink(pool, SystemClock(), SystemRandom(), [address], identity))


async def refused(data: Path, **fields: Any) -> KvfsError:
    with pytest.raises(KvfsError) as error:
        await serve(config(data, **fields))
    return error.value


def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    kept: list[pb.RoutingInfo] = []

    async def fill(link: ManagerLink) -> None:
        for index in range(3):
            await link.register(role=pb.ROLE_STORAGE, node_uuid=f"u{index}", addresses=["tcp://h:1"], disks=[pb.DiskInfo(disk=0)])
        await link.call(CREATE, pb.CreateTargetsRequest(table_id=1, replicas=3, expected_nodes=3), timeout_s=5.0)
        kept.append((await link.refresh()).message)

    async def look(link: ManagerLink) -> None:
        kept.append((await link.refresh()).message)

    async def body() -> None:
        await with_manager(tmp_path, lambda info: linked(info["addresses"][0], fill))
        await with_manager(tmp_path, lambda info: linked(info["addresses"][0], look))

    run(body)
    before, after = kept
    assert after.version == before.version + 1, "only the manager itself is news"
    assert list(after.chains) == list(before.chains) and list(after.tables) == list(before.tables) and len(after.chains) == 4
    assert [node for node in after.nodes if node.role == pb.ROLE_STORAGE] == [node for node in before.nodes if node.role == pb.ROLE_STORAGE]
    assert [(node.role, node.incarnation) for node in after.nodes if node.role == pb.ROLE_MANAGER] == [(pb.ROLE_MANAGER, 2)]


def test_grpc_speaks_the_same(tmp_path: Path) -> None:
    answers: list[Any] = []

    def ask(address: str) -> None:
        with grpc.insecure_channel(address) as channel:

            def call(what: str, request: Any) -> Any:
                of = method("Manager", what)
                stub = channel.unary_unary(f"/kvfs.wire.Manager/{what}", lambda message: message.SerializeToString(), of.reply.FromString)
                return stub(request, timeout=5)

            answers.append(call("Status", pb.GetConfigRequest()))
            answers.append(call("GetRouting", pb.GetRoutingRequest()))
            try:
                call("CreateTargets", pb.CreateTargetsRequest(table_id=1, replicas=1))
            except grpc.RpcError as error:
                answers.append(error.code())  # type: ignore[attr-defined]

    async def use(info: dict[str, Any]) -> None:
        assert info["cluster_id"] == "c" and info["node_uuid"]
        await trio.to_thread.run_sync(ask, info["grpc_address"])

    run(lambda: with_manager(tmp_path, use, grpc_listen="127.0.0.1:0"))
    status, routing, code = answers
    assert status.primary and status.primary_node == 1
    assert routing.changed and routing.routing.cluster_id == "c"
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert threading.active_count() < 40


def test_what_is_wrong_is_said_and_nothing_is_touched(tmp_path: Path) -> None:
    async def body() -> None:
        file = tmp_path / "file"
        file.write_text("not a directory")
        assert isinstance(await refused(file), KvfsError)
        assert file.read_text() == "not a directory"

        data = tmp_path / "m"

        async def meanwhile(info: dict[str, Any]) -> None:
            busy = await refused(data)
            assert isinstance(busy, DirectoryInUse), busy
            taken = await refused(tmp_path / "m2", listen=tuple(info["addresses"]))
            assert isinstance(taken, AddressInUse), taken

        await with_manager(data, meanwhile)
        before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
        other = await refused(data, cluster_id="other")
        assert isinstance(other, WrongDataDirectory) and "belongs to cluster 'c', not 'other'" in other.message
        assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before

    run(body)


@pytest.mark.parametrize("fields", [{"lease_ms": 10}, {"client_lease_ms": 1}, {"primary_lease_ms": 1}, {"listen": ()}])
def test_configuration_out_of_range(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ManagerConfig(data="x", **fields)


def test_no_data_directory() -> None:
    async def body() -> None:
        with pytest.raises(ConfigError, match=r"manager\.data is not set"):
            await serve(ManagerConfig())

    run(body)


def test_tables_answer_errors_as_themselves(tmp_path: Path) -> None:
    async def use(link: ManagerLink) -> None:
        await link.register(role=pb.ROLE_STORAGE, node_uuid="u", addresses=["tcp://h:1"], disks=[pb.DiskInfo(disk=0)])
        await link.call(CREATE, pb.CreateTargetsRequest(table_id=1, replicas=1), timeout_s=5.0)
        with pytest.raises(AlreadyExists):
            await link.call(CREATE, pb.CreateTargetsRequest(table_id=1, replicas=2), timeout_s=5.0)

    run(lambda: with_manager(tmp_path, lambda info: linked(info["addresses"][0], use)))
