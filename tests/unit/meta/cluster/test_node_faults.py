"""Single nodes that die, are cut off, come back, or come back with nothing, under virtual time: what the manager makes of them, also by chance."""

from __future__ import annotations

import pytest
import trio
from tests.unit.meta.cluster.manager_world import HEARTBEAT, LEASE_S, World, all_born, all_serve, create, run, states, until

from kvfs.common.boundary.random import SeededRandom
from kvfs.common.errors import (
    LeaseExpired,
    NotRegistered,
    StaleIncarnation,
)
from kvfs.common.wire import cluster_pb2 as pb
from kvfs.meta.cluster.registry import chain_from_wire
from kvfs.meta.cluster.states import problems


def test_a_node_dies_and_comes_back() -> None:
    async def body(world: World) -> None:
        await world.manager()
        nodes = await world.nodes(3)
        async with world.link() as link:
            table = (await create(link, expected_nodes=3)).table
            await link.refresh()
            assert len(table.chain_ids) == 4 and all_serve(link)
            chain_id = table.chain_ids[0]
            await trio.sleep(LEASE_S * 1.5)
            assert all_serve(link), "living nodes stay"

            victim = nodes[1]
            nodes[1].kill()
            died = trio.current_time()
            await until(lambda: states(link, chain_id)[-1] == (victim.link.node_id, pb.PUBLIC_OFFLINE), within_s=2 * LEASE_S)
            assert trio.current_time() - died > LEASE_S / 2, "not before its lease could have run out"
            assert not link.routing.node(victim.link.node_id).alive
            assert [state for _, state in states(link, chain_id)] == [pb.SERVING, pb.SERVING, pb.PUBLIC_OFFLINE]

            seen: list[int] = []
            versions: list[int] = []

            def watch(_: object) -> None:
                seen.append(states(link, chain_id)[-1][1])
                versions.append(link.routing.chain(chain_id).version)

            link.on_routing(watch)
            back = await world.node("uuid-1", own=victim.own)
            back.complete = False
            assert back.link.node_id == victim.link.node_id
            assert back.registered.incarnation == victim.registered.incarnation + 1
            assert {target.target_id for target in back.registered.targets} == victim.own
            await until(lambda: states(link, chain_id)[-1] == (back.link.node_id, pb.SYNCING))
            await trio.sleep(LEASE_S)
            assert states(link, chain_id)[-1][1] == pb.SYNCING, "not serving before it says that it is up to date"
            back.complete = True
            back.link.report_now()
            await until(lambda: all_serve(link))
            steps = [state for index, state in enumerate(seen) if index == 0 or seen[index - 1] != state]
            # A follower may miss the short wait between two versions, nothing else.
            assert [state for state in steps if state != pb.WAITING] == [pb.PUBLIC_OFFLINE, pb.SYNCING, pb.SERVING]
            assert versions == sorted(versions)

    run(body)


def test_a_stale_incarnation_is_refused_and_ends_its_process() -> None:
    async def body(world: World) -> None:
        await world.manager()
        old = await world.node("same")
        new = await world.node("same")
        await until(lambda: old.error is not None)
        assert isinstance(old.error, StaleIncarnation) and "must exit" in old.error.message
        await trio.sleep(LEASE_S)
        assert new.error is None and new.link.lease_valid()
        async with world.link() as link:
            for node_id, incarnation in ((99, 1), (new.link.node_id, new.link.incarnation + 1)):
                with pytest.raises(NotRegistered):
                    await link.call(HEARTBEAT, pb.HeartbeatRequest(node_id=node_id, incarnation=incarnation, sequence=1), timeout_s=1.0)

    run(body)


def test_a_node_declared_dead_must_register_again() -> None:
    async def body(world: World) -> None:
        await world.manager()
        async with world.link(role="storage", follow=False) as cut_off, world.link(role="meta", rejoin=True) as meta:
            await cut_off.register(role=pb.ROLE_STORAGE, node_uuid="u", addresses=["tcp://h:1"])
            await meta.register(role=pb.ROLE_META, node_uuid="m", addresses=["tcp://h:2"])
            await trio.sleep(LEASE_S * 1.6)
            assert not cut_off.lease_valid()
            meta.start_heartbeats()
            cut_off.start_heartbeats()
            with pytest.raises(LeaseExpired, match="must register again"):
                await cut_off.run()
            await until(meta.lease_valid)
            assert meta.incarnation == 2
            assert (await meta.refresh()).node(meta.node_id).alive

    run(body)


