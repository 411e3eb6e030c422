"""Managers that restart or take over, and nodes that stop and come back all together: nothing is lost, and the heads of chains stay spread."""

from __future__ import annotations

from collections import Counter

import pytest
import trio
from tests.unit.meta.cluster.manager_world import (
    CLUSTER,
    CREATE,
    LEASE_S,
    LIST_CLIENTS,
    STATUS,
    Node,
    RunningManager,
    World,
    all_born,
    all_serve,
    create,
    run,
    states,
    until,
)

from kvfs.common.errors import (
    LeaseExpired,
    NotPrimary,
)
from kvfs.common.membership import ManagerLink
from kvfs.common.primary import hinted_address
from kvfs.common.sim.clock import SimClock
from kvfs.common.wire import base_pb2 as base
from kvfs.common.wire import cluster_pb2 as pb
from kvfs.common.wire.channel import ChannelPool
from kvfs.common.wire.identity import Identity


def test_the_manager_restarts_on_its_store() -> None:
    async def body(world: World) -> None:
        manager = await world.manager()
        nodes = await world.nodes(3)
        async with world.link() as link:
            made = await create(link, expected_nodes=3)
            before = (await link.refresh()).message
            link.start_client_heartbeats(description="/mnt/x")
            await trio.sleep(LEASE_S / 2)
            await manager.stop()
            await trio.sleep(LEASE_S)  # longer than half a lease: the nodes stop serving
            assert not nodes[0].link.lease_valid()
            with pytest.raises(LeaseExpired):
                nodes[0].link.check_lease()
            again = await world.manager(listen=manager.address)
            assert again.address == manager.address
            await until(lambda: all(node.link.lease_valid() for node in nodes))
            await trio.sleep(LEASE_S * 1.5)
            after = (await link.refresh()).message
            assert after.version > before.version
            assert list(after.chains) == list(before.chains) and list(after.tables) == list(before.tables)
            assert [(n.node_id, n.incarnation, n.alive) for n in after.nodes if n.role == pb.ROLE_STORAGE] == [
                (n.node_id, n.incarnation, n.alive) for n in before.nodes if n.role == pb.ROLE_STORAGE
            ]
            assert all(node.error is None for node in nodes)
            assert (await create(link, expected_nodes=3)) == made
            clients = await link.call(LIST_CLIENTS, base.Empty(), timeout_s=1.0)
            assert [client.description for client in clients.clients] == ["/mnt/x"]
            # And one that does not find the restarted manager is dead after its lease of grace.
            nodes[2].kill()
            await until(lambda: not link.routing.node(nodes[2].link.node_id).alive, within_s=2 * LEASE_S)

    run(body)


def test_a_node_that_misses_the_restart_is_declared_dead_after_a_lease_of_grace() -> None:
    async def body(world: World) -> None:
        manager = await world.manager()
        nodes = await world.nodes(3)
        async with world.link() as link:
            await create(link, expected_nodes=3)
            await manager.stop()
            nodes[0].kill()
            await world.manager(listen=manager.address)
            await link.refresh()
            assert link.routing.node(nodes[0].link.node_id).alive, "grace first"
            await until(lambda: not link.routing.node(nodes[0].link.node_id).alive, within_s=2 * LEASE_S)
            assert all(node.error is None for node in nodes)

    run(body)


def test_two_managers_one_primary_failover_and_fence() -> None:
    async def body(world: World) -> None:
        first = await world.manager("m1")
        second = await world.manager("m2")
        nodes = await world.nodes(3)
        async with world.link() as link:
            made = await create(link, expected_nodes=3)
            async with ChannelPool(world.fabric.host("client"), SimClock(), Identity(cluster_id=CLUSTER)) as pool:
                status = await pool.call([second.address], STATUS, base.Empty(), timeout_s=1.0)
                assert not status.primary and status.primary_address == first.address
                with pytest.raises(NotPrimary) as refused:
                    await pool.call([second.address], CREATE, pb.CreateTargetsRequest(table_id=9), timeout_s=1.0)
                assert hinted_address(refused.value) == first.address
                assert (await pool.call([first.address], STATUS, base.Empty(), timeout_s=1.0)).primary
                version = link.routing.version
                await first.stop()
                with trio.fail_after(8.0):
                    while not (status := await pool.call([second.address], STATUS, base.Empty(), timeout_s=1.0)).primary:
                        await trio.sleep(0.05)
            await until(lambda: all(node.link.lease_valid() for node in nodes))
            await trio.sleep(LEASE_S * 1.5)
            assert all(node.error is None for node in nodes) and all_serve(link)
            assert link.routing.version > version
            assert await create(link) == made

    run(body)


def heads(link: ManagerLink) -> dict[int, int]:
    """How many chains each node is the head of."""
    return Counter(states(link, chain.chain_id)[0][0] for chain in link.routing.chains)


