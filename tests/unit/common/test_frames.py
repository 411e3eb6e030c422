"""Damage on the wire: flipped bits, cut frames, absurd lengths and peers that lie. Each is a typed error, costs bounded memory, and ends only its own
connection."""

from __future__ import annotations

import os
import random
import resource
from typing import Any

import pytest
import trio
from tests.unit.document import worked_bytes

from kvfs.common.errors import ConnectionLost, KvfsError, MalformedFrame, MessageTooBig, TransportError, Unreachable, VersionMismatch
from kvfs.common.wire import base_pb2, storage_pb2
from kvfs.common.wire.channel import Channel
from kvfs.common.wire.frame import (
    HEADER_BYTES,
    Kind,
    Limits,
    check_message,
    decode_header,
    decode_table,
    encode,
    encode_table,
    table_bytes,
)
from kvfs.common.wire.identity import Identity
from kvfs.common.wire.service import METHODS, SERVICES, method

from .rpc_world import READ, VERSION, Store, World, on_transport, read, version

LIMITS = Limits()


def parse(data: bytes) -> tuple[Any, bytes]:
    header = decode_header(data, 0, LIMITS)
    message = data[HEADER_BYTES : HEADER_BYTES + header.message_bytes]
    check_message(header, message)
    return header, message


def test_what_is_encoded_is_decoded() -> None:
    frame = encode(Kind.REQUEST, 2**64 - 1, b"message", method=0x0305, deadline_ms=1500, payload_bytes=99)
    header, message = parse(frame)
    assert message == b"message" and len(frame) == HEADER_BYTES + 7
    assert header[:7] == (Kind.REQUEST, 0x0305, 2**64 - 1, 1500, 0, 7, 99)


def test_every_flipped_bit_is_found() -> None:
    frame = encode(Kind.REPLY, 7, b"some message", status=3, payload_bytes=5)
    for bit in range(len(frame) * 8):
        damaged = bytearray(frame)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises((MalformedFrame, VersionMismatch)):
            parse(bytes(damaged))


def test_lengths_above_the_limits_are_refused_before_anything_is_allocated() -> None:
    for frame in (
        encode(Kind.REQUEST, 1, b"", payload_bytes=LIMITS.payload_bytes + 1),
        encode(Kind.REQUEST, 1, bytes(LIMITS.message_bytes + 1)),
    ):
        with pytest.raises(MessageTooBig):
            decode_header(frame, 0, LIMITS)


def test_the_table_of_lengths() -> None:
    table = encode_table([1, 2, 3])
    assert len(table) == table_bytes(3) and decode_table(table, 3) == [1, 2, 3]
    for bit in range(len(table) * 8):
        damaged = bytearray(table)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(MalformedFrame):
            decode_table(bytes(damaged), 3)


def test_the_example_in_the_format_document_is_what_is_written() -> None:
    """docs/format.md shows a request in bytes; it must be this one."""
    request = storage_pb2.VersionRequest(chain_id=7, target_id=1001)
    assert worked_bytes("frame") == encode(Kind.REQUEST, 42, request.SerializeToString(), method=method("Storage", "Version").key, deadline_ms=5000)


def test_the_example_of_a_lent_file_is_what_is_written() -> None:
    assert worked_bytes("lent file") == encode(Kind.FILE, 1)
    result = storage_pb2.ReadResult(
        length=4096,
        checksums=bytes(range(8, 0, -1)),
        version=3,
        chunk_length=40_000,
        file=1,
        file_offset=196_608,
        stored=32_768,
    )
    assert worked_bytes("place") == storage_pb2.ReadReply(results=[result]).SerializeToString()


def test_method_numbers_are_places_in_their_service() -> None:
    assert [SERVICES["Storage"][name].key for name in ("Read", "Write", "RemoveRange")] == [0x300, 0x301, 0x302]
    assert (SERVICES["Manager"]["GetRouting"].key, SERVICES["Meta"]["Lookup"].key) == (0x100, 0x200)
    assert SERVICES["Storage"]["ListChunks"].attribute == "list_chunks" and SERVICES["Meta"]["GetAttr"].attribute == "get_attr"
    assert [entry.full_name for entry in METHODS.values() if entry.has_bulk] == ["Storage.Read", "Storage.Write"]


# --- a server against raw bytes ---


def hello(world: World, **changes: Any) -> bytes:
    message = base_pb2.Hello.FromString(world.identity().hello())
    for name, value in changes.items():
        setattr(message, name, value)
    return encode(Kind.HELLO, 0, message.SerializeToString())