def test_registration_at_once_takes_the_earlier_run_out_of_service() -> None:
    async def body(world: World) -> None:
        await world.manager()
        nodes = await world.nodes(2)
        async with world.link() as link:
            await create(link, replicas=2, expected_nodes=2)
            nodes[0].kill()
            back = await world.node("uuid-0", own=nodes[0].own)
            routing = back.registered.routing
            mine = {target.target_id for target in back.registered.targets}
            public = [member.state for chain in routing.chains for member in chain.targets if member.target_id in mine]
            assert public and set(public) == {pb.PUBLIC_OFFLINE}
            await link.refresh()
            await until(lambda: all_serve(link))

    run(body)


def test_a_node_with_an_empty_disk_gets_its_targets_back_but_never_revives_a_chain() -> None:
    async def body(world: World) -> None:
        await world.manager()
        nodes = await world.nodes(2)
        async with world.link() as link:
            await create(link, replicas=2, expected_nodes=2)
            await until(lambda: len(nodes[0].own) == 4 and all(t.born for t in link.routing.targets))
            # One dies, then the other: that one was the last to serve. It comes back with an empty disk.
            nodes[0].kill()
            await until(lambda: not link.routing.node(nodes[0].link.node_id).alive)
            nodes[1].kill()
            await until(lambda: not link.routing.node(nodes[1].link.node_id).alive)
            blank = await world.node("new-uuid", node_id=nodes[1].link.node_id)
            assert blank.link.node_id == nodes[1].link.node_id
            assert {target.target_id for target in blank.registered.targets} == nodes[1].own
            await trio.sleep(LEASE_S)
            assert {state for chain in link.routing.chains for state in (m.state for m in chain.targets)} == {pb.LASTSRV, pb.PUBLIC_OFFLINE}
            assert all(target.blank for target in link.routing.targets_of_node(blank.link.node_id))
            # The one with data cannot revive it either: it missed writes.
            await world.node("uuid-0", own=nodes[0].own)
            await trio.sleep(LEASE_S)
            assert not any(link.routing.serving(chain.chain_id) for chain in link.routing.chains)

    run(body)


def test_a_blank_target_is_filled_by_its_predecessor() -> None:
    async def body(world: World) -> None:
        await world.manager()
        nodes = await world.nodes(2)
        async with world.link() as link:
            await create(link, replicas=2, expected_nodes=2)
            await until(lambda: len(nodes[1].own) == 4 and all(t.born for t in link.routing.targets))
            nodes[1].kill()
            back = await world.node("uuid-1")
            assert all(target.blank for target in back.registered.targets)
            await until(lambda: all_serve(link))
            assert not any(target.blank for target in link.routing.targets)

    run(body)


def test_a_node_cut_off_is_silent_before_it_is_declared_dead_and_must_register_again() -> None:
    async def body(world: World) -> None:
        await world.manager()
        nodes = await world.nodes(3)
        async with world.link() as link:
            await create(link, expected_nodes=3)
            await trio.sleep(LEASE_S)
            world.fabric.partition({nodes[1].host}, {"m1"})
            cut = trio.current_time()
            await until(lambda: not nodes[1].link.lease_valid())
            silent = trio.current_time()
            await until(lambda: not link.routing.node(nodes[1].link.node_id).alive)
            dead = trio.current_time()
            assert silent - cut <= LEASE_S / 2
            assert silent < dead - LEASE_S / 4, "it stopped serving well before others took its place"
            assert dead - cut <= LEASE_S * 1.2
            world.fabric.heal()
            await until(lambda: nodes[1].error is not None)
            assert isinstance(nodes[1].error, LeaseExpired)
            assert nodes[0].error is nodes[2].error is None

    run(body)


def test_a_short_cut_off_does_no_harm() -> None:
    async def body(world: World) -> None:
        await world.manager()
        nodes = await world.nodes(3)
        async with world.link() as link:
            await create(link, expected_nodes=3)
            await trio.sleep(LEASE_S)
            version = link.routing.version
            for _ in range(5):
                world.fabric.partition({nodes[1].host}, {"m1"})
                await trio.sleep(LEASE_S * 0.7)
                assert not nodes[1].link.lease_valid()
                world.fabric.heal()
                await until(nodes[1].link.lease_valid, within_s=LEASE_S / 2)
            assert all(node.error is None for node in nodes) and link.routing.version == version

    run(body)


