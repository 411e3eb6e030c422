"""Pure: new targets on every disk of every living storage node, and a chain table over them.

Invariants: a table is made once; asking for it again changes nothing. Target and chain ids are never used twice: target = node * 1,000,000 +
disk * 1,000 + n, chain = table * 100,000 + n, n from 1. A new chain starts with all its targets serving: it has no data that one could lack.
"""

from __future__ import annotations

from kvfs.common.boundary.random import Random
from kvfs.common.errors import AlreadyExists, InvalidArgument, NotEnoughTargets
from kvfs.common.ids import TARGETS_OF_NODE
from kvfs.common.wire import cluster_pb2 as pb
from kvfs.meta.cluster.registry import Change, Records
from kvfs.meta.cluster.states import Chain, Member, Public
from kvfs.meta.cluster.tables import Place, choose_targets_per_disk, generate, spread

TARGETS_OF_DISK = 1_000
CHAINS_OF_TABLE = 100_000
MAX_TABLE_ID = 40_000


def storage_nodes(records: Records) -> list[pb.Node]:
    """Alive, with a disk."""
    return [node for node in records.nodes.values() if node.role == pb.ROLE_STORAGE and node.alive and node.disks]


def existing(records: Records, request: pb.CreateTargetsRequest) -> pb.CreateTargetsReply | None:
    """The answer if the table is there already."""
    table = records.tables.get(request.table_id)
    if table is None:
        return None
    if request.replicas and request.replicas != table.replicas:
        raise AlreadyExists(
            f"chain table {request.table_id} exists with {table.replicas} replicas; {request.replicas} were asked for: use another table id"
        )
    return _reply(records, table)


def plan(records: Records, request: pb.CreateTargetsRequest, random: Random) -> tuple[Change, pb.CreateTargetsReply]:
    if not 1 <= request.table_id <= MAX_TABLE_ID:
        raise InvalidArgument(f"chain table id {request.table_id}: 1 to {MAX_TABLE_ID}")
    nodes = storage_nodes(records)
    if len(nodes) < request.expected_nodes:
        raise NotEnoughTargets(f"{len(nodes)} storage nodes are alive, {request.expected_nodes} were expected: start the others, or expect fewer")
    places = open_places(records)
    replicas = request.replicas or 1
    per_disk = request.targets_per_disk or choose_targets_per_disk(max(1, len(places)), replicas)
    layout = generate(places, replicas=replicas, targets_per_disk=per_disk, random=random)
    change = Change()
    next_of = {place: _first_free(records, place) for place in places}
    table = pb.ChainTable(table_id=request.table_id, version=1, replicas=replicas, description=request.description)
    for number, chain_places in enumerate(layout.chains, start=1):
        chain_id = request.table_id * CHAINS_OF_TABLE + number
        members = []
        for place in chain_places:
            target_id = _target_id(place, next_of[place])
            if next_of[place] >= TARGETS_OF_DISK:
                raise _no_ids(place)
            next_of[place] += 1
            change.targets[target_id] = pb.Target(target_id=target_id, node_id=place.node_id, disk=place.disk, chain_id=chain_id)
            members.append(Member(target_id, Public.SERVING))
        change.chains[chain_id] = Chain(chain_id, 1, tuple(members))
        table.chain_ids.append(chain_id)
    change.tables[table.table_id] = table
    return change, pb.CreateTargetsReply(table=table, best_pair_chains=layout.best_pair, worst_pair_chains=layout.worst_pair)


def _first_free(records: Records, place: Place, change: Change | None = None) -> int:
    """The number of the next target on a disk; `change`: with those that it makes."""
    made = change.targets.values() if change is not None else ()
    targets = [*records.targets_of_node(place.node_id), *(target for target in made if target.node_id == place.node_id)]
    return max((target.target_id % TARGETS_OF_DISK for target in targets if target.disk == place.disk), default=0) + 1


def new_target(records: Records, change: Change, place: Place, chain_id: int) -> pb.Target:
    """One more target on a disk, in a chain."""
    number = _first_free(records, place, change)
    if number >= TARGETS_OF_DISK:
        raise _no_ids(place)
    return pb.Target(target_id=_target_id(place, number), node_id=place.node_id, disk=place.disk, chain_id=chain_id)


def _target_id(place: Place, number: int) -> int:
    return place.node_id * TARGETS_OF_NODE + place.disk * TARGETS_OF_DISK + number


def _no_ids(place: Place) -> InvalidArgument:
    return InvalidArgument(f"disk {place.disk} of node {place.node_id} has no target ids left (it can have {TARGETS_OF_DISK - 1})")


def place_of(records: Records, target_id: int) -> Place:
    target = records.targets[target_id]
    return Place(target.node_id, target.disk)


def disks_leaving(records: Records) -> set[Place]:
    """Disks and whole nodes that are being emptied, or were: nothing new is placed there."""
    leaving = set()
    for drain in records.drains.values():
        target = records.targets[drain.target_id]
        node = records.nodes.get(target.node_id)
        if not drain.cancelled:
            leaving.add(Place(target.node_id, target.disk))
            if drain.whole_node and node is not None:
                leaving.update(Place(node.node_id, disk.disk) for disk in node.disks)
    return leaving


def open_places(records: Records) -> list[Place]:
    """Disks of living nodes on which something may be placed."""
    leaving = disks_leaving(records)
    places = [Place(node.node_id, disk.disk) for node in storage_nodes(records) for disk in node.disks]
    return [place for place in places if place not in leaving]


def _reply(records: Records, table: pb.ChainTable) -> pb.CreateTargetsReply:
    chains = [[place_of(records, member.target_id) for member in records.chains[chain_id].members] for chain_id in table.chain_ids]
    least, most = spread(chains, [disk for chain in chains for disk in chain])
    return pb.CreateTargetsReply(table=table, best_pair_chains=least, worst_pair_chains=most)
