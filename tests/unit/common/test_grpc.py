"""The gRPC face of a service: the same handlers, health checks, reflection."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import grpc
import pytest
import trio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvfs.common.boundary.clock import SystemClock
from kvfs.common.boundary.system_net import SystemNet
from kvfs.common.errors import AddressInUse, BadRequest, ConfigError, NotPrimary
from kvfs.common.wire import base_pb2, cluster_pb2, storage_pb2
from kvfs.common.wire.grpc_adapter import serve_grpc
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.server import RpcServer


class Manager:
    def __init__(self) -> None:
        self.threads: set[int] = set()
        self.roles: list[str] = []

    def status(self, request: Any, call: Any) -> Any:
        self.roles.append(call.peer.role)
        trio.lowlevel.current_task()  # raises outside the trio thread
        return cluster_pb2.ManagerStatusReply(primary=True, routing_version=12)

    async def get_routing(self, request: Any, call: Any) -> Any:
        await trio.sleep(call.remaining_s() if request.wait_ms else 0)
        return cluster_pb2.GetRoutingReply(changed=True)

    async def list_clients(self, request: Any, call: Any) -> Any:
        raise NotPrimary("ask node 7")

    def get_config(self, request: Any, call: Any) -> Any:
        raise ValueError("secret")


def with_grpc(test: Callable[[Any, Manager, str, RpcServer], None]) -> None:
    async def main() -> None:
        manager = Manager()
        server = RpcServer(SystemNet(), SystemClock(), Identity("c", bytes(16), "manager"))
        server.add("Manager", manager)
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                address = await nursery.start(serve_grpc, server, "tcp://127.0.0.1:0")

                def outside() -> None:
                    with grpc.insecure_channel(address) as channel:
                        test(channel, manager, address, server)

                await trio.to_thread.run_sync(outside)
                nursery.cancel_scope.cancel()

    trio.run(main)


def ask(channel: Any, name: str, request: Any, reply: Any, **more: Any) -> Any:
    call = channel.unary_unary(f"/kvfs.wire.{name}", lambda message: message.SerializeToString(), reply.FromString)
    return call(request, **({"timeout": 10} | more))


def test_the_same_handlers_answer() -> None:
    def test(channel: Any, manager: Manager, address: str, server: RpcServer) -> None:
        assert ask(channel, "Manager/Status", base_pb2.Empty(), cluster_pb2.ManagerStatusReply).routing_version == 12
        assert ask(channel, "Manager/GetRouting", cluster_pb2.GetRoutingRequest(), cluster_pb2.GetRoutingReply).changed
        assert manager.roles == ["grpc"]

    with_grpc(test)


def test_messages_that_do_not_parse_are_refused_and_others_are_served_on() -> None:
    def test(channel: Any, manager: Manager, address: str, server: RpcServer) -> None:
        chance = random.Random(7)
        spoiled = [
            b"\xff",
            b"\x08",
            b"\x12\xff\xff\xff\xff\x7f",
            bytes(5 << 20),
            *(b"\x0a\xff" + chance.randbytes(chance.randrange(40)) for _ in range(200)),
        ]
        call = channel.unary_unary("/kvfs.wire.Manager/GetRouting", None, cluster_pb2.GetRoutingReply.FromString)
        for data in spoiled:
            with pytest.raises(grpc.RpcError) as caught:
                call(data, timeout=10)
            if len(data) > 1 << 20:
                assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            else:
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, data
                assert ("kvfs-error-code", str(BadRequest.code)) in [(entry.key, entry.value) for entry in caught.value.trailing_metadata()]
        assert ask(channel, "Manager/Status", base_pb2.Empty(), cluster_pb2.ManagerStatusReply).routing_version == 12

    with_grpc(test)


@pytest.mark.parametrize(
    ("name", "request_message", "status", "text"),
    [
        ("Manager/ListClients", base_pb2.Empty(), grpc.StatusCode.UNAVAILABLE, "ask node 7"),
        ("Manager/GetConfig", cluster_pb2.GetConfigRequest(), grpc.StatusCode.INTERNAL, "its log says why"),
        ("Manager/GetRouting", cluster_pb2.GetRoutingRequest(wait_ms=1), grpc.StatusCode.DEADLINE_EXCEEDED, ""),
        ("Manager/Register", cluster_pb2.RegisterRequest(), grpc.StatusCode.UNIMPLEMENTED, ""),
        ("Storage/Read", storage_pb2.ReadRequest(), grpc.StatusCode.UNIMPLEMENTED, ""),
    ],
)
def test_errors(name: str, request_message: Any, status: grpc.StatusCode, text: str) -> None:
    def test(channel: Any, manager: Manager, address: str, server: RpcServer) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            ask(channel, name, request_message, base_pb2.Empty, timeout=0.5 if status is grpc.StatusCode.DEADLINE_EXCEEDED else 10)
        assert caught.value.code() is status
        assert text in caught.value.details() and "secret" not in caught.value.details()
        if status is grpc.StatusCode.UNAVAILABLE:
            assert dict(caught.value.trailing_metadata())["kvfs-error-code"] == "601"

    with_grpc(test)


def test_health_and_reflection() -> None:
    def test(channel: Any, manager: Manager, address: str, server: RpcServer) -> None:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "kvfs.wire.Manager"):
            assert health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5).status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (listed,) = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5)
        assert "kvfs.wire.Manager" in [entry.name for entry in listed.list_services_response.service]
        (described,) = stub.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(file_containing_symbol="kvfs.wire.Manager")]), timeout=5
        )
        assert described.file_descriptor_response.file_descriptor_proto

    with_grpc(test)


def test_addresses() -> None:
    def test(channel: Any, manager: Manager, address: str, server: RpcServer) -> None:
        async def again(where: str) -> None:
            await serve_grpc(server, where)

        with pytest.raises(AddressInUse):
            trio.run(again, address)
        with pytest.raises(ConfigError):
            trio.run(again, "unix:///x")

    with_grpc(test)


def test_stopping_does_not_wait_for_long_polls() -> None:
    async def main() -> None:
        server = RpcServer(SystemNet(), SystemClock(), Identity("c", bytes(16), "manager"))
        server.add("Manager", Manager())
        statuses: list[Any] = []
        async with trio.open_nursery() as outer:
            async with trio.open_nursery() as nursery:
                address = await nursery.start(serve_grpc, server, "127.0.0.1:0")

                def poll() -> None:
                    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
                        ask(channel, "Manager/GetRouting", cluster_pb2.GetRoutingRequest(wait_ms=1), cluster_pb2.GetRoutingReply, timeout=60)
                    statuses.append(caught.value.code())

                outer.start_soon(trio.to_thread.run_sync, poll)
                await trio.sleep(0.3)
                begun = trio.current_time()
                nursery.cancel_scope.cancel()
            assert trio.current_time() - begun < 2
        assert statuses == [grpc.StatusCode.UNAVAILABLE]

    trio.run(main)
