"""Pure core: targets that lost their data, and chains whose last copy is gone.

Invariants: a target that lost data is taken out of service and marked blank in one change, and only while another replica serves: it is filled by
the others and can never revive the chain by itself. A chain goes on without its data only when no target of it serves, a person said so, and saw it
at the version that it has: then one new, empty target serves it, and from then on a chunk that is not there, of a file that was there before, is lost
and no hole (`Chain.lost_below`). Nothing of the old targets ever serves again: those that return are filled anew.
"""

from __future__ import annotations

from dataclasses import replace

from kvfs.common.errors import InvalidArgument, NoServingTarget, NotEnoughTargets, StaleIncarnation, UnknownChain, UnknownTarget
from kvfs.common.wire import cluster_pb2 as pb
from kvfs.meta.cluster.placing import new_target, open_places, place_of
from kvfs.meta.cluster.registry import Change, Records, changed
from kvfs.meta.cluster.states import Local, Member, Public, advance
from kvfs.meta.cluster.tables import choose


def withdraw(records: Records, request: pb.WithdrawRequest) -> Change:
    """NoServingTarget: no other replica could fill it."""
    target = records.targets.get(request.target_id)
    node = records.nodes.get(request.node_id)
    if target is None or node is None or target.node_id != request.node_id or target.chain_id not in records.chains:
        raise UnknownTarget(f"target {request.target_id} of node {request.node_id} is in no chain")
    if node.incarnation != request.incarnation:
        raise StaleIncarnation(f"node {node.node_id} runs as incarnation {node.incarnation}, not {request.incarnation}")
    chain = records.chains[target.chain_id]
    if not any(target_id != target.target_id for target_id in chain.serving):
        raise NoServingTarget(f"chain {chain.chain_id} has no other serving replica: target {target.target_id} keeps what it has")
    change = Change()
    after = advance(chain, {target.target_id: Local.OFFLINE})
    if after is not chain:
        change.chains[chain.chain_id] = after
    change.targets[target.target_id] = changed(target, blank=True)
    return change


def accept(records: Records, request: pb.AcceptLossRequest) -> Change:
    chain = records.chains.get(request.chain_id)
    if chain is None:
        raise UnknownChain(f"there is no chain {request.chain_id}: `kvfs admin list-chains` shows them")
    if chain.serving:
        raise InvalidArgument(f"chain {chain.chain_id} is served by target {chain.serving[0]}: nothing is lost")
    if chain.version != request.chain_version:
        raise InvalidArgument(f"chain {chain.chain_id} is at version {chain.version} now, not {request.chain_version}: look again")
    change = Change()
    # The place of the one that was last to serve is taken, on its own disk if that is alive (a new disk in the old one's place), else on another.
    gone = next(member.target_id for member in chain.members if member.state is Public.LASTSRV)
    others = [member for member in chain.members if member.target_id != gone]
    nodes = {place_of(records, member.target_id).node_id for member in others}
    candidates = [place for place in open_places(records) if place.node_id not in nodes]
    own = place_of(records, gone)
    if not candidates:
        raise NotEnoughTargets(f"chain {chain.chain_id} has no living disk to go on with: start a storage service first")
    chains = [[place_of(records, member.target_id) for member in other.members] for other in records.chains.values()]
    place = own if own in candidates else choose(chains, [place_of(records, member.target_id) for member in others], candidates)
    fresh = new_target(records, change, place, chain.chain_id)
    members = [Member(fresh.target_id, Public.SERVING), *(Member(member.target_id, Public.OFFLINE) for member in others)]
    after = chain.with_members(members)
    change.chains[chain.chain_id] = replace(after, lost_below=max(chain.lost_below, request.lost_below), loss=chain.loss + 1, last_boot="")
    change.targets[fresh.target_id] = fresh
    change.targets[gone] = changed(records.targets[gone], blank=True, chain_id=0)
    for member in others:
        change.targets[member.target_id] = changed(records.targets[member.target_id], blank=True)
    return change