def test_a_node_that_never_makes_its_targets_is_taken_out() -> None:
    async def body(world: World) -> None:
        await world.manager()
        nodes = await world.nodes(2)
        nodes[1].mute = True
        async with world.link() as link:
            chain_id = (await create(link, replicas=2, expected_nodes=2)).table.chain_ids[0]
            await trio.sleep(5.0)
            assert all_serve(link)
            await until(
                lambda: states(link, chain_id) == [(nodes[0].link.node_id, pb.SERVING), (nodes[1].link.node_id, pb.PUBLIC_OFFLINE)], within_s=15.0
            )
            nodes[1].mute = False
            await until(lambda: all_serve(link))

    run(body)


def test_an_uptodate_report_from_an_earlier_shape_of_the_chain_does_not_count() -> None:
    async def body(world: World) -> None:
        await world.manager()
        nodes = await world.nodes(2)
        async with world.link() as link:
            chain_id = (await create(link, replicas=2, expected_nodes=2)).table.chain_ids[0]
            await until(lambda: all(len(node.own) == 4 for node in nodes) and all_born(link))
            nodes[1].kill()
            back = await world.node("uuid-1", own=nodes[1].own, complete=False)
            await until(lambda: states(link, chain_id)[-1][1] == pb.SYNCING)
            back.complete, back.chain_versions_behind = True, 1
            await trio.sleep(LEASE_S * 2)
            assert states(link, chain_id)[-1][1] == pb.SYNCING
            back.chain_versions_behind = 0
            await until(lambda: all_serve(link))

    run(body)


@pytest.mark.parametrize("seed", range(3))
def test_random_faults_end_with_everyone_serving(seed: int) -> None:
    """Nodes die, come back, are cut off; the manager restarts: chains stay sound all the time, and all serve when it is over."""

    async def body(world: World) -> None:
        random = SeededRandom(seed)
        manager = await world.manager()
        nodes = await world.nodes(4)
        alive = {node.uuid: node for node in nodes}
        async with world.link() as link:
            await create(link, expected_nodes=4)
            await until(lambda: len(nodes[3].own) > 0 and all_born(link))
            unsound: list[str] = []
            link.on_routing(lambda routing: unsound.extend(p for c in routing.chains for p in problems(chain_from_wire(c))))
            own = {node.uuid: node.own for node in nodes}
            for _ in range(60):
                uuid = random.choice(sorted(own))
                match random.randrange(4):
                    case 0:
                        alive.pop(uuid).kill() if uuid in alive else None
                    case 1:
                        world.fabric.partition({f"host-{uuid}"}, {"m1"})
                    case 2:
                        world.fabric.heal()
                    case 3:
                        await manager.stop()
                        manager = await world.manager(listen=manager.address)
                await trio.sleep(random.uniform(0.0, 2.5))
                for uuid in [uuid for uuid, node in alive.items() if node.error is not None]:
                    del alive[uuid]
                for uuid in sorted(set(own) - set(alive)):
                    if random.randrange(2) and not world.fabric.parted(f"host-{uuid}", "m1"):
                        alive[uuid] = await world.node(uuid, own=own[uuid])
            world.fabric.heal()
            await trio.sleep(LEASE_S)
            for uuid in sorted(own):
                if uuid not in alive or alive[uuid].error is not None:
                    await world.node(uuid, own=own[uuid])
            await until(lambda: all_serve(link), within_s=20.0)
            assert unsound == []

    run(body)


def test_a_node_whose_disk_was_replaced_waits_for_its_own_death_and_is_filled() -> None:
    async def body(world: World) -> None:
        await world.manager()
        nodes = await world.nodes(2)
        async with world.link() as link:
            await create(link, replicas=2, expected_nodes=2)
            await until(lambda: all(len(node.own) == 4 for node in nodes) and all_born(link))
            nodes[1].kill()
            began = trio.current_time()
            new = await world.node("another-uuid", node_id=nodes[1].link.node_id)
            assert LEASE_S / 2 < trio.current_time() - began < LEASE_S * 1.5
            assert {target.target_id for target in new.registered.targets} == nodes[1].own
            await until(lambda: all_serve(link))
            assert len(list(link.routing.nodes)) == 3

    run(body)
