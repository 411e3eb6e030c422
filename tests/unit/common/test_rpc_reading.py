"""Who reads the answers: the caller that waits reads in the reader's place, and every other caller must fare as if the reader did."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from kvfs.common.boundary.net import ByteStream
from kvfs.common.errors import ConnectionLost, DeadlineExceeded, NotFound, Unreachable
from kvfs.common.wire import storage_pb2
from kvfs.common.wire.caller import Channel
from kvfs.common.wire.frame import HEADER_BYTES, Kind, Limits, decode_header, encode
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.server import RpcServer

from .rpc_world import LAST, READ, TRANSPORTS, VERSION, WRITE, Store, World, on_transport, read, sleep_ms, version, write

each = pytest.mark.parametrize("transport", TRANSPORTS)


@each
def test_callers_that_come_and_go_get_their_own_answers(transport: str) -> None:
    chance = random.Random(11)

    async def main(world: World) -> None:
        store = Store(world)
        async with world.serve(store) as where, world.pool() as pool:
            outcomes = {"answered": 0, "late": 0, "left": 0}

            async def ask(number: int) -> None:
                scope = trio.CancelScope()
                if chance.random() < 0.3:
                    scope.deadline = trio.current_time() + chance.choice((0, 0.001, 0.01))
                with scope:
                    try:
                        if chance.random() < 0.5:
                            answer = await pool.call(where, VERSION, version(number), timeout_s=5)
                            assert answer.versions[0] == number
                        else:
                            timeout_s = chance.choice((0.001, 0.01, 5.0, 5.0))
                            answer = await pool.call(where, LAST, sleep_ms(chance.choice((0, 0, 5)), number), timeout_s=timeout_s)
                            assert answer.index == number
                        outcomes["answered"] += 1
                    except (DeadlineExceeded, Unreachable):
                        outcomes["late"] += 1
                if scope.cancelled_caught:
                    outcomes["left"] += 1

            await pool.call(where, VERSION, version(), timeout_s=5)
            first = await pool.channel(where, timeout_s=5)
            number = 0
            for callers in (1, 2, 1, 5, 1, 30, 1) * 12:
                async with trio.open_nursery() as nursery:
                    for _ in range(callers):
                        number += 1
                        nursery.start_soon(ask, number)
            assert sum(outcomes.values()) == number and all(outcomes.values()), outcomes
            assert (await pool.call(where, VERSION, version(9), timeout_s=5)).versions[0] == 9
            if not first.suspect:
                assert await pool.channel(where, timeout_s=5) is first

    on_transport(transport, main)


@each
def test_a_caller_that_waits_long_reads_for_those_that_come_later_and_still_gets_its_answer(transport: str) -> None:
    async def main(world: World) -> None:
        async with world.serve(Store(world)) as where, world.pool() as pool:
            order: list[int] = []

            async def ask(duration_ms: int) -> None:
                await pool.call(where, LAST, sleep_ms(duration_ms), timeout_s=5)
                order.append(duration_ms)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, 500)
                await world.clock.sleep(0.02)
                nursery.start_soon(ask, 20)
                await world.clock.sleep(0.005)
                with trio.move_on_after(0.03):  # the last one to come leaves first
                    await ask(900)
                for _ in range(3):
                    await ask(0)
            assert order == [20, 0, 0, 0, 500]

    on_transport(transport, main)


# --- a worker of the service that reads ---


@each
@pytest.mark.parametrize("end", ["garbage", "goodbye", "the end", "payload", "nothing"])
def test_a_service_reads_on_in_a_worker_as_in_its_reader(transport: str, end: str) -> None:
    frame = encode(Kind.REQUEST, 3, write_of(3).SerializeToString(), method=WRITE.key, deadline_ms=5000, payload_bytes=3)
    last = {
        "garbage": b"GET / HTTP/1.1\r\n\r\n" + bytes(60),
        "goodbye": encode(Kind.GOODBYE, 0),
        "the end": b"",
        "nothing": b"",
        "payload": frame + b"abc",
    }[end]

    async def main(world: World) -> None:
        store = Store(world)
        server = RpcServer(world.net, world.clock, world.identity("storage"), limits=Limits(idle_s=0.4))
        server.add("Storage", store)
        async with trio.open_nursery() as nursery:
            where = await nursery.start(server.serve, [world.address()])
            stream = await world.net.connect(where[0].partition("?")[0], timeout_s=5)
            received = Frames(stream)
            await stream.send([encode(Kind.HELLO, 0, world.identity().hello())])
            assert await received.next() == (Kind.HELLO, 0)
            for number in (1, 2):  # the worker that has answered the first listens for the second
                ask = encode(Kind.REQUEST, number, sleep_ms(1).SerializeToString(), method=LAST.key, deadline_ms=5000)
                await stream.send([ask[:20]])
                await trio.sleep(0.002)
                await stream.send([ask[20:]])
                assert await received.next() == (Kind.REPLY, number)
            assert len(server._idle) <= 1
            if last:
                await stream.send([last])
            elif end == "the end":
                stream.close_sending()
            if end == "payload":
                assert await received.next() == (Kind.REPLY, 3)
                assert store.data == [b"abc"]
            if end == "garbage":
                assert await received.next() == (Kind.GOODBYE, 0)
            with trio.fail_after(3):
                assert await received.next() is None
                while server.peers:
                    await trio.sleep(0.001)
            stream.close()
            again = await world.net.connect(where[0].partition("?")[0], timeout_s=5)
            await again.send([encode(Kind.HELLO, 0, world.identity().hello()), ask])
            received = Frames(again)
            assert await received.next() == (Kind.HELLO, 0)
            assert await received.next() == (Kind.REPLY, 2)
            nursery.cancel_scope.cancel()

    on_transport(transport, main)


def write_of(size: int) -> Any:
    request = write()
    request.bulk.length.append(size)
    return request


class Frames:
    """What comes out of a raw stream: kind and request id of each frame, None at the end."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._here = bytearray()

    async def next(self) -> tuple[int, int] | None:
        buffer = memoryview(bytearray(1 << 16))
        while True:
            if len(self._here) >= HEADER_BYTES:
                header = decode_header(bytes(self._here), 0, Limits())
                size = HEADER_BYTES + header.message_bytes + header.payload_bytes
                if len(self._here) >= size:
                    del self._here[:size]
                    return header.kind, header.request_id
            try:
                count = await self._stream.receive_into(buffer)
            except ConnectionLost:
                count = 0
            if count == 0:
                return None
            self._here += buffer[:count]


