"""Draining targets and giving up chains: the decisions by themselves, against records that advance as the manager would move them."""

from __future__ import annotations

import random
from copy import deepcopy
from functools import cache

import pytest

from kvfs.common.boundary.random import SeededRandom
from kvfs.common.errors import InvalidArgument, KvfsError, NoServingTarget, NoSpace, NotEnoughTargets, StaleIncarnation
from kvfs.common.wire import cluster_pb2 as pb
from kvfs.meta.cluster import drains, losses, placing
from kvfs.meta.cluster.registry import Change, Records
from kvfs.meta.cluster.states import Chain, Local, Member, Public, advance, problems

S, L, O = Public.SERVING, Public.LASTSRV, Public.OFFLINE  # noqa: E741
GIB = 1 << 30


@cache
def table(nodes: int, replicas: int, disks: int) -> Change:
    """What makes the chains: the search takes a moment."""
    records = Records("c")
    for number in range(1, nodes + 1):
        places = [pb.DiskInfo(disk=disk) for disk in range(disks)]
        records.nodes[number] = pb.Node(node_id=number, role=pb.ROLE_STORAGE, alive=True, disks=places)
    change, _ = placing.plan(records, pb.CreateTargetsRequest(table_id=1, replicas=replicas, targets_per_disk=4), SeededRandom(1))
    return change