async def talk(world: World, where: list[str], data: bytes, *, patience_s: float = 5) -> tuple[bytes, bool]:
    """Sends raw bytes; what comes back until the server closes or falls silent, and whether it closed."""
    stream = await world.net.connect(where[0].partition("?")[0], timeout_s=5)
    got = bytearray()
    buffer = memoryview(bytearray(1 << 16))
    try:
        with trio.move_on_after(patience_s):
            await stream.send([data])
            while count := await stream.receive_into(buffer):
                got += buffer[:count]
            return bytes(got), True
        return bytes(got), False
    except ConnectionLost:
        return bytes(got), True
    finally:
        stream.close()


def frames_of(data: bytes) -> list[tuple[Any, bytes]]:
    frames = []
    while data:
        header, message = parse(data)
        frames.append((header, message))
        data = data[HEADER_BYTES + header.message_bytes + header.payload_bytes :]
    return frames


def request_frame(**more: Any) -> bytes:
    return encode(Kind.REQUEST, 1, version(5).SerializeToString(), method=VERSION.key, deadline_ms=1000, **more)


def test_a_server_survives_thousands_of_damaged_frames() -> None:
    seed = int(os.environ.get("KVFS_SEED", "20250"))
    print(f"seed {seed}")
    chance = random.Random(seed)

    async def main(world: World) -> None:
        async with world.serve(Store(world), limits=Limits(handshake_s=0.2)) as where, world.pool() as pool:
            await pool.call(where, VERSION, version(), timeout_s=5)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            good = hello(world) + request_frame() * 3

            async def attack(count: int) -> None:
                for _ in range(count):
                    data = bytearray(good * 3)
                    for _ in range(chance.choice((1, 1, 2, 8))):
                        kind = chance.randrange(4)
                        place = chance.randrange(len(data))
                        if kind == 0:
                            data[place] ^= 1 << chance.randrange(8)
                        elif kind == 1:
                            del data[place : place + chance.randrange(1, 60)]
                        elif kind == 2:
                            data[place:place] = chance.randbytes(chance.randrange(1, 60))
                        else:
                            data[place : place + 4] = b"\xff\xff\xff\xff"
                        if len(data) < 2:
                            break
                    answer, _closed = await talk(world, where, bytes(data), patience_s=0.02)
                    for header, _message in frames_of(answer):
                        assert header.kind in (Kind.HELLO, Kind.REPLY, Kind.GOODBYE)

            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(attack, 25)
            assert (await pool.call(where, VERSION, version(), timeout_s=5)).versions, "others are served on"
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            assert grown < 64 << 10, f"{grown} KiB more memory"

    on_transport("sim-tcp", main)


@pytest.mark.parametrize("transport", ["tcp", "shm", "sim-tcp"])
def test_malformed_frames_close_the_connection_with_the_reason(transport: str) -> None:
    async def main(world: World) -> None:
        async with world.serve(Store(world), limits=Limits(handshake_s=0.3)) as where:
            flipped = bytearray(request_frame())
            flipped[33] ^= 4
            cases = {
                bytes(flipped): MalformedFrame,
                b"GET / HTTP/1.1\r\nHost: x\r\nUser-Agent: y\r\n\r\n": MalformedFrame,
                encode(Kind.REQUEST, 1, b"", method=VERSION.key, deadline_ms=9, payload_bytes=(64 << 20) + (64 << 10) + 1): MessageTooBig,
                encode(Kind.RELEASE, 1): MalformedFrame,
                encode(Kind.REPLY, 1): MalformedFrame,
                encode(Kind.REGION, 1, bytes(8)): MalformedFrame,
                encode(Kind.HELLO, 0): MalformedFrame,
                encode(Kind.GOODBYE, 0, b"", payload_bytes=5) + b"12345": MalformedFrame,
            }
            for data, error in cases.items():
                answer, closed = await talk(world, where, hello(world) + data)
                frames = frames_of(answer)
                assert closed and [header.kind for header, _ in frames] == [Kind.HELLO, Kind.GOODBYE], data
                assert frames[1][0].status == error.code
            for early in (request_frame(), encode(Kind.HELLO, 0, b"\xff\xff"), encode(Kind.REGION, 1, bytes(8))):
                answer, closed = await talk(world, where, early)
                assert closed and [header.kind for header, _ in frames_of(answer)] == [Kind.GOODBYE]

    on_transport(transport, main)


@pytest.mark.parametrize("transport", ["tcp", "shm", "sim-tcp"])
def test_a_silent_or_half_open_connection_is_closed(transport: str) -> None:
    async def main(world: World) -> None:
        async with world.serve(Store(world), limits=Limits(handshake_s=0.1)) as where:
            for data in (b"", b"KVFS", hello(world)[:-1]):
                answer, closed = await talk(world, where, data, patience_s=3)
                assert closed and answer == b""

    on_transport(transport, main)


