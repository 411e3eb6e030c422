"""Calls over every transport: one suite for TCP, shared memory and their simulated kin."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import trio
import trio.testing

from kvfs.common.errors import (
    BadRequest,
    DeadlineExceeded,
    InternalError,
    MessageTooBig,
    NotFound,
    UnknownMethod,
)
from kvfs.common.wire import storage_pb2
from kvfs.common.wire.frame import Limits

from .rpc_world import (
    LAST,
    LIST,
    READ,
    SYNC,
    TRANSPORTS,
    VERSION,
    WRITE,
    Store,
    World,
    on_transport,
    read,
    sleep_ms,
    version,
    write,
)

each = pytest.mark.parametrize("transport", TRANSPORTS)


@each
def test_a_call_is_answered(transport: str) -> None:
    async def main(world: World) -> None:
        store = Store(world)
        async with world.serve(store) as where, world.pool() as pool:
            assert (await pool.call(where, VERSION, version(5), timeout_s=5)).versions == [5, 0]
            assert (await pool.call(where, LAST, sleep_ms(5, 77), timeout_s=5)).index == 77
            caller = store.callers[0]
            assert (caller.cluster_id, caller.role, caller.client_id) == ("c1", "client", pool.identity.client_id)

    on_transport(transport, main)


@each
def test_many_calls_at_once_get_their_own_answers(transport: str) -> None:
    async def main(world: World) -> None:
        async with world.serve(Store(world)) as where, world.pool() as pool:
            answers: dict[int, int] = {}

            async def ask(number: int) -> None:
                if number % 3:
                    answers[number] = (await pool.call(where, VERSION, version(number), timeout_s=30)).versions[0]
                else:
                    answers[number] = (await pool.call(where, LAST, sleep_ms(number % 20, number), timeout_s=30)).index

            async with trio.open_nursery() as nursery:
                for number in range(1000):
                    nursery.start_soon(ask, number)
            assert answers == {number: number for number in range(1000)}

    on_transport(transport, main)


class Faulty:
    def version(self, request: Any, call: Any) -> Any:
        raise NotFound("no such thing")

    async def last_chunk(self, request: Any, call: Any) -> Any:
        raise ValueError("secret detail")

    def read(self, request: Any, call: Any) -> Any:
        return storage_pb2.WriteReply()

    async def sync(self, request: Any, call: Any) -> Any:
        return None

    def list_chunks(self, request: Any, call: Any) -> Any:
        return storage_pb2.ListChunksReply(chunks=[storage_pb2.ChunkInfo(chunk_id=bytes(4 << 20))])


class Garbage:
    def SerializeToString(self) -> bytes:
        return b"\xff\xff\xff"


@each
def test_errors_come_back_as_their_class(transport: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main(world: World) -> None:
        async with world.serve(Faulty()) as where, world.pool() as pool:
            with pytest.raises(NotFound, match="no such thing"):
                await pool.call(where, VERSION, version(), timeout_s=5)
            with pytest.raises(InternalError) as caught:
                await pool.call(where, LAST, sleep_ms(0), timeout_s=5)
            assert "secret" not in caught.value.message and "secret" in caplog.text
            for method, request in ((READ, read()), (SYNC, storage_pb2.SyncRequest())):
                with pytest.raises(InternalError):
                    await pool.call(where, method, request, timeout_s=5)
            with pytest.raises(UnknownMethod, match="no method 3\\.1"):
                await pool.call(where, WRITE, write(), timeout_s=5)
            with pytest.raises(MessageTooBig, match="ask for less"):
                await pool.call(where, LIST, storage_pb2.ListChunksRequest(), timeout_s=5)
            with pytest.raises(MessageTooBig):
                await pool.call(where, VERSION, storage_pb2.VersionRequest(chunk_ids=[bytes(5 << 20)]), timeout_s=5)
            with pytest.raises(BadRequest, match="does not parse"):
                await pool.call(where, VERSION, Garbage(), timeout_s=5)
            with pytest.raises(NotFound):
                await pool.call(where, VERSION, version(), timeout_s=5)

    with caplog.at_level(logging.ERROR):
        on_transport(transport, main)


@each
def test_a_large_message_passes(transport: str) -> None:
    async def main(world: World) -> None:
        async with world.serve(Store(world)) as where, world.pool() as pool:
            for size in (60_000, 65_500, 65_536, 100_000, 4_000_000):
                request = storage_pb2.VersionRequest(chain_id=size, chunk_ids=[bytes(size)])
                assert (await pool.call(where, VERSION, request, timeout_s=20)).versions[0] == size

    on_transport(transport, main)


@each
def test_deadline(transport: str) -> None:
    async def main(world: World) -> None:
        store = Store(world)
        async with world.serve(store) as where, world.pool() as pool:
            begun = world.clock.monotonic()
            with pytest.raises(DeadlineExceeded):
                await pool.call(where, LAST, sleep_ms(30_000), timeout_s=0.1)
            assert 0.09 < world.clock.monotonic() - begun < 3
            assert (await pool.call(where, VERSION, version(), timeout_s=5)).versions
            await world.clock.sleep(1.5)
            assert store.finished == 1, "the handler is cancelled when its deadline and the grace are over"

    on_transport(transport, main)


@each
def test_a_cancelled_call_leaves_the_channel_usable(transport: str) -> None:
    async def main(world: World) -> None:
        store = Store(world)
        async with world.serve(store) as where, world.pool() as pool:
            for _ in range(3):
                with trio.move_on_after(0.02) as scope:
                    await pool.call(where, LAST, sleep_ms(60), timeout_s=5)
                assert scope.cancelled_caught
            assert (await pool.call(where, LAST, sleep_ms(100, 9), timeout_s=5)).index == 9
            channel = await pool.channel(where, timeout_s=1)
            assert store.finished == 4 and channel._calls.table == {}, "late answers were taken off the table"

    on_transport(transport, main)


@each
def test_requests_under_way_are_bounded(transport: str) -> None:
    async def main(world: World) -> None:
        store = Store(world)
        async with world.serve(store, limits=Limits(in_flight=8)) as where, world.pool() as pool:
            async with trio.open_nursery() as nursery:
                for _ in range(100):
                    nursery.start_soon(lambda: pool.call(where, LAST, sleep_ms(5), timeout_s=30))
            assert store.finished == 100 and store.most_running <= 8

        async with world.serve(store) as where, world.pool(limits=Limits(in_flight=4)) as pool:
            store.most_running = 0
            async with trio.open_nursery() as nursery:
                for _ in range(40):
                    nursery.start_soon(lambda: pool.call(where, LAST, sleep_ms(5), timeout_s=30))
            assert store.most_running <= 4
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(lambda: pool.call(where, LAST, sleep_ms(300), timeout_s=30))
                await world.clock.sleep(0.05)
                with pytest.raises(DeadlineExceeded, match="under way already"):
                    await pool.call(where, VERSION, version(), timeout_s=0.05)

    on_transport(transport, main)
