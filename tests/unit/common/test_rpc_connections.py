"""Connections between callers and services: how they are chosen, shared, lost, left and closed."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from kvfs.common.errors import (
    ConnectionLost,
    DeadlineExceeded,
    NotFound,
    ServiceStopping,
    Unreachable,
    WrongCluster,
)
from kvfs.common.wire import storage_pb2
from kvfs.common.wire.frame import Limits

from .rpc_world import (
    LAST,
    LIST,
    TRANSPORTS,
    VERSION,
    Store,
    World,
    on_transport,
    sleep_ms,
    version,
)

each = pytest.mark.parametrize("transport", TRANSPORTS)


@each
def test_a_service_that_goes_away_fails_the_calls_under_way(transport: str) -> None:
    async def main(world: World) -> None:
        store = Store(world)
        failures: list[type[BaseException]] = []

        async def ask(pool: Any, where: list[str]) -> None:
            try:
                await pool.call(where, LIST, storage_pb2.ListChunksRequest(), timeout_s=30)
            except (ConnectionLost, ServiceStopping) as error:
                failures.append(type(error))

        async with world.pool() as pool, trio.open_nursery() as nursery:
            async with world.serve(store) as where:
                for _ in range(5):
                    nursery.start_soon(ask, pool, where)
                await store.entered.wait()
                await world.clock.sleep(0.02)
            await world.clock.sleep(0.05)
            assert len(failures) == 5
            with pytest.raises(Unreachable):
                await pool.call(where, VERSION, version(), timeout_s=5)

    on_transport(transport, main)


@each
def test_another_cluster_is_refused(transport: str) -> None:
    async def main(world: World) -> None:
        async with world.serve(Store(world), cluster="c2") as where, world.pool() as pool:
            with pytest.raises(WrongCluster, match="c1"):
                await pool.call(where, VERSION, version(), timeout_s=5)
        async with world.serve(Store(world), cluster="") as where, world.pool() as pool:
            assert (await pool.call(where, VERSION, version(), timeout_s=5)).versions

    on_transport(transport, main)


@each
def test_an_idle_connection_is_closed_and_made_again(transport: str) -> None:
    async def main(world: World) -> None:
        store = Store(world)
        limits = Limits(idle_s=0.1)
        async with world.serve(store, limits=limits) as where, world.pool(limits=limits) as pool:
            await pool.call(where, VERSION, version(), timeout_s=5)
            first = await pool.channel(where, timeout_s=5)
            await world.clock.sleep(0.5)
            assert first.ended is not None
            await pool.call(where, LAST, sleep_ms(400), timeout_s=5)
            assert await pool.channel(where, timeout_s=5) is not first

    on_transport(transport, main)


def test_the_best_transport_that_reaches_the_right_process_is_taken() -> None:
    async def main(world: World) -> None:
        store, other = Store(world), Store(world)
        async with world.serve(store) as unix, world.serve(other) as other_unix:
            world.shares_memory = False
            async with world.serve(store) as tcp, world.pool() as pool:

                async def way(addresses: list[str]) -> str:
                    return (await pool.channel(addresses, timeout_s=5)).address.partition(":")[0]

                assert await way([*tcp, *unix]) == "unix"
                stranger = unix[0].replace(f"host={pool.identity.host_id}", "host=another-machine")
                assert await way([*tcp, stranger]) == "tcp"
                gone = unix[0].replace(".sock", "-gone.sock")
                assert await way([*tcp, gone]) == "tcp"
                wrong_process = unix[0].partition("?")[0] + "?" + other_unix[0].partition("?")[2]
                assert await way([*tcp, wrong_process]) == "tcp"
                with pytest.raises(Unreachable, match="another process"):
                    await way([wrong_process])
                with pytest.raises(Unreachable):
                    await way([stranger])
            async with world.pool(shared_memory=False) as pool:
                with pytest.raises(Unreachable):
                    await pool.call(unix, VERSION, version(), timeout_s=5)

    on_transport("shm", main)


@each
def test_forget_connects_anew_and_lets_calls_end(transport: str) -> None:
    async def main(world: World) -> None:
        async with world.serve(Store(world)) as where, world.pool() as pool, trio.open_nursery() as nursery:
            answers: list[int] = []

            async def ask() -> None:
                answers.append((await pool.call(where, LAST, sleep_ms(100, 3), timeout_s=5)).index)

            nursery.start_soon(ask)
            await world.clock.sleep(0.03)
            first = await pool.channel(where, timeout_s=5)
            pool.forget(where)
            assert await pool.channel(where, timeout_s=5) is not first
            await world.clock.sleep(0.2)
            assert answers == [3] and first.ended is not None

    on_transport(transport, main)


def test_a_peer_that_hangs_is_left_for_a_new_connection() -> None:
    """Half-open: the network swallows everything. The call ends at its deadline, and the next one does not use that connection."""

    async def main(world: World) -> None:
        assert world.fabric is not None
        there = World("sim-tcp", world.folder)
        there.fabric, there.net = world.fabric, world.fabric.host("there")
        async with there.serve(Store(world)) as where, world.pool() as pool:
            await pool.call(where, VERSION, version(), timeout_s=5)
            first = await pool.channel(where, timeout_s=5)
            world.fabric.partition(["here"], ["there"])
            with pytest.raises(DeadlineExceeded):
                await pool.call(where, VERSION, version(), timeout_s=1)
            with pytest.raises(Unreachable):
                await pool.call(where, VERSION, version(), timeout_s=1)
            world.fabric.heal()
            assert (await pool.call(where, VERSION, version(), timeout_s=1)).versions
            assert await pool.channel(where, timeout_s=5) is not first

    on_transport("sim-tcp", main)


def test_callers_share_an_attempt_to_connect_and_its_failure() -> None:
    async def main(world: World) -> None:
        assert world.fabric is not None
        there = World("sim-tcp", world.folder)
        there.fabric, there.net = world.fabric, world.fabric.host("there")
        async with there.serve(Store(world)) as where, world.pool(connect_timeout_s=3) as pool:
            world.fabric.partition(["here"], ["there"])

            async def ask() -> None:
                begun = world.clock.monotonic()
                with pytest.raises(Unreachable):
                    await pool.call(where, VERSION, version(), timeout_s=60)
                assert world.clock.monotonic() - begun < 3.5

            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(ask)
            world.fabric.heal()
            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(lambda: pool.call(where, VERSION, version(), timeout_s=5))
                with trio.move_on_after(0):
                    await pool.call(where, VERSION, version(), timeout_s=5)

    on_transport("sim-tcp", main)


@pytest.mark.parametrize("transport", ["sim-tcp", "sim-shm"])
def test_breaking_connections_lose_calls_but_never_mix_answers(transport: str) -> None:
    async def main(world: World) -> None:
        assert world.fabric is not None
        async with world.serve(Store(world)) as where, world.pool() as pool:
            outcomes: list[str] = []

            async def ask(number: int) -> None:
                try:
                    answer = await pool.call(where, LAST, sleep_ms(number % 5, number), timeout_s=5)
                    assert answer.index == number
                    outcomes.append("answered")
                except (ConnectionLost, Unreachable):
                    outcomes.append("lost")

            world.fabric.break_probability = 0.02
            for round_number in range(20):
                async with trio.open_nursery() as nursery:
                    for number in range(20):
                        nursery.start_soon(ask, round_number * 20 + number)
            assert len(outcomes) == 400 and outcomes.count("answered") > 100 and outcomes.count("lost") > 10

    on_transport(transport, main)


def test_an_error_inside_the_pool_is_not_wrapped() -> None:
    async def main(world: World) -> None:
        with pytest.raises(NotFound):
            async with world.pool():
                raise NotFound("plain")

    on_transport("tcp", main)