@pytest.mark.parametrize("transport", ["tcp", "sim-tcp"])
def test_versions_and_clusters_are_settled_first(transport: str) -> None:
    async def main(world: World) -> None:
        async with world.serve(Store(world)) as where:
            for changes, code in (
                ({"version_min": 9, "version_max": 12}, 207),
                ({"version_min": 0, "version_max": 0}, 207),
                ({"cluster_id": "other"}, 208),
            ):
                answer, closed = await talk(world, where, hello(world, **changes))
                ((header, message),) = frames_of(answer)
                assert closed and (header.kind, header.status) == (Kind.HELLO, code)
                assert base_pb2.ErrorReply.FromString(message).message
            newer_format = bytearray(hello(world))
            newer_format[4] = 9
            answer, closed = await talk(world, where, bytes(newer_format))
            assert closed and frames_of(answer)[0][0].status == VersionMismatch.code

    on_transport(transport, main)


@pytest.mark.parametrize("transport", ["tcp", "sim-tcp"])
def test_a_request_that_dribbles_in_is_answered_and_one_without_time_is_not_run(transport: str) -> None:
    async def main(world: World) -> None:
        store = Store(world)
        async with world.serve(store) as where:
            stream = await world.net.connect(where[0], timeout_s=5)
            expired = encode(Kind.REQUEST, 2, version().SerializeToString(), method=VERSION.key, deadline_ms=0)
            for byte in hello(world) + request_frame() + expired:
                await stream.send([bytes([byte])])
            got = bytearray()
            buffer = memoryview(bytearray(1 << 16))
            while len(got) < HEADER_BYTES or len(frames_of(bytes(got))) < 3:
                got += buffer[: await stream.receive_into(buffer)]
            frames = frames_of(bytes(got))
            assert [(header.kind, header.status) for header, _ in frames] == [(Kind.HELLO, 0), (Kind.REPLY, 0), (Kind.REPLY, 203)]
            assert len(store.callers) == 1
            stream.close()

    on_transport(transport, main)


@pytest.mark.parametrize("transport", ["tcp", "sim-tcp"])
def test_a_payload_that_does_not_match_its_request_is_refused_and_the_connection_goes_on(transport: str) -> None:
    async def main(world: World) -> None:
        async with world.serve(Store(world)) as where:
            lies = storage_pb2.WriteRequest()
            lies.bulk.length.extend([3, 4])
            frame = encode(Kind.REQUEST, 1, lies.SerializeToString(), method=method("Storage", "Write").key, deadline_ms=1000, payload_bytes=9)
            unknown = encode(Kind.REQUEST, 2, b"", method=0x7777, deadline_ms=1000, payload_bytes=300_000)
            answer, closed = await talk(world, where, hello(world) + frame + bytes(9) + unknown + bytes(300_000) + request_frame(), patience_s=0.5)
            assert not closed
            assert [(header.request_id, header.status) for header, _ in frames_of(answer)] == [(0, 0), (1, 211), (2, 205), (1, 0)]

    on_transport(transport, main)


# --- a client against a server that lies ---


async def against(world: World, answers: list[bytes]) -> KvfsError:
    """Calls READ for 10 bytes at a server that shakes hands and then sends these bytes, whatever it is asked."""
    listener = await world.net.listen(world.address())

    async def lie() -> None:
        stream = await listener.accept()
        buffer = memoryview(bytearray(1 << 16))
        await stream.receive_into(buffer)
        await stream.send([encode(Kind.HELLO, 0, Identity("c1", bytes(16), "storage").hello())])
        await stream.receive_into(buffer)
        await stream.send(answers)
        await trio.sleep(0.3)
        stream.close()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lie)
            channel = await Channel.open(nursery, world.net, world.clock, world.identity(), listener.address, timeout_s=5)
            memory = memoryview(bytearray(b"-" * 10))
            try:
                await channel.call(READ, read(), timeout_s=2, receive=[memory])
                raise AssertionError("the call should have failed")
            except KvfsError as error:
                assert bytes(memory) == b"-" * 10
                assert channel.ended is not None
                nursery.cancel_scope.cancel()
                return error
    finally:
        await listener.aclose()
    raise AssertionError


