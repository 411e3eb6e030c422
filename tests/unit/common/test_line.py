"""Lines: a thread calls a service by itself; what goes wrong ends the line and never the thread's patience."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from kvfs.common.boundary.system_net import SystemNet
from kvfs.common.errors import ConnectionLost, DeadlineExceeded, KvfsError, MalformedFrame, NoSpace, Unreachable, VersionMismatch, WrongCluster
from kvfs.common.sim.net import SimFabric
from kvfs.common.transport.region import Region
from kvfs.common.wire import base_pb2, storage_pb2
from kvfs.common.wire.frame import HEADER_BYTES, Kind, Limits, encode
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.line import Line, unix_address
from kvfs.common.wire.server import RpcServer

from .rpc_world import WRITE, Store, World, on_transport

LIMITS = Limits()


class Keeper(Store):
    """Writes wait for the gate when they name a chunk, and fail when they are told to."""

    error: KvfsError | None = None

    async def write(self, request: Any, call: Any) -> Any:
        if self.error is not None:
            raise self.error
        if request.writes:
            await self.gate.wait()
        return await super().write(request, call)


def on_shm(test: Callable[[World, Keeper, RpcServer, Callable[[], Line]], Awaitable[None]], limits: Limits = LIMITS) -> None:
    """`test` gets a server and how to open a line to it."""

    async def main(world: World) -> None:
        store = Keeper(world)
        server = RpcServer(world.net, world.clock, world.identity("storage"), limits=limits)
        server.add("Storage", store)
        async with trio.open_nursery() as nursery:
            addresses: list[str] = await nursery.start(server.serve, [world.address()])
            found = unix_address(addresses, world.identity())
            assert found is not None
            await test(world, store, server, lambda: Line.open(world.net, world.identity(), *found, timeout_s=5, limits=limits))
            store.gate.set()
            nursery.cancel_scope.cancel()

    on_transport("shm", main)


async def thread(function: Callable[[], Any]) -> Any:
    return await trio.to_thread.run_sync(function)


def request(waits: bool = False) -> Any:
    return storage_pb2.WriteRequest(writes=[storage_pb2.WriteIO()] if waits else [])


def test_bytes_arrive_from_several_regions_and_closed_ones_are_forgotten() -> None:
    async def test(world: World, store: Keeper, server: RpcServer, connect: Callable[[], Line]) -> None:
        line = await thread(connect)
        regions = [Region.create(3 << 20) for _ in range(3)]
        for turn in range(2):
            for number, region in enumerate(regions):
                region.view[:] = os.urandom(8) * (region.size // 8)
                span = region.span(4096 * number, 1_000_000 + turn)
                reply = await thread(lambda span=span: line.call(WRITE, request(), span, timeout_s=5))
                assert isinstance(reply, storage_pb2.WriteReply) and store.data == [bytes(span.view)]
        [peer] = server.peers
        assert len(peer._regions) == 3
        regions[0].close()  # an idle line tells it at once
        while len(peer._regions) > 2:
            await trio.sleep(0.01)
        call = threading.Thread(target=lambda: line.call(WRITE, request(waits=True), regions[1].span(0, 10), timeout_s=5))
        call.start()
        await trio.sleep(0.05)
        regions[2].close()  # one in use, when its call is over
        await trio.sleep(0.05)
        assert len(peer._regions) == 2
        store.gate.set()
        await thread(call.join)
        while len(peer._regions) > 1:
            await trio.sleep(0.01)
        line.close()
        regions[1].close()

    on_shm(test)


def test_a_refusal_is_its_error_and_the_line_goes_on() -> None:
    async def test(world: World, store: Keeper, server: RpcServer, connect: Callable[[], Line]) -> None:
        line, region = await thread(connect), Region.create(4096)
        store.error = NoSpace("the disk is full")
        with pytest.raises(NoSpace, match="is full"):
            await thread(lambda: line.call(WRITE, request(), region.span(), timeout_s=5))
        store.error = None
        await thread(lambda: line.call(WRITE, request(), region.span(), timeout_s=5))
        assert not line.broken
        line.close()

    on_shm(test)


def test_a_service_that_hangs_ends_the_call_in_time_and_the_line() -> None:
    async def test(world: World, store: Keeper, server: RpcServer, connect: Callable[[], Line]) -> None:
        line, region = await thread(connect), Region.create(4096)
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await thread(lambda: line.call(WRITE, request(waits=True), region.span(), timeout_s=0.2))
        assert time.monotonic() - began < 2 and line.broken
        with pytest.raises(ConnectionLost, match="broken"):
            await thread(lambda: line.call(WRITE, request(), region.span(), timeout_s=5))
        line.close()

    on_shm(test)


def test_a_service_that_goes_away_is_a_lost_connection() -> None:
    async def test(world: World, store: Keeper, server: RpcServer, connect: Callable[[], Line]) -> None:
        line, region = await thread(connect), Region.create(4096)
        [peer] = server.peers
        async with trio.open_nursery() as nursery:

            async def call() -> None:
                with pytest.raises(ConnectionLost):
                    await thread(lambda: line.call(WRITE, request(waits=True), region.span(), timeout_s=10))

            nursery.start_soon(call)
            await trio.sleep(0.1)
            peer._connection.stream._sock.shutdown(socket.SHUT_RDWR)  # type: ignore[attr-defined]
        assert line.broken
        line.close()

    on_shm(test)


def test_no_more_memory_than_the_service_takes() -> None:
    async def test(world: World, store: Keeper, server: RpcServer, connect: Callable[[], Line]) -> None:
        line, regions = await thread(connect), [Region.create(4096) for _ in range(3)]
        for region in regions[:2]:
            await thread(lambda region=region: line.call(WRITE, request(), region.span(), timeout_s=5))
        with pytest.raises(ConnectionLost, match="no more memory"):
            await thread(lambda: line.call(WRITE, request(), regions[2].span(), timeout_s=5))
        line.close()

    on_shm(test, Limits(regions=4))


def test_only_the_right_process_of_this_machine_is_called() -> None:
    async def test(world: World, store: Keeper, server: RpcServer, connect: Callable[[], Line]) -> None:
        path = (await thread(connect))._stream.peer[len("unix://") :]

        def opened(identity: Identity, server_id: str) -> Callable[[], Line]:
            return lambda: Line.open(world.net, identity, path, server_id, timeout_s=5, limits=LIMITS)

        with pytest.raises(Unreachable, match="another process"):
            await thread(opened(world.identity(), "00" * 16))
        with pytest.raises(WrongCluster):
            await thread(opened(world.identity(cluster="other"), server.identity.client_id.hex()))

    on_shm(test)
    me = Identity(host_id="me")
    assert unix_address(["tcp://h:1", "unix:///a?host=me&server=ab"], me) == ("/a", "ab")
    for addresses in ([], ["tcp://h:1?host=me&server=ab"], ["unix:///a?host=you&server=ab"], ["unix:///a"]):
        assert unix_address(addresses, me) is None
    with pytest.raises(Unreachable, match="no streams"):
        Line.open(SimFabric().host("a"), me, "/a", "ab", timeout_s=1, limits=LIMITS)
    with pytest.raises(Unreachable, match="cannot connect"):
        Line.open(SystemNet(), me, "/nowhere", "ab", timeout_s=1, limits=LIMITS)


@pytest.fixture
def answers(tmp_path: Path) -> Iterator[Callable[[list[bytes]], Line]]:
    """A line to a peer that shakes hands and then says this."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()

    def connect(frames: list[bytes]) -> Line:
        def serve() -> None:
            sock, _ = listener.accept()
            sock.sendall(encode(Kind.HELLO, 0, Identity(client_id=b"s" * 16).hello()))
            sock.recv(1 << 16)
            sock.recv(1 << 16)
            sock.sendall(b"".join(frames))
            with suppress(OSError):
                sock.recv(1 << 16)
            sock.close()

        threading.Thread(target=serve, daemon=True).start()
        return Line.open(SystemNet(), Identity(), str(tmp_path / "s"), (b"s" * 16).hex(), timeout_s=5, limits=LIMITS)

    yield connect
    listener.close()