async def restart_everyone(world: World, manager: RunningManager, nodes: list[Node], missing: int = 0, boot: str = "") -> list[Node]:
    for node in nodes:
        node.kill()
    await manager.stop()
    await world.manager(listen=manager.address)
    again = [Node(world, node.uuid, own=node.own, boot=boot) for node in nodes[missing:]]
    async with trio.open_nursery() as starting:
        for place, node in enumerate(again):
            await trio.sleep(0.1 * bool(place))  # no two processes start equally fast
            starting.start_soon(world.nursery.start, node.run)
    return again


def test_everyone_restarts_and_all_serve_again_with_the_heads_spread() -> None:
    async def body(world: World) -> None:
        manager = await world.manager()
        nodes = await world.nodes(3)
        async with world.link() as link:
            await create(link, expected_nodes=3, targets_per_disk=6)
            await until(lambda: all(len(node.own) == 6 for node in nodes) and all_born(link))
            assert sorted(heads(link).values()) == [2, 2, 2]
        await restart_everyone(world, manager, nodes)
        async with world.link() as link:
            await until(lambda: all_serve(link))
            assert not any(target.blank for target in link.routing.targets)
            assert sorted(heads(link).values()) == [2, 2, 2]

    run(body)


def test_nodes_that_leave_together_leave_the_heads_spread() -> None:
    async def body(world: World) -> None:
        await world.manager()
        nodes = await world.nodes(3)
        async with world.link() as link:
            await create(link, expected_nodes=3, targets_per_disk=6)
            await until(lambda: all_serve(link) and all_born(link))
            for node in nodes:
                node.leave()
                await trio.sleep(0.02)
            await until(lambda: not any(link.routing.serving(chain.chain_id) for chain in link.routing.chains))
            assert sorted(heads(link).values()) == [2, 2, 2]
            for node in nodes:
                node.leaving = False
                node.link.report_now()
            await until(lambda: all_serve(link))
            nodes[0].leave()  # and one that goes alone is not waited with for long
            left_s = trio.current_time()
            await until(lambda: not all_serve(link))
            assert trio.current_time() - left_s < 0.2

    run(body)


def test_nodes_that_restart_do_not_wait_for_one_that_stays_away() -> None:
    async def body(world: World) -> None:
        manager = await world.manager()
        nodes = await world.nodes(3)
        async with world.link() as link:
            await create(link, expected_nodes=3)
            await until(lambda: all(len(node.own) == 4 for node in nodes) and all_born(link))
        before_s = trio.current_time()
        again = await restart_everyone(world, manager, nodes, missing=1)
        assert trio.current_time() - before_s < LEASE_S
        await trio.sleep(2 * LEASE_S)
        assert all(node.error is None and node.link.lease_valid() for node in again)
        await world.node(nodes[0].uuid, own=nodes[0].own)
        async with world.link() as link:
            await until(lambda: all_serve(link))

    run(body)


@pytest.mark.parametrize(("boot", "loss"), [("", 0), ("another", 1)], ids=["killed", "without power"])
def test_every_chain_tells_of_a_loss_of_power_everywhere(boot: str, loss: int) -> None:
    """They are back before anyone misses them, and so is the manager."""

    async def body(world: World) -> None:
        manager = await world.manager()
        nodes = await world.nodes(3)
        async with world.link() as link:
            await create(link, expected_nodes=3)
            await until(lambda: all(len(node.own) == 4 for node in nodes) and all_born(link))
            assert not any(chain.loss for chain in link.routing.chains)
        await restart_everyone(world, manager, nodes, boot=boot)
        async with world.link() as link:
            await until(lambda: all_serve(link))
            assert {chain.loss for chain in link.routing.chains} == {loss}
            assert not any(chain.last_boot for chain in link.routing.chains)

    run(body)


def test_no_chain_tells_of_a_loss_of_power_while_another_replica_goes_on() -> None:
    async def body(world: World) -> None:
        await world.manager()
        nodes = await world.nodes(3)
        async with world.link() as link:
            await create(link, expected_nodes=3)
            await until(lambda: all(len(node.own) == 4 for node in nodes) and all_born(link))
            for turn in range(3):  # one after the other, each back before it is missed, and brought up to date
                nodes[turn].kill()
                nodes[turn] = await world.node(nodes[turn].uuid, own=nodes[turn].own, boot="another")
                await until(lambda: all_serve(link))
            assert not any(chain.loss for chain in link.routing.chains)
            for node in nodes[:2]:
                node.kill()
            await until(lambda: all(len(link.routing.serving(chain.chain_id)) == 1 for chain in link.routing.chains), within_s=2 * LEASE_S)
            nodes[2].kill()  # the last one loses power; the others are back before it, with what they had when they were killed
            await until(lambda: not any(link.routing.serving(chain.chain_id) for chain in link.routing.chains), within_s=2 * LEASE_S)
            for node in nodes[:2]:
                await world.node(node.uuid, own=node.own, boot="another")
            await trio.sleep(2 * LEASE_S)
            assert not any(link.routing.serving(chain.chain_id) for chain in link.routing.chains)
            await world.node(nodes[2].uuid, own=nodes[2].own, boot="the third")
            await until(lambda: all_serve(link))
            assert {chain.loss for chain in link.routing.chains} == {1}

    run(body)
