"""What registrations and chain tables change in the records, without a store."""

from __future__ import annotations

from typing import Any

import pytest

from kvfs.common.boundary.random import SeededRandom
from kvfs.common.errors import AlreadyExists, BadRequest, Busy, InvalidArgument, NotEnoughTargets
from kvfs.common.wire import cluster_pb2 as pb
from kvfs.meta.cluster import joining, placing, routing
from kvfs.meta.cluster.registry import Change, Records
from kvfs.meta.cluster.states import Public, problems


def request(uuid: str, *, role: pb.NodeRole = pb.ROLE_STORAGE, disks: int = 1, targets: tuple[int, ...] = (), **fields: Any) -> pb.RegisterRequest:
    infos = [pb.DiskInfo(disk=index, targets=targets if index == 0 else ()) for index in range(disks)]
    return pb.RegisterRequest(node_uuid=uuid, role=role, addresses=[f"tcp://{uuid}:1"], disks=infos, **fields)


def join(records: Records, **fields: Any) -> pb.Node:
    change, node = joining.plan(records, request(**fields))
    records.take(change)
    return node


def cluster(nodes: int, disks: int = 1) -> Records:
    records = Records("c")
    for index in range(nodes):
        join(records, uuid=f"u{index}", disks=disks)
    return records


def place(records: Records, **fields: Any) -> pb.CreateTargetsReply:
    change, reply = placing.plan(records, pb.CreateTargetsRequest(**{"table_id": 1, "replicas": 3, **fields}), SeededRandom(1))
    records.take(change)
    return reply


# --- registration


def test_ids_are_given_once_and_kept_with_the_uuid() -> None:
    records = cluster(3)
    assert sorted(records.nodes) == [1, 2, 3]
    again = join(records, uuid="u1", node_id=3)
    assert (again.node_id, again.incarnation) == (2, 2), "a known uuid gets its old id, whatever it asks for"
    assert join(records, uuid="m", role=pb.ROLE_META, disks=0).node_id == 4
    assert join(records, uuid="w", node_id=40).node_id == 40
    assert join(records, uuid="z").node_id == 5, "ids that others wish for by configuration are left to them"
    assert records.version == 7


def test_an_id_passes_on_only_when_its_node_is_dead() -> None:
    records = cluster(2)
    with pytest.raises(Busy, match="node id 2 belongs to a node that is alive"):
        join(records, uuid="new", node_id=2)
    records.nodes[2].alive = False
    with pytest.raises(InvalidArgument, match="role ROLE_STORAGE"):
        join(records, uuid="new", node_id=2, role=pb.ROLE_META)
    heir = join(records, uuid="new", node_id=2)
    assert (heir.node_id, heir.incarnation, heir.node_uuid) == (2, 2, "new")