def reply(kind: int = Kind.REPLY, number: int = 2, message: bytes = b"", **more: int) -> bytes:
    return encode(kind, number, message, **more)


@pytest.mark.parametrize(
    ("frames", "error"),
    [
        ([reply(number=7)], MalformedFrame),
        ([reply(Kind.HELLO)], MalformedFrame),
        ([reply(message=b"\xff\xff")], MalformedFrame),
        ([reply(payload_bytes=5) + b"12345"], MalformedFrame),
        ([reply(message=bytes(100_000))], MalformedFrame),
        ([reply()[: HEADER_BYTES - 1] + b"x"], MalformedFrame),
        ([b"GET / HTTP/1.1\r\n" + bytes(100)], MalformedFrame),
        ([reply()[:4] + b"\x09" + reply()[5:]], VersionMismatch),
        ([reply(Kind.GOODBYE, status=1, message=base_pb2.ErrorReply(message="enough").SerializeToString())], ConnectionLost),
        ([reply(status=1, message=b"\xff\xff")], MalformedFrame),
    ],
)
def test_a_wrong_answer_is_an_error_and_ends_the_line(answers: Callable[[list[bytes]], Line], frames: list[bytes], error: type[KvfsError]) -> None:
    line = answers(frames)
    with pytest.raises(error):
        line.call(WRITE, request(), Region.create(4096).span(), timeout_s=3)
    assert line.broken
    line.close()


def test_releases_of_earlier_memory_are_no_answer(answers: Callable[[list[bytes]], Line]) -> None:
    line = answers([reply(Kind.RELEASE, 1), reply(Kind.REPLY_HELD), reply(Kind.RELEASE)])
    assert line.call(WRITE, request(), Region.create(4096).span(), timeout_s=3) == storage_pb2.WriteReply()
    assert not line.broken
    line.close()