class Cluster:
    """Records, and nodes that do what they are told: those of `down` are silent."""

    def __init__(self, nodes: int, replicas: int, *, disks: int = 1) -> None:
        self.records = Records("c")
        for number in range(1, nodes + 1):
            self.add_node(number, disks)
        self.records.take(deepcopy(table(nodes, replicas, disks)))
        self.stays: set[int] = set()
        """Targets that are slow to leave though they were asked to."""
        self.down: set[int] = set()
        self.behind: set[int] = set()
        """Targets that are being filled and do not get to the end."""
        self.used = 0

    def add_node(self, number: int, disks: int = 1) -> None:
        self.records.nodes[number] = pb.Node(
            node_id=number,
            role=pb.ROLE_STORAGE,
            alive=True,
            incarnation=1,
            disks=[pb.DiskInfo(disk=disk, capacity_bytes=GIB, free_bytes=GIB // 2) for disk in range(disks)],
        )

    def reports(self) -> dict[int, pb.TargetReport]:
        return {
            target_id: pb.TargetReport(target_id=target_id, used_bytes=self.used, free_bytes=GIB // 2, capacity_bytes=GIB)
            for target_id, target in self.records.targets.items()
            if target.chain_id and target.node_id not in self.down
        }

    def local(self, member: Member) -> Local:
        target = self.records.targets[member.target_id]
        if target.node_id in self.down or (target.retiring and target.target_id not in self.stays) or (target.blank and member.state is L):
            return Local.OFFLINE
        done = member.state is S or (member.state is Public.SYNCING and member.target_id not in self.behind)
        return Local.UPTODATE if done else Local.ONLINE

    def scan(self) -> None:
        change = Change()
        for node in self.records.nodes.values():
            node.alive = node.node_id not in self.down
        for chain in self.records.chains.values():
            after = advance(chain, {member.target_id: self.local(member) for member in chain.members})
            if after is not chain:
                change.chains[chain.chain_id] = after
        drains.advance(self.records, self.reports(), change)
        self.take(change)

    def take(self, change: Change) -> None:
        for chain_id, after in change.chains.items():
            assert after.version == self.records.chains[chain_id].version + 1 if chain_id in self.records.chains else True
            assert not problems(after), problems(after)
        self.records.take(change)

    def drain(self, *targets: int, node: int = 0, cancel: bool = False) -> None:
        request = pb.DrainRequest(target_ids=targets, node_id=node, cancel=cancel)
        if cancel:
            self.take(drains.cancel(self.records, request, 7))
        else:
            self.take(drains.begin(self.records, self.reports(), request, 7))

    def settle(self) -> None:
        before = None
        while before != (before := [(chain.version, chain.members) for chain in self.records.chains.values()] + [str(self.records.drains)]):
            self.scan()

    def chain_of(self, target_id: int) -> Chain:
        return self.records.chains[self.records.targets[target_id].chain_id]

    def on_node(self, node: int) -> list[int]:
        return [target.target_id for target in self.records.targets_of_node(node) if target.chain_id]


def test_a_node_is_emptied_without_a_chain_losing_a_replica() -> None:
    cluster = Cluster(4, 3)
    before = len(cluster.on_node(2))
    cluster.drain(node=2)
    for _ in range(200):
        cluster.scan()
        assert all(len(chain.serving) >= 3 for chain in cluster.records.chains.values())
        filling = sum(bool(drain.replacement) and not drain.leaving for drain in cluster.records.drains.values())
        assert filling <= drains.SYNCING_MAX
    assert before and cluster.on_node(2) == []
    for chain in cluster.records.chains.values():
        nodes = [cluster.records.targets[target_id].node_id for target_id in chain.serving]
        assert len(chain.members) == 3 == len(set(nodes)) and 2 not in nodes
    assert all(drain.done for drain in cluster.records.drains.values())
    loads = [len(cluster.on_node(node)) for node in (1, 3, 4)]
    assert max(loads) - min(loads) <= 1, "balanced"
    with pytest.raises(NotEnoughTargets):
        cluster.drain(node=1)  # three are left for three replicas, and the emptied one stays empty ...
    cluster.drain(node=2, cancel=True)
    cluster.drain(node=1)  # ... until it is wanted again


def test_it_is_refused_when_there_is_no_place_to_go_to() -> None:
    cluster = Cluster(3, 3)
    with pytest.raises(NotEnoughTargets, match="start another storage service first"):
        cluster.drain(node=1)
    assert not cluster.records.drains
    cluster.add_node(4)
    cluster.used = GIB
    with pytest.raises(NoSpace, match="add a disk"):
        cluster.drain(node=1)
    cluster.used = 0
    cluster.drain(node=1)
    cluster.drain(node=1)  # the same again goes on with it
    cluster.settle()
    assert cluster.on_node(1) == []


def test_one_disk_of_a_node_moves_to_another_of_the_same_node() -> None:
    cluster = Cluster(2, 2, disks=2)
    moved = [target for target in cluster.on_node(1) if cluster.records.targets[target].disk == 1]
    cluster.drain(*moved)
    cluster.settle()
    assert {cluster.records.targets[target].disk for target in cluster.on_node(1)} == {0}
    assert all(len(chain.serving) == 2 for chain in cluster.records.chains.values())


def test_a_cancelled_drain_leaves_the_chain_as_it_was() -> None:
    for scans in range(12):
        cluster = Cluster(4, 3)
        before = {chain_id: set(chain.serving) for chain_id, chain in cluster.records.chains.items()}
        cluster.drain(node=1)
        for _ in range(scans):
            cluster.scan()
        moved = {drain.chain_id for drain in cluster.records.drains.values() if drain.done}
        cluster.drain(node=1, cancel=True)
        for _ in range(100):
            cluster.scan()
            assert all(len(chain.serving) >= 3 - (chain.chain_id not in moved) for chain in cluster.records.chains.values())
        assert not cluster.records.drains
        for chain_id, chain in cluster.records.chains.items():
            if chain_id not in moved:
                assert set(chain.serving) == before[chain_id] == {member.target_id for member in chain.members}, scans
        assert not any(target.retiring for target in cluster.records.targets.values() if target.chain_id)


def test_the_only_copy_moves_and_is_asked_back_when_its_replacement_dies() -> None:
    cluster = Cluster(2, 1)
    target = cluster.on_node(1)[0]
    chain_id = cluster.chain_of(target).chain_id
    cluster.drain(target)
    while not cluster.records.drains[target].leaving:
        cluster.scan()
    cluster.stays.add(target)
    cluster.down.add(2)  # before the target has left
    for _ in range(5):
        cluster.scan()
        chain = cluster.records.chains[chain_id]
        assert chain.serving or any(member.state is L for member in chain.members)
    assert cluster.records.chains[chain_id].serving == (target,) and not cluster.records.targets[target].retiring
    cluster.down.clear()
    cluster.stays.clear()
    cluster.settle()
    replacement = cluster.records.drains[target].replacement
    assert cluster.records.chains[chain_id].members == (Member(replacement, S),) and cluster.records.drains[target].done


def test_a_dead_target_is_replaced() -> None:
    cluster = Cluster(4, 3)
    cluster.down.add(1)
    cluster.settle()
    cluster.drain(node=1)
    cluster.settle()
    assert cluster.on_node(1) == [] and all(len(chain.serving) == 3 for chain in cluster.records.chains.values())


def test_nothing_is_ever_worse_for_a_drain_whatever_dies() -> None:
    """Random deaths, returns, cancels: every chain keeps a serving or last-serving target, and in the end is whole."""
    for seed in range(25):
        chance = random.Random(seed)
        cluster = Cluster(5, chance.choice((1, 2, 3)))
        for _ in range(60):
            event = chance.randrange(10)
            try:
                if event == 0:
                    cluster.drain(node=chance.randrange(1, 6), cancel=chance.random() < 0.4)
                elif event == 1 and len(cluster.down) < 2:
                    cluster.down.add(chance.randrange(1, 6))
                elif event == 2:
                    cluster.down.clear()
            except KvfsError:
                pass
            cluster.scan()
        cluster.down.clear()
        cluster.settle()
        replicas = {table.replicas for table in cluster.records.tables.values()}
        for chain in cluster.records.chains.values():
            assert {len(chain.serving)} == {len(chain.members)} == replicas, (seed, chain, cluster.records.drains)
            nodes = [cluster.records.targets[target_id].node_id for target_id in chain.serving]
            assert len(set(nodes)) == len(nodes)


def test_what_makes_no_sense_is_refused() -> None:
    cluster = Cluster(2, 1)
    target = cluster.on_node(1)[0]
    with pytest.raises(KvfsError, match="no target 5"):
        cluster.drain(5)
    with pytest.raises(KvfsError, match="no node 9"):
        cluster.drain(node=9)
    cluster.drain(target)
    cluster.scan()
    with pytest.raises(InvalidArgument, match="taking the place"):
        cluster.drain(cluster.records.drains[target].replacement)
    cluster.settle()
    cluster.drain(target, cancel=True)
    with pytest.raises(InvalidArgument, match="in no chain"):
        cluster.drain(target)


# --- losses ------------------------------------------------------------------------------------------------------------------------------


def test_a_target_withdraws_only_while_another_serves() -> None:
    cluster = Cluster(2, 2)
    first, second = cluster.records.chains[100001].serving

    def request(target: int, incarnation: int = 1) -> pb.WithdrawRequest:
        return pb.WithdrawRequest(target_id=target, node_id=cluster.records.targets[target].node_id, incarnation=incarnation)

    with pytest.raises(StaleIncarnation):
        losses.withdraw(cluster.records, request(first, 0))
    cluster.take(losses.withdraw(cluster.records, request(first)))
    assert cluster.records.targets[first].blank
    assert cluster.records.chains[100001].members == (Member(second, S), Member(first, O))
    cluster.take(losses.withdraw(cluster.records, request(first)))  # again changes nothing
    with pytest.raises(NoServingTarget):
        losses.withdraw(cluster.records, request(second))
    cluster.settle()
    assert cluster.records.chains[100001].serving == (second, first)


def test_a_lost_chain_goes_on_empty_once_it_is_accepted() -> None:
    cluster = Cluster(2, 2)
    chain = cluster.records.chains[100001]
    with pytest.raises(InvalidArgument, match="nothing is lost"):
        losses.accept(cluster.records, pb.AcceptLossRequest(chain_id=100001, chain_version=chain.version, lost_below=50))
    tail = chain.serving[1]
    other = chain.serving[0]
    cluster.down.add(cluster.records.targets[other].node_id)
    cluster.settle()
    cluster.records.targets[tail].blank = True
    cluster.records.chains[100001] = Chain(100001, 9, (Member(tail, L), Member(other, O)), loss=3, last_boot="b")
    cluster.down.clear()
    cluster.scan()
    lost = cluster.records.chains[100001]
    assert lost.serving == (), "what came back empty revives nothing, nor does what is behind"
    with pytest.raises(InvalidArgument, match="look again"):
        losses.accept(cluster.records, pb.AcceptLossRequest(chain_id=100001, chain_version=lost.version - 1, lost_below=50))
    cluster.take(losses.accept(cluster.records, pb.AcceptLossRequest(chain_id=100001, chain_version=lost.version, lost_below=50)))
    after = cluster.records.chains[100001]
    (fresh,) = after.serving
    assert fresh not in (tail, other) and cluster.records.targets[fresh].node_id == cluster.records.targets[tail].node_id
    assert after.lost_below == 50 and (after.loss, after.last_boot) == (4, ""), "nor is there what was acknowledged since"
    assert cluster.records.targets[tail].chain_id == 0
    cluster.settle()
    assert cluster.records.chains[100001].serving == (fresh, other) and cluster.records.chains[100001].lost_below == 50