# --- against a scripted service ---

Script = Callable[[ByteStream, memoryview], Awaitable[None]]


async def scripted(world: World, script: Script, body: Callable[[Channel], Awaitable[None]]) -> None:
    listener = await world.net.listen(world.address())

    async def serve() -> None:
        stream = await listener.accept()
        buffer = memoryview(bytearray(1 << 16))
        await stream.receive_into(buffer)
        await stream.send([encode(Kind.HELLO, 0, Identity("c1", bytes(16), "storage").hello())])
        try:
            await script(stream, buffer)
        finally:
            stream.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        channel = await Channel.open(nursery, world.net, world.clock, world.identity(), listener.address, timeout_s=5)
        await body(channel)
        nursery.cancel_scope.cancel()
    await listener.aclose()


def reply(number: int) -> bytes:
    return encode(Kind.REPLY, number, storage_pb2.VersionReply(versions=[number]).SerializeToString())


async def ask_each(channel: Channel, count: int) -> None:
    for number in range(1, count + 1):
        assert (await channel.call(VERSION, version(), timeout_s=5)).versions == [number]


@each
def test_an_answer_that_dribbles_in(transport: str) -> None:
    async def script(stream: ByteStream, buffer: memoryview) -> None:
        for number in range(1, 3):
            await stream.receive_into(buffer)
            for byte in reply(number):
                await stream.send([bytes([byte])])
                await trio.sleep(0.0005)

    async def main(world: World) -> None:
        await scripted(world, script, lambda channel: ask_each(channel, 2))

    on_transport(transport, main)