@pytest.mark.parametrize(
    "bad",
    [
        {"uuid": ""},
        {"uuid": "x" * 101},
        {"uuid": "x", "role": pb.ROLE_MANAGER},
        {"uuid": "x", "role": pb.ROLE_UNKNOWN},
        {"uuid": "x", "disks": joining.MAX_DISKS + 1},
    ],
)
def test_malformed_registrations(bad: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        joining.plan(Records("c"), request(**bad))


def test_two_services_on_one_directory() -> None:
    records = cluster(1)
    with pytest.raises(InvalidArgument, match="two services share a data directory"):
        join(records, uuid="u0", role=pb.ROLE_META)


def test_targets_that_were_there_once_and_are_not_now_are_blank() -> None:
    records = cluster(3)
    place(records)
    mine = sorted(target.target_id for target in records.targets_of_node(1))
    assert len(mine) == 4
    join(records, uuid="u0")
    assert not any(target.blank for target in records.targets.values()), "never made, so nothing is lost"
    for target_id in mine[:3]:
        records.targets[target_id].born = True
    join(records, uuid="u0", targets=(mine[0],))
    assert [records.targets[target_id].blank for target_id in mine] == [False, True, True, False]
    join(records, uuid="u0", targets=tuple(mine))
    assert [records.targets[target_id].blank for target_id in mine] == [False, True, True, False], "made anew is still without the data"


# --- chain tables


def test_a_table_over_three_nodes() -> None:
    records = cluster(3)
    reply = place(records, description="main")
    table = records.tables[1]
    assert (table.replicas, len(table.chain_ids), table.description) == (3, 4, "main")
    assert (reply.best_pair_chains, reply.worst_pair_chains) == (4, 4)
    assert len(records.targets) == 12
    for chain_id in table.chain_ids:
        chain = records.chains[chain_id]
        assert chain.version == 1 and problems(chain) == []
        assert all(member.state is Public.SERVING and records.targets[member.target_id].chain_id == chain_id for member in chain.members)
        assert {records.targets[member.target_id].node_id for member in chain.members} == {1, 2, 3}
    assert placing.existing(records, pb.CreateTargetsRequest(table_id=1, replicas=3)) == reply
    assert placing.existing(records, pb.CreateTargetsRequest(table_id=1)) == reply
    assert placing.existing(records, pb.CreateTargetsRequest(table_id=2)) is None
    with pytest.raises(AlreadyExists):
        placing.existing(records, pb.CreateTargetsRequest(table_id=1, replicas=2))


def test_the_answer_is_the_same_after_chains_have_changed_their_order() -> None:
    records = cluster(6)
    reply = place(records)
    assert (len(reply.table.chain_ids), reply.best_pair_chains, reply.worst_pair_chains) == (10, 2, 2)
    for chain in list(records.chains.values()):
        records.take(Change(chains={chain.chain_id: type(chain)(chain.chain_id, chain.version + 1, chain.members[::-1])}))
    assert placing.existing(records, pb.CreateTargetsRequest(table_id=1, replicas=3)) == reply


def test_ids_are_never_used_twice_and_name_their_place() -> None:
    records = cluster(3, disks=2)
    place(records)
    before = set(records.targets)
    place(records, table_id=2, replicas=1, targets_per_disk=3)
    new = set(records.targets) - before
    assert len(new) == 18 and len(records.chains) == len(records.tables[1].chain_ids) + 18
    for target_id in records.targets:
        target = records.targets[target_id]
        assert (target_id // 1_000_000, target_id % 1_000_000 // 1000) == (target.node_id, target.disk)
    assert max(records.chains) < 1 << 32


def test_dead_nodes_and_nodes_without_disks_take_no_part() -> None:
    records = cluster(4)
    records.nodes[2].alive = False
    join(records, uuid="m", role=pb.ROLE_META, disks=0)
    join(records, uuid="s", disks=0)
    place(records)
    assert {target.node_id for target in records.targets.values()} == {1, 3, 4}


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"table_id": 0}, InvalidArgument),
        ({"table_id": placing.MAX_TABLE_ID + 1}, InvalidArgument),
        ({"replicas": 4}, NotEnoughTargets),
        ({"expected_nodes": 4}, NotEnoughTargets),
        ({"targets_per_disk": 65}, InvalidArgument),
        ({"replicas": 9}, InvalidArgument),
    ],
)
def test_tables_that_cannot_be(fields: dict[str, Any], error: type[Exception]) -> None:
    records = cluster(3)
    with pytest.raises(error):
        place(records, **fields)
    assert not records.tables and not records.targets


def test_routing_message() -> None:
    records = cluster(3)
    place(records)
    some = records.targets_of_node(1)[0].target_id
    report = pb.TargetReport(target_id=some, local_state=pb.UPTODATE, capacity_bytes=10, used_bytes=4, free_bytes=6)
    records.nodes[3].alive = False
    info = routing.build(records, {some: report})
    assert (info.version, info.cluster_id) == (records.version, "c")
    assert [node.node_id for node in info.nodes] == [1, 2, 3] and len(info.chains) == 4 and len(info.tables) == 1
    found = {target.target_id: target for target in info.targets}
    assert (found[some].local_state, found[some].capacity_bytes, found[some].public_state) == (pb.UPTODATE, 10, pb.SERVING)
    assert all(target.local_state == pb.LOCAL_OFFLINE for target in info.targets if target.node_id == 3)
    assert routing.targets_of_node(info, 2) == [target for target in info.targets if target.node_id == 2]
