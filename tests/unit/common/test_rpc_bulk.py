"""Bulk bytes over every transport: they arrive, fit, are checked, and are never touched after their owner has taken them back."""

from __future__ import annotations

import os
from typing import Any

import pytest
import trio
import trio.testing

from kvfs.common.errors import (
    BadRequest,
    ConnectionLost,
    NotFound,
    Overloaded,
    UnknownRegion,
)
from kvfs.common.transport.region import Region
from kvfs.common.wire import storage_pb2
from kvfs.common.wire.frame import Limits
from kvfs.common.wire.service import Method

from .rpc_world import (
    LAST,
    READ,
    TRANSPORTS,
    VERSION,
    WRITE,
    Store,
    World,
    buffers,
    on_transport,
    read,
    sleep_ms,
    version,
    write,
)

each = pytest.mark.parametrize("transport", TRANSPORTS)


@each
def test_bytes_go_and_come_back(transport: str) -> None:
    async def main(world: World) -> None:
        store = Store(world)
        async with world.serve(store) as where, world.pool() as pool:
            own = buffers(64 << 20)
            for sizes in ([5], [100, 0, 7], [4096] * 300, [1 << 20], [20_000, 30_000], [3_000_001, 5_000_000]):
                data = [os.urandom(size) for size in sizes]
                spans = [own.allocate(size) for size in sizes]
                for span, part in zip(spans, data, strict=True):
                    span.view[:] = part
                plain = [memoryview(bytearray(size)) for size in sizes]
                mixed = [span if index % 2 else view for index, (span, view) in enumerate(zip(spans, plain, strict=True))]
                for send in (spans, data, [memoryview(part) for part in data]):
                    store.data = []
                    await pool.call(where, WRITE, write(), timeout_s=20, send=send)
                    assert store.data == data
                for receive in (spans, plain, mixed):
                    for span, view in zip(spans, plain, strict=True):
                        span.view[:] = bytes(span.length)
                        view[:] = bytes(len(view))
                    await pool.call(where, READ, read(), timeout_s=20, receive=receive)
                    assert [bytes(getattr(part, "view", part)) for part in receive] == data
                for span in spans:
                    assert not span.pinned
                    own.release(span)
            assert own.free_bytes == own.total_bytes

    on_transport(transport, main)


@each
def test_fewer_bytes_than_room(transport: str) -> None:
    async def main(world: World) -> None:
        store = Store(world)
        store.data = [b"abc", b"", b"x" * 50_000]
        async with world.serve(store) as where, world.pool() as pool:
            own = buffers()
            plain = [memoryview(bytearray(b"-" * size)) for size in (10, 10, 60_000)]
            span_lists = [own.allocate(10), own.allocate(10), own.allocate(60_000)]
            for span in span_lists:
                span.view[:] = b"-" * span.length
            for receive in (plain, span_lists):
                reply = await pool.call(where, READ, read(), timeout_s=5, receive=receive)
                assert [result.length for result in reply.results] == [3, 0, 50_000]
                got = [bytes(getattr(part, "view", part)) for part in receive]
                assert got == [b"abc" + b"-" * 7, b"-" * 10, b"x" * 50_000 + b"-" * 10_000], "what lies beyond stays as it was"

    on_transport(transport, main)


@each
def test_many_bulk_calls_at_once(transport: str) -> None:
    async def main(world: World) -> None:
        class Echo:
            """READ answers with bytes that say which request they are for."""

            async def read(self, request: Any, call: Any) -> Any:
                await world.clock.sleep((request.reads[0].chain_id % 7) / 1000)
                for view in call.bulk.sink():
                    view[:] = bytes([request.reads[0].chain_id % 251]) * len(view)
                return storage_pb2.ReadReply()

        async with world.serve(Echo()) as where, world.pool() as pool:
            own = buffers(64 << 20)

            async def ask(number: int) -> None:
                size = 1 + (number * 7919) % 200_000
                span = await own.acquire(size)
                request = storage_pb2.ReadRequest(reads=[storage_pb2.ReadIO(chain_id=number)])
                await pool.call(where, READ, request, timeout_s=30, receive=[span])
                assert bytes(span.view) == bytes([number % 251]) * size
                own.release(span)

            async with trio.open_nursery() as nursery:
                for number in range(300):
                    nursery.start_soon(ask, number)

    on_transport(transport, main)