@each
def test_an_error_keeps_nothing_of_its_call_alive(transport: str) -> None:
    class Refusing:
        def read(self, request: Any, call: Any) -> Any:
            raise NotFound("no such chunk")

    async def main(world: World) -> None:
        async with world.serve(Refusing()) as where, world.pool() as pool:
            gc.collect()
            gc.disable()
            try:
                for _ in range(3):
                    memory = Memory(100)
                    gone = weakref.ref(memory)
                    try:
                        await pool.call(where, READ, read(), timeout_s=5, receive=[memoryview(memory)])
                    except NotFound:
                        pass
                    del memory
                    await trio.lowlevel.checkpoint()  # trio's loop lets go of what it woke us with
                    assert gone() is None
            finally:
                gc.enable()

    on_transport(transport, main)


class Memory(bytearray):
    """Can be watched."""


@each
def test_an_answer_larger_than_the_read_ahead_among_small_ones(transport: str) -> None:
    async def main(world: World) -> None:
        async with world.serve(Big()) as where, world.pool() as pool:
            for size in (1, 40_000, 1, 65_000, 65_536, 200_000, 1, 3_000_000, 1):
                assert len((await pool.call(where, VERSION, version(size), timeout_s=5)).versions) == size

    class Big:
        def version(self, request: Any, call: Any) -> Any:
            return storage_pb2.VersionReply(versions=[1] * request.chain_id)

    on_transport(transport, main)


@each
@pytest.mark.parametrize("after", ["garbage", "the end", "part of a frame and the end"])
def test_what_follows_an_answer_ends_the_channel_but_not_the_call(transport: str, after: str) -> None:
    rest = {"garbage": b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(60), "the end": b"", "part of a frame and the end": reply(2)[:30]}[after]

    async def script(stream: ByteStream, buffer: memoryview) -> None:
        await stream.receive_into(buffer)
        await stream.send([reply(1) + rest])
        if after == "garbage":
            await trio.sleep(1)

    async def body(channel: Channel) -> None:
        await ask_each(channel, 1)
        await trio.sleep(0.05)
        assert channel.ended is not None
        with pytest.raises(ConnectionLost):
            await channel.call(VERSION, version(), timeout_s=5)

    async def main(world: World) -> None:
        await scripted(world, script, body)

    on_transport(transport, main)


@each
@pytest.mark.parametrize("instead", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(60), reply(77)])
def test_every_caller_learns_that_the_connection_is_lost(transport: str, instead: bytes) -> None:
    async def script(stream: ByteStream, buffer: memoryview) -> None:
        await trio.sleep(0.05)
        if instead:
            await stream.send([instead])
            await trio.sleep(1)

    async def body(channel: Channel) -> None:
        lost = 0

        async def ask() -> None:
            nonlocal lost
            with pytest.raises(ConnectionLost):
                await channel.call(VERSION, version(), timeout_s=5)
            lost += 1

        with trio.fail_after(1):
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(ask)
        assert lost == 5 and channel.ended is not None

    async def main(world: World) -> None:
        await scripted(world, script, body)

    on_transport(transport, main)


@each
def test_hardly_any_time_left_is_a_typed_error_at_every_step_of_connecting(transport: str) -> None:
    async def main(world: World) -> None:
        async with world.serve(Store(world)) as where:
            for timeout_s in (0.0, 1e-9, 1e-6, 1e-5, 1e-4, 3e-4, 1e-3) * 5:
                async with world.pool() as pool:
                    try:
                        assert (await pool.call(where, VERSION, version(), timeout_s=timeout_s)).versions
                    except (DeadlineExceeded, Unreachable):
                        pass

    on_transport(transport, main)