@pytest.mark.parametrize("transport", ["tcp", "sim-tcp"])
def test_a_lying_server_fails_the_call_and_ends_the_channel(transport: str) -> None:
    reply = storage_pb2.ReadReply().SerializeToString()
    table = encode_table([10])
    broken = bytearray(table)
    broken[5] ^= 1

    def with_payload(payload: bytes, **more: Any) -> bytes:
        return encode(Kind.REPLY, 1, reply, payload_bytes=len(payload), **more) + payload

    lies = [
        encode(Kind.REPLY, 99, reply),
        encode(Kind.REPLY, 1, reply),
        encode(Kind.REPLY, 1, b"\xff\xff\xff"),
        encode(Kind.REPLY, 1, b"\xff\xff\xff", status=101),
        encode(Kind.RELEASE, 1),
        encode(Kind.REQUEST, 1, b"", method=VERSION.key, deadline_ms=100),
        encode(Kind.HELLO, 0, b""),
        encode(Kind.FILE, 1),
        with_payload(bytes(broken) + b"x" * 10),
        with_payload(encode_table([11]) + b"x" * 11),
        with_payload(encode_table([10, 10]) + b"x" * 20),
        with_payload(table + b"x" * 11),
        with_payload(table + b"x" * 9),
        with_payload(table[:7]),
        with_payload(table + b"x" * 10, status=101),
        encode(Kind.GOODBYE, 0, base_pb2.ErrorReply(message="enough").SerializeToString(), status=204),
        b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(60),
    ]

    async def main(world: World) -> None:
        for lie in lies:
            error = await against(world, [lie])
            assert isinstance(error, TransportError), lie

    on_transport(transport, main)


@pytest.mark.parametrize(
    "greeting", [encode(Kind.HELLO, 0, b"\x0a\xff"), encode(Kind.HELLO, 0, b"", status=101), encode(Kind.HELLO, 0, b"", status=9999)]
)
def test_a_greeting_that_makes_no_sense_ends_that_channel_and_nothing_else(greeting: bytes) -> None:
    """An exception in the channel's reader came out of the pool's nursery, and ended the client with all its other channels."""

    async def main(world: World) -> None:
        listener = await world.net.listen(world.address())

        async def greet() -> None:
            stream = await listener.accept()
            await stream.send([greeting])
            await trio.sleep_forever()

        async with world.serve(Store(world)) as where, world.pool() as pool, trio.open_nursery() as nursery:
            nursery.start_soon(greet)
            with pytest.raises(TransportError):
                await pool.call([listener.address], VERSION, version(), timeout_s=2)
            assert (await pool.call(where, VERSION, version(), timeout_s=5)).versions
            nursery.cancel_scope.cancel()
        await listener.aclose()

    on_transport("tcp", main)


def test_a_server_that_is_no_kvfs_is_unreachable_or_malformed() -> None:
    async def main(world: World) -> None:
        listener = await world.net.listen(world.address())

        async def other() -> None:
            while True:
                stream = await listener.accept()
                await stream.send([b"SSH-2.0-OpenSSH_9.2 and some more bytes to fill a header\r\n"])
                await trio.sleep(0.05)
                stream.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            with pytest.raises(MalformedFrame, match="not a kvfs frame"):
                await Channel.open(nursery, world.net, world.clock, world.identity(), listener.address, timeout_s=5)
            nursery.cancel_scope.cancel()
        await listener.aclose()
        with pytest.raises(Unreachable):
            async with trio.open_nursery(strict_exception_groups=True) as nursery:
                try:
                    await Channel.open(nursery, world.net, world.clock, world.identity(), listener.address, timeout_s=5)
                except Unreachable as error:
                    unreachable = error
            raise unreachable

    on_transport("tcp", main)


@pytest.mark.parametrize("transport", ["tcp", "sim-tcp"])
def test_a_caller_that_gives_up_in_the_middle_of_its_payload_gets_no_more_bytes(transport: str) -> None:
    async def main(world: World) -> None:
        listener = await world.net.listen(world.address())
        reply = storage_pb2.ReadReply().SerializeToString()
        payload = encode_table([300_000]) + b"L" * 300_000
        gave_up = trio.Event()

        async def serve() -> None:
            stream = await listener.accept()
            buffer = memoryview(bytearray(1 << 16))
            await stream.receive_into(buffer)
            await stream.send([encode(Kind.HELLO, 0, Identity("c1", bytes(16), "storage").hello())])
            await stream.receive_into(buffer)
            await stream.send([encode(Kind.REPLY, 1, reply, payload_bytes=len(payload)), payload[:150_000]])
            await gave_up.wait()
            await stream.send([payload[150_000:]])
            await stream.receive_into(buffer)
            await stream.send([encode(Kind.REPLY, 2, storage_pb2.VersionReply(versions=[4]).SerializeToString())])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            channel = await Channel.open(nursery, world.net, world.clock, world.identity(), listener.address, timeout_s=5)
            memory = bytearray(b"-" * 300_000)
            with trio.move_on_after(0.2) as scope:
                await channel.call(READ, read(), timeout_s=5, receive=[memory])
            assert scope.cancelled_caught and memory[:100_000] == b"L" * 100_000
            memory[:] = b"-" * 300_000
            gave_up.set()
            assert (await channel.call(VERSION, version(), timeout_s=5)).versions == [4]
            assert memory == b"-" * 300_000
            nursery.cancel_scope.cancel()
        await listener.aclose()

    on_transport(transport, main)