@each
def test_late_bytes_never_reach_memory_that_was_taken_back(transport: str) -> None:
    """The heart of one-sided reads: a caller that gave up may use plain memory at once, and a span once it is unpinned; the pool keeps it so long."""

    async def main(world: World) -> None:
        gate = trio.Event()
        placed = trio.Event()

        class Slow:
            async def read(self, request: Any, call: Any) -> Any:
                views = call.bulk.sink()
                await gate.wait()
                for view in views:
                    view[:] = b"L" * len(view)
                placed.set()
                return storage_pb2.ReadReply()

        async with world.serve(Slow()) as where, world.pool() as pool:
            own = buffers(1 << 20)
            whole = own.allocate(1 << 20)
            plain = memoryview(bytearray(b"-" * 100_000))
            for receive in ([whole], [plain]):
                with trio.move_on_after(0.05) as scope:
                    await pool.call(where, READ, read(), timeout_s=5, receive=receive)
                assert scope.cancelled_caught
            own.release(whole)
            if world.shares_memory:
                assert whole.pinned
                with pytest.raises(Overloaded):
                    own.allocate(4096)
            else:
                assert not whole.pinned
            gate.set()
            await placed.wait()
            await world.clock.sleep(0.05)
            assert not whole.pinned
            assert bytes(plain) == b"-" * 100_000
            again = own.allocate(1 << 20)
            again.view[:] = b"-" * (1 << 20)
            await world.clock.sleep(0.05)
            assert bytes(again.view) == b"-" * (1 << 20)

    on_transport(transport, main)


@each
def test_bytes_being_sent_are_copied_when_the_caller_gives_up(transport: str) -> None:
    async def main(world: World) -> None:
        if world.shares_memory:
            return  # spans are pinned instead: see above
        store = Store(world)
        async with world.serve(store, limits=Limits(payload_wait_s=30)) as where, world.pool() as pool:
            memory = bytearray(b"A" * (48 << 20))
            with trio.move_on_after(0.002) as scope:
                await pool.call(where, WRITE, write(), timeout_s=30, send=[memory])
            assert scope.cancelled_caught
            memory[:] = b"B" * len(memory)
            await pool.call(where, LAST, sleep_ms(0), timeout_s=30)
            assert not store.data or (len(store.data[0]) == len(memory) and b"B" not in store.data[0])

    on_transport(transport, main)


@each
def test_memory_is_passed_on_to_another_service(transport: str) -> None:
    async def main(world: World) -> None:
        last = Store(world)
        inodes: list[int] = []
        own = buffers()

        async with world.serve(last) as last_where, world.pool() as inner:

            class Middle:
                async def write(self, request: Any, call: Any) -> Any:
                    spans = call.bulk.spans()
                    inodes.append(os.fstat(spans[0].region.fd).st_ino)
                    await inner.call(last_where, WRITE, write(), timeout_s=5, send=call.bulk.spans([1, 0]))
                    return storage_pb2.WriteReply()

                async def read(self, request: Any, call: Any) -> Any:
                    call.bulk.sink()
                    return await inner.call(last_where, READ, read(), timeout_s=5, receive=call.bulk.spans())

            async with world.serve(Middle()) as where, world.pool() as pool:
                data = [os.urandom(100_000), os.urandom(5)]
                spans = [own.allocate(len(part)) for part in data]
                for span, part in zip(spans, data, strict=True):
                    span.view[:] = part
                await pool.call(where, WRITE, write(), timeout_s=5, send=spans)
                assert last.data == [data[1], data[0]]
                if world.shares_memory:
                    assert inodes == [os.fstat(own.region.fd).st_ino], "the caller's own memory went along"
                last.data.reverse()
                for span in spans:
                    span.view[:] = bytes(span.length)
                await pool.call(where, READ, read(), timeout_s=5, receive=spans)
                assert [bytes(span.view) for span in spans] == data

    on_transport(transport, main)


@pytest.mark.parametrize("transport", ["shm", "sim-shm"])
def test_memory_passed_on_stays_pinned_until_the_last_service_is_done(transport: str) -> None:
    """The middle gives up on the last service and answers; the caller's memory is its own only when the last has let go too."""

    async def main(world: World) -> None:
        gate = trio.Event()

        class Last:
            async def write(self, request: Any, call: Any) -> Any:
                await gate.wait()
                return storage_pb2.WriteReply()

        async with world.serve(Last()) as last_where, world.pool() as inner:

            class Middle:
                async def write(self, request: Any, call: Any) -> Any:
                    with trio.move_on_after(0.05):
                        await inner.call(last_where, WRITE, write(), timeout_s=5, send=call.bulk.spans())
                    raise NotFound("gave up")

            async with world.serve(Middle()) as where, world.pool() as pool:
                own = buffers(1 << 20)
                span = own.allocate(1 << 20)
                with pytest.raises(NotFound):
                    await pool.call(where, WRITE, write(), timeout_s=5, send=[span])
                assert span.pinned
                own.release(span)
                with pytest.raises(Overloaded):
                    own.allocate(1)
                gate.set()
                await world.clock.sleep(0.1)
                assert not span.pinned and own.free_bytes == own.total_bytes

    on_transport(transport, main)


@pytest.mark.parametrize("how", ["closed here", "malformed frame"])
@pytest.mark.parametrize("transport", ["shm", "sim-shm"])
def test_a_channel_that_ends_keeps_memory_pinned_until_the_service_is_done(transport: str, how: str) -> None:
    async def main(world: World) -> None:
        gate = trio.Event()

        class Slow:
            async def read(self, request: Any, call: Any) -> Any:
                views = call.bulk.sink()
                with trio.CancelScope(shield=True):
                    await gate.wait()
                views[0][:] = b"L" * len(views[0])
                return storage_pb2.ReadReply()

        async with world.serve(Slow()) as where, world.pool() as pool:
            own = buffers(1 << 20)
            span = own.allocate(1 << 20)
            async with trio.open_nursery() as nursery:

                async def ask() -> None:
                    with pytest.raises(ConnectionLost):
                        await pool.call(where, READ, read(), timeout_s=5, receive=[span])

                nursery.start_soon(ask)
                await world.clock.sleep(0.05)
                channel = await pool.channel(where, timeout_s=1)
                if how == "closed here":
                    channel.close()
                else:
                    channel._connection.send([b"X" * 40])
            try:
                await world.clock.sleep(0.05)
                assert span.pinned, "the service still has the memory"
            finally:
                gate.set()
            await world.clock.sleep(0.1)
            assert not span.pinned

    on_transport(transport, main)


def test_regions_are_checked() -> None:
    """A span outside its region, an unknown region, and memory that could be shrunk under the service."""

    async def main(world: World) -> None:
        store = Store(world)
        async with world.serve(store) as where, world.pool() as pool:
            own = buffers(1 << 20)
            span = own.allocate(4096)
            await pool.call(where, WRITE, write(), timeout_s=5, send=[span])
            channel = await pool.channel(where, timeout_s=1)
            for region, offset, length in ((1, 1 << 20, 1), (1, (1 << 20) - 10, 11), (99, 0, 1), (1, (1 << 64) - 1, 4)):
                request = write()
                request.bulk.region.append(region)
                request.bulk.offset.append(offset)
                request.bulk.length.append(length)
                plain = Method("Storage", "Write", "write", WRITE.key, WRITE.request, WRITE.reply, has_bulk=False)
                with pytest.raises(UnknownRegion):
                    await channel.call(plain, request, timeout_s=5)
            request = write()
            request.bulk.region.extend([1, 1])
            request.bulk.length.append(1)
            with pytest.raises(BadRequest):
                await channel.call(plain, request, timeout_s=5)

            fd = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, 8192)
            with pytest.raises(UnknownRegion, match="not sealed"):
                Region.adopt(os.dup(fd), 8192)
            with pytest.raises(UnknownRegion, match="does not fit"):
                Region.adopt(os.dup(own.region.fd or -1), 1 << 30)
            import mmap

            bad = Region(mmap.mmap(fd, 8192), fd)
            with pytest.raises(ConnectionLost, match="not sealed"):
                await pool.call(where, WRITE, write(), timeout_s=5, send=[bad.span()])
            assert (await pool.call(where, VERSION, version(), timeout_s=5)).versions, "the pool connects anew"

    on_transport("shm", main)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["in the loop's thread", "in another thread"])
def test_a_closed_region_is_forgotten_by_the_service(elsewhere: bool) -> None:
    def mapped() -> int:
        with open("/proc/self/maps", encoding="ascii") as file:
            return sum("memfd:short-lived" in line for line in file)

    async def main(world: World) -> None:
        async with world.serve(Store(world)) as where, world.pool() as pool:

            async def send(region: Region) -> None:
                await pool.call(where, WRITE, write(), timeout_s=5, send=[region.span(0, 100)])

            for _ in range(200):
                region = Region.create(1 << 16, "short-lived")
                async with trio.open_nursery() as nursery:
                    for _ in range(4):  # a channel with so much to do leaves frames to its writer, whom only the loop may wake
                        nursery.start_soon(send, region)
                if elsewhere:
                    await trio.to_thread.run_sync(region.close)
                else:
                    region.close()
            await pool.call(where, LAST, sleep_ms(0), timeout_s=5)
            assert mapped() <= 2

    on_transport("shm", main)


@pytest.mark.parametrize("transport", ["tcp", "sim-tcp"])
def test_no_memory_for_payloads_is_an_answer_and_not_a_stall(transport: str) -> None:
    async def main(world: World) -> None:
        gate = trio.Event()

        class Holding:
            async def write(self, request: Any, call: Any) -> Any:
                await call.bulk.source()
                await gate.wait()
                return storage_pb2.WriteReply()

            def version(self, request: Any, call: Any) -> Any:
                return storage_pb2.VersionReply(versions=[7])

        limits = Limits(payload_pool_bytes=4 << 20, payload_wait_s=0.2)
        async with world.serve(Holding(), limits=limits) as where, world.pool() as pool:
            outcomes: list[str] = []

            async def put() -> None:
                try:
                    await pool.call(where, WRITE, write(), timeout_s=20, send=[bytes(1 << 20)])
                    outcomes.append("written")
                except Overloaded:
                    outcomes.append("refused")

            async with trio.open_nursery() as nursery:
                for _ in range(6):
                    nursery.start_soon(put)
                await world.clock.sleep(1)
                assert outcomes == ["refused", "refused"]
                assert (await pool.call(where, VERSION, version(), timeout_s=5)).versions == [7]
                gate.set()
            assert sorted(outcomes) == ["refused"] * 2 + ["written"] * 4

    on_transport(transport, main)
